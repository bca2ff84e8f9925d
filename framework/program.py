"""The artifact: a compiled program as one folder that can be read, compared, checked and run.

    program.json            modules and signatures by field name, instructions, demonstrations, the model's name
    evidence.json           what the compile measured, and probe answers
    centroids.safetensors   where each expert answers, if the program has several
    manifest.json           SHA-256 of the others

It is written beside its place and renamed, so that it is there whole or not at all. Anybody may have
written what is loaded: links aren't followed, sizes are bounded, types come from a closed list, and
nothing is imported or run. Modules of ours are rebuilt by name, a class of the user's is passed in.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Any, Final, cast

import dspy

from preceptor import declared, form, routed, untrusted
from preceptor.canonical import written
from preceptor.checks import refuse_steering
from preceptor.copies import apply, candidate_of, copy_of
from preceptor.declared import type_text
from preceptor.errors import ArtifactError, ConfigError
from preceptor.lm.embedding import Embedder
from preceptor.lm.redaction import without_address, without_credentials
from preceptor.lm.seam import frozen_predictors, has_address, predictors
from preceptor.untrusted import Malformed, shown

__all__ = ["Artifact", "apply", "candidate_of", "copy_of", "load", "read", "save", "type_text"]

SCHEMA: Final = 1
_FILES: Final = ("program.json", "evidence.json")
_DSPY: Final[Mapping[str, Any]] = {"dspy.Predict": dspy.Predict, "dspy.ChainOfThought": dspy.ChainOfThought}


def save(
    program: dspy.Module, path: Path, *, evidence: Mapping[str, Any], lm: dspy.LM | str, replace: bool = False
) -> None:
    """Write the artifact folder `path`, and read it back before it is put in its place.

    Args:
        program: What to save; its language models are left out but for the name.
        path: A folder that doesn't exist yet, unless `replace`.
        evidence: Shown by `show` and `report`. Probes that can't be asked safely again are left out.
        lm: The model or its identifier; of an address, no more is kept than that there is one.
        replace: Put the new artifact in the place of an older one.

    Raises:
        ArtifactError: If the folder exists, can't be written, or couldn't be read again; what was there stays.
    """
    if path.exists() and not (replace and (path / "manifest.json").is_file()):
        raise ArtifactError(f"{path} exists already; nothing was overwritten. Choose another folder.")
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        files = {"program.json": written(_described(program, lm)), "evidence.json": written(form.replayable(evidence))}
        _write(fresh, files | ({routed.FILE: routed.written(program)} if _is_routed(program) else {}))
        _read(fresh)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"Can't write the program to {path}: {_reason(error)}.") from error
    finally:
        if old.is_dir() and not path.exists():
            old.rename(path)
        shutil.rmtree(fresh, ignore_errors=True)


def check_savable(program: dspy.Module, lm: str, *, copies: int = 1) -> None:
    """Raise if a program of the model `lm`, or `copies` experts as large as it, couldn't be saved; nothing is written.

    Raises:
        ConfigError: Saying why not.
    """
    if lm and not without_address(lm):
        raise ConfigError(
            f"A program of the model {without_credentials(lm)} couldn't be saved: its name is an address, which isn't "
            "kept. Name it without: dspy.LM('organisation/model', engine=...)."
        )
    if (kind := _module_name(program)) in _DSPY or kind in _installed():  # loaded without the user's class
        for name, predictor in predictors(program):
            refuse_steering(name, predictor.signature.fields)
    try:
        content = written(_described(program, lm))
        form.check_program(untrusted.json_object(content))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"A program like {type(program).__name__} couldn't be saved: program.json {error}."
        ) from error
    if len(content) * copies > untrusted.MOST_BYTES:
        raise ConfigError(
            f"The compiled program couldn't be saved: with its demonstrations it has about {len(content) * copies:,} "
            f"bytes, and a file may have {untrusted.MOST_BYTES:,}. Show fewer or shorter rows."
        )


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    manifest = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    for name, content in {**files, "manifest.json": written(manifest)}.items():
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _described(program: dspy.Module, lm: dspy.LM | str) -> dict[str, Any]:
    is_routed = _is_routed(program)
    described = {
        name: {
            **declared.described(predictor),
            "demos": [dspy.Example(dict(demo)).toDict() for demo in predictor.demos],
        }
        for name, predictor in routed.labels(program, is_routed=is_routed).items()
    }
    student = {"experts": routed.described(program, _module_name(cast("Any", program).default))} if is_routed else {}
    return {
        "schema": SCHEMA,
        "module": _module_name(program),
        **student,
        "predictors": described,
        **({"frozen": frozen} if (frozen := _frozen(cast("Any", program).default if is_routed else program)) else {}),
        "lm": without_address(lm if isinstance(lm, str) else lm.model),
        **({"has_address": True} if not isinstance(lm, str) and has_address(lm) else {}),
        "preceptor": version("preceptor"),
        "dspy": version("dspy"),
    }


def _frozen(program: dspy.Module) -> dict[str, str]:
    """Return what tells one version of each frozen predictor from another; the user's class brings them itself."""
    others = frozen_predictors(program)
    parts = {name: {**declared.described(one), "demos": [dict(demo) for demo in one.demos]} for name, one in others}
    return {name: hashlib.sha256(written(one)).hexdigest()[:16] for name, one in parts.items()}


def _module_name(program: dspy.Module) -> str:
    kind = type(program)
    for entry in _installed().values():
        if kind.__module__.startswith(entry.module) and kind.__name__ == entry.attr:
            return entry.name
    known = [name for name, cls in _DSPY.items() if cls is kind]
    return known[0] if known else f"{kind.__module__}:{kind.__qualname__}"


def _is_routed(program: dspy.Module) -> bool:
    return _module_name(program) == routed.MODULE


@functools.cache
def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group="preceptor.modules")}


@dataclass(frozen=True, slots=True)
class Artifact:
    """A folder that was read and whose hashes hold."""

    path: Path
    program: Mapping[str, Any]
    evidence: Mapping[str, Any]
    tensors: routed.Tensors

    @property
    def is_routed(self) -> bool:
        """True if it has several experts."""
        return routed.MODULE in self.program

    @property
    def instructions(self) -> dict[str, str]:
        """Predictor name -> instructions; an expert's predictor is named after the expert, too."""
        return {name: saved["instructions"] for name, saved in self.program["predictors"].items()}

    @property
    def predictors(self) -> dict[str, dict[str, Any]]:
        """Expert -> predictor name -> what was saved of it; the expert is "" where there are none."""
        return routed.grouped(self.program["predictors"], is_routed=self.is_routed)

    def answering(self, experts: Iterable[str]) -> dict[str, Mapping[str, Any]]:
        """Return the predictors that answer for each expert: its own, else the default's."""
        groups = self.predictors
        found = {expert: groups.get(expert) or groups.get(routed.DEFAULT) or groups[""] for expert in experts}
        return {routed.label(expert, name): saved for expert, group in found.items() for name, saved in group.items()}

    def instructions_of(self, experts: Iterable[str]) -> dict[str, str]:
        """Return the instructions that answer for each expert, and the router in words."""
        found = {name: str(saved["instructions"]) for name, saved in self.answering(experts).items()}
        return found | ({"router": self.router} if self.is_routed else {})

    @property
    def router(self) -> str:
        """The router of the experts in words, "" if there are none."""
        return routed.told(self.program[routed.MODULE], self.predictors) if self.is_routed else ""


def read(path: Path) -> Artifact:
    """Read an artifact, check its hashes and its form; nothing is run.

    Raises:
        ArtifactError: If it is incomplete, altered, malformed, or of another schema version.
    """
    try:
        return _read(path)
    except Malformed as error:
        raise ArtifactError(f"{error}.") from error


def _read(path: Path) -> Artifact:
    manifest = _parsed(path / "manifest.json", _content(path, "manifest.json"))
    contents = {name: _content(path, name) for name in (*_FILES, *({routed.FILE} & set(manifest)))}
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != manifest.get(name):
            raise Malformed(f"{path / name} was altered since it was saved (its SHA-256 differs)")
    program, evidence = (_parsed(path / name, contents[name]) for name in _FILES)
    schema, writer = program.get("schema"), program.get("preceptor")
    if type(schema) is not int or schema != SCHEMA:
        raise Malformed(
            f"{path} has schema {shown(schema)}, this preceptor reads {SCHEMA}; "
            f"it was saved by preceptor {shown(writer)[1:-1]}"
        )
    for name, check, value in zip(_FILES, (form.check_program, form.check_evidence), (program, evidence), strict=True):
        try:
            check(value)
        except Malformed as error:
            raise Malformed(f"{path / name} is malformed: {error}") from error
    return Artifact(path, program, evidence, _tensors(path, program, contents.get(routed.FILE)))


def _tensors(path: Path, program: Mapping[str, Any], content: bytes | None) -> routed.Tensors:
    if routed.MODULE not in program:
        return {}
    if content is None:
        raise Malformed(f"{path} is incomplete: {routed.FILE} is missing")
    try:
        return routed.check(program[routed.MODULE], content)
    except Malformed as error:
        raise Malformed(f"{path / routed.FILE} {error}") from error


def _content(path: Path, name: str) -> bytes:
    try:
        return untrusted.content(path / name)
    except (FileNotFoundError, NotADirectoryError) as error:
        if name == "manifest.json":
            own = path / "program"
            hint = f"; the program of this run is {own}" if (own / name).is_file() else ""
            raise Malformed(f"{path} is no saved program: it has no manifest.json{hint}") from error
        raise Malformed(f"{path} is incomplete: {name} is missing") from error
    except Malformed as error:
        raise Malformed(f"{path / name} {error}") from error
    except (OSError, ValueError) as error:
        raise Malformed(f"Can't read {path / name}: {_reason(error)}") from error


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    try:
        return untrusted.json_object(content)
    except Malformed as error:
        raise Malformed(f"{path} {error}") from error


def load(path: str | Path, *, student: dspy.Module | None = None, embedder: Embedder | None = None) -> dspy.Module:
    """Return the saved program, ready to call.

    Args:
        path: The artifact folder; whoever wrote it, nothing of it is run.
        student: An instance of the user's own class, where the program, or each of its experts, is none of ours
            or DSPy's.
        embedder: The user's own, where a program of several experts was made with one.

    Raises:
        ArtifactError: If the folder is bad, the student has other predictors or fields, or other frozen parts, or
            the embedder isn't there or isn't the one that was used.
    """
    artifact, parts = read(Path(path)), dict[str, dspy.Module]()
    if student is not None:
        _refuse_other_frozen(str(path), _frozen(student), artifact.program.get("frozen", {}))
    for expert, saved in artifact.predictors.items():
        part = copy_of(student) if student is not None else _rebuilt(artifact, saved)
        parts[expert] = _filled(part, str(path), saved)
    program = _routed(artifact, parts, embedder) if artifact.is_routed else parts[""]
    program._compiled = True
    return program


def _filled(program: dspy.Module, path: str, saved: Mapping[str, Any]) -> dspy.Module:
    """Return the program with the instructions and demonstrations that were saved."""
    found = dict(predictors(program))
    if set(found) != set(saved):
        raise ArtifactError(f"{path} has the predictors {_listed(saved)}, the student has {_listed(found)}.")
    for name, predictor in found.items():
        _refuse_other_fields(path, name, predictor.signature, saved[name])
        _refuse_lists_for_texts(path, name, predictor.signature, saved[name]["demos"])
    for name, predictor in found.items():
        if predictor.signature.instructions != saved[name]["instructions"]:  # another signature takes time to make
            predictor.signature = predictor.signature.with_instructions(saved[name]["instructions"])
        predictor.demos = [dspy.Example(demo) for demo in saved[name]["demos"]]
    return program


def _routed(artifact: Artifact, parts: Mapping[str, dspy.Module], embedder: Embedder | None) -> dspy.Module:
    saved = artifact.program[routed.MODULE]
    router = routed.router(str(artifact.path), saved, artifact.tensors, embedder)
    experts = {name: part for name, part in parts.items() if name != routed.DEFAULT}
    kind: Any = _installed()[routed.MODULE].load()
    try:
        return cast("dspy.Module", kind(parts[routed.DEFAULT], experts, router))
    except ConfigError as error:
        raise ArtifactError(f"{artifact.path} holds experts that can't be: {error}") from error


def _rebuilt(artifact: Artifact, predictors_saved: Mapping[str, Any]) -> dspy.Module:
    holder = artifact.program[routed.MODULE] if artifact.is_routed else artifact.program
    name, ours = str(holder["student" if artifact.is_routed else "module"]), _installed()
    if name not in ours and name not in _DSPY:
        raise ArtifactError(
            f"{artifact.path} holds a {name:.200}; pass an instance: load(path, student={name.split(':')[-1]:.100}())."
        )
    saved = list(predictors_saved.values())
    if len(saved) != 1:
        raise ArtifactError(f"{artifact.path} holds a {name} of {len(saved)} predictors; it has one.")
    own: list[str] = saved[0].get("own", [])
    if own:
        raise ArtifactError(
            f"{artifact.path} was saved without {', '.join(own)}, which no file holds; "
            "pass an instance: load(path, student=...)."
        )
    try:
        signature = declared.signature(saved[0])
    except Malformed as error:
        raise ArtifactError(
            f"{artifact.path} has a field of a type of its own ({error}); pass an instance: load(path, student=...)."
        ) from error
    try:
        kind = ours[name].load() if name in ours else _DSPY[name]
        made = _of(kind, signature)
        for _, predictor in predictors(made):
            predictor.config = dict(saved[0].get("config", {}))
        return made
    except ValueError as error:
        raise ArtifactError(f"{artifact.path} holds a {name} that can't be one: {str(error)[:200]}") from error


def _of(kind: Any, signature: Any) -> dspy.Module:
    """Return a module of a signature; `ChainOfThought` adds its own `reasoning`, the saved one takes its place."""
    if kind is not dspy.ChainOfThought:
        return cast("dspy.Module", kind(signature))
    made: Any = kind(signature.delete("reasoning"))
    if "reasoning" in signature.output_fields:
        made.predict.signature = signature
    return cast("dspy.Module", made)


def _refuse_other_frozen(path: str, found: Mapping[str, str], saved: Mapping[str, str]) -> None:
    changed = [name for name in {**saved, **found} if found.get(name) != saved.get(name)]
    if changed:
        raise ArtifactError(
            f"{path}: the frozen predictor {shown(changed[0])[1:-1]} isn't the student's; a file holds none. "
            "Pass the student with the parts it was saved with."
        )


def _refuse_other_fields(path: str, name: str, signature: Any, saved: Mapping[str, Any]) -> None:
    for side, fields in (("inputs", signature.input_fields), ("outputs", signature.output_fields)):
        if list(fields) != list(saved[side]):
            raise ArtifactError(
                f"{path}: {name} was saved with the {side} {_listed(saved[side])}, not {_listed(fields)}."
            )


def _refuse_lists_for_texts(path: str, name: str, signature: Any, demos: Iterable[Mapping[str, Any]]) -> None:
    """Refuse what DSPy can't write into a prompt: a list in a text's place, unless it is one of texts."""
    texts = [field for field, info in signature.fields.items() if info.annotation is str]
    for given, field in ((demo[field], field) for demo in demos for field in texts if field in demo):
        if isinstance(given, list) and not all(isinstance(each, str) for each in given):
            raise ArtifactError(f"{path}: a demonstration of {name} has a list for {field}, which must be a text.")


def _listed(names: Iterable[str]) -> str:
    return shown(list(names))
