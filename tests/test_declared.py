"""A loaded program asks what the saved one asked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import dspy
import pytest

from preceptor.errors import ArtifactError
from preceptor.modules import Generate
from preceptor.program import load, save
from preceptor.testing import ChatServer


class Rated(dspy.Signature):
    """Rate the text."""

    text: str = dspy.InputField()
    tone: str = dspy.InputField(default="calm")
    stars: int = dspy.OutputField(le=5, ge=0, desc="how good")
    words: list[str] = dspy.OutputField(max_length=3, default=[])


def stored(folder: Path, program: dspy.Module) -> Any:
    save(program, folder, evidence={}, lm="openai/m")
    return json.loads((folder / "program.json").read_text(encoding="utf-8"))["predictors"]


def asked(program: Any, **inputs: Any) -> list[dict[str, Any]]:
    answer = '[[ ## reasoning ## ]]\n["so"]\n\n[[ ## stars ## ]]\n4\n\n[[ ## words ## ]]\n[]\n\n[[ ## completed ## ]]'
    with ChatServer(lambda body: answer) as server, dspy.context(lm=server.lm("m", max_tokens=64)):
        program(**inputs)
        return [received.body for received in server.requests]


@pytest.mark.parametrize("kind", [dspy.Predict, dspy.ChainOfThought])
def test_bounds_defaults_and_settings_are_asked_as_before(tmp_path: Path, kind: Any) -> None:
    program = kind(Rated, temperature=1.0, max_tokens=99, stop=["END"])
    stored(tmp_path / "program", program)
    loaded = load(tmp_path / "program")

    before, after = asked(program, text="hi"), asked(loaded, text="hi")

    assert after == before
    assert (after[0]["temperature"], after[0]["max_completion_tokens"]) == (1.0, 99)
    assert "less than or equal to: 5, greater than or equal to: 0" in json.dumps(after)
    assert "calm" in json.dumps(after)


class Argued(dspy.Signature):
    """Rate the text."""

    text: str = dspy.InputField()
    reasoning: str = dspy.OutputField(desc="in Latin")
    stars: int = dspy.OutputField()
    words: list[str] = dspy.OutputField()


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (dspy.ChainOfThought(Rated, rationale_field=dspy.OutputField(desc="in Latin")), "in Latin"),
        (dspy.ChainOfThought(Rated, rationale_field_type=list[str]), "list[str]"),
        (dspy.ChainOfThought(Argued), "in Latin"),
    ],
)
def test_reasoning_of_another_kind_is_asked_for_as_before(tmp_path: Path, program: Any, told: str) -> None:
    saved = stored(tmp_path / "program", program)["predict"]
    loaded: Any = load(tmp_path / "program")

    assert asked(loaded, text="hi") == asked(program, text="hi")
    assert told in saved["outputs"]["reasoning"].values()
    assert type(loaded) is dspy.ChainOfThought


def test_a_chain_of_thought_without_reasoning_is_refused(tmp_path: Path) -> None:
    stored(tmp_path / "program", dspy.ChainOfThought("text -> gist"))
    altered(tmp_path / "program", lambda saved: saved["predictors"]["predict"]["outputs"].pop("reasoning"))

    with pytest.raises(ArtifactError, match=r"the outputs \['gist'\], not \['reasoning', 'gist'\]"):
        load(tmp_path / "program")


def test_what_is_usual_takes_no_room_in_the_file(tmp_path: Path) -> None:
    saved = stored(tmp_path / "program", Generate("text -> gist"))["predict"]
    assert set(saved) == {"instructions", "inputs", "outputs", "demos"}
    assert set(saved["inputs"]["text"]) == {"type", "description"}


class Ruled(dspy.Signature):
    """Name it."""

    text: str = dspy.InputField(default_factory=str)
    name: str = dspy.OutputField(pattern="a+")


def test_what_no_file_holds_comes_with_the_users_own_instance(tmp_path: Path) -> None:
    program = dspy.Predict(Ruled, response_format={"type": "json_object"}, temperature=0.5)
    saved = stored(tmp_path / "program", program)["self"]
    assert saved["config"] == {"temperature": 0.5}

    message = (
        r"was saved without a default of text, a rule for name, the setting response_format, which no file holds; "
        r"pass an instance: load\(path, student=\.\.\.\)\.$"
    )
    with pytest.raises(ArtifactError, match=message):
        load(tmp_path / "program")
    loaded: Any = load(tmp_path / "program", student=program)
    assert loaded.config == program.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"api_base": "http://evil"}}, r"predictor self\.config\.api_base can't be 'http://evil'"),
        ({"config": {"temperature": "hot"}}, r"predictor self\.config\.temperature can't be 'hot'"),
        ({"config": {"stop": [1]}}, r"config\.stop can't be"),
        ({"config": []}, r"config must be an object"),
        ({"own": [7]}, r"own must be a text"),
    ],
)
def test_a_file_that_would_steer_calls_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    stored(tmp_path / "program", dspy.Predict("text -> gist"))
    altered(tmp_path / "program", lambda saved: saved["predictors"]["self"].update(change))
    with pytest.raises(ArtifactError, match=message):
        load(tmp_path / "program")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bounds": {"pattern": "(a+)+"}}, r"bounds\.pattern can't be"),
        ({"bounds": {"multiple_of": 0}}, r"bounds\.multiple_of can't be 0"),
        ({"bounds": {"max_length": -1}}, r"bounds\.max_length can't be -1"),
        ({"default": ["x"]}, r"the default of 'gist' is of another type"),
    ],
)
def test_a_field_that_cant_be_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    stored(tmp_path / "program", dspy.Predict("text -> gist"))
    altered(tmp_path / "program", lambda saved: saved["predictors"]["self"]["outputs"]["gist"].update(change))
    with pytest.raises(ArtifactError, match=message):
        load(tmp_path / "program")


def altered(folder: Path, change: Any) -> None:
    """Change a program and its hash, as whoever sends one can."""
    saved = json.loads((folder / "program.json").read_text(encoding="utf-8"))
    change(saved)
    content = json.dumps(saved).encode()
    (folder / "program.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["program.json"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
