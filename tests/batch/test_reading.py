from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.table import InMemoryTable

from preceptor.batch import Source, open_source
from preceptor.batch.reading import _streamed
from preceptor.data import load_rows
from preceptor.errors import DataError

TRICKY = '\ufeffid,text,label\n1,"a, ""b""\nc",NA\n\n2,  spaced ,\n3,\u00e9\u20ac,null\n'


def written(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def values(source: Source, start: int = 0) -> list[dict[str, object]]:
    return [row.values for row in source.rows(start)]


@pytest.mark.parametrize(("name", "content"), [("a.csv", TRICKY), ("a.tsv", 'id\ttext\n1\t"quoted\n2\tNA\n')])
def test_a_table_has_the_values_that_the_other_commands_read(name: str, content: str, tmp_path: Path) -> None:
    source = open_source(written(tmp_path / name, content))
    assert values(source) == load_rows(tmp_path / name)
    assert not any(row.problem for row in source.rows(0))


def test_a_json_line_keeps_its_keys_and_types(tmp_path: Path) -> None:
    lines = [{"text": "a", "when": "2024-01-01 10:00:00"}, {"text": "b", "n": 1, "deep": {"x": [1, None]}}, {"n": 1.5}]
    source = open_source(written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines))))
    assert values(source) == lines
    assert (source.columns, source.about, source.kind) == (("text", "when", "n", "deep"), 3, "jsonl")


def test_a_parquet_file_is_read_from_any_row_on_across_row_groups(tmp_path: Path) -> None:
    table = pa.table({"n": list(range(10)), "text": [f"t{n}" for n in range(10)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    source = open_source(str(tmp_path / "a.parquet"))
    assert source.about == 10
    for start in range(12):
        rows = list(source.rows(start))
        assert [row.number for row in rows] == list(range(start + 1, 11))
        assert [row.values["n"] for row in rows] == list(range(start, 10))


def test_every_kind_starts_at_any_row(tmp_path: Path) -> None:
    for name in ("a.csv", "a.jsonl"):
        line = "{}" if name == "a.csv" else '{{"text": "{}"}}'
        head = "text\n" if name == "a.csv" else ""
        source = open_source(written(tmp_path / name, head + "\n".join(line.format(f"t{n}") for n in range(5))))
        assert source.about == 5
        assert [(row.number, row.values["text"]) for row in source.rows(3)] == [(4, "t3"), (5, "t4")]
        assert list(source.rows(5)) == []


def test_a_bad_row_is_a_row_with_a_problem_and_the_next_is_read(tmp_path: Path) -> None:
    table = open_source(written(tmp_path / "a.csv", b"a,b\n1,2\n3\n4,5,6\n\xff,7\n8,9\n"))
    assert [row.problem for row in table.rows(0)] == [
        "",
        "1 values under 2 columns; quote text with separators",
        "3 values under 2 columns; quote text with separators",
        "it isn't UTF-8",
        "",
    ]
    lines = open_source(written(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": \n[1]\n{"a": 2}\n'))
    assert [bool(row.problem) for row in lines.rows(0)] == [False, True, True, False]
    assert [row.number for row in lines.rows(0)] == [1, 2, 3, 4]


def test_the_fingerprint_is_the_content_s(tmp_path: Path) -> None:
    one, same = (open_source(written(tmp_path / name, "a\n1\n")) for name in ("one.csv", "same.csv"))
    other = open_source(written(tmp_path / "other.csv", "a\n2\n"))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_a_value_may_be_longer_than_python_s_limit(tmp_path: Path) -> None:
    source = open_source(written(tmp_path / "a.csv", f"a,b\n{'x' * 200_000},1\n"))
    [row] = source.rows(0)
    assert len(row.values["a"]) == 200_000


def test_a_part_is_a_file_of_a_folder(tmp_path: Path) -> None:
    written(tmp_path / "test.csv", "a\n1\n")
    assert values(open_source(str(tmp_path), part="test")) == [{"a": "1"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", r"a\.csv is empty; it needs a header and at least one row\."),
        ("a.csv", "a;b\n1;2\n", r"a\.csv: one column, 'a;b'\. Values are separated by commas, .* to be ';'\."),
        ("a.csv", "a,a\n1,2\n", "every column needs a name of its own, got a, a"),
        ("a.csv", "a,b\n", "has no rows"),
        (
            "a.csv",
            'text,n\n"two\nlines",1\n"oops,2\nmore,3\n',
            r"a\.csv: a quote in the row that begins in line 4 is never closed\.$",
        ),
        ("a.csv.gz", "a", r"a\.csv\.gz: rows come from files that end in \.csv, .*, not in '\.gz'\."),
        ("a.jsonl", "", "holds no JSON object a line"),
        ("a.json", '[\n{"a": 1}\n]\n', "a list over the whole file won't do"),
        ("a.parquet", "no parquet", "can't be read as PARQUET"),
    ],
)
def test_what_cannot_be_read_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_source(written(tmp_path / name, content))


def test_a_last_row_may_end_in_quotes_and_without_a_line_end(tmp_path: Path) -> None:
    source = open_source(written(tmp_path / "a.csv", 'text,n\n1,"a ""b"""'))
    assert values(source) == [{"text": "1", "n": 'a "b"'}]


def test_columns_of_one_name_are_refused_in_parquet_too(tmp_path: Path) -> None:
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="every column needs a name of its own, got a, a"):
        open_source(str(tmp_path / "a.parquet"))


def test_a_value_of_a_parquet_file_that_cannot_be_read_is_named_with_its_row(tmp_path: Path) -> None:
    ends, text = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")
    bad = pa.Array.from_buffers(pa.string(), 2, [None, ends, text])
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet can't be read from row \d on: .*utf-8"):
        open_source(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_file_that_the_system_refuses_to_read_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to("/proc/self/mem")  # may be opened, and fails where it is read
    with pytest.raises(DataError, match=rf"{name} can't be read: Input/output error\.$"):
        open_source(str(tmp_path / name))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No file"):
        open_source(str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match=r"rows come from .csv"):
        open_source("nowhere")


def test_what_the_hub_streams_has_its_types_and_starts_at_any_row() -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "n": [1, 2, 3]})
    source = _streamed("owner/name", rows.to_iterable_dataset(), "train", "abc train")
    assert (source.kind, source.columns, source.fingerprint) == ("parquet", ("text", "n"), "abc train")
    assert source.schema == pa.schema([("text", pa.string()), ("n", pa.int64())])
    assert [(row.number, row.values) for row in source.rows(1)] == [
        (2, {"text": "b", "n": 2}),
        (3, {"text": "c", "n": 3}),
    ]


def test_pictures_that_the_hub_streams_stay_the_bytes_they_are() -> None:
    rows = [{"scan": {"bytes": b"no picture", "path": "0.png"}}]
    table = pa.Table.from_pylist(rows, schema=datasets.Features({"scan": datasets.Image()}).arrow_schema)
    scans = datasets.Dataset(InMemoryTable(table)).to_iterable_dataset()
    assert values(_streamed("owner/name", scans, "train", "abc train")) == rows
