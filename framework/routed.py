"""Experts in an artifact: whose predictor is whose, and the router, whose numbers are a safetensors file.

`program.json` then says `experts`: the module that each of them is, the embedder's name, the inputs that are
looked at, the regions and the radius. `centroids.safetensors` holds the `centroids` and the `probe` of a
`preceptor.regions.Router`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import dspy
import numpy as np
from safetensors.numpy import save

from preceptor import untrusted
from preceptor.errors import ArtifactError, ModelError
from preceptor.lm.embedding import Embedder, Vectors, named_in_artifact
from preceptor.lm.seam import predictors
from preceptor.regions import Router
from preceptor.untrusted import Malformed, shown

MODULE: Final = "experts"
"""Entry point of the module, and what `program.json` calls its part."""

DEFAULT: Final = "default"
"""Name of the expert that answers where no region has one of its own."""

FILE: Final = "centroids.safetensors"

_UNIT: Final = 1e-3
"""How far from 1 the length of a vector may be."""

Tensors = Mapping[str, Vectors]


def parts_of(program: Any, *, is_routed: bool) -> dict[str, dspy.Module]:
    """Return the experts by name, or the program itself by "" where it has none."""
    return {DEFAULT: program.default, **program.experts} if is_routed else {"": program}


def label(expert: str, predictor: str) -> str:
    """Return what an expert's predictor is called in an artifact.

    Example:
        >>> label("region 2", "predict"), label("", "predict")
        ('region 2: predict', 'predict')
    """
    return f"{expert}: {predictor}" if expert else predictor


def grouped(saved: Mapping[str, Any], *, is_routed: bool) -> dict[str, dict[str, Any]]:
    """Return what was saved under each label, by expert and predictor."""
    if not is_routed:
        return {"": dict(saved)}
    groups: dict[str, dict[str, Any]] = {}
    for name, value in saved.items():
        expert, _, predictor = name.partition(": ")
        groups.setdefault(expert, {})[predictor] = value
    return groups


def described(program: Any, student: str) -> dict[str, Any]:
    """Return what `program.json` says of the experts; `student` names the module that each of them is."""
    router: Router = program.router
    return {
        "student": student,
        "embedder": router.embedder.name,
        "fields": list(router.fields),
        "regions": list(router.names),
        "radius": router.radius,
    }


def written(program: Any) -> bytes:
    """Return the content of `centroids.safetensors`."""
    router: Router = program.router
    arrays = {"centroids": router.centroids, "probe": router.probe}
    return save({name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()})


def check(saved: Mapping[str, Any], content: bytes) -> Tensors:
    """Return the numbers of `centroids.safetensors`, if they fit what `program.json` says.

    Raises:
        Malformed: If they don't, or the file holds anything else.
    """
    tensors = untrusted.tensors(content)
    if set(tensors) != {"centroids", "probe"}:
        raise Malformed(f"holds {shown(sorted(tensors))}, not centroids and probe")
    centroids, probe = tensors["centroids"], tensors["probe"]
    regions, dimensions = len(saved["regions"]), probe.size
    shapes = {"centroids": (regions, dimensions), "probe": (dimensions,)}
    for name, shape in shapes.items():
        if tensors[name].shape != shape or not dimensions:
            raise Malformed(f"holds {name} of shape {tensors[name].shape}; with {regions} regions it must be {shape}")
    every = np.array([*centroids, probe])
    if np.abs(every).max() > 1 + _UNIT or np.abs(np.linalg.norm(every, axis=1) - 1).max() > _UNIT:
        raise Malformed("holds centroids whose length isn't 1")
    return tensors


def router(path: str, saved: Mapping[str, Any], tensors: Tensors, embedder: Embedder | None) -> Router:
    """Return the router that was saved in the folder `path`.

    Args:
        path: Named in messages.
        saved: What `program.json` says of the experts.
        tensors: Checked.
        embedder: The user's own; by default the catalogue's, if it is the one that was used.

    Raises:
        ArtifactError: If the embedder isn't in the catalogue, or the one given isn't the one that was used.
    """
    try:
        used = embedder or named_in_artifact(saved["embedder"])
    except ModelError as error:
        raise ArtifactError(f"{path} {error}.") from error
    made = Router(
        used,
        tuple(saved["fields"]),
        tuple(saved["regions"]),
        tensors["centroids"],
        float(saved["radius"]),
        tensors["probe"],
    )
    if embedder is not None:
        made.refuse_another_embedder()
    return made


def told(saved: Mapping[str, Any], groups: Mapping[str, Any]) -> str:
    """Return the router in words: one line for each region says who answers there."""
    lines = [f"by {saved['embedder']}, on {', '.join(saved['fields'])}"]
    lines += [f"{region}: {'its own expert' if region in groups else DEFAULT}" for region in saved["regions"]]
    return "\n".join(lines)


def labels(program: Any, *, is_routed: bool) -> dict[str, Any]:
    """Return the predictors of a program, or of all its experts, by their labels."""
    return {
        label(expert, name): predictor
        for expert, part in parts_of(program, is_routed=is_routed).items()
        for name, predictor in predictors(part)
    }
