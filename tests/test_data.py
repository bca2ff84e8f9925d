from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal

import datasets
import dspy
import pydantic
import pytest

from preceptor.cli.inputs import rows_of
from preceptor.data import check_examples, examples, load_rows
from preceptor.errors import DataError
from preceptor.scoring.metrics import wrap

ROWS = [{"text": "Hello, you", "label": "1"}, {"text": 'She said "no"', "label": "NA"}]


def written(folder: Path, name: str, content: str, encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(content.encode(encoding))
    return path


def as_csv(separator: str = ",") -> str:
    return f'text{separator}label\n"Hello, you"{separator}1\n"She said ""no"""{separator}NA\n'


def as_tsv() -> str:
    return 'text\tlabel\nHello, you\t1\nShe said "no"\tNA\n'


def as_jsonl() -> str:
    return "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", as_csv()),
        ("rows.CSV", as_csv()),
        ("rows.tsv", as_tsv()),
        ("rows.jsonl", as_jsonl()),
        ("rows.json", json.dumps(ROWS)),
    ],
)
def test_a_text_file_gives_its_rows_and_labels_such_as_1_and_na_stay_text(
    tmp_path: Path, name: str, content: str
) -> None:
    assert load_rows(written(tmp_path, name, content)) == ROWS


def test_a_field_is_read_from_the_column_it_is_told_and_one_that_has_its_name_gives_way(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", "text,Message Body,Queue\nsubject,Hello,a\nsubject,Bye,b\n")
    told = {"text": "Message Body", "label": "Queue"}
    assert load_rows(path, columns=told) == [{"text": "Hello", "label": "a"}, {"text": "Bye", "label": "b"}]
    with pytest.raises(
        DataError, match=r"rows\.csv has no column 'queue' to read label from; it has text, Message Body"
    ):
        load_rows(path, columns={"label": "queue"})


def test_a_parquet_file_gives_its_rows_with_their_types(tmp_path: Path) -> None:
    rows = [{"text": "Hello", "stars": 5, "good": True}, {"text": "Bye", "stars": 1, "good": False}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))

    assert load_rows(str(tmp_path / "rows.parquet")) == rows


def test_a_folder_gives_the_part_asked_for(tmp_path: Path) -> None:
    written(tmp_path, "train.csv", "text,label\nhi,a\n")
    written(tmp_path, "validation.jsonl", '{"text": "ho", "label": "b"}\n')
    written(tmp_path, "train.md", "What these rows are.")

    assert load_rows(tmp_path) == [{"text": "hi", "label": "a"}]
    assert load_rows(tmp_path, part="validation") == [{"text": "ho", "label": "b"}]
    with pytest.raises(DataError, match=r"has no test file ending in \.csv, \.tsv, \.jsonl, \.json, \.parquet\.$"):
        load_rows(tmp_path, part="test")
    written(tmp_path, "train.balanced.csv", "text,label\nhi,c\n")
    assert load_rows(tmp_path) == [{"text": "hi", "label": "a"}]
    written(tmp_path, "train.json", "[]")
    with pytest.raises(DataError, match=r"has several train files, train\.csv, train\.json; name one\.$"):
        load_rows(tmp_path)


def test_blank_lines_before_the_header_are_passed_over(tmp_path: Path) -> None:
    assert load_rows(written(tmp_path, "a.csv", "\n\ntext,label\nhi,a\n")) == [{"text": "hi", "label": "a"}]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = written(tmp_path, "excel.csv", as_csv(), encoding="utf-8-sig")
    assert load_rows(path) == ROWS


def test_quoted_text_keeps_its_line_breaks_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", 'text,label\n"one\ntwo",a\n\nthree,b\n')
    assert load_rows(path) == [{"text": "one\ntwo", "label": "a"}, {"text": "three", "label": "b"}]


def test_a_very_long_text_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "long.csv", f"text,label\n{'x' * 200_000},a\n")
    assert load_rows(path) == [{"text": "x" * 200_000, "label": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", "", r"empty\.csv is empty; it needs a header and at least one row\."),
        ("empty.jsonl", "", r"empty\.jsonl is empty; it needs"),
        ("header.csv", "text,label\n", r"header\.csv has no rows\."),
        ("empty.json", "[]", r"empty\.json has no rows\."),
        ("twice.csv", "text,text\na,b\n", r"twice\.csv: every column needs a name of its own, got text, text\."),
        ("nameless.csv", "text,\na,b\n", r"nameless\.csv: every column needs a name of its own, got text, \."),
        ("shifted.csv", "text,label\na,b,c\n", r"shifted\.csv, row 1: 3 values under 2 columns; quote text with"),
        (
            "long.csv",
            "text,label\na,b\nc,d,e\n",
            r"long\.csv, line 3: 3 values under 2 columns; quote text with separators\.$",
        ),
        ("bad.jsonl", '{"text": "a"}\n\n{oops\n', r"bad\.jsonl, line 3 can't be read as JSON: Expecting property name"),
        (
            "bad.json",
            '[{"text": "a"},',
            r"bad\.json can't be read as JSON: .* Rows are a list of objects, or an object a",
        ),
        ("texts.jsonl", '{"text": "a"}\n"b"\n', r'texts\.jsonl, line 2: expected an object, as in .*, got "b"\.'),
        ("texts.json", '[{"text": "a"}, ["b"]]', r'texts\.json, row 2: expected an object, as in .*, got \["b"\]\.'),
        ("half.jsonl", '{"text": "\\ud83d"}', r"half\.jsonl, line 1: it holds half a character, '\\ud83d'\."),
        ("bad.parquet", "no parquet", r"bad\.parquet can't be read as PARQUET: "),
    ],
)
def test_a_file_that_cant_be_used_is_named_with_the_reason(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(written(tmp_path, name, content))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_text_of_a_json_file_stays_what_it_is_and_a_missing_key_is_none(tmp_path: Path, name: str) -> None:
    rows = [
        {"text": "2024-05-01", "at": "2024-05-01 10:00:00", "n": 1},
        {"text": "007\u2028\ud83d\ude00", "tags": ["a", 1]},
    ]
    lines = json.dumps(rows) if name == "rows.json" else "\ufeff" + "\r\n".join(map(json.dumps, rows))
    assert load_rows(written(tmp_path, name, lines)) == [
        {"text": "2024-05-01", "at": "2024-05-01 10:00:00", "n": 1, "tags": None},
        {"text": "007\u2028\U0001f600", "at": None, "n": None, "tags": ["a", 1]},
    ]


def test_what_datasets_logs_of_a_file_that_cant_be_read_is_not_shown(tmp_path: Path) -> None:
    records: list[logging.LogRecord] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    noting, logger = Noting(), logging.getLogger("datasets")
    level = logger.level
    logger.addHandler(noting)
    try:
        with pytest.raises(DataError, match=r"long\.csv, line 3: 3 values"):
            load_rows(written(tmp_path, "long.csv", "text,label\na,b\nc,d,e\n"))
    finally:
        logger.removeHandler(noting)
    assert records == []
    assert logger.level == level


@pytest.mark.parametrize("content", ["téxt,label\nhi,a\n", "text,label\nhé,a\n"])
def test_a_file_in_another_encoding_is_refused(tmp_path: Path, content: str) -> None:
    message = (
        r"latin\.csv isn't in UTF-8: 'utf-8' codec can't decode byte 0xe9.*\. Save it so; Excel calls it 'CSV UTF-8'"
    )
    with pytest.raises(DataError, match=message):
        load_rows(written(tmp_path, "latin.csv", content, encoding="latin-1"))


def test_a_file_in_two_bytes_a_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wide\.csv isn't in UTF-8: .*Save it so"):
        load_rows(written(tmp_path, "wide.csv", "text,label\nhi,a\n", encoding="utf-16"))


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_file_of_other_separators_is_refused_with_what_they_seem_to_be(tmp_path: Path, mark: str) -> None:
    message = rf"marked\.csv: one column, 'text.*label'\. .* here it seems to be {re.escape(repr(mark))}\. Save it with"
    with pytest.raises(DataError, match=message):
        load_rows(written(tmp_path, "marked.csv", f"text{mark}label\nhi{mark}a\n"))
    assert load_rows(written(tmp_path, "one.csv", "text\nhi; there\n")) == [{"text": "hi; there"}]


def test_all_rows_that_cant_be_used_are_told_together_ten_of_them_one_by_one() -> None:
    rows = [{"text": f"row {n}", "label": "c" if n % 2 else "a"} for n in range(30)]
    with pytest.raises(DataError) as caught:
        checked(*rows)

    lines = str(caught.value).splitlines()
    assert lines[:2] == [f"rows.csv, row {n}, label: 'c' is no label; expected one of a, b." for n in (2, 4)]
    assert lines[9:] == ["rows.csv, row 20, label: 'c' is no label; expected one of a, b.", "15 rows can't be used."]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^No file .*none\.csv\.$"):
        load_rows(tmp_path / "none.csv")


@pytest.mark.parametrize("name", ["rows.xlsx", "./owner/rows", "/owner/rows", "rows"])
def test_what_is_neither_a_file_nor_a_hub_id_is_refused_without_the_network(name: str) -> None:
    with pytest.raises(
        DataError, match=rf"^No file {name}; rows come from \.csv, .* or a hub id \(owner/name, .*\)\.$"
    ):
        load_rows(name)


INPUTS: dict[str, Any] = {"text": str}
OUTPUTS: dict[str, Any] = {"label": Literal["a", "b"]}


def checked(*rows: dict[str, Any], inputs: dict[str, Any] = INPUTS, outputs: dict[str, Any] = OUTPUTS) -> Any:
    return examples(rows, inputs, outputs, source="rows.csv")


def test_rows_become_examples_with_their_inputs_and_without_other_columns() -> None:
    [example] = checked({"id": "7", "text": "hi", "label": "a", "note": "x"})

    assert example.toDict() == {"text": "hi", "label": "a"}
    assert example.inputs().toDict() == {"text": "hi"}
    assert example.labels().toDict() == {"label": "a"}


def test_values_become_the_declared_types() -> None:
    types: dict[str, Any] = {"n": int, "x": float, "yes": bool, "stars": Literal[1, 2], "tags": list[str]}
    row = {"text": "hi", "n": " 3", "x": "2.5", "yes": "TRUE", "stars": "2", "tags": ["a"]}

    [example] = checked(row, outputs=types)

    assert example.labels().toDict() == {"n": 3, "x": 2.5, "yes": True, "stars": 2, "tags": ["a"]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"^rows\.csv has no rows\.$"),
        (
            [{"text": "hi", "lable": "a"}],
            r"^rows\.csv has no column 'label'; it has text, lable\. .*: --column label=NAME\.$",
        ),
        (
            [{"text": "hi", "label": "a"}, {"text": "ho", "label": "c"}],
            r"^rows\.csv, row 2, label: 'c' is no label; expected one of a, b\.$",
        ),
        ([{"text": "", "label": "a"}], r"^rows\.csv, row 1, text: the value is missing\.$"),
        ([{"text": "hi", "label": "a"}, {"text": "ho"}], r"^rows\.csv, row 2, label: the value is missing\.$"),
        ([{"text": 7, "label": "a"}], r"^rows\.csv, row 1, text: expected text, got int 7\.$"),
        (
            [{"id": number, "text": "hi", "label": "a"} for number in (4, 5, 4)],
            r"^rows\.csv: rows 1 and 3 have the same id 4\.$",
        ),
    ],
)
def test_a_row_that_cant_be_used_is_named_with_its_field(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        checked(*rows)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (int, "2.5", r"rows\.csv, row 1, label: expected int, got '2\.5'\."),
        (float, "many", r"rows\.csv, row 1, label: expected float, got 'many'\."),
        (bool, "yes", r"rows\.csv, row 1, label: expected True or False, got 'yes'\."),
    ],
)
def test_a_value_of_another_type_is_refused(kind: type, value: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        checked({"text": "hi", "label": value}, outputs={"label": kind})


def test_rows_without_ids_may_repeat() -> None:
    assert len(checked({"text": "hi", "label": "a"}, {"text": "hi", "label": "a"})) == 2


def test_examples_of_the_users_are_returned_as_they_are() -> None:
    rows = [dspy.Example(text="hi", label="a").with_inputs("text")]
    assert check_examples(iter(rows), ["text"], name="trainset") == rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"^trainset is empty\.$"),
        ([{"text": "hi"}], r"^trainset, row 1: expected a dspy\.Example, got dict\.$"),
        (
            [dspy.Example(text="hi")],
            r"^trainset, row 1: call \.with_inputs\(\.\.\.\) to say which fields are inputs\.$",
        ),
        (
            [dspy.Example(text="hi").with_inputs("text"), dspy.Example(body="hi").with_inputs("body")],
            r"^trainset, row 2: the input 'text' is missing; it has \['body'\]\.$",
        ),
    ],
)
def test_what_is_no_usable_example_is_refused_with_its_row(rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_examples(rows, ["text"], name="trainset")


class Ticket(pydantic.BaseModel):
    queue: str
    urgent: bool


TAX = Ticket(queue="tax", urgent=True)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (list[str], '["a", "b"]', ["a", "b"]),
        (dict[str, int], '{"a": 1}', {"a": 1}),
        (list, "[1]", [1]),
        (list[str] | None, "[]", []),
    ],
)
def test_a_list_or_a_record_is_written_as_json_where_all_is_text(kind: Any, text: str, value: Any) -> None:
    row = checked({"text": text, "label": text}, inputs={"text": kind}, outputs={"label": kind})[0]
    assert (row.text, row.label) == (value, value)


@pytest.mark.parametrize("is_text", [True, False])
@pytest.mark.parametrize(
    ("kind", "plain", "value"),
    [
        (Ticket, TAX.model_dump(), TAX),
        (Ticket | None, TAX.model_dump(), TAX),
        (list[Ticket], [TAX.model_dump()], [TAX]),
        (dict[str, Ticket], {"a": TAX.model_dump()}, {"a": TAX}),
    ],
)
def test_an_input_that_is_a_record_is_an_object_of_its_class_and_a_label_is_as_json_has_it(
    kind: Any, plain: Any, value: Any, *, is_text: bool
) -> None:
    given = json.dumps(plain) if is_text else plain
    row = checked({"text": given, "label": given}, inputs={"text": kind}, outputs={"label": kind})[0]
    assert (row.text, row.label) == (value, plain)


def test_a_record_that_isnt_of_its_class_is_refused_with_the_row_and_the_field() -> None:
    rows: list[dict[str, Any]] = [{"text": TAX.model_dump(), "label": "a"}, {"text": {"queue": "tax"}, "label": "a"}]
    told = r"^rows\.csv, row 2, text: \{'queue': 'tax'\} is no Ticket: urgent: Field required\.$"
    with pytest.raises(DataError, match=told):
        checked(*rows, inputs={"text": Ticket})


def test_a_label_of_csv_that_is_a_list_scores_as_the_answer_does(tmp_path: Path) -> None:
    place = written(tmp_path, "rows.csv", 'text,tags\nhello,"[""mail"", ""work""]"\n')
    [row] = rows_of(dspy.Predict("text -> tags: list[str]"), str(place))
    assert wrap("exact_match", "tags")(row, dspy.Prediction(tags=["mail", "work"])) == 1
    assert wrap("exact_match", "tags")(row, dspy.Prediction(tags=["mail"])) == 0


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (
            list[str],
            "mail, work",
            r"label: 'mail, work' is no list\[str\]; write it in JSON, as in \[\"a\", \"b\"\]\.$",
        ),
        (list[int], '["x"]', r"label: '\[\"x\"\]' is no list\[int\]; write it in JSON"),
        (Ticket, '{"queue": "tax"}', r"is no Ticket; write it in JSON, as in \{\"name\": \"value\"\}\.$"),
    ],
)
def test_what_is_no_such_json_is_refused_with_an_example(kind: Any, text: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"^rows\.csv, row 1, .*{message}"):
        checked({"text": "hi", "label": text}, outputs={"label": kind})


def test_a_name_is_no_pattern_of_names(tmp_path: Path) -> None:
    for name in ("mails[1].csv", "mails1.csv", "a*b?.csv", "a::b.jsonl"):
        content = f"text\n{name}\n" if name.endswith("csv") else json.dumps({"text": name})
        written(tmp_path, name, content)
    for name in ("mails[1].csv", "a*b?.csv", "a::b.jsonl"):
        assert load_rows(tmp_path / name) == [{"text": name}]


def test_a_file_that_others_may_not_see_is_named(tmp_path: Path) -> None:
    place = written(tmp_path, "rows.csv", as_csv())
    tmp_path.chmod(0)
    try:
        with without_rights(), pytest.raises(DataError, match=r"rows\.csv can't be read: Permission denied\.$"):
            load_rows(place)
    finally:
        tmp_path.chmod(0o700)


@contextlib.contextmanager
def without_rights() -> Generator[None]:
    """As any user, for whom a folder that is closed is closed."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_header_that_is_too_long_to_be_one_is_refused(tmp_path: Path) -> None:
    place = written(tmp_path, "rows.csv", f'"{"x" * 200_000}",label\nhi,a\n')
    before = csv.field_size_limit(131_072)  # Python's own; `batch` raises it
    try:
        with pytest.raises(DataError, match=r"rows\.csv can't be read as CSV: field larger than field limit"):
            load_rows(place)
    finally:
        csv.field_size_limit(before)


def test_a_file_of_another_kind_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    written(tmp_path, "data/rows.csv.gz", "text\nhi\n")
    with pytest.raises(
        DataError, match=r"^data/rows\.csv\.gz: rows come from files that end in \.csv, .*, not in '\.gz"
    ):
        load_rows("data/rows.csv.gz")


def test_an_id_may_be_left_blank_or_be_an_object() -> None:
    rows = [{"id": key, "text": "hi", "label": "a"} for key in ("", "", {"n": 1}, {"n": 2}, [1])]
    assert len(checked(*rows)) == 5
    with pytest.raises(DataError, match=r"^rows\.csv: rows 3 and 6 have the same id \"\{'n': 1\}\"\.$"):
        checked(*rows, rows[2])
