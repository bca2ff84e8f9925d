"""Writing answered rows the way the rows came: CSV, TSV, JSONL or Parquet."""

from __future__ import annotations

import csv
import json
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args, get_origin

import pyarrow as pa
from dspy.adapters.utils import serialize_for_json

from preceptor.batch.reading import Kind
from preceptor.data import dialect
from preceptor.lm.adapter import bare
from preceptor.scoring.texts import as_text

Columns: TypeAlias = Mapping[str, str]
"""Column -> `int`, `float`, `bool` or `str`."""

Write: TypeAlias = Callable[[Mapping[str, Any]], None]

_ARROW: Final[dict[str, pa.DataType]] = {
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "str": pa.string(),
}
_GROUP: Final = 1000
"""Rows of a Parquet file that are written at a time."""

UNWRITABLE: Final = (TypeError, ValueError, OverflowError, RecursionError)
"""What Arrow and JSON raise for a value of another type or size than a column takes."""

_NO_JSON: Final = ("NaN", "Infinity")
"""How Python writes numbers that JSON doesn't know."""

_HALVES: Final = "backslashreplace"
"""Half a character, as a cut-off answer may end in, is written as JSON's escape for it."""

_ESCAPES: Final = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
"""What an answer in a TSV file is written with, since quotes are text there."""


def column_type(annotation: Any) -> str:
    """Return what a field's values are written as: numbers and truth values as such, all else as text.

    Example:
        >>> from typing import Literal
        >>> [column_type(kind) for kind in (str, int | None, Literal[1, 2], Literal["a"], list[int], bool)]
        ['str', 'int', 'int', 'str', 'str', 'bool']
    """
    inner = bare(annotation)
    kinds = {type(value) for value in get_args(inner)} if get_origin(inner) is Literal else {inner}
    return next((kind.__name__ for kind in (bool, int, float) if kinds == {kind}), "str")


@contextmanager
def writing(
    path: Path, kind: Kind, inputs: Iterable[str], schema: pa.Schema | None, outputs: Columns
) -> Generator[Write]:
    """Open a file for answered rows; what is yielded writes one, in constant memory.

    A row whose answer can't be written down as its column is declared raises one of `UNWRITABLE` and leaves no trace.

    Args:
        path: Overwritten.
        kind: How rows are written down.
        inputs: Columns that were read.
        schema: Their types, for Parquet.
        outputs: Columns that the program answered.
    """
    if kind == "parquet":
        fields = [pa.field(name, _ARROW[each]) for name, each in outputs.items()]
        with _parquet(path, pa.schema([*(schema or ()), *fields]), outputs) as write:
            yield write
        return
    with path.open("w", encoding="utf-8", errors=_HALVES, newline="") as file:
        if kind == "jsonl":
            yield lambda row: print_line(file, row)
            return
        is_tsv = kind == "tsv"
        style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if is_tsv else {}
        table = csv.writer(file, lineterminator="\n", **style)
        # Python up to 3.12 leaves a carriage return bare where lines end with a line feed; readers end a row there.
        quoted = table if is_tsv else csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        names = [*inputs, *outputs]

        def put(cells: list[str]) -> None:
            (quoted if any("\r" in cell for cell in cells) else table).writerow(cells)

        put(names)
        yield lambda row: put([_cell(row.get(name), is_tsv and name in outputs) for name in names])


def print_line(file: Any, value: Mapping[str, Any]) -> None:
    """Write one object as a line of JSON; numbers that JSON doesn't know are null."""
    text = json.dumps(dict(value), ensure_ascii=False, default=serialize_for_json)
    if any(name in text for name in _NO_JSON):
        text = json.dumps(json.loads(text, parse_constant=lambda name: None), ensure_ascii=False)
    file.write(text + "\n")


def _cell(value: Any, is_escaped: bool) -> str:
    text = as_text(value)
    return text.translate(_ESCAPES) if is_escaped else text


@contextmanager
def _parquet(path: Path, schema: pa.Schema, outputs: Columns) -> Generator[Write]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []

    def write(row: Mapping[str, Any]) -> None:
        rows.append({**row, **{name: _storable(name, row.get(name), kind) for name, kind in outputs.items()}})
        if len(rows) == _GROUP:
            flush()

    def flush() -> None:
        if rows:
            file.write_table(pa.Table.from_pylist(rows, schema=schema))
            rows.clear()

    with pq.ParquetWriter(path, schema) as file:
        yield write
        flush()


def _storable(name: str, value: Any, kind: str) -> Any:
    """Return an answer as its column holds it.

    Raises:
        ValueError: If it can't: a whole number beyond 64 bits, say, or text where a number is declared.
    """
    if value is None:
        return None
    if kind == "str":
        return as_text(value).encode("utf-8", _HALVES).decode()
    try:
        return pa.scalar(value, _ARROW[kind]).as_py()
    except UNWRITABLE as error:
        raise ValueError(f"{name}: {value!r:.80} is no {_ARROW[kind]}: {error}") from error


def join(parts: Iterable[Path], to: Path, kind: Kind) -> None:
    """Write files of one kind and the same columns into one, in order and in constant memory."""
    if kind == "parquet":
        _join_parquet(parts, to)
        return
    with to.open("wb") as file:
        for number, part in enumerate(parts):
            skipped = _header_lines(part) if number and kind != "jsonl" else 0
            with part.open("rb") as lines:
                deque(islice(lines, skipped), maxlen=0)
                shutil.copyfileobj(lines, file)


def _header_lines(part: Path) -> int:
    with part.open(encoding="utf-8", newline="\n") as file:  # lines as `join` counts them, in bytes
        header = csv.reader(file, **dialect(part))
        next(header)
        return header.line_num


def _join_parquet(parts: Iterable[Path], to: Path) -> None:
    import pyarrow.parquet as pq

    groups = _groups(parts)
    first = next(groups)
    with pq.ParquetWriter(to, first.schema) as file:
        for group in chain([first], groups):
            file.write_table(group)


def _groups(parts: Iterable[Path]) -> Iterator[pa.Table]:
    import pyarrow.parquet as pq

    for part in parts:
        with pq.ParquetFile(part) as file:
            yield from map(file.read_row_group, range(file.num_row_groups))
