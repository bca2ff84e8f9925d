from __future__ import annotations

import csv
import datetime
import enum
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preceptor.batch.reading import Kind, open_source
from preceptor.batch.writing import column_type, join, writing
from preceptor.data import load_rows

COLUMNS = {"label": "str", "score": "float", "sure": "bool", "count": "int"}


class Queue(enum.Enum):
    BILLING = "billing"


ROWS: list[dict[str, Any]] = [
    {"text": 'a, "b"\nc', "label": "spam", "score": 0.5, "sure": True, "count": 3},
    {"text": "d", "label": None, "score": None, "sure": None, "count": None},
]


def put(path: Path, kind: Kind, rows: Sequence[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    with writing(path, kind, ["text"], schema, COLUMNS) as write:
        for row in rows:
            write(row)
    return path


def test_a_table_has_a_header_and_none_is_empty(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "csv", ROWS)
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["text", *COLUMNS],
            ['a, "b"\nc', "spam", "0.5", "True", "3"],
            ["d", "", "", "", ""],
        ]


@pytest.mark.parametrize(
    "row",
    [
        {"a\rb": "x\ry", "label": "spam"},
        {"a\rb": "x", "label": "first\rsecond"},
        {"a\rb": "\r", "label": "\r\n"},
    ],
)
def test_a_carriage_return_ends_no_row_for_any_reader(row: dict[str, str], tmp_path: Path) -> None:
    rows = [{"a\rb": "before", "label": "mail"}, row, {"a\rb": "after", "label": "mail"}]
    for number, part in enumerate((rows[:2], rows[2:])):
        with writing(tmp_path / f"{number}.csv", "csv", ["a\rb"], None, {"label": "str"}) as write:
            for each in part:
                write(each)
    whole = tmp_path / "whole.csv"
    join([tmp_path / "0.csv", tmp_path / "1.csv"], whole, "csv")

    with whole.open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == rows
    assert load_rows(whole) == rows  # by `datasets`
    assert [each.values for each in open_source(str(whole)).rows(0)] == rows


def test_an_answer_s_tabs_and_line_ends_are_escaped_where_quotes_are_text(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tsv", "tsv", [{"text": '"as it was', "label": "a\tb\nc\\d", "score": 1.0}])
    [row] = open_source(str(path)).rows(0)
    assert row.values["text"] == '"as it was'
    assert row.values["label"] == "a\\tb\\nc\\\\d"


def test_json_lines_keep_numbers_lists_and_half_a_character(tmp_path: Path) -> None:
    path = put(
        tmp_path / "a.jsonl", "jsonl", [{"text": ["x"], "label": Queue.BILLING, "score": 0.5}, {"text": "\ud83d"}]
    )
    first, second = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert first == {"text": ["x"], "label": "billing", "score": 0.5}
    assert second == {"text": "\ud83d"}


def test_numbers_that_json_does_not_know_are_null(tmp_path: Path) -> None:
    first: dict[str, Any] = {"text": "NaN is no number", "score": float("nan")}
    rows = [first, {"text": "x", "score": [float("-inf"), 1.5]}]
    path = put(tmp_path / "a.jsonl", "jsonl", rows)
    assert path.read_text(encoding="utf-8").splitlines() == [
        '{"text": "NaN is no number", "score": null}',
        '{"text": "x", "score": [null, 1.5]}',
    ]


def test_parquet_keeps_the_types_it_came_with_and_adds_typed_columns(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 1, 1, 10)
    schema = pa.schema([("text", pa.large_string()), ("when", pa.timestamp("us")), ("tags", pa.list_(pa.int8()))])
    row = {"text": "a", "when": when, "tags": [1, 2], "label": ["x"], "score": 1, "sure": False, "count": 7}
    path = put(tmp_path / "a.parquet", "parquet", [row, {"text": "b", "label": "half \ud83d"}], schema)
    table = pq.read_table(path)
    assert table.schema == pa.schema(
        [*schema, ("label", pa.string()), ("score", pa.float64()), ("sure", pa.bool_()), ("count", pa.int64())]
    )
    first, second = table.to_pylist()
    assert first == {**row, "label": '["x"]', "score": 1.0}
    assert (second["label"], second["when"], second["count"]) == ("half \\ud83d", None, None)


@pytest.mark.parametrize(
    ("answer", "told"),
    [({"count": 2**63}, "count: 9223372036854775808 is no int64"), ({"score": "high"}, "score: 'high' is no double")],
)
def test_an_answer_that_a_column_cannot_hold_is_refused_at_once_and_the_others_are_written(
    answer: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    with writing(path, "parquet", ["text"], pa.schema([("text", pa.string())]), COLUMNS) as write:
        write({"text": "a", "count": 2**63 - 1})
        with pytest.raises(ValueError, match=told):
            write({"text": "b", **answer})
        write({"text": "c", "score": 1})
    assert [(row["text"], row["score"], row["count"]) for row in pq.read_table(path).to_pylist()] == [
        ("a", None, 2**63 - 1),
        ("c", 1.0, None),
    ]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_parts_are_joined_in_order_with_one_header(kind: Kind, tmp_path: Path) -> None:
    schema = pa.schema([("text", pa.string())])
    rows = [{"text": f"t{n}", "label": "spam", "score": 0.5, "sure": True, "count": n} for n in range(5)]
    parts = [put(tmp_path / f"{start}.{kind}", kind, rows[start : start + 2], schema) for start in (0, 2, 4)]
    join(parts, tmp_path / f"whole.{kind}", kind)
    whole = open_source(str(put(tmp_path / f"at-once.{kind}", kind, rows, schema)))
    joined = open_source(str(tmp_path / f"whole.{kind}"))
    assert [row.values for row in joined.rows(0)] == [row.values for row in whole.rows(0)]
    assert len(list(joined.rows(0))) == 5


def test_a_header_over_two_lines_is_skipped_whole(tmp_path: Path) -> None:
    for number in range(2):
        with writing(tmp_path / f"{number}.csv", "csv", ["a\nb"], None, {"c": "int"}) as write:
            write({"a\nb": "x", "c": number})
    join([tmp_path / "0.csv", tmp_path / "1.csv"], tmp_path / "whole.csv", "csv")
    assert (tmp_path / "whole.csv").read_text() == '"a\nb",c\nx,0\nx,1\n'


def test_numbers_are_columns_of_numbers_and_all_else_is_text() -> None:
    kinds = (Literal["a", "b"], Literal[1, "b"], float | None, dict[str, int], Queue)
    assert [column_type(kind) for kind in kinds] == ["str", "str", "float", "str", "str"]
