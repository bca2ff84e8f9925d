"""Files of unknown origin, and types written as text."""

from __future__ import annotations

import collections.abc
import os
from pathlib import Path
from typing import Any, Literal, Optional, Union

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from preceptor.program import type_text
from preceptor.untrusted import MOST_BYTES, Malformed, annotation, content, json_object, shown, tensors


@pytest.mark.parametrize(
    "kind",
    [
        *(str, int, float, bool, complex, bytes, Any, list, tuple, dict, set, frozenset),
        *(list[str], dict[str, list[int]], tuple[int, ...], tuple[int, str], set[int], frozenset[str]),
        *(int | None, Optional[str], Union[int, str, None], list[int | None], dict[str, int | list[str]]),  # noqa: UP007, UP045
        *(Literal["a"], Literal["x, y", "it's", 'a "b"', "]", "|"], Literal[1, -2, True, None, "True"]),
        *(Literal["ä\n\t\\n😀\x00\xa0\u2028"], Literal["->", " ", ""], Optional[Literal["a", "b"]]),  # noqa: UP045
        *(collections.abc.Sequence[str], collections.abc.Mapping[str, int], collections.abc.Iterable[int]),
    ],
    ids=str,
)
def test_a_type_that_was_written_is_read_as_it_was(kind: Any) -> None:
    assert annotation(type_text(kind)) == kind


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, unique=True))
def test_labels_of_any_text_are_read_as_they_were(labels: list[str]) -> None:
    kind: Any = Literal[tuple(labels)]
    assert annotation(type_text(kind)) == kind


@given(st.text(st.sampled_from("intsrLeal[],|' \"\\x0u.-()_:=\n")))
def test_any_text_is_a_type_or_malformed(text: str) -> None:
    try:
        told = type_text(annotation(text))
    except Malformed as error:
        told = str(error)
    assert told
    assert told.isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' in a type, where a name must be"),
        ("os.system", "Unknown name: os.system"),
        ("Image", "Unknown name: Image"),
        ("__import__('os').system('x')", "Unexpected \"('os').system('x')\" in a type"),
        ("Literal", "Unknown name: Literal"),
        ("Literal[1.5]", "Unexpected '.5]' in a type"),
        ("Literal['\\d']", "Unexpected \"'\\\\d']\" in a type"),
        ("Literal['\\ud800']", "holds half a character in '\\ud800'"),
        ("Literal['\\U00110000']", "\"'\\\\U00110000'\" is no text"),
        ("Literal[int]", "'int' in a Literal, where a text, a whole number, True, False or None must be"),
        ("Literal['a' 'b']", "\"'b'\" in a type, where ']' must be"),
        ("dict[str]", "dict of 1 types; it must be 2"),
        ("list[int, str]", "list of 2 types; it must be 1"),
        ("list[int]]", "Unexpected ']' in a type"),
        ("list[" * 40 + "int" + "]" * 40, "A type is nested deeper than 32 levels"),
        ("int|" * 2000 + "int", "A type of more than 1,000 types"),
        ("Literal[" + "1," * 10_000 + "1]", "A type of more than 10,000 labels"),
        ("x" * 1_000_001, "A type of 1,000,001 characters; 1,000,000 is the most"),
    ],
    ids=lambda text: text[:20],
)
def test_what_names_no_type_of_the_list_is_refused(text: str, message: str) -> None:
    with pytest.raises(Malformed) as caught:
        annotation(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "holds a list, not an object"),
        (b"{", "is no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b"\xff{}", "is no JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b'{"a": 1, "a": 1}', "names 'a' twice"),
        (b'{"b": {"a": 1, "a": 1}}', "names 'a' twice"),
        (b'{"a": "\\ud800"}', "holds half a character in '\\ud800'"),
        (b'{"a": [{"\\udc00": 1}]}', "holds half a character in '\\udc00'"),
        (b'{"a": ' + b"[" * 100_000, "is nested deeper than 32 levels"),
        (b'{"a": ' + b"[" * 33 + b"]" * 33 + b"}", "is nested deeper than 32 levels"),
        (b'{"a": [' + b"1," * 1_000_000 + b"1]}", "holds more than 1,000,000 values"),
    ],
    ids=lambda text: str(text[:20]),
)
def test_json_beyond_its_bounds_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(Malformed) as caught:
        json_object(text)
    assert str(caught.value) == message


def test_json_within_its_bounds_is_read() -> None:
    assert json_object(b'{"a": [1, -2.5, null, {"b": "\\ud83d\\ude00"}], "c": []}') == {
        "a": [1, -2.5, None, {"b": "\U0001f600"}],
        "c": [],
    }
    assert json_object(b'{"a": ' + b"[" * 30 + b"]" * 30 + b"}").keys() == {"a"}


def test_only_regular_files_of_bounded_size_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert content(tmp_path / "file") == b"content"

    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    for name, message in {
        "link": "is a symbolic link, which isn't followed; copy the folder with the files themselves",
        "pipe": "is no regular file",
        ".": "is no regular file",
        "large": "has 16,000,001 bytes, more than 16,000,000",
    }.items():
        with pytest.raises(Malformed) as caught:
            content(tmp_path / name)
        assert str(caught.value) == message
    with pytest.raises(FileNotFoundError):
        content(tmp_path / "missing")


def test_tensors_are_finite_numbers_of_32_bits_or_malformed() -> None:
    numbers = np.array([[1.0, -2.5]], dtype=np.float32)
    [(name, read)] = tensors(save({"a": numbers})).items()
    assert (name, read.tolist()) == ("a", [[1.0, -2.5]])

    for bad, message in {
        b"": "is no safetensors file: ",
        (100).to_bytes(8, "little") + b"{}": "is no safetensors file: ",
        save({"a": numbers.astype(np.float64)}): "holds 'a' of type float64, not float32",
        save({"a\n": np.array([np.inf], dtype=np.float32)}): "holds 'a\\n' with numbers that aren't finite",
    }.items():
        with pytest.raises(Malformed) as caught:
            tensors(bad)
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", "'a\\nb'"),
        ("x" * 100, "'" + "x" * 76 + "..."),
        (None, "None"),
        (10**100, "1" + "0" * 76 + "..."),
        ({"a": 1}, "a dict"),
        (["a", "b"], "['a', 'b']"),
        ([1], "a list"),
    ],
    ids=["text", "long", "none", "number", "object", "texts", "list"],
)
def test_foreign_values_are_shown_on_one_short_line(value: object, text: str) -> None:
    assert shown(value) == text
