"""Reading a data set row by row: CSV, TSV, JSONL and Parquet files, and the Hugging Face hub.

`preceptor.data` reads through `datasets`, which makes one typed table of all rows: one bad row refuses the
file, and JSON lines come back with other keys and types than they had. Rows of a batch are read one by one
instead, with the same values, so that a bad row among millions fails alone and every other row is written as
it was read.

The hub's data sets are streamed, nothing is kept on the disk. Their rows have the types that `datasets` gives them,
whatever the files there are, and are written as Parquet; a file that it can't read, or of other columns, ends the
batch. Of a Parquet file one row group is in memory at a time, of JSON lines and CSV a block, but all of a JSON file
that is one list. What goes on from a later row of other files than Parquet reads, though doesn't ask for, the rows
before it once more. The commit is part of what a batch is: after the branch has moved, only `owner/name@<commit>`
goes on.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast

import pyarrow as pa

from preceptor.data import check_header, dialect, file_in, hub_errors, hub_id
from preceptor.errors import DataError

Kind: TypeAlias = Literal["csv", "tsv", "jsonl", "parquet"]
"""How rows are written down."""

_KINDS: Final[dict[str, Kind]] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_BLOCK: Final = 1 << 20
_AT_ONCE: Final = 256
"""Rows of a Parquet file that are in memory at a time."""

_LONGEST: Final = 2**31 - 1
"""Bytes of one value; Python's own limit for CSV is 128 kB, pandas has none."""

_END: Final = "preceptor: the end"
"""A row of its own behind the last, unless a quote is still open there."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read.

    Attributes:
        number: From 1.
        values: Column -> value; of a row that can't be read, what could be.
        problem: Why it can't be used, "" if it can.
    """

    number: int
    values: dict[str, Any]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """A data set, of any size.

    Attributes:
        name: As the user wrote it; of a hub id, with the commit that is read.
        kind: How it is written down.
        columns: Their names; of JSON lines, all that any row has.
        schema: The columns' types, where the kind has any.
        fingerprint: Differs where the content does.
        about: Rows there are, give or take; None if nobody knows.
        rows: Reads from a row on, the first is 0.
    """

    name: str
    kind: Kind
    columns: tuple[str, ...]
    schema: pa.Schema | None
    fingerprint: str
    about: int | None
    rows: Callable[[int], Iterator[Row]]


def kind_of(path: Path) -> Kind | None:
    """Return how a file of this name is written down, None if it is none of the known kinds."""
    return _KINDS.get(path.suffix.lower())


def open_source(name: str, *, part: str = "train") -> Source:
    """Return a data set, ready to be read; a file is read through once, for its fingerprint.

    Args:
        name: A file, a folder with a file for each part, or a hub id, `owner/name[:configuration][@revision]`.
        part: Of a folder; on the hub, a split.

    Raises:
        DataError: If it isn't there, can't be read, or has no rows.
    """
    path = Path(name)
    path = file_in(path, part) if path.is_dir() else path
    kind = kind_of(path)
    if kind is not None and not path.is_file():
        raise DataError(f"No file {path}.")
    if kind is None and path.is_file():
        raise DataError(f"{path}: rows come from files that end in {', '.join(_KINDS)}, not in {path.suffix!r}.")
    readers = {"csv": _table, "tsv": _table, "jsonl": _lines, "parquet": _parquet}
    try:
        opened = _hub(name, part) if kind is None else readers[kind](name, path, kind)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from error
    if next(opened.rows(0), None) is None:
        raise DataError(f"{path} has no rows.")
    return opened


def _table(name: str, path: Path, kind: Kind) -> Source:
    header = next(_records(path), [])
    if not header:
        raise DataError(f"{path} is empty; it needs a header and at least one row.")
    if not _is_text("".join(header)):
        raise DataError(f"{path} can't be read as {kind.upper()}: it isn't UTF-8.")
    check_header(path, header)
    _refuse_open_quote(path)
    digest, lines = _digest(path)
    return Source(name, kind, tuple(header), None, digest, lines - 1, partial(_table_rows, path, header))


def _table_rows(path: Path, header: list[str], start: int) -> Iterator[Row]:
    for number, values in enumerate(islice(_records(path), start + 1, None), start + 1):
        yield Row(number, dict(zip(header, values, strict=False)), _misfit(values, header))


def _refuse_open_quote(path: Path) -> None:
    """Raise if a quote is never closed: all rows behind it would be one."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(chain(file, [_END]), **dialect(path))
        last, began, ended = list[str](), 1, 0
        for row in rows:
            last, began, ended = row, ended + 1, rows.line_num
    if last != [_END]:
        raise DataError(f"{path}: a quote in the row that begins in line {began} is never closed.")


def _records(path: Path) -> Iterator[list[str]]:
    """Yield the header and the rows that aren't blank."""
    csv.field_size_limit(_LONGEST)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        yield from filter(None, csv.reader(file, **dialect(path)))


def _misfit(values: list[str], header: list[str]) -> str:
    if len(values) != len(header):
        return f"{len(values)} values under {len(header)} columns; quote text with separators"
    return "" if _is_text("".join(values)) else "it isn't UTF-8"


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(name: str, path: Path, kind: Kind) -> Source:
    digest, lines = _digest(path)
    rows = partial(_line_rows, path)
    found = iter(()) if _is_list(path) else rows(0)
    columns = dict.fromkeys(column for row in found if not row.problem for column in row.values)
    if not columns:
        raise DataError(
            f"{path} holds no JSON object a line. Rows are read one by one, so a list over the whole file won't do."
        )
    return Source(name, kind, tuple(columns), None, digest, lines, rows)


def _is_list(path: Path) -> bool:
    with path.open("rb") as file:
        return next(filter(None, map(bytes.strip, file)), b"").startswith(b"[")


def _line_rows(path: Path, start: int) -> Iterator[Row]:
    with path.open("rb") as file:
        filled = (line for line in file if line.strip())
        for number, line in enumerate(islice(filled, start, None), start + 1):
            yield _parsed(number, line)


def _parsed(number: int, line: bytes) -> Row:
    try:
        values: Any = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        return Row(number, {"line": line.decode(errors="backslashreplace").strip()}, f"it is no JSON: {error}")
    if not isinstance(values, dict):
        return Row(number, {"line": values}, "it is no JSON object")
    return Row(number, cast("dict[str, Any]", values))


def _parquet(name: str, path: Path, kind: Kind) -> Source:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, count = file.schema_arrow.remove_metadata(), file.metadata.num_rows
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} can't be read as PARQUET: {error}") from error
    if len(set(schema.names)) < len(schema.names):
        raise DataError(f"{path}: every column needs a name of its own, got {', '.join(schema.names)}.")
    digest, _ = _digest(path)
    return Source(name, kind, tuple(schema.names), schema, digest, count, partial(_parquet_rows, path))


def _parquet_rows(path: Path, start: int) -> Iterator[Row]:
    read = start
    try:
        for values in _parquet_values(path, start):
            read += 1
            yield Row(read, values)
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"{path} can't be read from row {read + 1} on: {error}") from error


def _parquet_values(path: Path, start: int) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in _batches(file, start):
            yield from batch.to_pylist()


def _batches(file: Any, start: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a Parquet file from one on; row groups before it aren't read."""
    left = start
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if left >= count:
            left -= count
            continue
        for batch in file.iter_batches(_AT_ONCE, row_groups=[group]):  # of all at once, what was read stays in memory
            yield batch.slice(min(left, batch.num_rows))
            left = max(0, left - batch.num_rows)


def _hub(name: str, part: str) -> Source:
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet
    from huggingface_hub import HfApi, constants

    asked = hub_id(name)
    with hub_errors(f"The data set {name!r} can't be had from the hub"):
        # A branch moves, its commit doesn't; and where no hub is, `datasets` would try for half a minute.
        info = HfApi().dataset_info(
            asked["path"], revision=asked.get("revision"), timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        asked["revision"] = str(info.sha)
        builder: Any = datasets.load_dataset_builder(**dict[str, Any](asked))
        files: Any = builder.config.data_files
        found = builder.as_streaming_dataset(split=part)
        version = " ".join(filter(None, [asked["revision"], asked.get("name"), part]))
        pinned = f"{name.partition('@')[0]}@{asked['revision']}"
        source = _streamed(pinned, found, part, version)
        if not isinstance(builder, Parquet):
            return source
        # The reader of `datasets` keeps a whole file in memory, and aborts a process that ends before it does.
        reads = partial(_hub_parquet, files[part], found.features.arrow_schema)
        return replace(source, rows=partial(_hub_rows, pinned, reads))


def _streamed(name: str, found: Any, part: str, version: str) -> Source:
    """Return a data set that `datasets` streams; pictures and sounds stay the bytes they are."""
    if not found.features and next(iter(found), None) is None:  # a file of no rows doesn't tell its columns
        raise DataError(f"{name} has no rows.")
    found = (found if found.features else found._resolve_features()).decode(False)
    schema: pa.Schema = found.features.arrow_schema.remove_metadata()
    known = (found.info.splits or {}).get(part)
    about = None if known is None else int(known.num_examples)
    reads = partial(_skipped, found)
    return Source(name, "parquet", tuple(schema.names), schema, version, about, partial(_hub_rows, name, reads))


def _skipped(found: Any, start: int) -> Iterator[dict[str, Any]]:
    return iter(found.skip(start))


def _hub_parquet(files: Sequence[str], schema: pa.Schema, start: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of Parquet files on the hub from one on, with the types that `datasets` gives them."""
    import pyarrow.parquet as pq
    from datasets.table import table_cast
    from huggingface_hub import HfFileSystem

    left = start
    for url in files:
        with HfFileSystem().open(url, "rb") as remote, pq.ParquetFile(remote) as file:
            for batch in _batches(file, left):
                yield from table_cast(pa.Table.from_batches([batch]), schema).to_pylist()
            left = max(0, left - file.metadata.num_rows)


def _hub_rows(name: str, reads: Callable[[int], Iterator[dict[str, Any]]], start: int) -> Iterator[Row]:
    read, values = start, reads(start)
    while True:
        with hub_errors(f"The data set {name!r} can't be read from row {read + 1} on"):
            row = next(values, None)
        if row is None:
            return
        read += 1
        yield Row(read, dict(row))


def _digest(path: Path) -> tuple[str, int]:
    """Return a file's SHA-256 and how many lines it has."""
    digest, lines, last = hashlib.sha256(), 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            lines += block.count(b"\n")
            last = block[-1:]
    return digest.hexdigest(), lines + (last != b"\n")
