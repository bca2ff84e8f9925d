"""`compile --dry-run`: what a compile would take, told without a call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dspy.lm15 import Message, Request, Response, TextPart, Usage

from preceptor.cli import planning, run
from preceptor.lm.catalogue import CATALOGUE
from preceptor.lm.ledger import Answer, Call
from preceptor.run import open_run

SPAM = "text -> label: Literal['spam','mail']"
ANSWERED = (
    Call(Request(model="m", messages=(Message.user("Spam?"),))),
    Answer(Response(None, "m", Message.assistant([TextPart("spam")]), "stop", Usage(1, 1)), 2, 0.0, 0.5),
)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.csv"
    lines = [f"Win {n},spam\nLunch {n},mail" for n in range(12)]
    rows.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    return ["compile", SPAM, "--data", str(rows), "--set", "candidates=1", "--dry-run"]


def test_the_calls_are_told_and_neither_a_model_nor_a_folder_is_made(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "--run", str(tmp_path / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "calls": 49,
        "search_calls": 25,
        "confirm_calls": 24,
        "least_calls": 49,
        "train_rows": 12,
        "shown_rows": 0,
        "confirm_rows": 12,
        "different_rows": 12,
        "smallest_gain": pytest.approx(0.757, abs=0.001),
        "confirmed_programs": 2,
        "run": str(tmp_path / "run"),
        "to_fetch": ["local/qwen2.5-coder-1.5b"],
    }
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_people_are_told_in_lines_and_what_would_be_fetched_first(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "--run", str(tmp_path / "run")]) == 0
    size = round(CATALOGUE["qwen2.5-coder-1.5b"].size / 1e6)
    assert capsys.readouterr().out.splitlines() == [
        "About 49 calls, 49 at least; none was made.",
        "  12 rows to search on, about 25 calls",
        "  12 rows to confirm on, 24 calls at most",
        "  12 rows confirm a gain of 76 points or more in a score of 0 or 1, four times in five",
        f"  local/qwen2.5-coder-1.5b isn't here yet: {size} MB are fetched first",
        f"Run      {tmp_path / 'run'}",
    ]


@pytest.mark.parametrize(("pinned", "is_known"), [("smollm2-135m@0123456789ab", True), ("smollm2-135m@latest", False)])
def test_a_model_whose_weights_are_pinned_would_be_fetched_too(
    command: list[str], pinned: str, is_known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "--lm", f"local/{pinned}"]) == (0 if is_known else 2)
    size = round(CATALOGUE["smollm2-135m"].size / 1e6)
    told = f"  local/{pinned} isn't here yet: {size} MB are fetched first"
    assert (told in capsys.readouterr().out.splitlines()) == is_known


def test_rows_that_are_shown_and_not_scored_are_told(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--set", "few_shot=4"]) == 0
    assert "  12 rows to search on (4 shown as demonstrations), about 17 calls" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("more", [[], ["--mixture", "2"]])
def test_the_folder_is_that_of_the_demonstrations_told_or_not(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    rows_of_each = 80 if more else 40  # Each of two regions has to have enough.
    lines = [f"Win {n},spam\nLunch {n},mail" for n in range(rows_of_each)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    plain = [word for word in command if word not in ("--set", "candidates=1")]
    folders: list[str] = []
    for count in ([], ["--set", "few_shot=8"], ["--set", "few_shot=0"]):
        assert run([*plain, "--method", "constitutional_experts", *more, *count, "--json"]) == 0
        folders.append(json.loads(capsys.readouterr().out)["run"])
    assert folders[0] == folders[1] != folders[2]


def test_rows_of_one_label_are_warned_of(command: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(rows.read_text(encoding="utf-8").replace(",mail", ",spam"), encoding="utf-8")
    assert run(command) == 0
    assert [told for told in caplog.messages if told.startswith("All 12 rows to confirm on have the label 'spam'.")]


def test_a_model_that_is_here_need_not_be_fetched(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "_is_missing", lambda name: False)
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["to_fetch"] == []


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--budget", "calls=48"], "APE needs at least 49 calls here"),
        (["--lm", "openai/gpt-4o-mini"], "openai/gpt-4o-mini needs a key. Set OPENAI_API_KEY"),
        (["--proposer", "openai/gpt-4o-mini"], "openai/gpt-4o-mini needs a key. Set OPENAI_API_KEY"),
        (
            ["--lm", "opena/gpt-4o-mini"],
            "opena/gpt-4o-mini: no provider 'opena' is known. Write it as openai/gpt-4o-mini",
        ),
        (["--lm", "local/nope"], "No model 'nope'. The catalogue has smollm2-135m, "),
        (["--proposer", "local/nope"], "No model 'nope'. The catalogue has smollm2-135m, "),
        (["--lm", "openai/none-such", "--budget", "dollars=1"], "No price is known for openai/none-such"),
        (["--metric", "wit"], "wit"),
        (["--workers", "4"], "'4' is neither ray nor ray:<number of workers>."),
        (["--run", "/dev/null/run"], "/dev/null/run can't be written: /dev/null is no folder."),
    ],
)
def test_what_would_be_refused_is_refused(
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    told: str,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert run([*command, *more]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "more",
    [["--lm", "ollama_chat/m"], ["--proposer", "ollama_chat/m"], ["--proposer", "ollama_chat/m", "--mixture", "2"]],
)
def test_soft_tokens_need_a_proposer_of_this_process(
    command: list[str], capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    plain = [word for word in command if word not in ("--set", "candidates=1")]
    assert run([*plain, "--method", "instruct_zero", *more]) == 2
    told = "Soft tokens need a proposer in this process; ollama_chat/m only reads text."
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("metric", "code", "told"),
    [("accuracy", 0, ""), ("macro_f1", 2, "belongs to another metric; nothing was overwritten.")],
)
def test_a_folder_in_which_another_compile_was_begun_is_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: str, code: int, told: str
) -> None:
    with open_run(tmp_path / "run", {"metric": "accuracy"}) as begun:
        begun.ledger.write([ANSWERED])
    assert run([*command, "--run", str(tmp_path / "run"), "--metric", metric]) == code
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_folder_of_other_things_is_refused_by_the_compile_as_by_its_plan(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "experiments"
    place.mkdir()
    (place / "train.jsonl").write_text("{}\n", encoding="utf-8")
    for asked in (command, [word for word in command if word != "--dry-run"]):
        assert run([*asked, "--run", str(place)]) == 2
        assert "holds other files and is no run folder" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in place.iterdir()] == ["train.jsonl"]


def test_a_file_is_no_place_for_a_run(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--run", str(tmp_path / "rows.csv")]) == 2
    assert "rows.csv is no folder" in " ".join(capsys.readouterr().err.split())


def test_a_predictors_own_model_needs_its_key_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    source = "import dspy\nprogram = dspy.Predict('text -> label')\nprogram.lm = dspy.LM('openai/gpt-4o-mini')\n"
    (tmp_path / "planned_mine.py").write_text(source, encoding="utf-8")
    assert run(["compile", f"{tmp_path / 'planned_mine.py'}:program", *command[2:]]) == 2
    assert "openai/gpt-4o-mini needs a key" in " ".join(capsys.readouterr().err.split())


def test_a_mixture_is_planned_with_its_regions(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--mixture", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["to_fetch"] == ["local/qwen2.5-coder-1.5b", "all-minilm-l6-v2"]
    assert told["confirm_calls"] == 36, "the seed, the one program and the experts"
    assert told["calls"] == told["search_calls"] + 36


def test_a_program_that_cant_be_routed_to_is_refused_for_regions_only(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    routed = tmp_path / "routed.csv"
    routed.write_text(
        (tmp_path / "rows.csv").read_text(encoding="utf-8").replace("label", "route", 1), encoding="utf-8"
    )
    told = ["compile", SPAM.replace("label", "route"), "--data", str(routed), *command[4:], "--json"]
    assert run(told) == 0
    capsys.readouterr()
    assert run([*told, "--mixture", "2"]) == 2
    assert json.loads(capsys.readouterr().out)["error"].startswith("Experts answer with a field 'route' that says who")
