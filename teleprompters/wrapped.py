"""GEPA, MIPROv2 and COPRO: DSPy's own optimizers, searching as DSPy wrote them, under this package's contract.

Paper:   Agrawal et al., "GEPA: Reflective Prompt Evolution Can Outperform Reinforcement Learning", 2025.
         arXiv:2507.19457
         Opsahl-Ong et al., "Optimizing Instructions and Demonstrations for Multi-Stage Language Model
         Programs", EMNLP 2024. arXiv:2406.11695
         Khattab et al., "DSPy: Compiling Declarative Language Model Calls into Self-Improving Pipelines",
         2023, whose optimizers COPRO belongs to. arXiv:2310.03714
Notes:   the search is the code of dspy/teleprompt; what stands between it and a compile is in `watched`.
Departs: the winner is confirmed on rows the optimizer never saw; the budget counts every call and ends the
         search at once; a failed call counts as the seed's mean score, not as a wrong answer, and too many
         end the search; a repeated question is answered from memory, but to a proposer that samples it is
         a new draw; a proposer's answer without DSPy's field markers is taken whole; an instruction that
         copies a training input is worth 0; GEPA is told the right label, and none of the answers'
         log-probabilities; MIPROv2 sets no demonstrations, and is shown no more of the source of `Classify` and
         `Generate` than of DSPy's own `Predict`: none; GEPA and MIPROv2 read one half of the train rows
         and judge by the other (in DSPy GEPA does both on all, MIPROv2 reads one row in five); of those
         judged on all these rows, the best by the metric over the set is confirmed, at a tie DSPy's choice.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, cast

import dspy

from preceptor.errors import ConfigError
from preceptor.lm.meter import batching_engine
from preceptor.scoring.trial import Trial
from preceptor.task import Task
from preceptor.teleprompter import Estimate, Teleprompter, check_least, check_sampling
from preceptor.teleprompters.asking import Json
from preceptor.teleprompters.watched import Watch

Auto = Literal["light", "medium", "heavy"]

CANDIDATES: Final[Mapping[str, int]] = {"light": 6, "medium": 12, "heavy": 18}
"""Instructions GEPA and MIPROv2 aim for, as in DSPy."""

JUDGED: Final[Mapping[str, int]] = {"light": 100, "medium": 300, "heavy": 1000}
"""Rows MIPROv2 judges candidates by, at most, as in DSPy."""

_LIGHT: Final[Auto] = "light"
_ENDLESS: Final = 10
"""Row scores that GEPA is told it may take for each call that is left: repeated ones cost none."""
_MINIBATCH, _FEW_ROWS, _FULL_EVERY = 35, 50, 5  # MIPROv2's, as in DSPy
_REFLECTED = 3  # rows a GEPA proposal is made from and tried on first, as in DSPy


@dataclass(frozen=True, kw_only=True)
class _Wrapped(Teleprompter):
    """A search by one of DSPy's optimizers.

    The seed is scored first, on the rows the optimizer will judge candidates by.
    """

    is_alone: ClassVar[bool] = True

    def search(self, task: Task) -> Sequence[Trial]:
        """Run the optimizer; return its candidates' trials, best first."""
        what, rows = f"{type(self).__name__} scores rows", len(task.order)
        watch = Watch.begin(task, self._judged(rows), lambda done: task.report(what, done, 0))
        threads = 1 if batching_engine(task.lm) is not None else task.threads
        chosen = watch.run(lambda: self._optimized(watch, threads))
        trials = [watch.seed, *watch.trials()]
        if watch.error is not None:
            raise watch.error
        key = watch.candidate(chosen).key if chosen is not None else ""
        return sorted(trials, key=lambda trial: (-len(trial.rows), -trial.score, trial.candidate.key != key))

    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        """Return the calls until a first candidate is judged, and those of the whole search."""
        least, whole = self._least(len(signatures), rows), self._expected(len(signatures), rows)
        return Estimate(least, max(least, whole if calls is None else min(whole, calls)))

    def _judged(self, rows: int) -> int:
        """Return how many train rows candidates are judged by; the proposer is shown the others."""
        return rows // 2

    def _least(self, predictors: int, rows: int) -> int:
        raise NotImplementedError

    def _expected(self, predictors: int, rows: int) -> int:
        raise NotImplementedError

    def _optimized(self, watch: Watch, threads: int) -> dspy.Module:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class GEPA(_Wrapped):
    """Reflective prompt evolution: the proposer reads answers and feedback, the best for each row evolve on.

    Candidates are judged on half of the train rows; proposals are made from the other half, three at a time.
    It takes what the budget of calls leaves it. Without one, or with `auto`, it costs as many row scores as
    DSPy sets for `auto` (it stops between candidates, and repeated ones cost nothing), times the predictors,
    and one proposer call per proposal. Feedback is the metric's own where it takes five arguments and returns
    some, else the score and the right label.

    Rows are scored `threads` at a time, and equal seeds give equal programs at any number of them. A model
    in this process answers them in batches. Scores over the whole set, such as F1, reach
    GEPA as the mean of the rows'.

    Args:
        auto: How long the search is: one of DSPy's sizes; None for as long as the budget of calls lasts, and
            `light` if there is none.
        temperature: Of the proposer (1.0 in DSPy's documentation; DSPy itself sets none).

    Raises:
        ConfigError: If a setting is out of range.
    """

    paper: ClassVar[str] = "arXiv:2507.19457"
    formula: ClassVar[str] = "the budget of calls, or DSPy's for auto + proposals"

    auto: Auto | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        Teleprompter.__post_init__(self)
        _check(self, self.auto or _LIGHT)

    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        """Return the calls until a first candidate is judged, and those of the whole search."""
        found = _Wrapped.estimate(self, signatures, rows, calls)
        return found if calls is None or self.auto else Estimate(found.least, max(found.least, calls))

    def _optimized(self, watch: Watch, threads: int) -> dspy.Module:
        from dspy.teleprompt.gepa import InstructionProposer

        left = None if self.auto else watch.calls_left
        optimizer = dspy.GEPA(
            watch.criticize,
            auto=(self.auto or _LIGHT) if left is None else None,
            max_metric_calls=None if left is None else _ENDLESS * left,
            reflection_lm=watch.proposer.copy(temperature=self.temperature),
            instruction_proposer=InstructionProposer(adapter=Json()),
            num_threads=threads,
            warn_on_score_mismatch=False,
            seed=self.seed,
        )
        return optimizer.compile(watch.student, trainset=watch.shown, valset=watch.judged)

    def _least(self, predictors: int, rows: int) -> int:
        return predictors * (2 * self._judged(rows) + 2 * _REFLECTED) + 1

    def _expected(self, predictors: int, rows: int) -> int:
        judged, optimizer = self._judged(rows), cast("Any", dspy.GEPA)
        scores: int = optimizer.auto_budget(None, predictors, CANDIDATES[self.auto or _LIGHT], judged)
        proposals = (scores - judged) // (2 * _REFLECTED + judged // 3)  # one in three is taken to look better
        return predictors * scores + proposals


@dataclass(frozen=True, kw_only=True)
class MIPROv2(_Wrapped):
    """Instructions written from summaries of the data and the program; a Bayesian search picks among them.

    Sets instructions only. Candidates are judged on half of the train rows, with `auto="light"` on at most
    100; the others are shown to the proposer. Costs a few rows run for demonstrations to show it, three
    proposer calls per instruction, and per trial one scoring of the judged rows, or of 35 of them where
    there are more than 50; repeated ones cost nothing.

    Rows are scored `threads` at a time, and equal seeds give equal programs at any number of them. A model
    in this process answers them in batches. Scores over the whole set, such as F1, reach
    MIPROv2 as the mean of the rows'.

    Args:
        auto: How many instructions, trials and rows (`light` in DSPy).
        temperature: Of the proposer (1.0 in DSPy).

    Raises:
        ConfigError: If a setting is out of range.
    """

    paper: ClassVar[str] = "arXiv:2406.11695"
    formula: ClassVar[str] = "rows/2 + proposals + trials * rows/2"

    auto: Auto = _LIGHT
    temperature: float = 1.0

    def __post_init__(self) -> None:
        Teleprompter.__post_init__(self)
        _check(self, self.auto)

    def _optimized(self, watch: Watch, threads: int) -> dspy.Module:
        import optuna

        optimizer = dspy.MIPROv2(
            watch.score,
            prompt_model=watch.proposer,
            task_model=watch.lm,
            max_bootstrapped_demos=0,
            max_labeled_demos=0,
            auto=self.auto,
            init_temperature=self.temperature,
            num_threads=threads,
            seed=self.seed,
            track_stats=False,
        )
        verbosity = optuna.logging.get_verbosity()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optimizer.compile(watch.student, trainset=watch.shown, valset=watch.judged)
        finally:
            optuna.logging.set_verbosity(verbosity)

    def _judged(self, rows: int) -> int:
        return min(rows // 2, JUDGED[self.auto])

    def _least(self, predictors: int, rows: int) -> int:
        judged = self._judged(rows)
        scores = judged + self._bootstrapped(rows) + self._tried(judged)
        return predictors * scores + self._asked(predictors, rows)

    def _expected(self, predictors: int, rows: int) -> int:
        judged, instructions = self._judged(rows), CANDIDATES[self.auto]
        trials = int(max(2 * predictors * math.log2(instructions), 1.5 * instructions))
        programs: int = instructions**predictors
        # each trial draws a program and rows; what was scored before costs nothing
        seen = judged * (1 - (1 - self._tried(judged) / judged / programs) ** trials)
        whole = -(-trials // _FULL_EVERY) * (judged - self._tried(judged))
        scores = judged + self._bootstrapped(rows) + round((programs - 1) * seen) + whole
        return predictors * scores + self._asked(predictors, rows)

    def _tried(self, judged: int) -> int:
        """Return the rows of a trial."""
        return _MINIBATCH if judged > _FEW_ROWS else judged

    def _bootstrapped(self, rows: int) -> int:
        """Return the rows run to find demonstrations: about two a set, half of those tried being right."""
        shown, sets = rows - self._judged(rows), CANDIDATES[self.auto] - 1
        return round(shown * (1 - (1 - min(1.0, 4 / shown)) ** sets))

    def _asked(self, predictors: int, rows: int) -> int:
        """Return the proposer's calls: a summary of the data in batches of 10 rows, then three per instruction."""
        shown = rows - self._judged(rows)
        return 2 + min(9, (shown - 1) // 10) + 3 * CANDIDATES[self.auto] * predictors


@dataclass(frozen=True, kw_only=True)
class COPRO(_Wrapped):
    """Coordinate ascent: the proposer rewrites one predictor's instruction after the other, shown earlier scores.

    Every candidate is judged on all train rows. Costs `depth * breadth` proposer calls and as many
    scorings of all rows, per predictor; with several predictors, earlier candidates are scored again at
    each depth.

    Rows are scored `threads` at a time, and equal seeds give equal programs at any number of them. A model
    in this process answers them in batches. Scores over the whole set, such as F1, reach
    COPRO as the mean of the rows'.

    Args:
        breadth: Candidates at each depth, at least 2 (10 in DSPy).
        depth: Rounds of proposals, at least 1 (3 in DSPy).
        temperature: Of the proposer (1.4 in DSPy).

    Raises:
        ConfigError: If a number is out of range.
    """

    paper: ClassVar[str] = "arXiv:2310.03714"
    formula: ClassVar[str] = "depth * breadth * (rows + 1) - 1"

    breadth: int = 10
    depth: int = 3
    temperature: float = 1.4

    def __post_init__(self) -> None:
        Teleprompter.__post_init__(self)
        check_sampling(self)
        check_least(self, {"breadth": 2, "depth": 1})

    def _optimized(self, watch: Watch, threads: int) -> dspy.Module:
        optimizer = dspy.COPRO(
            prompt_model=watch.proposer,
            metric=watch.score,
            breadth=self.breadth,
            depth=self.depth,
            init_temperature=self.temperature,
        )
        return optimizer.compile(watch.student, trainset=watch.judged, eval_kwargs={"num_threads": threads})

    def _judged(self, rows: int) -> int:
        return rows

    def _least(self, predictors: int, rows: int) -> int:
        return predictors * (2 * rows + self.breadth - 1)

    def _expected(self, predictors: int, rows: int) -> int:
        rounds = self.depth if predictors == 1 else self.depth * (self.depth + 1) // 2
        programs = 1 + predictors * (self.breadth * rounds - 1)
        return predictors * (programs * rows + self.depth * self.breadth - 1)


def _check(method: _Wrapped, auto: str) -> None:
    if auto not in CANDIDATES:
        raise ConfigError(f"{type(method).__name__} needs auto to be {', '.join(CANDIDATES)}, got {auto!r}.")
    check_sampling(method)
