"""APE: a language model infers the instruction from demonstrations; the best of many is kept.

Paper:   Zhou et al., "Large Language Models Are Human-Level Prompt Engineers", ICLR 2023. arXiv:2211.01910
Notes:   seeds/ape.md
Departs: candidates are compared on the same rows; the threshold of adaptive filtering is the median
         (successive halving); the seed instruction stays in the race; the winner is confirmed on rows
         no search step has seen; proposals are cleaned and de-duplicated, and those that copy
         training text are left out; demonstrations are drawn so that labels are spread; tasks run at
         the model's own temperature, not at 0.7. Chat models don't infill: the reverse prompt shows the
         blank and asks for what belongs there. The mode `labels` is ours: it shows one label's inputs
         at a time and asks what they have in common.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from string import Template
from typing import Any, ClassVar, Final, Literal

import dspy

from preceptor.checks import is_plain
from preceptor.errors import ConfigError
from preceptor.leaks import Guard
from preceptor.lm.adapter import choices, is_direct
from preceptor.lm.seam import predictors
from preceptor.scoring import likelihood, racing
from preceptor.scoring.known import Known
from preceptor.scoring.metrics import mean
from preceptor.scoring.texts import folded, text_of
from preceptor.scoring.trial import Candidate, Trial
from preceptor.task import Sampling, Task
from preceptor.teleprompter import Estimate, Teleprompter, check_least, check_sampling
from preceptor.teleprompters.induction import FORWARD, clean, demonstrations
from preceptor.teleprompters.reading import cut

logger = logging.getLogger(__name__)

REVERSE: Final = Template("""\
The instruction was lost from this text; its place is marked ____.

Instruction: ____

$demos

Write the instruction that belongs in the blank. Write the instruction only.""")
"""Ours: infilling as a chat model can do it; the blank stands before the pairs, as in the paper."""

LABELS: Final = Template("""\
These inputs all belong to the same category:

$demos

What do they have in common? Name the kind of input in at most ten words, in general terms. Write only that.""")
"""Ours: small models describe one label better than they guess a whole instruction (seeds/ape.md)."""

RESAMPLE: Final = Template("""\
Generate a variation of the following instruction while keeping the semantic meaning.

Input: $instruction

Output:""")
"""The paper's own template for resampling."""

TEMPLATES: Final[Mapping[str, Template]] = {"forward": FORWARD, "reverse": REVERSE, "labels": LABELS}


@dataclass(frozen=True, kw_only=True)
class APE(Teleprompter):
    """Automatic prompt engineer.

    Asks `proposer` for `candidates` instructions, each from `demos` demonstrations, and races them with
    the seed on the train rows. Costs `candidates` proposer calls (as many for each label in mode `labels`) and the
    race's task calls (`racing.cost`), per predictor; fewer candidates are drawn if the budget can't pay for a race of
    all. A round of resampling costs up to 4 proposer calls and a race of 8 or 9.

    Args:
        candidates: Proposals, at least 1 (50 in the paper).
        demos: Demonstrations per proposal, at least 1 (5 in the paper); in mode `labels` so many of each label.
        subsamples: Draws of demonstrations; each is asked for its share of the proposals (5 in the published code).
        mode: `forward`, `reverse` (infilling), `labels` (ours: a description of every label, each asked for
            by itself, added to the seed instruction; for programs that pick a label; one call per label and
            candidate), or a template of the user's with `$demos` in it.
        score: `accuracy`, the metric on the model's answers; or `likelihood`, log P of the label, for
            models in this process (both in the paper).
        resample_rounds: Rounds of variations of the best candidates (the paper's iterative Monte-Carlo
            search, which it found to gain little after 3 rounds).
        temperature: Of the proposer (0.9 in the published code).
        top_p: Of the proposer (0.9 in the published code).
        max_tokens: Of a proposal (50 in the published code, which cuts instructions off).

    Raises:
        ConfigError: If a number is out of range, or a template lacks `$demos`.
    """

    paper: ClassVar[str] = "arXiv:2211.01910"
    formula: ClassVar[str] = "candidates (x labels in mode labels) + race(candidates + 1, rows)"

    candidates: int = 50
    demos: int = 5
    subsamples: int = 5
    mode: Literal["forward", "reverse", "labels"] | str = "forward"
    score: Literal["accuracy", "likelihood"] = "accuracy"
    resample_rounds: int = 0
    temperature: float = 0.9
    top_p: float = 0.9
    max_tokens: int = 200

    def __post_init__(self) -> None:
        Teleprompter.__post_init__(self)
        check_least(self, {"candidates": 1, "demos": 1, "subsamples": 1, "resample_rounds": 0, "max_tokens": 1})
        check_sampling(self)
        if self.score not in ("accuracy", "likelihood"):
            raise ConfigError(f"APE scores by accuracy or likelihood, not by {self.score!r}.")
        if self.mode not in TEMPLATES and "$demos" not in self.mode:
            raise ConfigError(f"APE's mode is {', '.join(TEMPLATES)}, or a template with $demos where the pairs go.")

    def check_program(self, student: dspy.Module, output: str) -> None:
        """Raise if the settings are for other programs."""
        signatures = {name: predictor.signature for name, predictor in predictors(student)}
        if self.score == "likelihood":
            likelihood.refuse_program(signatures)
        if self.mode == "labels" and not (len(signatures) == 1 and all(map(_picks, signatures.values()))):
            raise ConfigError("APE's mode labels needs a program of one predictor that picks a label (Classify).")

    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        """Return the calls of all predictors' searches; the least is a race of one candidate with the seed.

        A program of one predictor whose rows lack its fields takes a call a row more: it is watched first.
        """
        predictors = len(signatures)
        watching = rows * predictors if predictors > 1 else 0
        each = None if calls is None else max(0, (calls - watching) // predictors)
        count = max(1, self._count(rows, signatures, each, predictors))
        return Estimate(
            least=watching + predictors * self._cost(1, rows, signatures, predictors),
            expected=watching + predictors * self._with_resampling(count, rows, signatures, each),
        )

    def search(self, task: Task) -> Sequence[Trial]:
        """Improve the predictors' instructions one after the other; return the trials, best first."""
        if self.score == "likelihood":
            task.refuse_likelihood()
        best, rows = task.seed, list(task.order)
        pairs = demonstrations(task, rows, self.demos)
        known, account = Known(task.score_each, task.metric.aggregate), task.meter.account
        before = account.spent.calls
        if self.score == "accuracy" and not task.rates and not is_plain(task.student):
            known.score([best], rows[: racing.plan(1, len(rows))[0].stop])  # its code may ask a predictor several times
        paid = account.spent.calls - before  # of the first race
        trials: Sequence[Trial] = []
        names = [name for name in task.signatures if pairs[name]]
        for at, name in enumerate(names):
            left = account.calls_left
            calls = None if left is None else (left + (0 if at else paid)) // (len(names) - at)
            trials = self._improve(task, name, best, pairs[name], rows, calls, task.score if at else known.score)
            best = trials[0].candidate
        return trials

    def _improve(
        self,
        task: Task,
        name: str,
        seed: Candidate,
        pairs: list[str],
        rows: list[int],
        calls: int | None,
        score: racing.Score,
    ) -> Sequence[Trial]:
        """Propose, score, keep the best; then, if asked to, resample around them (Algorithm 1)."""
        count = max(1, self._count(len(rows), task.signatures, calls, task.calls_a_row))
        unspent = task.meter.account.calls_left or 0
        others = 0 if calls is None else max(0, unspent - calls)  # the other predictors' share
        texts = self._proposals(task, name, seed, rows, pairs, count)
        trials = self._race(task, [seed, *_distinct(task, seed, name, texts)], rows, score)
        for _ in range(self.resample_rounds):
            kept = [trial.candidate for trial in trials[: racing.FINALISTS]]
            pool = {one.key: one for one in [seed, *kept]}
            left = task.meter.account.calls_left
            scores = None if left is None else int((left - others - len(kept)) // task.calls_a_row)
            room = racing.affordable(len(pool) + len(kept), len(rows), scores) - len(pool)
            if room <= 0:
                break
            prompts = [RESAMPLE.substitute(instruction=one.instructions[name]) for one in kept[:room]]
            variations = task.draw(prompts, self._sampling)
            for one, text in zip(kept[:room], variations, strict=True):
                pool |= {made.key: made for made in _distinct(task, one, name, [clean(text or "")], "variation")}
            trials = self._race(task, list(pool.values()), rows, task.score)
        return trials

    def _race(self, task: Task, candidates: list[Candidate], rows: list[int], score: racing.Score) -> list[Trial]:
        by_likelihood = self.score == "likelihood"
        aggregate = mean if by_likelihood else task.metric.aggregate
        return racing.race(candidates, task.likelihood if by_likelihood else score, rows, aggregate)

    def _proposals(
        self, task: Task, name: str, seed: Candidate, rows: list[int], pairs: list[str], count: int
    ) -> list[str]:
        """Return `count` instructions, drawn evenly from `subsamples` draws of demonstrations."""
        draws = min(self.subsamples, count)
        shares = [count // draws + (at < count % draws) for at in range(draws)]
        if self.mode == "labels":
            lists = [text for share in shares for text in self._descriptions(task, rows, share)]
            return [f"{seed.instructions[name]}\n{text}" for text in lists]
        template = TEMPLATES.get(self.mode) or Template(self.mode)
        prompts = [template.safe_substitute(demos="\n\n".join(self._draw(task, pairs))) for _ in shares]
        return [clean(text) for text in self._asked(task, prompts, shares)]

    def _asked(self, task: Task, prompts: Sequence[str], shares: Sequence[int]) -> list[str]:
        """Ask each prompt as often as its share says, prompt by prompt; all of a kind at once."""
        texts: list[str] = []
        for share, group in groupby(zip(prompts, shares, strict=True), key=lambda pair: pair[1]):
            texts += task.propose([prompt for prompt, _ in group], self._sampling, samples=share)
        return texts

    def _draw(self, task: Task, pairs: list[str]) -> list[str]:
        """Draw demonstrations: a random stretch of the stratified order, so that labels are spread, shuffled."""
        start = task.rng.randrange(len(pairs))
        drawn = [pairs[(start + step) % len(pairs)] for step in range(min(self.demos, len(pairs)))]
        task.rng.shuffle(drawn)
        return drawn

    def _descriptions(self, task: Task, rows: list[int], share: int) -> list[str]:
        """Ask what each label's inputs have in common, `share` times a label; return as many lists of labels."""
        [signature] = task.signatures.values()
        labels, guard = choices(signature), Guard.of(task.train, task.signatures)
        columns: list[list[str]] = []
        for label in labels:
            members = [row for row in rows if folded(text_of(task.train[row], task.output)) == folded(label)]
            if not members:
                continue
            drawn = task.rng.sample(members, min(len(members), self.demos))
            inputs = [
                " ".join(
                    cut(str(task.train[row][field]))
                    for field in signature.input_fields
                    if task.train[row].get(field) is not None
                )
                for row in drawn
            ]
            prompt = LABELS.substitute(demos="\n".join(f"- {text}" for text in inputs))
            texts = task.propose([prompt], self._sampling, samples=share)
            described = guard.originals(line for text in texts for line in clean(text).splitlines()[:1] if line)
            columns.append([f"{label}: {text}" for text in described])
        return [
            "\n".join(lines) for lines in zip(*columns, strict=False)
        ]  # what failed, is empty or a copy costs a list

    def _count(self, rows: int, signatures: Mapping[str, Any], calls: int | None, calls_a_row: float) -> int:
        """Return how many candidates can be drawn and raced."""
        if calls is None:
            return self.candidates
        counts = range(self.candidates, 0, -1)
        return next((count for count in counts if self._cost(count, rows, signatures, calls_a_row) <= calls), 0)

    def _cost(self, candidates: int, rows: int, signatures: Mapping[str, Any], calls_a_row: float) -> int:
        """Return the calls of drawing and racing so many candidates for one predictor."""
        [signature, *_] = signatures.values()
        asked = len(choices(signature)) if self.mode == "labels" and is_direct(signature) else 1
        return candidates * asked + math.ceil(calls_a_row * racing.cost(candidates + 1, rows))

    def _with_resampling(self, candidates: int, rows: int, signatures: Mapping[str, Any], calls: int | None) -> int:
        """Return the calls of one predictor's search, variations included; no more than it may spend."""
        kept, predictors = min(racing.FINALISTS, candidates + 1), len(signatures)
        again = self.resample_rounds * (kept + predictors * racing.cost(2 * kept, rows))
        first = self._cost(candidates, rows, signatures, predictors)
        return first + again if calls is None else max(first, min(first + again, calls))

    @property
    def _sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.max_tokens)


def _picks(signature: Any) -> bool:
    return is_direct(signature) and bool(choices(signature))


def _distinct(task: Task, seed: Candidate, name: str, texts: Sequence[str], how: str = "proposal") -> list[Candidate]:
    """Return one candidate per new text, in the order they came; copies of training text are left out."""
    fresh = [text for text in dict.fromkeys(texts) if text and text != seed.instructions[name]]
    made = [seed.with_instruction(name, text) for text in Guard.of(task.train, task.signatures).originals(fresh)]
    for one in made:
        task.made(one, seed, name, how)
    return made
