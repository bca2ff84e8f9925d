"""Where a batch goes: answered rows in shards, and beside them what it takes to go on after any end.

OUT/                   part-00000.csv, part-00001.csv ...: answered rows and nothing else, so that any reader of
                       folders takes it as it is; or, if OUT is named like a file, one file, joined at the end
OUT.batch/
    run.json           fingerprints of input, program and model
    ledger.sqlite      every answer
    shards.jsonl       one line for each finished shard; it is there once its line is
    failed.jsonl       rows without an answer, with the reason
    manifest.json      shards with their SHA-256, rows, and what they took

A shard is written beside its place, synchronized with the disk and renamed before its line is written. So a
shard with a line is whole, and one without is written again, from the ledger.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import file_digest
from pathlib import Path
from typing import Any, Final

from preceptor.batch.reading import Kind, kind_of
from preceptor.batch.writing import Columns, join
from preceptor.errors import ConfigError, RunError
from preceptor.run import writable, write_whole

_LOG: Final = "shards.jsonl"
_NEW: Final = ".new"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A finished shard.

    Attributes:
        number: From 0.
        answered: Rows in its file; without any there is no file.
        failed: Rows whose call failed or whose answer can't be used.
        retries: How often its failed rows were asked again.
        columns: What the program answers, as it is written; {} as long as nothing was answered.
        unusable: Rows that weren't asked, since they can't be read or a value is missing.
        sha256: Of its file.
        bytes: Of its file.
        is_open: True if its failed rows are to be asked again.
    """

    number: int
    answered: int
    failed: int
    retries: int
    columns: Columns
    unusable: int = 0
    sha256: str = ""
    bytes: int = 0
    is_open: bool = False

    @property
    def rows(self) -> int:
        """All of its rows."""
        return self.answered + self.unanswered

    @property
    def unanswered(self) -> int:
        """Rows in its list of failures."""
        return self.failed + self.unusable


@dataclass(frozen=True, slots=True)
class Folder:
    """The place of one batch.

    Attributes:
        out: As the user wrote it.
        kind: How rows are written down.
        shards: Those finished, by number.
    """

    out: Path
    kind: Kind
    shards: dict[int, Shard] = field(default_factory=dict[int, Shard])

    @property
    def work(self) -> Path:
        """The folder beside `out`.

        Raises:
            ConfigError: If `out` is the root of the file system.
        """
        out = self.out if self.out.name not in ("", "..") else self.out.resolve()
        if not out.name:
            raise ConfigError(f"Nothing can stand beside {out}, and a batch keeps its books beside its output.")
        return out.with_name(f"{out.name}.batch")

    @property
    def is_file(self) -> bool:
        """True if the shards are joined into one file."""
        return kind_of(self.out) is not None

    @property
    def failed(self) -> Path:
        """Where rows without an answer are."""
        return self.work / "failed.jsonl"

    def check(self) -> None:
        """Raise unless this place is free, or this batch's.

        Raises:
            ConfigError: If `out` is named like a file of another kind.
            RunError: If something else is there.
        """
        if self.is_file and kind_of(self.out) != self.kind:
            raise ConfigError(f"The rows are {self.kind.upper()}, and so is the output; {self.out} is named otherwise.")
        is_taken = self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir()))
        if is_taken and not (self.work / "run.json").is_file():
            raise RunError(f"{self.out} is there already, and from no batch; nothing was overwritten.")

    def read(self) -> None:
        """Find out which shards are finished; make the folders.

        Raises:
            ConfigError: If what is written beside `out` can't be moved there.
        """
        with writable(self.work):
            self._shards.mkdir(parents=True, exist_ok=True)
            (self.work / "failed").mkdir(exist_ok=True)
            with (self.work / _LOG).open("a+b") as file:
                file.seek(0)
                lines = file.read()
                file.write(b"" if lines.endswith(b"\n") or not lines else b"\n")
        for line in lines.splitlines():
            with suppress(ValueError, TypeError):  # the last one, if it was being written when the process died
                shard = Shard(**json.loads(line))
                self.shards[shard.number] = shard
        self._check_move()

    def _check_move(self) -> None:
        fresh, moved = self.work / f"move{_NEW}", self._shards / f".move{_NEW}"
        try:
            fresh.touch()
            fresh.replace(moved)
            moved.unlink()
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise ConfigError(
                f"{self.out} can't take what is written beside it, in {self.work}: {error.strerror or error}. It has "
                "to be writable and of the same file system; a folder within it would do."
            ) from error

    @property
    def columns(self) -> Columns:
        """What the program answers, {} as long as nothing was answered."""
        return next((shard.columns for _, shard in sorted(self.shards.items()) if shard.columns), {})

    def is_finished(self, number: int) -> bool:
        """Return True if a shard is there, and not to be asked again."""
        shard = self.shards.get(number)
        if shard is None or shard.is_open:
            return False
        path = self.path(number)
        return not shard.answered or (path.is_file() and path.stat().st_size == shard.bytes)

    def reopen_failed(self) -> None:
        """Let the rows that failed be asked again; their shards stay as they are until they are written anew."""
        for shard in list(self.shards.values()):
            if shard.failed and not shard.is_open:
                self._log(replace(shard, retries=shard.retries + 1, is_open=True))

    def path(self, number: int) -> Path:
        """Return the file of a shard."""
        suffix = self.out.suffix if self.is_file else f".{self.kind}"
        return self._shards / f"part-{number:05d}{suffix}"

    @property
    def fresh(self) -> tuple[Path, Path]:
        """Where a shard's answered and failed rows are written before they are all there."""
        return self.work / f"answered{_NEW}", self.work / f"failed{_NEW}"

    def commit(self, shard: Shard) -> None:
        """Put a shard, whose rows are in `fresh`, in its place for good."""
        with writable(self.work):
            rows, failures = self.fresh
            digest, size = ("", 0)
            if shard.answered:
                digest, size = _synchronized(rows), rows.stat().st_size
            if shard.unanswered:
                _synchronized(failures)
            _place(rows, self.path(shard.number), shard.answered)
            _place(failures, self._failures(shard.number), shard.unanswered)
            self._log(replace(shard, columns=dict(shard.columns), sha256=digest, bytes=size))

    def conclude(self, facts: Mapping[str, Any], *, is_whole: bool) -> None:
        """Write the list of failed rows and the manifest; and the one file, if all rows have been asked."""
        with writable(self.work):
            shards = [shard for _, shard in sorted(self.shards.items())]
            join([self._failures(s.number) for s in shards if s.unanswered], self.failed.with_suffix(_NEW), "jsonl")
            _place(self.failed.with_suffix(_NEW), self.failed, sum(shard.unanswered for shard in shards))
            if is_whole and self.is_file and any(shard.answered for shard in shards):
                whole = self.work / f"whole{_NEW}"
                join([self.path(shard.number) for shard in shards if shard.answered], whole, self.kind)
                _synchronized(whole)
                _place(whole, self.out, True)
            listed = [{**asdict(s), "file": self.path(s.number).name if s.answered else None} for s in shards]
            write_whole(self.work / "manifest.json", {**facts, "is_whole": is_whole, "shards": listed})

    @property
    def _shards(self) -> Path:
        return self.work / "shards" if self.is_file else self.out

    def _failures(self, number: int) -> Path:
        return self.work / "failed" / f"{number:05d}.jsonl"

    def _log(self, shard: Shard) -> None:
        with writable(self.work), (self.work / _LOG).open("ab") as file:
            file.write(json.dumps(asdict(shard)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.shards[shard.number] = shard


def _synchronized(path: Path) -> str:
    """Wait until a file is on the disk; return its SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return file_digest(file, "sha256").hexdigest()


def _place(fresh: Path, path: Path, is_needed: object) -> None:
    """Put a file in its place, or take away both where none is needed; the folder is synchronized with the disk."""
    if is_needed:
        fresh.replace(path)
    else:
        fresh.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
