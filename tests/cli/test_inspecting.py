"""`preceptor verify` and `show` on programs whose answers follow a rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dspy
import pytest

from preceptor import program as artifact
from preceptor.cli import run
from preceptor.lm.adapter import declare

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
def saved(tmp_path: Path) -> Path:
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
