"""What the papers claim, and what runs of `preceptor bench papers` say of it.

The lines are those of the tables "Claimed, and measured by us" in `seeds/`. The papers don't say what their "%" is
of; points are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final, Literal

from preceptor.benchmarks.compared import (
    HUMAN,
    PEERS,
    Measured,
    Run,
    f1_over,
    gaps_of,
    interval,
    mean_of_tasks,
    measured,
    mixed,
    scored,
    settled,
)
from preceptor.benchmarks.tasks import find

Verdict = Literal["reproduced", "not reproduced", "undecided", "not testable here"]
Differences = Callable[[Sequence[Run]], list[float]]

OTHERS: Final = ("ape", "protegi", "instruct_zero", *PEERS)
ITS_EXPERTS: Final = "constitutional_experts:few_shot=0"
"""ConstitutionalExperts as its paper has it, without demonstrations."""

ON_SIMULATED_MODELS: Final = "measured on simulated models only: preceptor bench "
NO_DATA: Final = "its data is not here: "
ITS_PROPOSER: Final = "its figures are of a 13B proposer, WizardLM or Vicuna"


@dataclass(frozen=True, slots=True)
class Claim:
    """A headline claim of a paper.

    Attributes:
        paper: Which.
        says: In words.
        figure: Its number, in points of [0, 1]; None of a claim that something is so every time.
        differences: Returns a difference per task, of those there are runs for; positive if the claim's side is
            ahead.
        times: How many differences it takes to say that something is so every time; chance does six once in 64.
        is_strict: True if a difference of zero speaks against it.
    """

    paper: str
    says: str
    figure: float | None
    differences: Differences
    times: int = 0
    is_strict: bool = True


@dataclass(frozen=True, slots=True)
class Untested:
    """A claim that no runs are compared with, and why."""

    paper: str
    says: str
    verdict: Verdict
    why: str


def verdict(claim: Claim, gaps: Sequence[float]) -> tuple[Verdict, str]:
    """Return what is to be said of a claim, and why.

    A figure is reproduced if the whole interval of the mean is above zero and doesn't end below the figure; not
    reproduced if the interval ends below it. Equal differences have no interval, and decide nothing. What is said of
    every time isn't if it is once otherwise.
    """
    if not gaps:
        return "undecided", "no runs of it yet"
    if claim.figure is None:
        behind = sum(gap < 0 or (claim.is_strict and gap == 0) for gap in gaps)
        so = f"so in {len(gaps) - behind} of {len(gaps)}"
        if behind:
            return "not reproduced", so
        return ("reproduced", so) if len(gaps) >= claim.times else ("undecided", f"{so}; it takes {claim.times}")
    low, high = interval(gaps)
    if math.isnan(low):
        equal = "equal differences tell nothing of their spread"
        return "undecided", equal if len(gaps) > 1 else "one task decides nothing"
    if high < claim.figure:
        return "not reproduced", "the interval ends below the figure"
    return ("reproduced", "the interval is above 0") if low > 0 else ("undecided", "the interval holds 0")


def checked(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a line for each claim: the paper's figure, ours, and what is to be said of it."""
    lines: list[dict[str, Any]] = []
    for claim in CLAIMS:
        line: dict[str, Any] = {"paper": claim.paper, "claim": claim.says, "figure": None}
        if isinstance(claim, Untested):
            ours, said = None, (claim.verdict, claim.why)
        else:
            gaps = claim.differences(runs)
            ours, said = measured(gaps), verdict(claim, gaps)
            line["figure"] = claim.figure
        lines.append(line | _told(ours) | dict(zip(("verdict", "why"), said, strict=True)))
    return lines


def _told(ours: Measured | None) -> dict[str, Any]:
    names = {"ours": "value", "low": "low", "high": "high", "tasks": "tasks"}
    return {name: None if ours is None else getattr(ours, field) for name, field in names.items()}


def _against(one: str, other: str, is_meant: Callable[[str], bool] = lambda task: True) -> Differences:
    return lambda runs: gaps_of(scored(run for run in runs if is_meant(run["task"])), one, other)


def _over_seed(method: str, tasks: Sequence[str]) -> Differences:
    def gains(runs: Sequence[Run]) -> list[float]:
        meant = (run for run in runs if run["method"] == method and run["task"] in tasks)
        return [settled(fmean(gains.values())) for gains in scored(meant, "gain").values()]

    return gains


def _by_mixture(runs: Sequence[Run]) -> list[float]:
    return [settled(fmean(gaps.values())) for gaps in mixed(runs, "compiled_f1").values()]


def _is_induction(task: str) -> bool:
    return find(task).human is not None


def _is_protegis(task: str) -> bool:
    return task in ("ethos", "liar")


APE, PROTEGI, IZ, CE = "APE", "ProTeGi", "InstructZero", "ConstitutionalExperts"

CLAIMS: Final[Sequence[Claim | Untested]] = (
    Claim(
        APE,
        "as good as a person's instruction: .810 against .749 on 24 tasks",
        0.061,
        _against("ape", HUMAN, _is_induction),
    ),
    Claim(
        APE, "at a person's level or above on 24 of 24 tasks", None, _against("ape", HUMAN, _is_induction), 24, False
    ),
    Untested(
        APE,
        "accuracy selects better than log-probability, on 19 tasks against 14",
        "undecided",
        "not run: APE with the likelihood score on 24 tasks",
    ),
    Untested(
        APE,
        "with demonstrations as good or better on 21 of 24 tasks",
        "undecided",
        "not run: APE with few_shot on 24 tasks",
    ),
    Untested(
        APE,
        "what is searched with demonstrations fails without",
        "undecided",
        "not run: APE with few_shot on 24 tasks",
    ),
    Untested(APE, "as good as a person's on 17 of 21 BIG-bench tasks", "not testable here", NO_DATA + "BIG-bench"),
    Untested(APE, "82.0 on MultiArith", "not testable here", NO_DATA + "MultiArith; text-davinci-002 is withdrawn"),
    Untested(
        APE, "43.0 on GSM8K against 40.7", "not testable here", "text-davinci-002, whose figures they are, is withdrawn"
    ),
    Untested(
        APE,
        "TruthfulQA, .37-.44 true and informative",
        "not testable here",
        NO_DATA + "TruthfulQA and its judge models",
    ),
    Untested(
        APE, "resampling gains little after 3 rounds", "undecided", "not run: APE with resample_rounds on 24 tasks"
    ),
    Untested(
        APE, "the search exploits the metric on rhymes", "undecided", "not counted: needs a look at the texts it chose"
    ),
    Claim(PROTEGI, "15.3 % above the first prompt on 4 data sets", 0.153, _over_seed("protegi", ("ethos", "liar"))),
    Claim(PROTEGI, "3.9 % above Monte-Carlo search as in APE", 0.039, _against("protegi", "ape")),
    Claim(
        PROTEGI,
        "1 to 2 points above it on Ethos and Liar",
        0.01,
        _against("protegi", "ape", _is_protegis),
    ),
    Untested(
        PROTEGI,
        "8.2 % above reinforcement learning, 15.2 % above AutoGPT",
        "not testable here",
        "neither is here to run",
    ),
    Untested(
        PROTEGI,
        "beam over greedy over none on Jailbreak, Liar, Sarcasm",
        "not testable here",
        "two of the three data sets were never released",
    ),
    Untested(
        PROTEGI,
        "UCB and UCB-E pick better than uniform at 50 rows a prompt",
        "undecided",
        ON_SIMULATED_MODELS + "bandits",
    ),
    Untested(
        PROTEGI,
        "the proposer matters, on Sarcasm and Jailbreak",
        "not testable here",
        "the data sets were never released, and the proposers are behind an API",
    ),
    Claim(IZ, "better than APE on 32 of 32 tasks", None, _against("instruct_zero", "ape", _is_induction), 24),
    Untested(IZ, "soft prompts beat a manual meta-prompt and exemplars alone", "not testable here", ITS_PROPOSER),
    Untested(IZ, "best validation score .65, .8, 1.0 over three iterations", "not testable here", ITS_PROPOSER),
    Untested(IZ, "average .719 over 32 tasks", "not testable here", f"{ITS_PROPOSER}; 8 of the tasks are not here"),
    Untested(
        IZ, "rank 4.80 on 20 tasks, APE 4.25", "not testable here", "the other methods ranked are not here to run"
    ),
    Claim(CE, "10.9 % F1 above other optimizers", 0.109, lambda runs: f1_over(runs, OTHERS, ITS_EXPERTS)),
    Claim(CE, "a mixture improves all methods", None, _by_mixture, 6),
    Claim(
        CE,
        "the mixture adds 2.0 % F1 to all methods",
        0.02,
        lambda runs: mean_of_tasks(mixed(runs, "compiled_f1")),
    ),
    Untested(CE, "editing principles beats rewriting prompts", "undecided", ON_SIMULATED_MODELS + "principles"),
)
