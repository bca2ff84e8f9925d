"""The form of a saved program's files, and that what is saved can be read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import dspy
import pytest

from preceptor import load
from preceptor.errors import ArtifactError
from preceptor.form import check_evidence, check_program
from preceptor.modules import Classify
from preceptor.program import read, save
from preceptor.untrusted import Malformed

PROGRAM: dict[str, Any] = {
    "schema": 1,
    "module": "classify",
    "predictors": {
        "predict": {
            "instructions": "Sort.",
            "inputs": {"text": {"type": "str", "description": ""}},
            "outputs": {"label": {"type": "Literal['a', 'b']", "description": ""}},
            "demos": [{"text": "hi", "label": "a"}],
        }
    },
    "lm": "openai/x",
    "preceptor": "0.1.0",
    "dspy": "3.4.1",
}
VERDICT: dict[str, Any] = {
    **{"verdict": "Kept.", "metric": "accuracy", "replaced": False, "search_score": None, "dollars": float("nan")},
    **{"baseline": 0.5, "baseline_ci": [0.4, 0.6], "compiled": 0.5, "compiled_ci": [0, 1], "gain": 0.0},
    **{"rows": 10, "calls": 5, "tokens": 100, "instructions": {}, "seed_instructions": {"predict": "Sort."}},
}
PREDICTOR: Callable[[Any], Any] = lambda tree: tree["predictors"]["predict"]  # noqa: E731


def changed(tree: dict[str, Any], change: Callable[[Any], object]) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    change(tree)
    return tree


def test_what_is_written_is_of_the_form() -> None:
    check_program(PROGRAM)
    check_program({**PROGRAM, "of a later version": 1})
    check_evidence({})
    check_evidence({"method": "APE", "of a later version": object()})
    check_evidence(VERDICT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("lm"), "lm is missing"),
        (lambda tree: tree.update(module=None), "module must be a text, got None"),
        (lambda tree: tree.update(module="a\x1b[2J"), "module must be one line of printable text, got 'a\\x1b[2J'"),
        (lambda tree: tree.update(lm=""), "lm must be one line of printable text, got ''"),
        (lambda tree: tree.update(lm="x/https://host"), "lm holds an address; only the name of a model is taken"),
        (lambda tree: tree.update(predictors=[]), "predictors must be an object, got []"),
        (lambda tree: tree.update(predictors={"p": 1}), "predictor p must be an object, got 1"),
        (
            lambda tree: tree.update(predictors={"a\nb": {}}),
            "the name of a predictor must be one line of printable text",
        ),
        (lambda tree: PREDICTOR(tree).pop("demos"), "predictor predict.demos is missing"),
        (lambda tree: PREDICTOR(tree).update(instructions=1), "predictor predict.instructions must be a text, got 1"),
        (
            lambda tree: PREDICTOR(tree).update(demos=["a"]),
            "a demonstration of predictor predict must be an object, got",
        ),
        (
            lambda tree: PREDICTOR(tree)["inputs"].update(x="str"),
            "predictor predict.inputs.x must be an object, got 'st",
        ),
        (lambda tree: PREDICTOR(tree)["inputs"]["text"].pop("type"), "predictor predict.inputs.text.type is missing"),
        (
            lambda tree: PREDICTOR(tree)["outputs"]["label"].update(description=[]),
            "predictor predict.outputs.label.desc",
        ),
    ],
)
def test_a_program_of_another_form_is_refused(change: Callable[[Any], object], message: str) -> None:
    with pytest.raises(Malformed) as caught:
        check_program(changed(PROGRAM, change))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": 1}, "verdict must be a text, got 1"),
        ({"rows": "10"}, "rows must be a number, got '10'"),
        ({"rows": True}, "rows must be a number, got True"),
        ({"tokens": 10**400}, "tokens must be a number, got 1000000"),
        ({"search_score": "x"}, "search_score must be a number, got 'x'"),
        ({"replaced": 1}, "replaced must be true or false, got 1"),
        ({"baseline_ci": [1]}, "baseline_ci must be two numbers, got 1"),
        ({"compiled_ci": [0, "1"]}, "compiled_ci must be a number, got '1'"),
        ({"instructions": {"predict": None}}, "instructions.predict must be a text, got None"),
        ({"probes": {}}, "probes must be a list, got a dict"),
        ({"probes": [[]]}, "a probe must be an object, got []"),
        ({"probes": [{"inputs": {}}]}, "a probe.answer is missing"),
        ({"probes": [{"answer": "a", "inputs": []}]}, "a probe.inputs must be an object, got []"),
        ({"program": "here"}, "run is missing"),
        ({"regions": {}}, "regions must be a list, got a dict"),
        ({"regions": ["a"]}, "a region must be an object, got 'a'"),
        ({"regions": [{"seed": [1]}]}, "a region.seed must be a text or a number, got a list"),
        ({"principles": {}}, "principles must be a list, got a dict"),
        ({"principles": ["a"]}, "a principle must be an object, got 'a'"),
        ({"principles": [{"worth": {}}]}, "a principle.worth must be a text or a number, got a dict"),
    ],
    ids=str,
)
def test_evidence_that_cant_be_shown_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Malformed) as caught:
        check_evidence({**VERDICT, **change})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", sorted(set(VERDICT) - {"verdict"}))
def test_a_verdict_without_its_numbers_is_refused(name: str) -> None:
    with pytest.raises(Malformed, match=rf"^{name} is missing$"):
        check_evidence({key: value for key, value in VERDICT.items() if key != name})


def test_labels_that_look_like_the_arrow_of_a_signature_are_saved_and_loaded(tmp_path: Path) -> None:
    labels = Literal["a -> b", "c: d, e"]
    make: Any = dspy.Signature
    signature = make({"text": (str, dspy.InputField()), "label": (labels, dspy.OutputField())}, "Sort.")
    save(Classify(signature), tmp_path / "saved", evidence={}, lm="m")

    predictor: Any
    [predictor] = load(tmp_path / "saved").predictors()
    assert predictor.signature.output_fields["label"].annotation == labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda program: setattr(program, "demos", [{"a": "\ud83d"}]), "surrogates not allowed"),
        (lambda program: setattr(program, "demos", [{"a": {(1, 2): 3}}]), "keys must be str, int, float, bool or None"),
        (lambda program: setattr(program, "demos", [{"a": nested(40)}]), "is nested deeper than 32 levels"),
        (lambda program: setattr(program, "demos", [{"a": nested(100_000)}]), "recursion|nested deeper"),
        (
            lambda program: setattr(program, "signature", program.signature.with_instructions("x" * 1_000_001)),
            "instructions of 1,000,001 characters, more than 1,000,000",
        ),
    ],
    ids=["half a character", "names that are no text", "deep", "very deep", "long"],
)
def test_what_could_not_be_read_again_is_not_saved_and_the_old_program_stays(
    tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    program = dspy.Predict("a -> b")
    save(program, tmp_path / "saved", evidence={"method": "first"}, lm="m")
    change(program)

    with pytest.raises(ArtifactError, match=rf"^Can't write the program to .*({message})"):
        save(program, tmp_path / "saved", evidence={"method": "second"}, lm="m", replace=True)

    assert read(tmp_path / "saved").evidence == {"method": "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def test_a_probe_whose_inputs_steer_a_call_is_left_out_of_what_is_saved(tmp_path: Path) -> None:
    probes = [{"inputs": {"text": "a"}, "answer": "b"}, {"inputs": {"config": {}}, "answer": "b"}]
    save(dspy.Predict("a -> b"), tmp_path / "saved", evidence={"probes": probes}, lm="m")
    assert read(tmp_path / "saved").evidence == {"probes": probes[:1]}


def test_demonstrations_of_any_names_come_back(tmp_path: Path) -> None:
    program = dspy.Predict("a -> b")
    program.demos = [dspy.Example({"a": "x", "b": "y", "base": {"k": 1}, "self": 2, "row number": None})]
    save(program, tmp_path / "saved", evidence={}, lm="m")

    [demo] = load(tmp_path / "saved").predictors()[0].demos

    assert demo.toDict() == {"a": "x", "b": "y", "base": {"k": 1}, "self": 2, "row number": None}
