"""Rows: reading them from files, and checking them before anything is spent."""

from __future__ import annotations

import contextlib
import csv
import logging
import re
import tempfile
import textwrap
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import dspy

from preceptor.errors import DataError
from preceptor.jsonlines import read_json
from preceptor.lm.adapter import takes_none
from preceptor.values import as_json
from preceptor.values import typed as typed

READERS: Final = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}

HUB_ID: Final = "a hub id (owner/name, or owner/name:configuration@revision)"
_HUB_ID: Final = re.compile(r"(?P<path>\w[\w.-]*/[\w.-]+)(:(?P<name>[^@]+))?(@(?P<revision>.+))?")
_OTHER_MARKS: Final = (";", "\t", "|")
"""What separates values in files named .csv that aren't."""

_MOST_TOLD: Final = 10
"""Rows of which a message says what is wrong with them."""
_TOLD: Final = 400
"""Characters of what others say about an error."""

_RAGGED: Final = re.compile(r"Expected (\d+) fields in line (\d+), saw (\d+)")
"""What pandas says of a row with more values than the first."""


def load_rows(
    source: str | Path,
    *,
    part: str = "train",
    where: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of a CSV, TSV, JSON, JSONL or Parquet file, or of a data set on the Hugging Face hub.

    Args:
        source: A file; a folder with a file for each part; or a hub id, `owner/name[:configuration][@revision]`, for
            those who have the network.
        part: The hub's split, or the name of the folder's file; a file is one part.
        where: In the hub's data set, by the names of `datasets.load_dataset`: `revision`, `name`, `data_dir`.
        columns: Field -> the column that holds it, for fields whose column has another name.

    Raises:
        DataError: If there is no such file or column, it can't be read, or it has no rows.
    """
    try:
        rows = _loaded(Path(source), str(source), part, where or {})
    except OSError as error:
        raise DataError(f"{source} can't be read: {error.strerror or error}.") from error
    refuse_absent(columns or {}, list(rows[0]), str(source))
    return [as_fields(row, columns) for row in rows] if columns else rows


def refuse_absent(columns: Mapping[str, str], names: Sequence[str], source: str) -> None:
    """Refuse data without a column that a field is to be read from.

    Args:
        columns: Field -> column.
        names: The data's columns.
        source: Named in the message.

    Raises:
        DataError: If one isn't there.
    """
    for field, column in columns.items():
        if column not in names:
            raise DataError(f"{source} has no column {column!r} to read {field} from; it has {', '.join(names)}.")


def as_fields(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a row by its fields' names; a column that only happens to have a field's name gives way.

    Args:
        row: Column -> value.
        columns: Field -> column.

    Example:
        >>> as_fields({"Message Body": "hi", "label": "a", "text": "x"}, {"text": "Message Body"})
        {'label': 'a', 'text': 'hi'}
    """
    others = {name: value for name, value in row.items() if name not in columns and name not in columns.values()}
    return others | {field: row.get(column) for field, column in columns.items()}


def _loaded(path: Path, source: str, part: str, where: Mapping[str, str]) -> list[dict[str, Any]]:
    if path.is_dir():
        return load_rows(file_in(path, part))
    if path.suffix.lower() not in READERS and not path.is_file():
        return _from_hub(source, part, where)
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: rows come from files that end in {', '.join(READERS)}, not in {path.suffix!r}.")
    if not path.is_file():
        raise DataError(f"No file {path}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; it needs a header and at least one row.")
    rows = _read(READERS[path.suffix.lower()], path)
    if not rows:
        raise DataError(f"{path} has no rows.")
    return rows


def file_in(folder: Path, part: str) -> Path:
    """Return the file of a folder that holds one part of the data.

    Raises:
        DataError: If there is none, or several.
    """
    files = [each for each in sorted(folder.iterdir()) if each.stem == part and each.suffix.lower() in READERS]
    if not files:
        raise DataError(f"{folder} has no {part} file ending in {', '.join(READERS)}.")
    if len(files) > 1:
        raise DataError(f"{folder} has several {part} files, {', '.join(each.name for each in files)}; name one.")
    return files[0]


def _read(reader: str, path: Path) -> list[dict[str, Any]]:
    if reader == "json":
        return read_json(path)
    import datasets
    from datasets.exceptions import DatasetGenerationError

    options: dict[str, Any] = _csv_options(path) if reader == "csv" else {}
    with tempfile.TemporaryDirectory() as cache:
        shown, told = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # what is wrong is told below, by the file's own name
        try:
            named = Path(cache) / f"rows{path.suffix}"  # what datasets is given is a pattern, as in mails[1].csv
            named.symlink_to(path.absolute())
            table = datasets.load_dataset(reader, data_files=str(named), split="train", cache_dir=cache, **options)
            return cast("list[dict[str, Any]]", table.to_list())
        except (DatasetGenerationError, ValueError, UnicodeDecodeError) as error:
            if "corresponds to no data" in str(error):
                return []
            cause = error.__cause__ or error
            if isinstance(cause, UnicodeDecodeError):
                raise _encoded(path, cause) from error
            if ragged := _RAGGED.search(str(cause)):
                raise DataError(_told_ragged(f"{path}, line {ragged[2]}", ragged[3], ragged[1])) from error
            raise DataError(f"{path} can't be read as {path.suffix[1:].upper()}: {cause}") from error
        finally:
            datasets.logging.set_verbosity(told)
            if shown:
                datasets.enable_progress_bars()


def _told_ragged(where: str, values: int | str, columns: int | str) -> str:
    return f"{where}: {values} values under {columns} columns; quote text with separators."


def _csv_options(path: Path) -> dict[str, Any]:
    """Return how to read a CSV or TSV file with every value as text: labels such as 1 or NA stay what they are."""
    import datasets

    header, first = _beginning(path, dialect(path))
    check_header(path, header)
    if len(first) > len(header):  # pandas would take the first column for an index and shift the others
        raise DataError(_told_ragged(f"{path}, row 1", len(first), len(header)))
    features = datasets.Features({name: datasets.Value("string") for name in header})
    options = {"sep": "\t", "quoting": csv.QUOTE_NONE} if dialect(path) else {}
    return {"features": features, "keep_default_na": False, "encoding": "utf-8-sig", **options}


def check_header(path: Path, header: Sequence[str]) -> None:
    """Raise if a CSV or TSV file's columns can't be told apart.

    Raises:
        DataError: If two have one name, one has none, or it seems to be another separator that is between them.
    """
    other = next((mark for mark in _OTHER_MARKS if mark in header[0]), "") if len(header) == 1 else ""
    if other and not dialect(path):
        raise DataError(
            f"{path}: one column, {header[0]!r}. Values are separated by commas, or in a file named .tsv by tabs; "
            f"here it seems to be {other!r}. Save it with commas."
        )
    if len(set(header)) < len(header) or not all(header):
        raise DataError(f"{path}: every column needs a name of its own, got {', '.join(header)}.")


def dialect(path: Path) -> dict[str, Any]:
    """Return how the `csv` module reads a file of this name: in a TSV file, quotes are text."""
    return {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {}


def _beginning(path: Path, dialect: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the header and the first row that isn't blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, **dialect)
            header = next(filter(None, lines), [])
            with contextlib.suppress(csv.Error):  # a text longer than csv's limit; pandas has none
                return header, next(filter(None, lines), [])
            return header, []
    except UnicodeDecodeError as error:
        raise _encoded(path, error) from error
    except csv.Error as error:
        raise DataError(f"{path} can't be read as {path.suffix[1:].upper()}: {error}.") from error


def _encoded(path: Path, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{path} isn't in UTF-8: {error}. Save it so; Excel calls it 'CSV UTF-8'.")


def _from_hub(name: str, part: str, where: Mapping[str, str]) -> list[dict[str, Any]]:
    import datasets

    asked = {**hub_id(name), **where}
    with hub_errors(f"The data set {name!r} can't be had from the hub"):
        return cast("list[dict[str, Any]]", datasets.load_dataset(split=part, **dict[str, Any](asked)).to_list())


def hub_id(name: str) -> dict[str, str]:
    """Return what a name means to `datasets.load_dataset`, if it names a data set on the Hugging Face hub.

    Raises:
        DataError: If it doesn't.

    Example:
        >>> hub_id("openai/gsm8k:main@v1")
        {'path': 'openai/gsm8k', 'name': 'main', 'revision': 'v1'}
    """
    found = _HUB_ID.fullmatch(name)
    if found is None:
        raise DataError(f"No file {name}; rows come from {', '.join(READERS)} or {HUB_ID}.")
    return {part: value for part, value in found.groupdict().items() if value}


@contextlib.contextmanager
def hub_errors(told: str) -> Generator[None]:
    """Raise `DataError` for whatever the hub, `datasets` or the data set's files are to blame for."""
    import httpx
    from datasets.exceptions import DatasetsError

    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, httpx.HTTPError, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        raise DataError(f"{told}: {textwrap.shorten(str(cause), _TOLD)}") from error


def examples(
    rows: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    *,
    source: str,
    columns: Mapping[str, str] | None = None,
) -> list[dspy.Example]:
    """Return rows as examples, every field checked and of the declared type; a label's record as JSON has it.

    Args:
        rows: One mapping per row.
        inputs: Input field -> type.
        outputs: Label field -> type.
        source: Named in messages.
        columns: Field -> the column that it was read from, where the names differ; for messages.

    Raises:
        DataError: Naming the row and the field: a missing column, an empty value, a wrong type, an unknown
            label, an id that occurs twice.
    """
    fields = {**inputs, **outputs}
    if not rows:
        raise DataError(f"{source} has no rows.")
    absent = [name for name, kind in fields.items() if name not in rows[0] and not takes_none(kind)]
    if absent:
        raise DataError(no_column(absent[0], [(columns or {}).get(name, name) for name in rows[0]], source))
    _refuse_duplicates(rows, source)
    found: list[dspy.Example] = []
    unusable: list[str] = []
    for number, row in enumerate(rows, 1):
        try:
            where = f"{source}, row {number}"
            values = typed(row, inputs, where) | as_json(row, outputs, where)
        except DataError as error:
            unusable.append(str(error))
        else:
            found.append(dspy.Example(**values).with_inputs(*inputs))
    if unusable:
        raise DataError(_together(unusable))
    return found


def no_column(field: str, names: Iterable[str], source: str) -> str:
    """Return what is said where no column has a field's name."""
    return (
        f"{source} has no column {field!r}; it has {', '.join(names)}. Where another one holds it, rename that, or say "
        f"so on the command line: --column {field}=NAME."
    )


def _together(unusable: Sequence[str]) -> str:
    """Return what is wrong with some rows, in one message."""
    told = "\n".join(unusable[:_MOST_TOLD])
    return f"{told}\n{len(unusable)} rows can't be used." if len(unusable) > 1 else told


def _refuse_duplicates(rows: Sequence[Mapping[str, Any]], source: str) -> None:
    first: dict[Any, int] = {}
    for number, row in enumerate(rows, 1):
        key = row.get("id")
        if key is None or key == "":
            continue
        key = repr(key) if isinstance(key, (list, dict)) else key
        if key in first:
            raise DataError(f"{source}: rows {first[key]} and {number} have the same id {key!r}.")
        first[key] = number


def check_examples(rows: Iterable[Any], inputs: Iterable[str], *, name: str) -> list[dspy.Example]:
    """Return `rows` as a list, if all are examples with the inputs a program needs.

    Raises:
        DataError: If there are none, one is no `dspy.Example`, or one lacks an input.
    """
    found, needed = list(rows), list(inputs)
    if not found:
        raise DataError(f"{name} is empty.")
    for number, row in enumerate(found, 1):
        if not isinstance(row, dspy.Example):
            raise DataError(f"{name}, row {number}: expected a dspy.Example, got {type(row).__name__}.")
        if row._input_keys is None:
            raise DataError(f"{name}, row {number}: call .with_inputs(...) to say which fields are inputs.")
        absent = [field for field in needed if field not in row.inputs()]
        if absent:
            raise DataError(f"{name}, row {number}: the input {absent[0]!r} is missing; it has {list(row.inputs())}.")
        for field, value in row.items():
            _refuse_surrogates(value, f"{name}, row {number}, {field}")
    return found


def _refuse_surrogates(value: Any, where: str) -> None:
    """Refuse half of a character, as JSON has it where a text was cut: it can be neither sent nor kept."""
    try:
        value.encode() if isinstance(value, str) else None
    except UnicodeEncodeError as error:
        half = f"lone surrogate U+{ord(error.object[error.start]):X}"
        raise DataError(f"{where}: no valid Unicode ({half}); no model can be sent it.") from error
