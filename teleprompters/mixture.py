"""Mixture of experts: any method, once for all rows and once for each region of similar inputs.

Paper:   Petridis et al., "ConstitutionalExperts: Training a Mixture of Principle-based Prompts", ACL 2024.
         arXiv:2403.04894, whose mixture this is; it was found to help every method compared.
Notes:   seeds/constitutional_experts.md
Departs: an expert stands in for the default only where rows of its region that no search has seen confirm it;
         inputs far from every region go to the default; the mixture is then measured as a whole on rows that
         took no part in choosing the experts. Number of regions, clustering and embedding are ours: the parts
         of the paper that could be read don't say.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar, Final, Self

import dspy

from preceptor.errors import ConfigError
from preceptor.life import Compile
from preceptor.lm.dispatch import NOT_SENT
from preceptor.lm.embedding import DEFAULT, Embedder, embedder_of
from preceptor.lm.meter import Meter, batching_engine
from preceptor.lm.share import Share
from preceptor.modules.experts import refuse_unroutable
from preceptor.program import apply, candidate_of
from preceptor.scoring.multiplicity import confirmable
from preceptor.splits import different, stratified
from preceptor.task import Report, Task, with_models
from preceptor.teleprompter import Estimate, Teleprompter
from preceptor.teleprompters.ape import APE
from preceptor.teleprompters.gates import Expert, concluded
from preceptor.teleprompters.layout import Layout, laid_out

DEARER: Final = 1.25
"""How much dearer an expert's calls may be than those of the first search, for the confirmation to be paid."""

FIRST: Final = 0.5
"""Share of the search's budget that goes to the search on all rows; its winner answers wherever no expert does."""

GUESS: Final = 4
"""Regions assumed in an estimate where the number isn't given."""


@dataclass(frozen=True, kw_only=True)
class MixtureOfExperts(Teleprompter):
    """One expert for each region of similar inputs, where rows confirm it.

    The method searches on all train rows first, with half of the search's budget, or with the least it needs if
    that is more. Its winner is the default. Then it searches on each region's train rows, from the default, with a
    part of what is left in proportion to the region's rows; as many regions are left out, the smallest first, as
    it takes for all others to have the least the method needs. Regions are searched side by side where the
    model answers one request a call. No search sees what another has spent, so the result doesn't depend on
    timing. Where the inputs fall into one region, it is the method alone: one search with the whole budget.

    Half of each region's confirmation rows choose the experts: one replaces the default if it is better there,
    by Holm's correction over all regions tested. The other half measures the whole mixture against the seed. If it
    isn't better, or there is no expert, the default is confirmed on all confirmation rows, as in any compile.

    Args:
        method: The method; given the same metric, models and seed as this.
        settings: Of the method; `few_shot` may be one of them.
        regions: Their number; 0 takes as many as the inputs fall into (`preceptor.regions.divided`).
        least_rows: Train rows of a region, beside those it shows, below which it isn't searched.
        embedder: A model of the catalogue, a hub id, a folder, or one of the user's.

    Raises:
        ConfigError: If a number is out of range, or the method refuses its settings.
    """

    paper: ClassVar[str] = "arXiv:2403.04894"
    formula: ClassVar[str] = "of a budget, half to the method on all rows, half to it on the regions"
    needs: ClassVar[str] = "a chat model and an embedder"
    confirms: ClassVar[int] = 3

    method: Callable[..., Teleprompter] = APE
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    regions: int = 0
    least_rows: int = 10
    embedder: str | Embedder = DEFAULT

    def __post_init__(self) -> None:
        Teleprompter.__post_init__(self)
        if self.regions < 0 or self.regions == 1:
            raise ConfigError(f"A mixture has 2 regions or more, or 0 to choose their number; got {self.regions}.")
        if self.least_rows < 2:
            raise ConfigError(f"A region needs least_rows >= 2, got {self.least_rows}.")
        embedder_of(self.embedder)
        if self._inner.confirmed > Teleprompter.confirms:
            raise ConfigError("A mixture of mixtures has no router of its own; wrap another method.")

    @property
    def experts(self) -> int:
        """Experts of its programs, 0 if the rows decide how many."""
        return self.regions

    @property
    def routed_by(self) -> str | Embedder | None:
        """What embeds the inputs of its programs."""
        return self.embedder

    @property
    def is_soft(self) -> bool:
        """True if the method's proposer reads soft tokens."""
        return self._inner.is_soft

    @property
    def demonstration_rows(self) -> int:
        """Train rows that each search shows as demonstrations, with these settings."""
        return self._inner.demonstration_rows

    def settled(self, *, is_able: bool) -> Self:
        """Return the mixture with the number of demonstrations of the method's searches."""
        inner = self._inner
        if inner.few_shot is not None or not inner.shows:
            return self
        return replace(self, settings={**self.settings, "few_shot": inner.shows if is_able else 0})

    @property
    def knobs(self) -> dict[str, Any]:
        """The settings that decide which path the search takes."""
        inner = self._inner
        own = {"regions": self.regions, "least_rows": self.least_rows, "embedder": str(embedder_of(self.embedder))}
        return {**own, "method": type(inner).__name__, "settings": inner.knobs}

    def check_program(self, student: dspy.Module, output: str) -> None:
        """Raise if experts of a program can't be routed to."""
        refuse_unroutable(student, output)

    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        """Return the calls of the search on all rows and of those on regions of equal size, if such are searched.

        Where the number of regions isn't given, it is guessed, and there may be one: then no less than a search of the
        method alone.
        """
        inner, smallest = self._inner, self.least_rows + self.demonstration_rows
        count = self.regions or max(2, min(GUESS, rows // smallest))
        least = inner.estimated(signatures, rows, 1).least
        whole = inner.estimated(signatures, rows, None if calls is None else max(least, int(FIRST * calls)))
        each = None if calls is None else (calls - whole.expected) // count
        region = inner.estimated(signatures, max(2, rows // count), each)
        is_searched = -(-rows // count) >= smallest
        afforded = is_searched and (each is None or each >= region.least)
        expected = whole.expected + (count * region.expected if afforded else 0)
        alone = 0 if self.regions else inner.estimated(signatures, rows, calls).expected
        return Estimate(least, max(expected, alone))

    def estimated(self, signatures: Mapping[str, Any], train: int, calls: int | None) -> Estimate:
        """Return the estimate with so many train rows; the method knows how many of them it shows."""
        return self.estimate(signatures, train, calls)

    def carry_out(self, compiling: Compile, task: Task) -> dspy.Module:
        """Search on all rows and on each region's, confirm the experts, then the mixture; save and return it."""
        layout = self._layout(compiling, task)
        if len(layout.names) == 1:
            return self._undivided(compiling, task, layout)
        account = task.meter.account
        account.hold(compiling.confirmation)
        whole, calls = self._inner, account.calls_left
        least = whole.estimated(task.signatures, len(task.train), 1).least
        share = Share(account, FIRST, None if calls is None else max(least, int(FIRST * calls)))
        found = compiling.search(_within(task, share), whole)
        default = found.candidate(task.seed) or task.seed
        based = replace(task, student=apply(task.student, default))
        seed = replace(candidate_of(based.student), constitutions=default.constitutions)
        experts = self._experts(compiling, replace(based, seed=seed), layout)
        return concluded(compiling, task, found, experts, layout)

    def _undivided(self, compiling: Compile, task: Task, layout: Layout) -> dspy.Module:
        """Search once, with the whole budget, and confirm as the method alone does: there is nothing to route."""
        whole, [only] = self._inner, layout.names
        task.meter.account.hold(replace(compiling, method=whole).confirmation)
        found = compiling.search(replace(task, confirms=whole.confirmed), whole)
        return concluded(compiling, task, found, [Expert(only, why="there is no other region")], layout)

    @property
    def _inner(self) -> Teleprompter:
        shared = ("metric", "lm", "proposer", "budget", "threads", "patience", "seed", "report")
        try:
            given = {**({} if self.few_shot is None else {"few_shot": self.few_shot}), **self.settings}
            return self.method(**{name: getattr(self, name) for name in shared}, **given)
        except TypeError as error:
            raise ConfigError(f"{getattr(self.method, '__name__', self.method)}: {error}.") from error

    def _layout(self, compiling: Compile, task: Task) -> Layout:
        embedder = embedder_of(self.embedder)
        return laid_out(compiling, task, embedder, self.regions, least_rows=self.least_rows, seed=self.seed)

    def _experts(self, compiling: Compile, task: Task, layout: Layout) -> list[Expert]:
        """Search on every region that could be confirmed and paid for; return what came of each region."""
        least = self.least_rows + self.demonstration_rows
        large = [name for name in layout.names if len(layout.train[name]) >= least]
        able = confirmable({name: different([compiling.confirm[row] for row in layout.gate(name)]) for name in large})
        afforded = self._afforded(task, {name: len(layout.train[name]) for name in able})

        def searched(name: str) -> Expert:
            with task.run.part(name.replace(" ", "-")) as run:
                own = self._region(task, layout.train[name], afforded[name], name)
                found = compiling.search(replace(own, run=run), self._inner)
            return Expert(name, found.candidate(own.seed), found.stopped)

        def searched_or_refused(name: str) -> Expert:
            try:
                return searched(name)
            except ConfigError as error:
                if type(error) is not ConfigError:  # a metric or a disk that fails is no matter of few rows
                    raise
                return Expert(name, why=str(error))

        made = dict(
            zip(
                afforded,
                _side_by_side(searched_or_refused, list(afforded), self._workers(task), task.meter),
                strict=True,
            )
        )
        why = dict.fromkeys(layout.names, f"fewer than {least} train rows")
        why |= dict.fromkeys(large, "too few confirmation rows") | dict.fromkeys(able, "the budget is too small")
        return [made.get(name) or Expert(name, why=why[name]) for name in layout.names]

    def _afforded(self, task: Task, rows: Mapping[str, int]) -> dict[str, Share]:
        """Return a share for each region, in proportion to its rows; regions are left out until the others can pay.

        What the confirmation needs is kept back as far as it is known now: were it to grow with what one region
        sees, another would lose what its share had.
        """
        account, names = task.meter.account, sorted(rows, key=lambda name: (-rows[name], name))
        account.fix(DEARER)
        while names:
            total, left = sum(rows[name] for name in names), account.calls_left
            calls = {name: None if left is None else left * rows[name] // total for name in names}
            if all(self._can_pay(task, rows[name], calls[name]) for name in names):
                return {name: Share(account, rows[name] / total, calls[name]) for name in sorted(names)}
            names.pop()
        return {}

    def _can_pay(self, task: Task, rows: int, calls: int | None) -> bool:
        return calls is None or (calls > 0 and self._inner.estimated(task.signatures, rows, calls).least <= calls)

    def _region(self, task: Task, rows: Sequence[int], share: Share, name: str) -> Task:
        """Return the task of one region: its rows, its share of the budget, randomness of its own."""
        rng = random.Random(f"{self.seed} {name}")
        train = [task.train[row] for row in rows]
        order = stratified(train, task.output, rng)
        report = _prefixed(task.report, name, is_alone=self._workers(task) == 1)
        return replace(_within(_apart(task), share), train=train, order=order, rng=rng, report=report)

    def _workers(self, task: Task) -> int:
        """Return how many regions are searched at a time."""
        is_single = batching_engine(task.lm) is not None or batching_engine(task.proposer) is not None
        return 1 if is_single or self._inner.is_alone else task.threads


def _prefixed(report: Report, region: str, *, is_alone: bool) -> Report:
    """Return a report that names the region; of searches side by side, only where each step begins."""

    def told(what: str, done: int, total: int) -> None:
        if is_alone or done == 0:
            report(f"{region}: {what}", done, total)

    return told


def _apart(task: Task) -> Task:
    """Return the task with records of its own, so that it may run beside others."""
    empty: dict[str, Any] = {
        each.name: each.default_factory() for each in fields(task) if each.default_factory is not MISSING
    }
    return replace(task, **empty)


def _within(task: Task, share: Share) -> Task:
    """Return the task with its models metered on a share of the budget."""
    meter = task.meter.within(share)
    return replace(
        task,
        meter=meter,
        lm=meter.wrap(task.lm),
        proposer=meter.wrap(task.proposer),
        student=with_models(task.student, meter),
    )


def _side_by_side(search: Callable[[str], Expert], names: Sequence[str], workers: int, meter: Meter) -> list[Expert]:
    """Return one result a name, in order; with one worker, in this thread.

    What ends the wait for them, such as Ctrl-C, is raised once calls under way are answered and recorded.
    """
    if workers == 1 or len(names) < 2:
        return [search(name) for name in names]
    with ThreadPoolExecutor(min(workers, len(names))) as pool:
        try:
            running = [pool.submit(copy_context().run, search, name) for name in names]
            wait(running)
        except BaseException:
            meter.give_up()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    errors = [error for each in running if (error := each.exception()) is not None]
    if errors:
        raise min(errors, key=lambda error: NOT_SENT in str(error))  # else it tells of another region's error only
    return [each.result() for each in running]
