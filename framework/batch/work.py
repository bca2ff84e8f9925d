"""The rows of a batch on their way: read, asked, written, shard by shard."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Final, Literal, TypeAlias

import dspy
from dspy.utils.exceptions import AdapterParseError, LMInvalidRequestError

from preceptor.batch.folder import Folder, Shard
from preceptor.batch.reading import Row, Source
from preceptor.batch.writing import UNWRITABLE, Columns, Write, column_type, print_line, writing
from preceptor.data import as_fields, typed
from preceptor.errors import ConfigError, DataError, InputTooLong, LMFailed, ParseError, again
from preceptor.lm.budget import Budget, Cost, Purse
from preceptor.lm.dispatch import Patience, reason
from preceptor.lm.ended import ENDS, ending
from preceptor.lm.flow import in_order
from preceptor.lm.ledger import Ledger, drawing
from preceptor.lm.meter import Meter
from preceptor.lm.prices import unpriced
from preceptor.lm.seam import own_models, predictors
from preceptor.scoring.evaluate import TOLERATED, ours
from preceptor.task import with_models

_HOPELESS: Final = 50
"""Failures one after the other that make the model, or the program, count as broken."""

_TOLD: Final = 400
"""Characters of what is said about an answer that can't be written down."""

_PREFIX: Final = "predicted_"

_ROUTE: Final = "route"
"""Field in which a program of several experts says who answered."""

_LOGPROBS: Final = "logprobs"
"""What DSPy puts beside the outputs where a model tells its probabilities."""

Kind: TypeAlias = Literal["answered", "input", "unparsable", "failed"]
"""What became of a row. `input`: it wasn't asked; `unparsable`: the answer couldn't be read; `failed`: a call broke."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch is.

    Attributes:
        rows: Read, by earlier processes too.
        failed: Of those, rows without an answer.
        about: Rows there are, give or take; None if nobody knows.
        paid: By all processes, failed attempts included.
        fresh: Rows this process has worked on.
    """

    rows: int
    failed: int
    about: int | None
    paid: Cost
    fresh: int


@dataclass(frozen=True, slots=True)
class _Done:
    """What became of a row; `is_own` is true of a failure that says nothing of the model, only of this row."""

    row: Row
    kind: Kind
    reason: str = ""
    answer: Mapping[str, Any] = field(default_factory=dict[str, Any])
    is_own: bool = False


def column(name: str, source: Source) -> str:
    """Return where a field of the program's answer goes: its own name, or `predicted_<name>` where a column has it.

    Raises:
        ConfigError: If there is a column of that name, too.
    """
    if name not in source.columns:
        return name
    if _PREFIX + name in source.columns:
        raise ConfigError(
            f"The program answers {name!r}, and {source.name} has columns {name!r} and {_PREFIX + name!r} already; "
            "rename one of them."
        )
    return _PREFIX + name


@dataclass(kw_only=True, slots=True)
class Work:
    """A batch under way; the attributes are those of `preceptor.batch.Batch`, and its open folder."""

    program: dspy.Module
    inputs: Mapping[str, Any]
    read_from: Mapping[str, str]
    source: Source
    folder: Folder
    ledger: Ledger
    shard_rows: int
    threads: int
    report: Callable[[Progress], None]
    columns: dict[str, str] = field(default_factory=dict[str, str])
    fresh: int = 0
    broken: int = 0

    def carry_out(self, lm: dspy.LM, budget: Budget, patience: Patience) -> dict[str, Any]:
        """Ask for what isn't answered; return what came of all rows.

        Raises:
            ConfigError: If what a call of a model may cost can't be bounded in the budget's units; see `check`.
            BudgetExhausted: If the budget ends.
            LMFailed: If the model can't be asked, or fails row after row.
        """
        is_whole = False
        self.columns = dict(self.folder.columns)
        account = Purse(budget, Cost(*self.ledger.paid), Cost(*self.ledger.failures))
        meter = Meter(self.ledger, account, threads=self.threads, patience=patience)
        own = [model for _, model in own_models(self.program)]
        for model in (lm, *own):
            meter.check(model)
        names = unpriced([lm, *own], budget.prices)
        if own:
            self.program = with_models(self.program, meter)
        try:
            for number, rows in self._pending():
                self._write(number, rows, meter.wrap(lm), account)
            is_whole = True
        finally:
            took = account.spent + account.lost
            facts = self._facts() | {
                "calls": account.spent.calls,
                "billed_calls": account.billed.calls,
                "tokens": took.tokens,
                "dollars": took.dollars,
                **({"unpriced": list(names)} if names else {}),
                "seconds": account.seconds,
            }
            self.folder.conclude(facts, is_whole=is_whole)
        return facts

    def _pending(self) -> Iterator[tuple[int, Iterator[Row]]]:
        """Yield the shards that aren't finished with their rows, which are read as they are needed."""
        number, rows = 0, None
        while True:
            if self.folder.is_finished(number):
                number, rows = number + 1, None
                continue
            rows = self.source.rows(number * self.shard_rows) if rows is None else rows
            first = next(rows, None)
            if first is None:
                return
            yield number, chain([first], islice(rows, self.shard_rows - 1))
            number += 1

    def _write(self, number: int, rows: Iterator[Row], lm: dspy.LM, account: Purse) -> None:
        """Ask for the rows of a shard and put it in its place."""
        known = self.folder.shards.get(number)
        retries = known.retries if known else 0
        others = [shard for shard in self.folder.shards.values() if shard.number != number]
        earlier, failed_earlier = (sum(getattr(s, what) for s in others) for what in ("rows", "unanswered"))
        with ExitStack() as opened:
            files = _Files(self.folder, self.source, opened)
            answers = in_order(lm, rows, lambda row: self._done(row, lm, retries), self.threads)
            for done in opened.enter_context(closing(answers)):
                self._put(done, files)
                self.fresh += 1
                failed, paid = files.failed + files.unusable, account.spent + account.lost
                total = earlier + files.answered + failed
                self.report(Progress(total, failed_earlier + failed, self.source.about, paid, self.fresh))
        self.folder.commit(
            Shard(
                number=number,
                answered=files.answered,
                failed=files.failed,
                retries=retries,
                columns=self.columns,
                unusable=files.unusable,
            )
        )

    def _put(self, done: _Done, files: _Files) -> None:
        """Write a row to where it belongs.

        Raises:
            LMFailed: If it is one failure too many.
        """
        if done.kind == "answered":
            done = self._named(done)
        if done.kind == "answered":
            done = files.write_answered(done, self.columns)
        if done.kind != "answered":
            files.write_failed(done)
        if done.kind != "input" and not done.is_own:
            self.broken = self.broken + 1 if done.kind == "failed" else 0
        if self.broken == _HOPELESS:
            raise LMFailed(
                f"{_HOPELESS} rows one after the other failed, the last with: {done.reason}. What was answered is "
                "kept; the same command goes on from there."
            )

    def _named(self, done: _Done) -> _Done:
        """Return a row with its answer's fields under their columns, as the first answer had them."""
        answer = {column(name, self.source): value for name, value in done.answer.items()}
        self.columns = self.columns or {column(name, self.source): self._type(name) for name in done.answer}
        odd = sorted(set(answer) - set(self.columns))
        taken = [name for name in self.columns if name in done.row.values]
        if not odd and not taken:
            return _Done(done.row, "answered", answer=answer)
        told = f"the program answered with another field, {odd[0]!r}, than in other rows" if odd else ""
        return _Done(done.row, "failed", told or f"the row has a column {taken[0]!r}, where the answer goes")

    def _type(self, name: str) -> str:
        declared = predictors(self.program)[-1][1].signature.output_fields
        if name in declared:
            return column_type(declared[name].annotation)
        return "float" if name == f"{_ROUTE}_distance" else "str"

    def _done(self, row: Row, lm: dspy.LM, retries: int) -> _Done:
        """Ask for one row; an answer that can't be read is drawn again as often as retries were asked for."""
        if row.problem:
            return _Done(row, "input", row.problem)
        try:
            values = as_fields(row.values, self.read_from)
            given = typed(values, self.inputs, f"{self.source.name}, row {row.number}")
        except DataError as error:
            return _Done(row, "input", str(error))
        told = ""
        for number in range(retries + 1):
            try:
                # the trace is one of this row alone: BestOfN adds to it
                with dspy.context(lm=lm, trace=[], disable_history=True), drawing(number), ending():
                    return self._answered(row, self.program(**given))
            except (AdapterParseError, ParseError) as error:
                told = str(error).splitlines()[0]
            except Exception as error:  # noqa: BLE001  ends the batch, or its row
                known = ours(error)
                if isinstance(known, ENDS):
                    raise again(known) from known.__cause__
                return _Done(row, "failed", reason(known or error), is_own=self._is_own(known or error))
        return _Done(row, "unparsable", told)

    def _is_own(self, error: Exception) -> bool:
        """Return True if a failure is a row's own: it is too long, or refused by a model that answered others."""
        return isinstance(error, InputTooLong) or (isinstance(error, LMInvalidRequestError) and bool(self.columns))

    def _answered(self, row: Row, prediction: Any) -> _Done:
        if not isinstance(prediction, dspy.Prediction):
            return _Done(row, "failed", f"the program returned a {type(prediction).__name__}, not a dspy.Prediction")
        answer = dict(prediction.items())
        if _LOGPROBS not in predictors(self.program)[-1][1].signature.output_fields:
            answer.pop(_LOGPROBS, None)
        route = answer.get(_ROUTE)
        if hasattr(self.program, "router") and isinstance(route, dict):
            answer.pop(_ROUTE)
            answer |= {f"{_ROUTE}_{name}": value for name, value in route.items()}
        return _Done(row, "answered", answer=answer)

    def _facts(self) -> dict[str, Any]:
        shards = self.folder.shards.values()
        return {
            **{name: sum(getattr(s, name) for s in shards) for name in ("rows", "answered", "failed", "unusable")},
            "shards": sum(shard.answered > 0 for shard in shards),
            "columns": list(self.columns),
            "out": str(self.folder.out),
            "failed_rows": str(self.folder.failed) if any(shard.unanswered for shard in shards) else None,
        }


def refuse_failures(facts: Mapping[str, Any]) -> None:
    """Raise if what `Batch.run` returned is no success: too many rows failed, or none could be asked.

    Raises:
        LMFailed: If more rows failed than a comparison would stand.
        DataError: If no row can be used.
    """
    failed, unusable, rows, where = (facts[name] for name in ("failed", "unusable", "rows", "failed_rows"))
    if failed > TOLERATED * (rows - unusable):
        raise LMFailed(
            f"{failed} of {rows - unusable} rows that were asked have no answer; {where} says why. The others are "
            "written. --retry-failed asks for them again."
        )
    if unusable == rows:
        raise DataError(f"None of the {rows} rows can be used; {where} says why.")


@dataclass(slots=True)
class _Files:
    """The files of a shard that is being written, made when there is something to write.

    Attributes:
        folder: Where they go.
        source: What the rows come from.
        opened: Closes them.
        answered: Rows so far.
        failed: Rows so far.
        unusable: Rows so far.
    """

    folder: Folder
    source: Source
    opened: ExitStack
    answered: int = 0
    failed: int = 0
    unusable: int = 0
    _write: Write | None = None
    _log: Any = None

    def write_answered(self, done: _Done, columns: Columns) -> _Done:
        """Write a row with its answer; return what came of it, a failure where the answer can't be written down."""
        if self._write is None:
            path, source = self.folder.fresh[0], self.source
            self._write = self.opened.enter_context(writing(path, source.kind, source.columns, source.schema, columns))
        try:
            self._write({**done.row.values, **done.answer})
        except UNWRITABLE as error:
            told = textwrap.shorten(str(error), _TOLD)
            return _Done(done.row, "failed", f"the answer can't be written as {self.source.kind.upper()}: {told}")
        self.answered += 1
        return done

    def write_failed(self, done: _Done) -> None:
        """Write a row without one."""
        if self._log is None:
            fresh = self.folder.fresh[1]
            self._log = self.opened.enter_context(fresh.open("w", encoding="utf-8", errors="backslashreplace"))
        told = {"row": done.row.number, "kind": done.kind, "reason": done.reason}
        print_line(self._log, {**told, "values": done.row.values})
        self.unusable += done.kind == "input"
        self.failed += done.kind != "input"
