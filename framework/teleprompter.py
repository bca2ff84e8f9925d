"""The contract: what every method is given, and what it defines.

A method is a frozen dataclass with a `search(task)` that returns trials, best first. Checking,
splitting, metering, resuming, confirming and saving are in `preceptor.life`, once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Self, cast

import dspy

from preceptor.demonstrated import LEFT
from preceptor.errors import BudgetExhausted, ConfigError, LMFailed, MetricError, RunError
from preceptor.life import Compile
from preceptor.lm.budget import Budget
from preceptor.lm.dispatch import Patience
from preceptor.lm.embedding import Embedder
from preceptor.scoring.metrics import Metric, Scorer
from preceptor.scoring.trial import Trial
from preceptor.task import Report, Task

_SEEDS: Final = 2**32
"""Seeds that NumPy takes, and so the optimizers that are built on it: those below."""

_HOTTEST: Final = 2.0
"""Temperature up to which DSPy's requests go."""


def _quiet(what: str, done: int, total: int) -> None:
    del what, done, total


@dataclass(frozen=True, slots=True)
class Estimate:
    """Calls a search is expected to take, confirmation excluded.

    Attributes:
        least: Below this the method can't do anything useful.
        expected: With this budget.
    """

    least: int
    expected: int


@dataclass(frozen=True, kw_only=True)
class Teleprompter(dspy.teleprompt.Teleprompter):
    """What every method is given.

    Args:
        metric: A DSPy metric of 2, 3 or 5 arguments, or the name of a built-in one.
        lm: Answers the task; by default the configured one.
        proposer: Writes instructions; by default `lm`.
        budget: Bounds on what both may spend together.
        run_dir: Where the run is kept; by default a folder of the cache named after the inputs, so
            that the same compile started again resumes.
        threads: Calls in flight, where the model answers one request a call.
        patience: Deadline and retries of each call to a provider.
        seed: Equal seeds give equal programs.
        report: Told of progress.
        few_shot: Train rows shown below the instruction as demonstrations, in the search and in what it finds; it
            scores none of them (`preceptor.demonstrated`). The winner is confirmed against the student as it is. For
            programs of one predictor. By default the method's own number, `shows`, where they can be shown.

    Raises:
        ConfigError: If `threads` is below 1, `seed` or `few_shot` below 0, or `seed` is 2**32 or above.
    """

    paper: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    needs: ClassVar[str] = "a chat model"
    confirms: ClassVar[int] = 2
    """Programs that are asked each confirmation row, at most: the seed and the winner."""
    shows: ClassVar[int] = 0
    """Demonstrations where `few_shot` isn't given."""
    is_alone: ClassVar[bool] = False
    """True if two searches can't run in one process at the same time."""

    metric: Scorer | Metric | str
    lm: dspy.LM | None = None
    proposer: dspy.LM | None = None
    budget: Budget = field(default_factory=Budget)
    run_dir: Path | str | None = None
    threads: int = 8
    patience: Patience = field(default_factory=Patience)
    seed: int = 0
    report: Report = _quiet
    few_shot: int | None = None

    def __post_init__(self) -> None:
        check_least(self, {"threads": 1, "seed": 0} | ({} if self.few_shot is None else {"few_shot": 0}))
        if self.seed >= _SEEDS:
            raise ConfigError(f"{type(self).__name__} needs seed < {_SEEDS}, got {self.seed}.")

    @property
    def confirmed(self) -> int:
        """Programs that are asked each confirmation row, at most, with these settings."""
        return self.confirms

    @property
    def experts(self) -> int:
        """Experts of its programs, one for each region, with these settings; 0 if the rows decide how many."""
        return 1

    @property
    def routed_by(self) -> str | Embedder | None:
        """What embeds the inputs of its programs, so that they are routed to experts; None if there is one for all."""
        return None

    @property
    def is_soft(self) -> bool:
        """True if the proposer reads soft tokens, which models of this process do."""
        return False

    @property
    def demonstration_rows(self) -> int:
        """Train rows that each search shows as demonstrations, with these settings; none before it is `settled`."""
        return self.few_shot or 0

    def settled(self, *, is_able: bool) -> Self:
        """Return the method with its number of demonstrations: what was given, else its own if they can be shown."""
        if self.few_shot is not None:
            return self
        return dataclasses.replace(self, few_shot=self.shows if is_able else 0)

    @property
    def knobs(self) -> dict[str, Any]:
        """The settings that decide which path a search takes: the method's own, the demonstrations, and the seed."""
        shared = {field.name for field in dataclasses.fields(Teleprompter)} - {"few_shot", "seed"}
        own = {field.name for field in dataclasses.fields(self)} - shared
        return {name: getattr(self, name) for name in sorted(own)} | {"few_shot": self.demonstration_rows}

    def check_program(self, student: dspy.Module, output: str) -> None:
        """Raise if the method can't compile a program whose answers are compared by this field; any can, by default.

        Raises:
            ConfigError: Says why.
        """

    def search(self, task: Task) -> Sequence[Trial]:
        """Return trials, best first; the method's own work.

        Raises:
            BudgetExhausted: Stops the search; the best candidate so far is confirmed.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no search.")

    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        """Return the calls a search takes, the confirmation's excluded; asks nothing.

        Args:
            signatures: Of the predictors, by name.
            rows: Train rows to search on, at least 2: those that are shown as demonstrations are left out.
            calls: To be spent on the search; None if they have no bound.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no estimate.")

    def estimated(self, signatures: Mapping[str, Any], train: int, calls: int | None) -> Estimate:
        """Return the estimate of a search with so many train rows, some of them shown as demonstrations."""
        return self.estimate(signatures, max(LEFT, train - self.demonstration_rows), calls)

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: list[dspy.Example],
        teacher: dspy.Module | None = None,
        valset: list[dspy.Example] | None = None,
        **kwargs: Any,
    ) -> dspy.Module:
        """Return a copy of `student` with better instructions, or with its own if none is confirmed.

        Args:
            student: Any program; left as it is.
            trainset: Errors are read and candidates race here.
            teacher: Not used by these methods; accepted so that DSPy's combinators work.
            valset: Opened once, to confirm; by default half of `trainset` is set aside.
            kwargs: None is known; a misspelt one is refused.

        Returns:
            A `dspy.Module` with an `evidence` attribute.

        Raises:
            ConfigError: If an input can't work; no call was made then. Later only as `MetricError`, where the metric
                fails on an answer, and as `RunError`, where the run folder can't be written.
            BudgetExhausted: If the budget ended before anything was confirmed; compile again to resume.
            LMFailed: If the model failed on too many rows; compile again to resume.
        """
        if kwargs:
            raise ConfigError(f"{type(self).__name__}.compile doesn't know {sorted(kwargs)[0]!r}.")
        compiling = Compile.prepare(self, student, trainset, valset)
        with compiling.open() as task:
            try:
                return compiling.method.carry_out(compiling, task)
            except (BudgetExhausted, LMFailed, MetricError, RunError) as error:
                if isinstance(error, LMFailed):
                    task.meter.ledger.take_back()
                raise type(error)(f"{error} {compiling.so_far(task)}") from error

    def carry_out(self, compiling: Compile, task: Task) -> dspy.Module:
        """Search, confirm and save; return the program. A method of several winners has its own."""
        task.meter.account.hold(compiling.confirmation)
        found = compiling.search(task, self)
        return compiling.conclude(task, found)


def check_least(method: Teleprompter, least: Mapping[str, int]) -> None:
    """Raise if a setting is below the least it may be.

    Raises:
        ConfigError: Naming the setting.
    """
    for name, bound in least.items():
        if getattr(method, name) < bound:
            raise ConfigError(f"{type(method).__name__} needs {name} >= {bound}, got {getattr(method, name)}.")


def check_sampling(method: Teleprompter) -> None:
    """Raise if no model draws texts at a method's `temperature`, and `top_p` where it has one.

    Raises:
        ConfigError: Naming the setting, and from where to where it may be.
    """
    name, settings = type(method).__name__, cast("Any", method)
    temperature, top_p = settings.temperature, getattr(settings, "top_p", 1.0)
    if not (0 <= temperature <= _HOTTEST):  # what is no number isn't, either
        raise ConfigError(f"{name} needs temperature from 0 to {_HOTTEST:g}, got {temperature}.")
    if not (0 < top_p <= 1):
        raise ConfigError(f"{name} needs top_p above 0 and up to 1, got {top_p}.")
