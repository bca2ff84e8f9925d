"""The commands as people run them, on real files and the real small model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import dspy
import pytest

from preceptor.cli import run, tools

SPAM = "text -> label: Literal['spam', 'mail']"
LM = ["--lm", "local/smollm2-135m"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    lines = [f"{n},{'Win a prize' if n % 2 else 'Lunch at noon'} {n},{'spam' if n % 2 else 'mail'}" for n in range(24)]
    path.write_text("\n".join(["id,text,label", *lines]) + "\n", encoding="utf-8")
    return path


def compile_arguments(rows: Path, *more: str) -> list[str]:
    knobs = ["--set", "candidates=2", "--set", "max_tokens=12", "--budget", "calls=120"]
    return ["compile", SPAM, "--instructions", "Sort.", "--data", str(rows), *LM, *knobs, *more]


def replaced(path: Path, old: str, new: str) -> Path:
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    return path


def test_compile_show_eval_diff_verify_and_resume_work_together(
    rows: Path, tmp_path: Path, smollm: dspy.LM, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(compile_arguments(rows, "--run", str(tmp_path / "run"), "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    names = (
        "method baseline compiled gain ci p_value replaced rows calls billed_calls tokens seconds instructions program"
    )
    assert set(names.split()) <= set(result)
    assert (result["method"], result["rows"], result["billed_calls"]) == ("APE", 12, result["calls"])
    program = result["program"]

    assert run(["show", program]) == 0
    assert "predict: text: str -> label: Literal['spam', 'mail']" in capsys.readouterr().out
    assert run(["eval", program, "--data", str(rows), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["rows"] == sum(cell["rows"] for cell in evaluated["confusion"]) == 24
    assert evaluated["ci"][0] <= evaluated["score"] <= evaluated["ci"][1]
    assert run(["diff", program, program]) == 0
    assert capsys.readouterr().out == "The programs are equal.\n"
    assert run(["verify", program, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"hashes": True, "probes": 3, "changed": []}

    assert run(["resume", str(tmp_path / "run"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["calls"], again["billed_calls"]) == (result["calls"], 0)


def test_eval_takes_a_signature_and_prints_interval_and_confusion(
    rows: Path, smollm: dspy.LM, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", SPAM, "--instructions", "Is it spam?", "--data", str(rows), *LM]) == 0
    out = capsys.readouterr().out
    assert "95 % interval" in out
    assert "Rows by label (down) and answer (across)" in out


def test_columns_of_other_names_are_told_by_field(
    rows: Path, tmp_path: Path, smollm: dspy.LM, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(compile_arguments(rows, "--run", str(tmp_path / "plain"), "--json")) == 0
    plain = json.loads(capsys.readouterr().out)
    replaced(rows, "id,text,label", "id,Message = Body,Queue")
    names = ["--column", "text=Message = Body", "--column", "label=Queue"]

    assert run(compile_arguments(rows, *names, "--run", str(tmp_path / "run"), "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert run(["resume", str(tmp_path / "run"), "--json"]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert run(["eval", told["program"], "--data", str(rows), *names, "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)

    same = ("baseline", "compiled", "instructions", "calls")
    assert [told[name] for name in same] == [resumed[name] for name in same] == [plain[name] for name in same]
    assert sum(cell["rows"] for cell in evaluated["confusion"]) == 24
    assert {cell["label"] for cell in evaluated["confusion"]} == {"spam", "mail"}
    for columns, message in [
        (["text=Body"], "has no column 'Body' to read text from; it has id, Message = Body, Queue."),
        (["Queue"], "--column 'Queue' is not name=value."),
        (
            ["text=Message = Body", "label=Queue", "lable=Queue"],
            "--column lable=Queue: the fields are text, label, not 'lable'.",
        ),
    ]:
        named = chain(*(["--column", column] for column in columns))
        assert run(["eval", told["program"], "--data", str(rows), *named]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


BAD: list[tuple[str, str, str]] = [
    (
        "id,text,label",
        "id,body,label",
        r"rows.csv has no column 'text'; it has id, body, label\. .* --column text=NAME\.",
    ),
    (
        "0,Lunch at noon 0,mail",
        "0,Lunch at noon 0,ham",
        r"row 1, label: 'ham' is no label; expected one of spam, mail\.",
    ),
    ("1,Win a prize 1,spam", "0,Win a prize 1,spam", r"rows 1 and 2 have the same id '0'\."),
    ("0,Lunch at noon 0,mail", "0,,mail", r"row 1, text: the value is missing\."),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD, ids=["column", "label", "id", "value"])
def test_bad_rows_are_refused_with_file_row_and_field(
    rows: Path, tmp_path: Path, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    assert run(compile_arguments(replaced(rows, old, new), "--run", str(place))) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not place.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "magic"], "No method 'magic'; installed are ape, "),
        (["--regions", "2"], "APE has no setting 'regions'; it has candidates"),
        (["--mixture", "2", "--regions", "2"], "--mixture and --regions both give a number of regions"),
        (["--regions", "2", "--set", "regions=3"], "--regions and --set regions both give a number of regions"),
        (["--set", "speed=9"], "APE has no setting 'speed'; it has candidates"),
        (["--budget", "calls=lots"], "'calls=lots' is not name=number"),
        (["--lm", "local/gpt-9"], "No model 'gpt-9'."),
        (["--metric", "wit"], "No metric 'wit'; choose one of accuracy"),
        (["--budget", "calls=9"], "needs at least"),
        (["--run", "/proc/preceptor"], "Can't write the run folder /proc/preceptor"),
    ],
)
def test_bad_options_are_refused_with_what_is_accepted(
    rows: Path, tmp_path: Path, more: list[str], message: str, smollm: dspy.LM, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(compile_arguments(rows, "--run", str(tmp_path / "run"), *more)) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run" / "program").exists()


def test_an_empty_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.csv").touch()
    assert run(compile_arguments(tmp_path / "rows.csv")) == 2
    assert "rows.csv is empty; it needs a header and at least one row." in capsys.readouterr().err


def test_a_metric_that_returns_none_is_refused_before_any_call(
    rows: Path, tmp_path: Path, smollm: dspy.LM, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("def judge(example, prediction):\n    print(end='')\n", encoding="utf-8")
    arguments = compile_arguments(rows, "--run", str(tmp_path / "run"), "--metric", f"{tmp_path}/mine.py:judge")
    assert run(arguments) == 2
    assert "The metric judge returned None on" in capsys.readouterr().err
    assert not (tmp_path / "run" / "ledger.sqlite").exists()


def test_what_a_metric_prints_is_not_among_the_results_of_a_compile(
    rows: Path, tmp_path: Path, smollm: dspy.LM, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "def judge(example, prediction):\n    print('judged')\n    return prediction.label == 'spam'\n"
    (tmp_path / "loud.py").write_text(code, encoding="utf-8")
    given = compile_arguments(rows, "--run", str(tmp_path / "run"), "--metric", f"{tmp_path}/loud.py:judge", "--json")
    assert run([*given, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["confirm_rows"] == 12
    assert run(given) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["metric"] == "judge"
    assert "judged" in told.err.splitlines()


def test_a_run_folder_of_other_data_is_refused_and_left_alone(
    rows: Path, tmp_path: Path, smollm: dspy.LM, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = compile_arguments(rows, "--run", str(tmp_path / "run"))
    assert run(arguments) == 0
    before = (tmp_path / "run" / "result.json").read_bytes()
    replaced(rows, "Lunch", "Dinner")
    assert run(arguments) == 2
    assert "belongs to another trainset" in capsys.readouterr().err
    assert (tmp_path / "run" / "result.json").read_bytes() == before


def test_methods_models_and_doctor_answer_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, dict[str, Any]] = {}
    for command in ("methods", "models", "doctor"):
        assert run([command, "--json"]) == 0
        found[command] = json.loads(capsys.readouterr().out)
    assert found["methods"]["ape"]["paper"] == "arXiv:2211.01910"
    assert found["models"]["local/qwen2.5-coder-1.5b"]["licence"] == "Apache-2.0"
    assert found["doctor"]["methods"] == ", ".join(sorted(found["methods"]))


def test_a_program_file_is_compiled_by_its_name(rows: Path, tmp_path: Path, smollm: dspy.LM) -> None:
    source = (
        "import dspy\n"
        "class Spam(dspy.Signature):\n"
        "    '''Sort the mail.'''\n"
        "    text: str = dspy.InputField()\n"
        "    label: bool = dspy.OutputField()\n"
    )
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    data = replaced(replaced(rows, ",spam", ",True"), ",mail", ",False")
    arguments = ["eval", f"{tmp_path}/mine.py:Spam", "--data", str(data), *LM]
    assert run(arguments) == 0


def test_an_altered_program_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = Path(__file__).parents[1] / "golden" / "schema1"
    copy = tmp_path / "program"
    copy.mkdir()
    for file in golden.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    replaced(copy / "program.json", "schema", "Schema")
    assert run(["show", str(copy)]) == 2
    assert "was altered since it was saved" in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"preceptor {version('preceptor')}, dspy {version('dspy')}\n"


@pytest.mark.parametrize(
    ("arguments", "told"), [(["null", "--help"], "--effect"), (["--help"], "preceptor bench null")]
)
def test_help_of_a_benchmark_is_its_own(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "Usage: " in shown
    assert told in shown


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile"]) == 2
    assert run(["bench", "nothing"]) == 2
    assert "No benchmark 'nothing'" in capsys.readouterr().err


def test_ctrl_c_in_a_benchmark_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    class Entry:
        load = staticmethod(lambda: interrupted)

    monkeypatch.setattr(tools, "entries", lambda group: {"null": Entry})
    assert run(["bench", "null"]) == 130


def test_what_goes_wrong_is_one_object_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", str(tmp_path), "--json"]) == 2
    told = capsys.readouterr()
    assert json.loads(told.out)["exit_code"] == 2
    assert "Error: " + json.loads(told.out)["error"] == " ".join(told.err.split())


def broken(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def measured() -> None:
        raise error

    class Entry:
        load = staticmethod(lambda: measured)

    monkeypatch.setattr(tools, "entries", lambda group: {"null": Entry})


def test_a_fault_of_ones_own_is_one_line_and_an_exit_code_that_no_score_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PRECEPTOR_TRACEBACK", raising=False)
    broken(monkeypatch, RuntimeError("the flux\nis [bold]gone[/bold]"))
    assert run(["bench", "null"]) == 5
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == (
        "This is a fault of preceptor's own, not of what you gave: RuntimeError: the flux is [bold]gone[/bold]. "
        "PRECEPTOR_TRACEBACK=1 before the same command shows where. Please report it.\n"
    )


def test_a_fault_of_ones_own_shows_where_it_is_if_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRECEPTOR_TRACEBACK", "1")
    broken(monkeypatch, RuntimeError("the flux is gone"))
    assert run(["bench", "null"]) == 5
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("Traceback (most recent call last):\n")
    assert "test_cli.py" in told.err
    assert told.err.splitlines()[-2:] == [
        "RuntimeError: the flux is gone",
        "This is a fault of preceptor's own, not of what you gave: RuntimeError: the flux is gone. Please report it.",
    ]


def test_whoever_stops_reading_is_told_of_no_fault() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "preceptor", "methods"], stdout=nobody, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (1, b"")


def test_ctrl_c_while_the_libraries_load_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer").mkdir()
    (tmp_path / "typer" / "__init__.py").write_text("raise KeyboardInterrupt\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "preceptor", "methods"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def test_a_budget_that_ends_before_the_confirmation_exits_with_3(
    rows: Path, tmp_path: Path, smollm: dspy.LM, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = compile_arguments(rows, "--run", str(tmp_path / "run"), "--budget", "seconds=0.001")
    assert run([*arguments, "--json"]) == 3
    told = capsys.readouterr()
    assert "past the budget of 0.001; nothing was sent" in told.err.replace("\n", " ")
    assert (json.loads(told.out)["exit_code"], json.loads(told.out)["error"][:8]) == (3, "The next")
    assert not (tmp_path / "run" / "program").exists()


def test_a_program_that_always_fails_exits_with_4_and_says_how_to_go_on(
    rows: Path, tmp_path: Path, smollm: dspy.LM, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (
        "import dspy\n"
        "class Broken(dspy.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.predict = dspy.Predict('text -> label')\n"
        "    def forward(self, text):\n"
        "        raise RuntimeError('the line is dead')\n"
    )
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    knobs = ["--set", "candidates=1", "--set", "max_tokens=12", "--run", str(tmp_path / "run")]
    assert run(["compile", f"{tmp_path}/mine.py:Broken", "--data", str(rows), *LM, *knobs]) == 4
    message = capsys.readouterr().err.replace("\n", " ")
    assert (
        "2 of 2 rows failed (12 to be scored); the first with: RuntimeError: the line is dead (mine.py, line 7)."
        in message
    )
    assert f"preceptor resume {tmp_path}/run" in message
