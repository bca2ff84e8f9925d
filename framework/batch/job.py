"""A program run over a data set: every row answered once, however often the process is killed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import dspy

from preceptor.batch.folder import Folder
from preceptor.batch.reading import Source
from preceptor.batch.work import Progress, Work, column
from preceptor.canonical import lasting, without_addresses
from preceptor.checks import check_settings
from preceptor.data import no_column, refuse_absent
from preceptor.errors import ConfigError, DataError
from preceptor.lm.adapter import takes_none
from preceptor.lm.budget import Budget
from preceptor.lm.dispatch import Patience
from preceptor.lm.seam import adapter_state, own_models, predictors, state_of
from preceptor.run import open_ledger

SHARD_ROWS: Final = 10_000
"""Rows of a shard: what a kill lets be replayed at most, at a few thousand rows a second."""


def _quiet(progress: Progress) -> None:
    del progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A program, a model and a data set.

    Attributes:
        program: Asked for each row.
        identity: What else the answers depend on, such as the files the program was read from.
        inputs: Its input fields with their types.
        lm: Answers for every predictor that has no model of its own.
        source: The rows.
        out: A folder for shards, or a file.
        budget: Bounds what all processes of the batch pay together; seconds, each of them. A call answered by the
            ledger costs nothing here: equal rows are asked once.
        threads: Rows under way where the model answers one request a call.
        patience: Deadline and retries of those calls.
        shard_rows: Rows of a shard.
        report: Told after every row.
        read_from: Input field -> the column that holds it, for fields whose column has another name.

    Raises:
        ConfigError: If a number is out of range, or a predictor's settings hold a secret.
        DataError: If the rows lack an input, or have a column that the answers need.
    """

    program: dspy.Module
    identity: Any
    inputs: Mapping[str, Any]
    lm: dspy.LM
    source: Source
    out: Path
    budget: Budget = field(default_factory=Budget)
    threads: int = 8
    patience: Patience = field(default_factory=Patience)
    shard_rows: int = SHARD_ROWS
    report: Callable[[Progress], None] = _quiet
    read_from: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        if self.threads < 1 or self.shard_rows < 1:
            raise ConfigError(f"A batch needs threads and shard_rows >= 1, got {self.threads} and {self.shard_rows}.")
        needed = [name for name, kind in self.inputs.items() if not takes_none(kind)]
        refuse_absent(self.read_from, self.source.columns, self.source.name)
        absent = [name for name in needed if name not in {*self.source.columns, *self.read_from}]
        if absent:
            raise DataError(no_column(absent[0], self.source.columns, self.source.name))
        for name in predictors(self.program)[-1][1].signature.output_fields:
            column(name, self.source)
        check_settings(self.program)

    def run(self, *, retry_failed: bool = False) -> dict[str, Any]:
        """Ask for every row that has no answer yet; return what came of all of them, for `refuse_failures` to judge.

        Args:
            retry_failed: Ask again for rows that failed earlier. Those whose answer couldn't be read are drawn
                once more, which is billed.

        Raises:
            BudgetExhausted: If the budget ends; the same call with a larger one goes on.
            LMFailed: If the model can't be asked, or fails row after row; the same call goes on.
            RunError: If `out` is taken, or was begun with another input, program or model.
        """
        folder = Folder(self.out, self.source.kind)
        folder.check()
        with open_ledger(folder.work, self._parts()) as ledger:
            folder.read()
            if retry_failed:
                folder.reopen_failed()
            work = Work(
                program=self.program,
                inputs=self.inputs,
                read_from=self.read_from,
                source=self.source,
                folder=folder,
                ledger=ledger,
                shard_rows=self.shard_rows,
                threads=self.threads,
                report=self.report,
            )
            return work.carry_out(self.lm, self.budget, self.patience)

    def _parts(self) -> dict[str, Any]:
        parts = [
            [name, without_addresses(str(part.signature)), part.config, [dict(demo) for demo in part.demos]]
            for name, part in predictors(self.program)
        ]
        models = [[name, *state_of(own)] for name, own in own_models(self.program)]
        return {
            "input": [self.source.kind, self.source.fingerprint],
            "program": lasting([self.identity, parts, *([models] if models else []), *adapter_state()]),
            "model": state_of(self.lm),
            "number of rows a shard": self.shard_rows,
            "choice of columns": dict(sorted(self.read_from.items())),
        }
