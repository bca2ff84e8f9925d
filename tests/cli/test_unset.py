"""Options and arguments that are empty strings, as a variable of the shell that isn't set leaves them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from preceptor.cli import app, run, tools
from preceptor.cli.unset import NoneEmpty

SPAM = "text -> label: Literal['spam', 'mail']"


def commands(found: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command with the words that call it."""
    for name, one in getattr(found, "commands", {}).items():
        yield from commands(one, (*names, name))
    if not hasattr(found, "commands"):
        yield names, found


def textual() -> Iterator[Any]:
    """Yield every option that takes a text or a path, with the command line that gives it as an empty one."""
    for names, command in commands(typer.main.get_command(app)):
        needed = ["x" for one in command.params if one.param_type_name == "argument" and one.required]
        for one in command.params:
            if one.param_type_name == "option" and one.type_descriptor.annotation in (str, Path, list[str]):
                yield pytest.param([*names, *needed, one.opts[0], ""], one.opts[0], id=f"{names[-1]}{one.opts[0]}")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, and one above it for the cache."""
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(("arguments", "option"), list(textual()))
def test_an_empty_option_is_no_option_that_wasnt_given(
    arguments: list[str], option: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    required = ["--data", "rows.csv"] if arguments[0] in ("compile", "eval") and option != "--data" else []
    assert run([*arguments, *required]) == 2
    assert f"Error: {option} is empty: is a variable of the shell unset? " in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_every_command_refuses_what_is_empty() -> None:
    found = dict(commands(typer.main.get_command(app)))
    assert {type(one) for one in found.values()} == {NoneEmpty}
    assert {("compile",), ("resume",), ("batch",), ("serve",), ("models", "fetch")} <= set(found)


def test_a_compile_of_unset_variables_neither_reads_nor_writes_the_folder_here(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "train.csv").write_text("text,label\n" + "Win a prize,spam\nLunch,mail\n" * 12, encoding="utf-8")
    assert run(["compile", SPAM, "--data", "", "--run", "", "--budget", "", "--json"]) == 2
    told = capsys.readouterr()
    assert "Error: --data is empty: is a variable of the shell unset? Give it a value (CSV, TSV, JSONL" in told.err
    assert '"exit_code": 2' in told.out
    assert [path.name for path in here.iterdir()] == ["train.csv"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["compile", "", "--data", "rows.csv"], "TARGET is empty: is a variable of the shell unset? Give it a value"),
        (["batch", "program", "in.csv", ""], "OUT is empty: is a variable of the shell unset? Give it a value"),
        (["show", ""], "PROGRAM is empty: is a variable of the shell unset? Give it a value"),
        (["compile", SPAM, "--data", "r.csv", "--set", "beam=2", "--set", ""], "--set is empty: is a variable of"),
        (["demo", "--budget", ""], "--budget is empty: is a variable of the shell unset? Leave it out, or give it"),
    ],
)
def test_an_empty_argument_is_refused_with_what_it_takes(
    arguments: list[str], told: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    assert told in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_a_benchmark_refuses_an_empty_option_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(out: str = "") -> None:
        raise AssertionError(out)

    class Entry:
        load = staticmethod(lambda: measured)

    monkeypatch.setattr(tools, "entries", lambda group: {"null": Entry})
    assert run(["bench", "null", "--out", ""]) == 2
    assert "--out is empty: " in capsys.readouterr().err
