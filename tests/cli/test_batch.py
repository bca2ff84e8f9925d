"""`preceptor batch` against a real server: what it prints, what it exits with, and Ctrl-C."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preceptor import program as artifact
from preceptor.cli import run
from preceptor.modules import Classify
from preceptor.testing import ChatServer, Faults

SPAM = "text -> label: Literal['spam', 'mail']"
SETTINGS = ["--lm", "openai/model", "--price", "openai/model=1/2", "--retries", "0"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with ChatServer(lambda body: "spam" if "prize" in body["messages"][-1]["content"] else "mail") as chat:
        yield chat


def table(path: Path, count: int) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        writer.writerows([f"{'a prize' if number % 2 else 'lunch'} {number}"] for number in range(count))
    return path


def command(server: ChatServer, source: Path, out: Path, *more: str) -> list[str]:
    return ["batch", SPAM, str(source), str(out), "--instructions", "Sort.", "--api-base", server.url, *SETTINGS, *more]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_saved_program_answers_every_row_and_says_what_it_took(
    tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact.save(Classify(SPAM, "Sort."), tmp_path / "program", evidence={}, lm="openai/model")
    given = ["batch", str(tmp_path / "program"), str(table(tmp_path / "in.csv", 12)), str(tmp_path / "out.csv")]
    settings = ["--api-base", server.url, *SETTINGS[2:]]

    assert run([*given, *settings]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[:2] == [
        f"12 rows answered, 0 failed; in {tmp_path / 'out.csv'}",
        "columns added: label",
    ]
    assert told.out.splitlines()[2].startswith("12 calls, 12 billed now; ")
    assert [row["label"] for row in rows(tmp_path / "out.csv")] == ["mail", "spam"] * 6

    assert run([*given, *settings, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (result["answered"], result["calls"], result["billed_calls"], server.count) == (12, 12, 0, 12)
    dollars = (result["tokens"] - 12) / 1e6 + 12 * 2 / 1e6  # each answer is one word
    assert result["dollars"] == pytest.approx(dollars)

    artifact.save(Classify(SPAM, "Sort!"), tmp_path / "program", evidence={}, lm="openai/model", replace=True)
    assert run([*given, *settings]) == 2
    assert "belongs to another program; nothing was overwritten" in capsys.readouterr().err


def test_a_saved_program_is_not_asked_under_other_instructions_than_its_own(
    tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact.save(Classify(SPAM, "Sort."), tmp_path / "program", evidence={}, lm="openai/model")
    given = ["batch", str(tmp_path / "program"), str(table(tmp_path / "in.csv", 2)), str(tmp_path / "out.csv")]

    assert run([*given, "--api-base", server.url, *SETTINGS[2:], "--instructions", "Sort well."]) == 2

    told = " ".join(capsys.readouterr().err.split())
    assert f"--instructions goes with a signature; {tmp_path}/program is a saved program with its own." in told
    assert server.count == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "program"]


def test_what_a_program_prints_is_not_among_the_results(
    tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talks.py").write_text(
        "import dspy\nprint('imported')\nclass Talks(dspy.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.predict = dspy.Predict('text -> label')\n"
        "    def forward(self, text):\n        print('asked', text)\n        return dspy.Prediction(label='mail')\n",
        encoding="utf-8",
    )
    given = command(server, table(tmp_path / "in.csv", 2), tmp_path / "out.csv", "--json")
    kept = [each for each in given if each not in ("--instructions", "Sort.")]
    assert run(["batch", f"{tmp_path}/talks.py:Talks", *kept[2:]]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["answered"] == 2
    assert {"imported", "asked lunch 0", "asked a prize 1"} <= set(told.err.splitlines())


def test_a_missing_key_is_told_before_anything_is_written_and_a_finished_batch_needs_none(
    tmp_path: Path, server: ChatServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = command(server, table(tmp_path / "in.csv", 2), tmp_path / "out.csv")
    with monkeypatch.context() as without:
        without.delenv("OPENAI_API_KEY")
        assert run(given) == 2
        assert "openai/model needs a key. Set OPENAI_API_KEY" in " ".join(capsys.readouterr().err.split())
        assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]
    assert run(given) == 0
    monkeypatch.delenv("OPENAI_API_KEY")
    assert (run(given), server.count) == (0, 2)


def test_a_column_of_another_name_is_read_and_kept_as_it_is(
    tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    source = table(tmp_path / "in.csv", 4)
    source.write_text(
        source.read_text(encoding="utf-8").replace("text", "Label,Message Body", 1).replace("\n", "\nx,", 4)
    )
    lines = source.read_text(encoding="utf-8").splitlines()
    asked = command(server, source, tmp_path / "out.csv", "--column", "text=Message Body")

    assert run(asked) == 0
    assert [
        line.rpartition(",")[0] for line in (tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()
    ] == lines
    assert [row["label"] for row in rows(tmp_path / "out.csv")] == ["mail", "spam"] * 2
    assert run(command(server, source, tmp_path / "out.csv", "--column", "text=Label")) == 2
    assert "belongs to another choice of columns" in " ".join(capsys.readouterr().err.split())
    assert run(command(server, source, tmp_path / "other.csv", "--column", "text=Body")) == 2
    assert "has no column 'Body' to read text from; it has Label, Message Body." in capsys.readouterr().err
    assert run(command(server, source, tmp_path / "other.csv", "--column", "txt=Message Body")) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "--column txt=Message Body: the fields are text, label, not 'txt'." in told
    assert not (tmp_path / "other.csv.batch").exists()


@pytest.mark.parametrize("first", [[], ["--column", "text=body"]])
def test_a_batch_that_was_begun_is_not_gone_on_with_from_another_column(
    tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str], first: list[str]
) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("text,body\na prize,lunch\nlunch,a prize\n", encoding="utf-8")
    second = [] if first else ["--column", "text=body"]
    assert run(command(server, source, out, *first)) == 0
    before = out.read_bytes()

    assert run(command(server, source, out, *second)) == 2
    assert "belongs to another choice of columns; nothing was overwritten" in " ".join(capsys.readouterr().err.split())
    assert out.read_bytes() == before
    if not first:  # as folders of earlier versions have none
        path = Path(f"{out}.batch") / "run.json"
        known = json.loads(path.read_text(encoding="utf-8"))
        del known["fingerprints"]["choice of columns"]
        path.write_text(json.dumps(known), encoding="utf-8")
        assert run(command(server, source, out, *second)) == 2
    assert run(command(server, source, out, *first)) == 0


def test_a_budget_stops_with_3_and_a_broken_server_with_4_and_both_go_on(
    tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    source = table(tmp_path / "in.csv", 12)
    assert run(command(server, source, tmp_path / "out.csv", "--budget", "calls=5")) == 3
    assert "Stopped: The next call could take calls to 6" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()
    server.inject(Faults(kinds=("server_error",)))
    assert run(command(server, source, tmp_path / "out.csv")) == 4
    err = capsys.readouterr().err.replace("\n", " ")
    assert "Stopped: 7 of 12 rows that were asked have no answer" in err
    assert "--retry-failed asks for them again" in err
    server.inject(None)
    assert run(command(server, source, tmp_path / "out.csv", "--retry-failed")) == 0
    assert len(rows(tmp_path / "out.csv")) == server.answered == 12


def test_dollars_name_the_models_of_predictors_whose_price_isnt_known(
    tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    code = f"""import dspy
class Own(dspy.Module):
    def __init__(self):
        super().__init__()
        self.predict = dspy.Predict("text -> label")
        self.predict.lm = dspy.LM("openai/nobodys", api_base={server.url!r}, cache=False, max_tokens=9)
    def forward(self, text):
        return self.predict(text=text)
"""
    (tmp_path / "own.py").write_text(code, encoding="utf-8")
    server.answer = lambda body: "[[ ## label ## ]]\nmail\n\n[[ ## completed ## ]]"
    given = ["batch", f"{tmp_path}/own.py:Own", str(table(tmp_path / "in.csv", 3)), str(tmp_path / "out.csv")]

    assert run([*given, "--api-base", server.url, *SETTINGS]) == 0

    assert "but for openai/nobodys: no price is known, give it with --price" in capsys.readouterr().out


def test_rows_that_were_mended_are_no_longer_the_same_job_even_if_nothing_was_asked(
    tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": ""}\n' * 3, encoding="utf-8")
    run(command(server, source, tmp_path / "out"))
    assert server.count == 0
    source.write_text('{"text": "lunch"}\n' * 5, encoding="utf-8")

    assert run(command(server, source, tmp_path / "out")) == 2
    assert "belongs to another" in capsys.readouterr().err


def test_rows_with_empty_cells_are_told_apart_from_failures_and_the_result_is_printed_whatever_came_of_it(
    tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    given = [{"text": "lunch 0"}, {"text": "a prize 1"}, {"text": ""}, {"text": None}, {"text": "lunch 2"}]
    source.write_text("".join(f"{json.dumps(row)}\n" for row in given), encoding="utf-8")

    assert run(command(server, source, tmp_path / "out")) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[0].startswith("3 rows answered, 0 failed, 2 not asked, since they can't be used; in ")
    assert "--retry-failed" not in told.out + told.err
    assert run(command(server, source, tmp_path / "out", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert [result[name] for name in ("rows", "answered", "failed", "unusable")] == [5, 3, 0, 2]

    server.inject(Faults(kinds=("server_error",)))
    assert run(command(server, source, tmp_path / "other", "--json")) == 4
    result = json.loads(capsys.readouterr().out)
    assert [result[name] for name in ("rows", "answered", "failed", "unusable", "exit_code")] == [5, 0, 3, 2, 4]
    assert result["error"].startswith("3 of 3 rows that were asked have no answer; ")


def test_wrong_usage_exits_with_2_and_nothing_is_asked(
    tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    source = table(tmp_path / "in.csv", 2)
    wrong = [
        (command(server, tmp_path / "no.csv", tmp_path / "out"), "No file"),
        (command(server, source, tmp_path / "out.jsonl"), "The rows are CSV, and so is the output"),
        (command(server, source, tmp_path / "out", "--budget", "rows=2"), "no 'rows'; use calls"),
        (command(server, source, source), "is there already, and from no batch"),
    ]
    for given, message in wrong:
        assert run(given) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert server.count == 0


def hear_interrupts() -> None:
    """Undo what a shell does to the commands it runs in the background: they ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_exits_with_130_and_the_same_command_asks_for_the_rest(tmp_path: Path, server: ChatServer) -> None:
    source = table(tmp_path / "in.csv", 400)
    given = command(server, source, tmp_path / "out.csv", "--threads", "4")
    child = subprocess.Popen(
        [sys.executable, "-m", "preceptor", *given],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
        env={**os.environ, "OPENAI_API_KEY": "none"},
    )
    while server.count < 20 and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, message = child.communicate(timeout=120)
    assert child.returncode == 130
    assert "Interrupted. What was answered is kept; the same command" in message
    assert 20 <= server.count < 400

    assert run(given) == 0
    assert [row["label"] for row in rows(tmp_path / "out.csv")] == ["mail", "spam"] * 200
    assert server.count <= 400 + 4
