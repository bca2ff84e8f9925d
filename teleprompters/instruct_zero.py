"""InstructZero: a box of numbers is searched; an open model turns each point into an instruction.

Paper:   Chen et al., "InstructZero: Efficient Instruction Optimization for Black-Box Large Language Models",
         2023. arXiv:2306.03082
Notes:   seeds/instructzero.md
Departs: the best few and the seed are scored on all train rows before one is chosen, and the choice is confirmed on
         rows no search step has seen; the projection is fitted to the length of the model's own embeddings; the soft
         tokens stand before the demonstrations, inside the chat template, and the question is APE's; the search
         starts in the whole box it may end in; all instructions are scored on the same rows; one that was met
         before is not scored again and is no further observation; copies of training text are not scored; tasks
         run at the model's own temperature. The sampler's departures: coupled.py.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from preceptor.errors import ConfigError
from preceptor.leaks import Guard
from preceptor.lm.soft import EmbeddingSpace, SoftTokens
from preceptor.scoring.known import Known
from preceptor.scoring.trial import Candidate, Trial
from preceptor.task import Sampling, Task
from preceptor.teleprompter import Estimate, Teleprompter, check_least
from preceptor.teleprompters.induction import FORWARD, clean, demonstrations

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import BaseSampler

logger = logging.getLogger(__name__)

INSTRUCTION: Final = "instruction"
"""User attribute of a trial in the search's study."""


@dataclass(frozen=True, kw_only=True)
class InstructZero(Teleprompter):
    """Bayesian optimization of a soft prompt.

    Tries `start + iterations * batch` points. Each costs a call of `proposer`, a model in this process, and its
    instruction, if it is new, `rows` task calls; then the best `finalists` and the seed are scored on the other
    train rows. All of it per predictor. A smaller budget gives at most a third of its calls to the finalists, one
    or none if it must be, and the rest to as many points as it pays for: a third of them to start with, the others in
    as many iterations, each of a smaller batch; what instructions that come twice save, to further points.

    The run's study `InstructZero <predictor>` has a trial for each point, and says how many instructions were
    distinct and how many were left out: empty ones, and copies of training text.

    Args:
        dimensions: Of the box [-1, 1]^d that is searched (10 in the paper).
        soft_tokens: Embeddings a point is turned into (the best of 3, 5 and 10 in the paper, 5 in its code).
        exemplars: Demonstrations below them, the same for all points unless redrawn (5 in the paper, 10 in its code).
        redraw: Show each point exemplars of its own, drawn by its coordinates, from the train rows that the search
            doesn't score on, where there are 26 or more, else from all (ours; a small model hardly heeds soft tokens,
            seeds/instructzero.md).
        rows: Train rows an instruction is scored on, all of them where there are fewer (20 in the paper).
        start: Points drawn before the surrogate is asked, uniformly (25 in the published code).
        batch: Points per iteration (25 in the paper).
        iterations: After the start, at least 0 (5 in the paper).
        finalists: Instructions that are scored on all train rows beside the seed; 0 takes the best on `rows`, as
            the paper does (ours; seeds/instructzero.md has what it gains).
        sampler: A sampler class of Optuna, or a `functools.partial` of one, called with `seed=`; by default
            `CoupledSampler`, the paper's.
        max_tokens: Of an instruction (128 in the published code).

    Raises:
        ConfigError: If a number is out of range, or the sampler is an object, or has no name that lasts.
    """

    paper: ClassVar[str] = "arXiv:2306.03082"
    formula: ClassVar[str] = (
        "points + rows * (distinct points + 1) + (train - rows) * (finalists + 1); points = start + iterations * batch"
    )
    needs: ClassVar[str] = "a proposer in this process (local/<id>); any chat model for the task"

    dimensions: int = 10
    soft_tokens: int = 5
    exemplars: int = 5
    redraw: bool = False
    rows: int = 20
    start: int = 25
    batch: int = 25
    iterations: int = 5
    finalists: int = 4
    sampler: Callable[..., BaseSampler] | None = None
    max_tokens: int = 128

    @property
    def is_soft(self) -> bool:
        """True: the proposer reads soft tokens."""
        return True

    def __post_init__(self) -> None:
        Teleprompter.__post_init__(self)
        positive = ("dimensions", "soft_tokens", "exemplars", "rows", "start", "batch", "max_tokens")
        check_least(self, {**dict.fromkeys(positive, 1), "iterations": 0, "finalists": 0})
        if self.sampler is not None and not callable(self.sampler):
            raise ConfigError(
                f"InstructZero makes its sampler anew for each search: pass the class {type(self.sampler).__name__}, "
                "or functools.partial(...) of it, not an object."
            )
        if " at 0x" in str(self.sampler):
            raise ConfigError(
                f"InstructZero couldn't tell a run with the sampler {self.sampler} from others when it is resumed: its "
                "name is another one in each process. Pass a class, or functools.partial(...) of one with plain values."
            )

    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        """Return the calls of all predictors' searches if no instruction comes twice; the least is one point each.

        A program of one predictor whose rows lack its fields takes a call more for each exemplar: it is watched first.
        """
        predictors = len(signatures)
        watching = self._watching(rows, predictors)
        each = None if calls is None else max(0, (calls - watching) // predictors)
        plans, known = list[Plan](), 0
        for _ in range(predictors):
            plans.append(Plan.of(self, rows, predictors, each, known))
            known = rows if plans[-1].finalists else min(self.rows, rows)
        return Estimate(
            least=watching + predictors * Plan.least(self, rows, predictors),
            expected=watching + sum(plan.cost for plan in plans),
        )

    def search(self, task: Task) -> Sequence[Trial]:
        """Improve the predictors' instructions one after the other; return the trials, best first."""
        space, names, known = task.embedding_space, list(task.signatures), Known(task.score_each, task.metric.aggregate)
        plan = self._plan(task, len(names), self._watching(len(task.order), len(names)))
        trials: Sequence[Trial] = known.score([task.seed], task.order[: self.rows])
        pairs = demonstrations(task, self._shown(task.order), self.exemplars)
        names = [name for name in names if pairs[name]]
        for at, name in enumerate(names):
            seed = trials[0].candidate
            if at or task.calls_a_row > len(task.signatures):  # a row takes more than could be told before
                plan = self._plan(task, len(names) - at, known=len(known.whole(seed).rows))
            trials = self._improve(task, name, seed, pairs[name], space, plan, known)
        return trials

    def _plan(self, task: Task, searches: int, other: int = 0, known: int = 0) -> Plan:
        """Return the plan of the next of so many searches, which share what the budget has left but for `other`."""
        left = task.meter.account.calls_left
        calls = None if left is None else max(0, (left - other) // searches)
        return Plan.of(self, len(task.order), task.calls_a_row, calls, known)

    def _watching(self, rows: int, predictors: int) -> int:
        """Return the calls of seeing what each predictor is given and answers on the exemplars."""
        return len(self._shown(range(rows))) * predictors if predictors > 1 else 0

    def _shown(self, order: Sequence[int]) -> Sequence[int]:
        """Return the train rows that exemplars are taken from: none that scores, if there are enough others."""
        spare = order[self.rows :] if len(order) - self.rows > self.exemplars else order
        return spare if self.redraw else order[-self.exemplars :]

    def _prompt(self, pairs: Sequence[str], point: Sequence[float]) -> str:
        """Return the question below a point's soft tokens."""
        count = min(self.exemplars, len(pairs))
        shown = random.Random(repr(list(point))).sample(pairs, count) if self.redraw else pairs
        return FORWARD.substitute(demos="\n\n".join(shown))

    def _improve(
        self,
        task: Task,
        name: str,
        seed: Candidate,
        pairs: Sequence[str],
        space: EmbeddingSpace,
        plan: Plan,
        known: Known,
    ) -> Sequence[Trial]:
        """Ask the sampler for points, turn them into instructions, score these, tell the sampler (Algorithm 1)."""
        rows = task.order[: self.rows]
        projection = Projection.drawn(self.soft_tokens, self.dimensions, space, task.rng.getrandbits(32))
        box = _Box(task, name, seed, self._sampler(task.rng.getrandbits(32)), self.dimensions)
        for size in plan.sizes(box.counts):
            points = box.ask(size)
            prompts = [(projection.of(point), self._prompt(pairs, point)) for point in points]
            texts = task.propose_from(prompts, self._sampling)
            candidates = box.candidates([clean(text) for text in texts])
            box.tell(known.score([one for one in candidates if one is not None], rows))
        box.conclude()
        ranked = sorted(known.score([seed, *box.found], rows), key=lambda trial: -trial.score)
        best = [trial.candidate for trial in ranked if trial.candidate.key != seed.key][: plan.finalists]
        if not best:
            return ranked
        final = sorted(known.score([seed, *best], task.order), key=lambda trial: -trial.score)
        keys = {trial.candidate.key for trial in final}
        return [*final, *(trial for trial in ranked if trial.candidate.key not in keys)]

    def _sampler(self, seed: int) -> BaseSampler:
        from preceptor.teleprompters.coupled import CoupledSampler  # Optuna, which importing methods doesn't wait for

        return (self.sampler or CoupledSampler)(seed=seed)

    @property
    def _sampling(self) -> Sampling:
        return Sampling(temperature=0.0, max_tokens=self.max_tokens)


@dataclass(frozen=True, slots=True)
class Plan:
    """How many points a search tries, and how many instructions it scores again.

    Attributes:
        batches: Points of the start and of each iteration.
        finalists: Scored on all train rows beside the seed.
        cost: Calls, if all instructions are distinct.
        scoring: Task calls of a new instruction.
        most: Points, by the settings.
    """

    batches: tuple[int, ...]
    finalists: int
    cost: int
    scoring: int
    most: int

    def sizes(self, counts: Callable[[], tuple[int, int]]) -> Iterator[int]:
        """Give the number of points to try next, until there are enough or no more can be paid for.

        Args:
            counts: Returns how many points were tried, and how many instructions they came to: one that comes twice
                is scored once, and what that saves pays for further points.
        """
        yield from self.batches
        paid = sum(self.batches) * (1 + self.scoring)
        while True:
            points, found = counts()
            affordable = (paid - points - found * self.scoring) // (1 + self.scoring)
            size = min(affordable, self.most - points, max(self.batches))
            if size < 1:
                return
            yield size

    @classmethod
    def of(cls, method: InstructZero, train: int, calls_a_row: float, calls: int | None, known: int = 0) -> Plan:
        """Return what so many calls pay for, at least one point.

        Args:
            method: The settings.
            train: Train rows.
            calls_a_row: Of the program, one a predictor at least.
            calls: To spend on one predictor; None if unbounded.
            known: Train rows on which the seed's scores are known: those of an instruction, or all.
        """
        rows = min(method.rows, train)
        further, scoring = math.ceil((train - rows) * calls_a_row), math.ceil(rows * calls_a_row)
        point, again = 1 + scoring, int(known < train)  # again: the seed
        seed = math.ceil(max(0, rows - known) * calls_a_row)
        wanted = most = method.start + method.iterations * method.batch
        finalists = method.finalists if further else 0
        if calls is not None:
            finalists = max(0, min(finalists, (calls // 3) // further - again)) if further else 0
            if seed + point + further * (finalists + again) > calls:
                finalists = 0
            fixed = seed + (further * (finalists + again) if finalists else 0)
            wanted = max(1, min(wanted, (calls - fixed) // point))
        finalists = min(finalists, wanted)
        cost = seed + wanted * point + (further * (finalists + again) if finalists else 0)
        return cls(_batches(method, wanted), finalists, cost, scoring, most)

    @classmethod
    def least(cls, method: InstructZero, train: int, predictors: int) -> int:
        """Return the calls each predictor's search takes for one point, and its share of scoring the seed."""
        rows = min(method.rows, train)
        return 1 + rows * predictors + rows


def _batches(method: InstructZero, points: int) -> tuple[int, ...]:
    """Return how many points to try at a time.

    Example:
        >>> _batches(InstructZero(metric="accuracy"), 150)
        (25, 25, 25, 25, 25, 25)
        >>> _batches(InstructZero(metric="accuracy"), 20)
        (6, 3, 3, 3, 3, 2)
    """
    if points == method.start + method.iterations * method.batch:
        return (method.start, *[method.batch] * method.iterations)
    start = min(method.start, max(1, points // 3)) if method.iterations else points
    left, rounds = points - start, max(1, method.iterations)
    shares = [left // rounds + (at < left % rounds) for at in range(rounds)]
    return (start, *(share for share in shares if share))


@dataclass(frozen=True, slots=True)
class Projection:
    """The random matrix that turns a point into soft tokens.

    Attributes:
        matrix: Shape (tokens, width, dimensions).
    """

    matrix: npt.NDArray[np.float64]

    @classmethod
    def drawn(cls, tokens: int, dimensions: int, space: EmbeddingSpace, seed: int) -> Projection:
        """Draw a matrix, Uniform(-1, 1) but for its scale: a uniform point's tokens are as long as the model's own."""
        matrix = np.random.default_rng(seed).uniform(-1, 1, (tokens, space.width, dimensions))
        return cls(matrix * 3 * space.norm / (space.width * dimensions) ** 0.5)  # entries and points vary by 1/3 each

    def of(self, point: Sequence[float]) -> SoftTokens:
        """Return the soft tokens of a point, to four digits: more than a model's own have."""
        return [[float(f"{value:.4g}") for value in token] for token in self.matrix @ np.asarray(point)]


class _Box:
    """The search for one predictor's instruction, as an Optuna study of the run.

    A point whose instruction another point or the seed has had enters it once: further ones are told as failed,
    which samplers leave out, but with their scores.
    """

    def __init__(self, task: Task, name: str, seed: Candidate, sampler: BaseSampler, dimensions: int) -> None:
        from optuna.distributions import FloatDistribution

        self._task, self._name, self._seed = task, name, seed
        self._box: dict[str, Any] = {f"z{at}": FloatDistribution(-1, 1) for at in range(dimensions)}
        self._study = task.run.studies.search(f"InstructZero {name}", sampler)
        self._guard = Guard.of(task.train, task.signatures)
        self._asked: list[optuna.Trial] = []
        self._made: list[Candidate | None] = []
        self._told: dict[str, int] = {}
        self._points, self._left_out = 0, 0
        self._found: dict[str, Candidate] = {}

    @property
    def found(self) -> list[Candidate]:
        """The distinct candidates but for the seed, in the order they were come by."""
        return [one for one in self._found.values() if one.key != self._seed.key]

    def ask(self, size: int) -> list[list[float]]:
        """Return the next points."""
        self._asked = [self._study.ask(self._box) for _ in range(size)]
        self._points += size
        return [[float(trial.params[name]) for name in self._box] for trial in self._asked]

    def candidates(self, texts: Sequence[str]) -> list[Candidate | None]:
        """Return the points' candidates; None for a text that is empty or copies training text."""
        from preceptor.study import set_note  # Optuna's too

        allowed = set(self._guard.originals(dict.fromkeys(texts)))
        self._made = [
            self._seed.with_instruction(self._name, text) if text in allowed and text else None for text in texts
        ]
        for trial, text, made in zip(self._asked, texts, self._made, strict=True):
            trial.set_user_attr(INSTRUCTION, text)
            set_note(self._study, text, trial._trial_id)
            if made is None:
                trial.set_user_attr("left out", "it copies a training input" if text else "it is empty")
                self._left_out += 1
            if made is not None and made.key not in self._found:
                self._found[made.key] = made
                self._task.made(made, self._seed, self._name, "soft prompt")
        return self._made

    def tell(self, trials: Sequence[Trial]) -> None:
        """Tell the sampler the scores of what `candidates` returned."""
        from optuna.trial import TrialState

        from preceptor.teleprompters.coupled import SCORES

        scored = {trial.candidate.key: trial for trial in trials}
        for asked, made in zip(self._asked, self._made, strict=True):
            if made is None:
                self._study.tell(asked, state=TrialState.FAIL)
                continue
            trial = scored[made.key]
            rows = [trial.score if outcome.score is None else outcome.score for outcome in trial.outcomes]
            asked.set_user_attr(SCORES, rows)
            if self._told.setdefault(made.key, asked.number) == asked.number:
                self._study.tell(asked, trial.score)
            else:
                asked.set_user_attr("repeats trial", self._told[made.key])
                self._study.tell(asked, state=TrialState.FAIL)

        counts = {"points": self._points, "distinct instructions": len(self._found), "left out": self._left_out}
        for what, count in counts.items():
            self._study.set_user_attr(what, count)

    def counts(self) -> tuple[int, int]:
        """Return how many points were tried, and how many instructions they came to."""
        return self._points, len(self._found)

    def conclude(self) -> None:
        """Say how many instructions were distinct."""
        copies = f" ({self._left_out} were empty or copied training text)" if self._left_out else ""
        what = f"{len(self._found)} distinct instructions from {self._points} points{copies} for {self._name}"
        logger.info("%s", what)
        self._task.report(what, 0, 0)
