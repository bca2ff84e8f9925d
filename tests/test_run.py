from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dspy.lm15 import Message, Request, Response, TextPart, Usage

from preceptor.errors import RunError
from preceptor.lineage import Birth
from preceptor.lm.ledger import Answer, Call
from preceptor.resuming import remember_command
from preceptor.run import check_folder, fingerprint, open_run, read_run
from preceptor.scoring.trial import Candidate, Outcome, Trial

PARTS: dict[str, Any] = {"method": ["APE", {"candidates": 3}], "trainset": [{"text": "hi"}], "metric": "accuracy"}
TRIAL = Trial(
    Candidate({"predict": "Größer?"}), (4, 2), (Outcome("scored", 1.0), Outcome("failed", None, error="timeout")), 1.0
)

ANSWERED = (
    Call(Request(model="m", messages=(Message.user("Größer?"),))),
    Answer(
        Response(None, "m", Message.assistant([TextPart("ja")]), finish_reason="stop", usage=Usage(1, 1)), 2, 0.0, 0.5
    ),
)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_run_folder_holds_fingerprints_and_a_ledger(tmp_path: Path) -> None:
    with open_run(tmp_path / "new" / "run", PARTS) as run:
        assert run.folder == tmp_path / "new" / "run"
        assert run.program == tmp_path / "new" / "run" / "program"
        assert len(run.ledger) == 0

    assert read_run(tmp_path / "new" / "run") == {
        "fingerprints": {name: fingerprint(part) for name, part in PARTS.items()}
    }


def test_records_that_cannot_be_finished_are_an_error_about_the_folder(tmp_path: Path) -> None:
    def lose_the_folder() -> None:
        with open_run(tmp_path / "run", PARTS) as run:
            run.write_trials([TRIAL], calls=7, spread=lambda outcomes: (0.25, 1.0))
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(RunError, match=r"^Can't write the run folder .*run: .*Choose another one\.$"):
        lose_the_folder()


def test_what_a_search_holds_is_written_a_line_each_and_begins_anew_when_the_run_is_resumed(tmp_path: Path) -> None:
    for calls in (7, 9):
        with open_run(tmp_path, PARTS) as run:
            run.ledger.write([ANSWERED])
            run.write_held(TRIAL, calls)
        [line] = (tmp_path / "held.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(line) == {
            "candidate": fingerprint(TRIAL.candidate.key),
            "instructions": {"predict": "Größer?"},
            "score": 1.0,
            "calls": calls,
        }


def test_trials_are_written_a_line_each_and_begin_anew_when_the_run_is_resumed(tmp_path: Path) -> None:
    expected = {
        "candidate": fingerprint(TRIAL.candidate.key),
        "instructions": {"predict": "Größer?"},
        "score": 1.0,
        "rows": [4, 2],
        "scores": [1.0, None],
        "kinds": ["scored", "failed"],
        "demos": 0,
        "calls": 7,
        "seen": 2,
        "so_far": 1.0,
        "interval": [0.25, 1.0],
    }
    for _ in range(2):
        with open_run(tmp_path, PARTS) as run:
            run.ledger.write([ANSWERED])
            run.write_trials([TRIAL], calls=7, spread=lambda outcomes: (0.25, 1.0))
            run.write_trials([TRIAL], calls=7, spread=lambda outcomes: (0.25, 1.0))
        lines = (tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [expected, expected]


def test_the_lineage_begins_anew_when_the_run_is_resumed(tmp_path: Path) -> None:
    birth = Birth(TRIAL.candidate, Candidate({"predict": "Groß?"}), "predict", "edit", "Größe fehlt.")
    for _ in range(2):
        with open_run(tmp_path, PARTS) as run:
            run.ledger.write([ANSWERED])
            run.write_lineage(birth)
        lines = (tmp_path / "lineage.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [birth.as_dict()]


def test_candidates_are_numbered_as_they_look_at_the_rows_whichever_process_asks(tmp_path: Path) -> None:
    with open_run(tmp_path, PARTS) as run:
        run.ledger.write([ANSWERED])
        assert [run.look(text) for text in ("one", "two", "one")] == [1, 2, 1]
    remember_command(tmp_path, {"budget": "calls=9"})
    with open_run(tmp_path, PARTS) as run:
        assert [run.look(text) for text in ("two", "three", "one")] == [2, 3, 1]

    (tmp_path / "run.json").write_text('{"looks": "two"}')
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        read_run(tmp_path)


def test_looks_of_other_runs_at_the_same_rows_are_told_once_and_not_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: dict[str, Any] = {"valset": [{"text": "ho"}]}
    others: dict[str, dict[str, Any]] = {"ape": rows, "copro": {"valset": []}, "protegi": rows}
    for name, parts in others.items():
        with open_run(tmp_path / name, {**PARTS, **parts}) as run:
            run.ledger.write([ANSWERED])
            assert [run.look(name), run.look("the same")] == [1, 2]
    (tmp_path / "latest").symlink_to(tmp_path / "ape")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{", encoding="utf-8")
    odd = {"fingerprints": {"valset": fingerprint(rows["valset"])}, "looks": [fingerprint("the same"), {}]}
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "run.json").write_text(json.dumps(odd), encoding="utf-8")
    caplog.clear()

    with open_run(tmp_path / "gepa", {**PARTS, **rows}) as run:
        assert [run.look("the same"), run.look("the same"), run.look("one")] == [1, 1, 2]

    told = (
        "Other runs have looked at these same rows: ape, odd, protegi. "
        "Whoever ships the best of all {} candidates has to hold p to {}."
    )
    assert caplog.messages == [told.format(4, "0.013"), told.format(5, "0.01")]


def test_the_result_is_readable_json(tmp_path: Path) -> None:
    with open_run(tmp_path, PARTS) as run:
        run.write_result({"gain": 0.25, "verdict": "größer"})

    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == {"gain": 0.25, "verdict": "größer"}
    assert not (tmp_path / "result.json.new").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"trainset": [{"text": "ho"}]}, "trainset"),
        ({"method": ["APE", {"candidates": 4}]}, "method"),
        ({"metric": "f1:a"}, "metric"),
        ({"metric": "f1:a", "trainset": []}, "trainset and metric"),
    ],
)
def test_a_folder_of_other_inputs_is_refused_and_left_as_it_is(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with open_run(tmp_path, PARTS) as run:
        run.write_trials([TRIAL])
        run.write_result({"gain": 0.5})
    before = files(tmp_path)

    message = rf"^The run folder .* belongs to another {named}; nothing was overwritten\. Choose another folder, or go"
    with pytest.raises(RunError, match=message), open_run(tmp_path, {**PARTS, **change}):
        pass

    assert files(tmp_path) == before


def test_a_folder_is_checked_without_a_word_written_and_by_what_is_known(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", PARTS) as run:
        run.ledger.write([ANSWERED])
    before = files(tmp_path / "run")

    check_folder(tmp_path / "run", {"metric": PARTS["metric"]})
    check_folder(tmp_path / "new", PARTS)
    with pytest.raises(RunError, match=r"^The run folder .* belongs to another metric; nothing was overwritten\."):
        check_folder(tmp_path / "run", {"metric": "f1:a"})

    assert files(tmp_path / "run") == before
    assert not (tmp_path / "new").exists()


def test_a_file_is_no_place_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\n", encoding="utf-8")
    with pytest.raises(RunError, match=r"rows\.csv is no folder, so no run can be in it\. Choose another one\.$"):
        check_folder(tmp_path / "rows.csv", PARTS)


def test_a_folder_in_which_nothing_was_answered_is_anothers_to_use(tmp_path: Path) -> None:
    remember_command(tmp_path, {"lm": "openai/mistyped", "budget": "calls=9"})
    with open_run(tmp_path, PARTS):
        pass
    remember_command(tmp_path, {"lm": "openai/right", "budget": "calls=5"})
    with open_run(tmp_path, {**PARTS, "metric": "f1:a"}) as run:
        run.ledger.write([ANSWERED])

    known = read_run(tmp_path)
    assert (known["command"]["lm"], known["fingerprints"]["metric"]) == ("openai/right", fingerprint("f1:a"))
    with pytest.raises(RunError, match="belongs to another metric"), open_run(tmp_path, PARTS):
        pass
    remember_command(tmp_path, {"lm": "openai/mistyped", "budget": "calls=7"})
    assert read_run(tmp_path)["command"] == {"lm": "openai/right", "budget": "calls=7"}


def test_an_empty_ledger_stays_one_that_was_lost(tmp_path: Path) -> None:
    with open_run(tmp_path, PARTS) as run:
        run.ledger.write([ANSWERED])
    remember_command(tmp_path, {"data": "rows.csv"})
    (tmp_path / "ledger.sqlite").write_bytes(b"")

    remember_command(tmp_path, {"data": "rows.csv"})

    with pytest.raises(RunError, match="held every answer of this run, is empty"), open_run(tmp_path, PARTS):
        pass


def test_a_folder_of_other_things_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text("{}", encoding="utf-8")

    message = r"holds other files and is no run folder; choose an empty or a new one\.$"
    with pytest.raises(RunError, match=message), open_run(tmp_path, PARTS):
        pass

    assert (tmp_path / "package.json").read_text(encoding="utf-8") == "{}"
    assert not (tmp_path / "run.json").exists()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    message = r"^Another process is using the run folder "
    with open_run(tmp_path, PARTS), pytest.raises(RunError, match=message), open_run(tmp_path, PARTS):
        pass


def test_a_folder_another_process_uses_is_refused_until_that_process_is_gone(tmp_path: Path) -> None:
    code = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=r"^Another process is using the run folder "), open_run(tmp_path, PARTS):
            pass
        other.communicate("")

    with open_run(tmp_path, PARTS) as run:
        assert run.folder == tmp_path


def test_the_lock_is_let_go_when_a_run_breaks(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), open_run(tmp_path, PARTS):
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["/proc/x", "/proc/x/run"])
def test_a_place_that_cant_be_written_is_named(name: str) -> None:
    message = rf"^Can't write the run folder {name}: .*\. Choose another one\.$"
    with pytest.raises(RunError, match=message), open_run(Path(name), PARTS):
        pass
    with pytest.raises(RunError, match=message):
        remember_command(Path(name), {})


def test_a_folder_inside_a_file_cant_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    message = r"^Can't write the run folder .*run: Not a directory\. Choose another one\.$"
    with pytest.raises(RunError, match=message), open_run(tmp_path / "file" / "run", PARTS):
        pass


def test_an_error_of_the_searchs_own_is_not_blamed_on_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"^no route to the model$"), open_run(tmp_path, PARTS):
        raise ConnectionError("no route to the model")


@pytest.mark.parametrize("text", [None, "{oops"])
def test_what_is_no_run_folder_says_so(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=r"is no run folder: run\.json is missing or unreadable\.$"):
        read_run(tmp_path)


def test_a_remembered_command_survives_the_run(tmp_path: Path) -> None:
    remember_command(tmp_path / "run", {"method": "ape", "data": "rows.csv"})
    with open_run(tmp_path / "run", PARTS):
        pass

    known = read_run(tmp_path / "run")
    assert known["command"] == {"method": "ape", "data": "rows.csv"}
    assert known["fingerprints"]["metric"] == fingerprint("accuracy")


def test_fingerprints_differ_where_the_json_differs_and_only_there() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint("ü")) == 16
    words = [f"w{number}" for number in range(10)]
    assert fingerprint({"tags": set(words)}) == fingerprint({"tags": words})
