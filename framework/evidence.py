"""Evidence: what a compile measured, in the words and numbers that are reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from preceptor.lm.budget import Cost
from preceptor.scoring.statistics import Comparison

_OWN_TYPES: Final = {
    *("comparison", "baseline_ci", "compiled_ci", "spent", "billed", "lost"),
    *("regions", "principles", "unpriced"),
}
"""Fields of which JSON holds something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The result of a compile, from rows no search step has seen.

    Attributes:
        method: Name of the method.
        metric: Name of the metric; scores and gains are in [0, 1].
        comparison: The best candidate against the seed on the confirmation rows.
        baseline_ci: 95 % interval of the seed's score.
        compiled_ci: 95 % interval of the returned program's score.
        replaced: True if the user's instructions were replaced.
        has_candidate: False if the search found nothing better than the seed; demonstrations make another of it.
        train_rows: Rows the search could see.
        smallest_gain: Smallest true gain the confirmation rows confirm four times in five.
        search_score: The winner's score in the search: it was selected for being high, so it is no estimate.
        seed_search_score: The user's instructions' score in the search, None if they had no part in it.
        instructions: Of the returned program.
        seed_instructions: Of the user's.
        spent: Calls, tokens and dollars, replayed answers included.
        billed: What was paid in this process.
        seconds: Wall-clock time of this process.
        seed: Of the compile.
        lm: The task's model.
        proposer: The proposer's model.
        stopped: Why the search stopped early, "" if it didn't.
        run: The run folder.
        program: The artifact.
        demos: Demonstrations the method put below the instructions; they are part of the gain.
        copied: What the search's best candidate copies from a training input, "" if nothing; it was left out.
        lost: Failed attempts (`calls`), and the most they may have cost.
        regions: What became of each region of a mixture of experts; texts and numbers by name.
        principles: Of the returned program's constitutions, with what each is worth; texts and numbers by name.
        unparsable: Confirmation rows on which the returned program's answer couldn't be read.
        own_metric: True if the metric is a function of the user's, whatever it is called.
        unpriced: Models whose price isn't known; the dollars are without what they cost.
        later: What a search that went on with a larger budget came to, where it confirmed nothing: the program that was
            confirmed before is returned.
    """

    method: str
    metric: str
    comparison: Comparison
    baseline_ci: tuple[float, float]
    compiled_ci: tuple[float, float]
    replaced: bool
    has_candidate: bool
    train_rows: int
    smallest_gain: float
    search_score: float | None
    instructions: dict[str, str]
    seed_instructions: dict[str, str]
    spent: Cost
    billed: Cost
    seconds: float
    seed: int
    lm: str
    proposer: str
    stopped: str
    run: str
    program: str
    demos: int = 0
    copied: str = ""
    lost: Cost = field(default_factory=Cost)
    seed_search_score: float | None = None
    regions: tuple[Mapping[str, Any], ...] = ()
    principles: tuple[Mapping[str, Any], ...] = ()
    unparsable: int = 0
    own_metric: bool = False
    unpriced: tuple[str, ...] = ()
    later: str = ""

    @classmethod
    def told(cls, told: Mapping[str, Any]) -> Evidence:
        """Return what `as_dict` was written from."""
        names = {each.name for each in dataclasses.fields(cls)}
        low, high = told["ci"]
        after = told["baseline"] + told["tested_gain"]
        return cls(
            **{name: value for name, value in told.items() if name in names - _OWN_TYPES},
            comparison=Comparison(
                told["baseline"],
                after,
                told["tested_gain"],
                low,
                high,
                told["p_value"],
                told["rows"],
                told["test"],
                told.get("repeated_rows", 0),
                told.get("look", 1),
            ),
            baseline_ci=(told["baseline_ci"][0], told["baseline_ci"][1]),
            compiled_ci=(told["compiled_ci"][0], told["compiled_ci"][1]),
            spent=Cost(told["calls"], told["tokens"], told["dollars"]),
            billed=Cost(told["billed_calls"], told["billed_tokens"], told["billed_dollars"]),
            lost=Cost(told["failed_attempts"], told["lost_tokens"], told["lost_dollars"]),
            regions=tuple(told.get("regions", ())),
            principles=tuple(told.get("principles", ())),
            unpriced=tuple(told.get("unpriced", ())),
        )

    @property
    def baseline(self) -> float:
        """Score of the user's instructions on the confirmation rows."""
        return self.comparison.before

    @property
    def compiled(self) -> float:
        """Score of the returned program on the same rows."""
        return self.comparison.after if self.replaced else self.comparison.before

    @property
    def gain(self) -> float:
        """What is claimed: compiled - baseline, 0 if the user's instructions were kept."""
        return self.compiled - self.baseline

    @property
    def verdict(self) -> str:
        """The result in a sentence, and another one if a candidate was left out."""
        left_out = f" The search's best candidate was left out: it copies training text, {self.copied[:80]!r}."
        first = self._result + self._unread + self._again + self._mixed + (left_out if self.copied else "")
        return f"{first} A search that went on from there confirmed nothing else: {self.later}" if self.later else first

    @property
    def _mixed(self) -> str:
        if len(self.regions) == 1:
            return " The inputs fall into one region: one prompt answers all of them."
        experts = sum(region["expert"] == "its own" for region in self.regions)
        return f" {experts} of {len(self.regions)} regions have an expert of their own." if self.regions else ""

    @property
    def _unread(self) -> str:
        return f" {self.unparsable} of its answers on these rows couldn't be read." if self.unparsable else ""

    @property
    def _again(self) -> str:
        c = self.comparison
        return f" This is look {c.look} at these rows: p has to be below {c.level:.2g}." if c.look > 1 else ""

    @property
    def _result(self) -> str:
        c = self.comparison
        alike = f" of {c.rows - c.repeated} different inputs" if c.repeated else ""
        difference = f"{100 * c.gain:+.1f} points, 95 % interval {100 * c.low:+.1f} to {100 * c.high:+.1f}"
        if self.replaced:
            return (
                f"Replaced: {self.metric} {c.before:.3f} -> {c.after:.3f} "
                f"on {c.rows} rows{alike} no search step has seen "
                f"({difference}, p = {c.p_value:.2g}, {c.test})."
            )
        if not self.has_candidate:
            search = "the search, which was stopped early," if self.stopped else "the search"
            tried = sum("p_value" in region for region in self.regions)
            experts = f", and no expert of the {tried} found was confirmed in its region" if tried else ""
            return (
                f"Kept: {search} found nothing better than your instructions{experts} ({self.metric} {c.before:.3f})."
            )
        return (
            f"Kept: no significant improvement on {c.rows} untouched rows{alike}. The best candidate differs by "
            f"{difference}, p = {c.p_value:.2g}; so many rows can confirm {100 * self.smallest_gain:.0f} or more."
        )

    def stable(self) -> dict[str, Any]:
        """Return what is equal in every run of the same compile; it goes into the artifact."""
        c = self.comparison
        return {
            "method": self.method,
            "metric": self.metric,
            "baseline": self.baseline,
            "baseline_ci": list(self.baseline_ci),
            "compiled": self.compiled,
            "compiled_ci": list(self.compiled_ci),
            "gain": self.gain,
            "tested_gain": c.gain,
            "ci": [c.low, c.high] if self.has_candidate else [0.0, 0.0],
            "p_value": c.p_value,
            "test": c.test,
            "replaced": self.replaced,
            "has_candidate": self.has_candidate,
            "rows": c.rows,
            "train_rows": self.train_rows,
            "smallest_gain": self.smallest_gain,
            "search_score": self.search_score,
            "seed_search_score": self.seed_search_score,
            "calls": self.spent.calls,
            "tokens": self.spent.tokens,
            "dollars": self.spent.dollars,
            "seed": self.seed,
            "lm": self.lm,
            "proposer": self.proposer,
            "instructions": self.instructions,
            "seed_instructions": self.seed_instructions,
            "demos": self.demos,
            "copied": self.copied,
            "verdict": self.verdict,
            **({"own_metric": True} if self.own_metric else {}),
            **({"unpriced": list(self.unpriced)} if self.unpriced else {}),
            **({"look": c.look} if c.look > 1 else {}),
            **({"repeated_rows": c.repeated} if c.repeated else {}),
            **({"unparsable": self.unparsable} if self.unparsable else {}),
            **({"regions": [dict(region) for region in self.regions]} if self.regions else {}),
            **({"principles": [dict(principle) for principle in self.principles]} if self.principles else {}),
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `compile --json` prints."""
        return {
            **self.stable(),
            "billed_calls": self.billed.calls,
            "billed_tokens": self.billed.tokens,
            "billed_dollars": self.billed.dollars,
            "failed_attempts": self.lost.calls,
            "lost_tokens": self.lost.tokens,
            "lost_dollars": self.lost.dollars,
            "seconds": round(self.seconds, 1),
            "stopped": self.stopped,
            "run": self.run,
            "program": self.program,
            **({"later": self.later} if self.later else {}),
        }
