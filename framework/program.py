"""The artifact: a compiled program as one folder that can be read, compared, checked and run.

    program.json    modules and signatures by field name, instructions, demonstrations, the model's name
    evidence.json   what the compile measured, and probe answers
    manifest.json   SHA-256 of both

It is written beside its place and renamed, so that it is there whole or not at all. Loading runs no
code of the folder's: modules of ours are rebuilt by name, a class of the user's is passed in.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any, Final, cast

import dspy

from preceptor.errors import ArtifactError
from preceptor.lm.fetch import sha256
from preceptor.lm.seam import predictors
from preceptor.scoring.trial import Candidate

SCHEMA: Final = 1
_FILES: Final = ("program.json", "evidence.json")
_DSPY: Final[Mapping[str, Any]] = {"dspy.Predict": dspy.Predict, "dspy.ChainOfThought": dspy.ChainOfThought}


def candidate_of(program: dspy.Module) -> Candidate:
    """Return a program's instructions."""
    return Candidate({name: str(predictor.signature.instructions) for name, predictor in predictors(program)})


def apply(program: dspy.Module, candidate: Candidate) -> dspy.Module:
    """Return a copy of `program` with the candidate's instructions and demonstrations; the original stays as it is."""
    copied = program.deepcopy()
    for name, predictor in predictors(copied):
        predictor.signature = predictor.signature.with_instructions(candidate.instructions[name])
        if name in candidate.demos:
            predictor.demos = [dspy.Example(**demo) for demo in candidate.demos[name]]
    return copied


def save(program: dspy.Module, path: Path, *, evidence: Mapping[str, Any], lm: str, replace: bool = False) -> None:
    """Write the artifact folder `path`.

    Args:
        program: What to save; its language models are left out but for the name.
        path: A folder that doesn't exist yet, unless `replace`.
        evidence: Shown by `show` and `report`.
        lm: The model's identifier, without connection or key.
        replace: Put the new artifact in the place of an older one.

    Raises:
        ArtifactError: If the folder exists, or can't be written; what was there stays.
    """
    if path.exists() and not (replace and (path / "manifest.json").is_file()):
        raise ArtifactError(f"{path} exists already; nothing was overwritten. Choose another folder.")
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        _write_json(fresh / "program.json", _described(program, lm))
        _write_json(fresh / "evidence.json", dict(evidence))
        _write_json(fresh / "manifest.json", {name: sha256(fresh / name) for name in _FILES})
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(f"Can't write the program to {path}: {error.strerror or error}.") from error


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, default=str)  # the order of the fields is theirs
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _described(program: dspy.Module, lm: str) -> dict[str, Any]:
    described = {
        name: {
            "instructions": str(predictor.signature.instructions),
            "inputs": {field: _field(info) for field, info in predictor.signature.input_fields.items()},
            "outputs": {field: _field(info) for field, info in predictor.signature.output_fields.items()},
            "demos": [dspy.Example(**demo).toDict() for demo in predictor.demos],
        }
        for name, predictor in predictors(program)
    }
    return {
        "schema": SCHEMA,
        "module": _module_name(program),
        "predictors": described,
        "lm": lm,
        "preceptor": version("preceptor"),
        "dspy": version("dspy"),
    }


def _field(info: Any) -> dict[str, str]:
    extra: dict[str, Any] = info.json_schema_extra or {}
    return {"type": type_text(info.annotation), "description": str(extra.get("desc") or "")}


def type_text(annotation: Any) -> str:
    """Return a type as it is written in a signature.

    Example:
        >>> from typing import Literal
        >>> type_text(Literal["a", "b"]), type_text(list[str]), type_text(int)
        ("Literal['a', 'b']", 'list[str]', 'int')
    """
    origin = typing.get_origin(annotation)
    if annotation is type(None):
        return "None"
    if origin is None:
        return getattr(annotation, "__name__", str(annotation))
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, typing.get_args(annotation)))}]"
    if origin is type(int | None):
        return " | ".join(map(type_text, typing.get_args(annotation)))
    inner = ", ".join(map(type_text, typing.get_args(annotation)))
    return f"{getattr(origin, '__name__', origin)}[{inner}]"


def _module_name(program: dspy.Module) -> str:
    kind = type(program)
    for entry in entry_points(group="preceptor.modules"):
        if kind.__module__.startswith(entry.module) and kind.__name__ == entry.attr:
            return entry.name
    known = [name for name, cls in _DSPY.items() if cls is kind]
    return known[0] if known else f"{kind.__module__}:{kind.__qualname__}"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A folder that was read and whose hashes hold."""

    path: Path
    program: Mapping[str, Any]
    evidence: Mapping[str, Any]

    @property
    def instructions(self) -> dict[str, str]:
        """Predictor name -> instructions."""
        return {name: saved["instructions"] for name, saved in self.program["predictors"].items()}


def read(path: Path) -> Artifact:
    """Read an artifact and check its hashes; nothing is run.

    Raises:
        ArtifactError: If it is incomplete, altered, or of another schema version.
    """
    if not (path / "manifest.json").is_file():
        raise ArtifactError(f"{path} is no saved program: it has no manifest.json.")
    manifest = _read_json(path / "manifest.json")
    for name in _FILES:
        if not (path / name).is_file():
            raise ArtifactError(f"{path} is incomplete: {name} is missing.")
        if sha256(path / name) != manifest.get(name):
            raise ArtifactError(f"{path / name} was altered since it was saved (its SHA-256 differs).")
    program = _read_json(path / "program.json")
    if program.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{path} has schema {program.get('schema')}, this preceptor reads {SCHEMA}; "
            f"it was saved by preceptor {program.get('preceptor')}."
        )
    return Artifact(path, program, _read_json(path / "evidence.json"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ArtifactError(f"{path} is no JSON: {error}.") from error


def load(path: str | Path, *, student: dspy.Module | None = None) -> dspy.Module:
    """Return the saved program, ready to call.

    Args:
        path: The artifact folder.
        student: An instance of the user's own class, where the program is none of ours or DSPy's.

    Raises:
        ArtifactError: If the folder is bad, or the student has other predictors or fields.
    """
    artifact = read(Path(path))
    program = student.deepcopy() if student is not None else _rebuilt(artifact)
    found = dict(predictors(program))
    saved: dict[str, Any] = artifact.program["predictors"]
    if set(found) != set(saved):
        raise ArtifactError(f"{path} has the predictors {sorted(saved)}, the student has {sorted(found)}.")
    for name, predictor in found.items():
        _refuse_other_fields(str(path), name, predictor.signature, saved[name])
    for name, predictor in found.items():
        predictor.signature = predictor.signature.with_instructions(saved[name]["instructions"])
        predictor.demos = [dspy.Example(**demo) for demo in saved[name]["demos"]]
    program._compiled = True
    return program


def _rebuilt(artifact: Artifact) -> dspy.Module:
    name = str(artifact.program["module"])
    ours = {entry.name: entry for entry in entry_points(group="preceptor.modules")}
    if name in ours:
        kind = ours[name].load()
    elif name in _DSPY:
        kind = _DSPY[name]
    else:
        raise ArtifactError(
            f"{artifact.path} holds a {name}; pass an instance: load(path, student={name.split(':')[-1]}())."
        )
    [saved] = artifact.program["predictors"].values()
    try:
        return kind(_signature(saved, drops_reasoning=name == "dspy.ChainOfThought"))
    except ValueError as error:
        raise ArtifactError(
            f"{artifact.path} has a field of a type of its own ({error}); pass an instance: load(path, student=...)."
        ) from error


def _signature(saved: Mapping[str, Any], *, drops_reasoning: bool) -> Any:
    outputs = {name: field for name, field in saved["outputs"].items() if not (drops_reasoning and name == "reasoning")}
    sides = [
        ", ".join(f"{name}: {field['type']}" for name, field in side.items()) for side in (saved["inputs"], outputs)
    ]
    signature: Any = cast("Any", dspy.Signature)(" -> ".join(sides), saved["instructions"])
    for name, field in {**saved["inputs"], **outputs}.items():
        signature = signature.with_updated_fields(name, desc=field["description"])
    return signature


def _refuse_other_fields(path: str, name: str, signature: Any, saved: Mapping[str, Any]) -> None:
    for side, fields in (("inputs", signature.input_fields), ("outputs", signature.output_fields)):
        if list(fields) != list(saved[side]):
            raise ArtifactError(f"{path}: {name} was saved with the {side} {list(saved[side])}, not {list(fields)}.")


def diff(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Return a unified diff of two programs' instructions, "" where they are equal.

    Example:
        >>> print(diff({"predict": "Sort."}, {"predict": "Sort by queue."}))
        --- predict
        +++ predict
        @@ -1 +1 @@
        -Sort.
        +Sort by queue.
    """
    names = sorted({*before, *after})
    parts = [
        difflib.unified_diff(
            before.get(name, "").splitlines(), after.get(name, "").splitlines(), name, name, lineterm=""
        )
        for name in names
    ]
    return "\n".join(line for part in parts for line in part)
