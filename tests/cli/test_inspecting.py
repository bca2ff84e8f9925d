"""`preceptor verify` and `show` on programs whose answers follow a rule."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import dspy
import pytest

from preceptor import program as artifact
from preceptor.cli import run
from preceptor.cli.view import print_diff, print_json, print_regions, print_table
from preceptor.difference import diff
from preceptor.lm.adapter import declare
from preceptor.teleprompters import ProTeGi
from preceptor.testing import simulated, toy

RULE = """
import dspy

class Rule(dspy.Module):
    def __init__(self):
        super().__init__()
        self.predict = dspy.Predict("text -> label, reason")
    def forward(self, text):
        if text == "garbled":
            from dspy.utils.exceptions import AdapterParseError
            raise AdapterParseError("none", self.predict.signature, text)
        return dspy.Prediction(label=text.upper(), reason="because", count=None)
"""


class Rule(dspy.Module):
    """As in the file; only its predictor is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict("text -> label, reason")


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    (tmp_path / "rule.py").write_text(RULE, encoding="utf-8")
    return tmp_path / "program"


def verified(saved: Path, probes: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    artifact.save(Rule(), saved, evidence={"probes": probes}, lm="openai/model", replace=True)
    code = run(["verify", str(saved), "--student", f"{saved.parent}/rule.py:Rule", "--lm", "openai/model", "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_answer_that_was_recorded_is_the_one_compared(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the program's last output, which no row may have had a label for."""
    probes = [{"inputs": {"text": "a"}, "output": "label", "answer": "A"}]
    assert verified(saved, probes, capsys) == (0, {"hashes": True, "probes": 1, "changed": []})


def test_a_missing_key_is_a_wrong_use_and_programs_without_recorded_answers_need_none(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    code, told = verified(saved, [{"inputs": {"text": "a"}, "output": "label", "answer": "A"}], capsys)
    assert (code, told["error"][:27]) == (2, "openai/model needs a key. S")
    assert verified(saved, [], capsys) == (0, {"hashes": True, "probes": 0, "changed": []})


def test_a_probe_of_an_older_version_is_of_the_last_output(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probes = [{"inputs": {"text": "a"}, "answer": "because"}]
    assert verified(saved, probes, capsys)[0] == 0


def test_changed_and_unreadable_answers_are_told(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probes = [
        {"inputs": {"text": "a"}, "output": "label", "answer": "B"},
        {"inputs": {"text": "garbled"}, "output": "label", "answer": "G"},
        {"inputs": {"text": "c"}, "output": "count", "answer": ""},
    ]
    code, result = verified(saved, probes, capsys)
    assert code == 2
    assert [(each["recorded"], each["now"]) for each in result["changed"]] == [("B", "A"), ("G", "")]
    assert (result["exit_code"], result["error"][:26]) == (2, "2 recorded answers changed")


def test_a_program_that_takes_other_inputs_is_told_from_a_bug(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probes = [{"inputs": {"title": "a"}, "output": "label", "answer": "A"}]
    artifact.save(Rule(), saved, evidence={"probes": probes}, lm="openai/model", replace=True)

    assert run(["verify", str(saved), "--student", f"{saved.parent}/rule.py:Rule", "--lm", "openai/model"]) == 2

    told = " ".join(capsys.readouterr().err.split())
    assert "Rule can't be called with the recorded inputs title: " in told
    assert "Pass the class that was compiled: --student FILE.py:NAME." in told


@pytest.mark.parametrize(("count", "text"), [(1, "with 1 demonstration\n"), (2, "with 2 demonstrations\n")])
def test_show_counts_the_demonstrations(
    count: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = dspy.Predict(declare("text -> label", "Sort [bold]all[/bold]."))
    program.demos = [dspy.Example(text="a", label="b")] * count
    artifact.save(program, tmp_path / "program", evidence={}, lm="openai/model")
    assert run(["show", str(tmp_path / "program")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("dspy.Predict on openai/model\n\nself: text: str -> label: str\nSort [bold]all[/bold].\n")
    assert text in out


@pytest.fixture
def searched(tmp_path: Path) -> Path:
    """A run folder of a search that made two prompts of the user's, and a third of the second."""
    texts = iter(["Too short.", "Say yes.", "One.", "Two."])
    toy_lm = simulated(toy.answer)
    method = ProTeGi(
        metric="accuracy",
        lm=toy_lm,
        proposer=simulated(lambda request: next(texts)),
        run_dir=tmp_path / "run",
        rounds=1,
        gradients=1,
        paraphrases=1,
    )
    method.compile(toy.Sorter(), trainset=toy.rows(6), valset=toy.rows(6, 6))
    return tmp_path / "run"


def test_the_lineage_of_a_run_is_shown_as_a_tree(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []
    for place in (searched, searched / "program"):
        assert run(["show", str(place), "--lineage"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert [line.rstrip() for line in shown[0].splitlines()] == [
        "seed, 0.500 on 6 rows, kept",
        "Sort.",
        "├── gradient, predict, 0.500 on 6 rows",
        "│   because: Too short.",
        "│   Say yes.",
        "│   └── paraphrase, predict, 0.500 on 6 rows",
        "│       One.",
        "└── paraphrase, predict, 0.500 on 6 rows",
        "    Two.",
    ]


def test_the_lineage_as_json_has_every_candidate_whole(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", str(searched), "--lineage", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["candidates"]
    assert [(one["how"], one["instructions"]["predict"], one["rows"], one["is_kept"]) for one in found] == [
        ("seed", "Sort.", 6, True),
        ("gradient", "Say yes.", 6, False),
        ("paraphrase", "One.", 6, False),
        ("paraphrase", "Two.", 6, False),
    ]
    assert [one["parent"] for one in found] == ["", found[0]["key"], found[1]["key"], found[0]["key"]]


def test_texts_in_the_tree_are_cut_and_cant_steer_the_terminal(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {
        "instructions": {"predict": "word " * 100 + "end"},
        "how": "edit",
        "parent": "lost",
        "because": "\x1b[2Jgone",
    }
    (searched / "lineage.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    assert run(["show", str(searched), "--lineage"]) == 0
    printed = capsys.readouterr().out
    assert "because: \\x1b[2Jgone" in printed
    assert "word word ...\n" in printed
    assert "end" not in printed


def test_a_place_without_lineage_is_a_wrong_use(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", str(saved), "--lineage"]) == 2
    assert "is no run folder with a lineage.jsonl" in capsys.readouterr().err


def kept(folder: Path, **changes: Any) -> Path:
    """Save a program that differs in what is given."""
    settings: dict[str, Any] = {"temperature": 0.0, "desc": "short", "demo": "hi", "instructions": "Sort.", **changes}
    make: Any = dspy.Signature
    signature = make(
        {"text": (str, dspy.InputField()), "label": (str, dspy.OutputField(desc=settings["desc"]))},
        settings["instructions"],
    )
    program = dspy.Predict(signature, temperature=settings["temperature"])
    program.demos = [dspy.Example(text=settings["demo"], label="mail")]
    artifact.save(program, folder, evidence={}, lm="openai/model")
    return folder


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"instructions": "Sort. Now."}, ["-Sort.", "+Sort. Now."]),
        ({"demo": "ho"}, ["--- self, demonstrations", '-{"label": "mail", "text": "hi"}']),
        ({"desc": "long"}, ["--- self, fields", '+label: {"description": "long", "type": "str"}']),
        ({"temperature": 0.5}, ["--- self, settings", '+{"temperature": 0.5}']),
    ],
)
def test_programs_are_equal_only_where_all_is(
    tmp_path: Path, changes: dict[str, Any], lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before, same, after = kept(tmp_path / "a"), kept(tmp_path / "b"), kept(tmp_path / "c", **changes)
    assert run(["diff", str(before), str(same)]) == 0
    assert capsys.readouterr().out == "The programs are equal.\n"
    assert run(["diff", str(before), str(after)]) == 0
    assert set(lines) <= {line.rstrip() for line in capsys.readouterr().out.splitlines()}
    assert run(["diff", str(before), str(after), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is False


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        ("Sort.", "Sort.\n", ["@@ -1 +1,2 @@", " Sort.", "+"]),
        ("One.\nTwo.", "One.\r\nTwo.", ["@@ -1,2 +1,2 @@", "-One.", "+One.\\r", " Two."]),
    ],
)
def test_lines_that_end_otherwise_are_told_apart(
    before: str, after: str, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    print_diff(diff({"a": before}, {"a": after}))
    assert capsys.readouterr().out.split("\n") == ["--- a", "+++ a", *lines, ""]


def test_a_run_folder_says_where_its_program_is(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact.save(Rule(), saved, evidence={}, lm="openai/model")
    assert run(["show", str(saved.parent)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"is no saved program: it has no manifest.json; the program of this run is {saved}." in message


def test_a_region_of_anybodys_evidence_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    region = {"region": "a", "gain": "x", "seed": 10**400, "compiled": 0.5, "expert": "a", "train_rows": 3}
    print_regions([region])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["a", "3", "0.500", "a"]


def test_half_a_character_of_an_answer_is_printed(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    print_json({"answer": "cut \ud83d"})
    print_table("", ["answer"], [["cut \ud83d"]])
    sys.stdout.flush()
    assert capfdbinary.readouterr().out.count(b"cut \\ud83d") == 2
