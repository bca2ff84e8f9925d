"""Embeddings: texts as unit vectors, by a model of the catalogue, of the hub, or of the user's.

Reimers and Gurevych, "Sentence-BERT", EMNLP 2019, is the family of the catalogue's model.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from preceptor.errors import ConfigError, ModelError
from preceptor.lm.catalogue import CATALOGUE, lookup
from preceptor.lm.fetch import fetch, quiet_transformers, sha256_of

Vectors: TypeAlias = npt.NDArray[np.float32]
"""One text a row, each of length 1, or 0 where the embedder finds nothing to go by."""

Report = Callable[[str, int, int], None]

DEFAULT: Final = "all-minilm-l6-v2"
MODELS: Final = tuple(name for name, entry in CATALOGUE.items() if "modules.json" in entry.files)
"""The catalogue's embedders."""

BATCH: Final = 64
"""Texts embedded at a time; the model is asked for equal batches in every run, so that equal texts give equal bits."""

_OWN: Final = "own/"
_HUB: Final = "hub/"

_OF_A_FOLDER: Final = ("modules.json", "config.json")
"""One of them is in a folder that holds an embedder."""

_MODEL_FILES: Final = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt")
"""What an embedder's folder and those in it are made of: modules, weights, settings and vocabulary."""

_PRINT: Final = 12
"""Digits of a fingerprint in a name."""

_LOADED_AT_ONCE: Final = 4
"""Models kept in memory."""


def _silent(what: str, done: int, total: int) -> None:
    del what, done, total


@dataclass(frozen=True, slots=True)
class Embedder:
    """Something that turns texts into vectors.

    Attributes:
        name: Told apart from others by it: in a saved program, and when a run is resumed.
        embed: Given texts, returns as many vectors, of one number of dimensions; must be the same in every run.

    Raises:
        ConfigError: If the name isn't one line of printable text.
    """

    name: str
    embed: Callable[[Sequence[str]], Any]

    def __post_init__(self) -> None:
        if not self.name.isprintable() or not self.name:
            raise ConfigError(f"An embedder's name is one line of printable text, not {self.name!r}.")

    def __str__(self) -> str:
        return self.name

    def __deepcopy__(self, memo: dict[int, Any]) -> Embedder:
        return self

    def __call__(self, texts: Sequence[str], report: Report = _silent) -> Vectors:
        """Return the texts' embeddings, shape (texts, dimensions), of length 1 or 0; equal texts are embedded once.

        Raises:
            ConfigError: If the embedder returns something else than one finite vector a text.
        """
        distinct = list(dict.fromkeys(texts))
        what, done = f"embedding {len(distinct)} texts", 0
        found: list[Vectors] = []
        for start in range(0, len(distinct), BATCH):
            report(what, done, len(distinct))
            batch = distinct[start : start + BATCH]
            found.append(self._unit(self.embed(batch), len(batch)))
            done += len(batch)
        report(what, done, len(distinct))
        place = {text: at for at, text in enumerate(distinct)}
        return np.concatenate(found)[[place[text] for text in texts]]

    def _unit(self, made: Any, count: int) -> Vectors:
        vectors = np.asarray(made, dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != count or not np.isfinite(vectors).all():
            raise ConfigError(
                f"The embedder {self.name} must return {count} vectors of finite numbers for as many texts, "
                f"not an array of shape {vectors.shape}."
            )
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.where(lengths > 0, lengths, 1), dtype=np.float32)


def embedder_of(model: str | Embedder) -> Embedder:
    """Return an embedder: one of the user's, of the catalogue, or of a hub id or a folder.

    The model is fetched and loaded when it is first asked. A folder's name ends in a fingerprint of what is in it:
    trained further, it is another embedder, and moved, it is the same.

    Raises:
        ConfigError: If the catalogue's model of that name writes text.
        ModelError: If the folder isn't there, or holds no model.
    """
    if isinstance(model, Embedder):
        return model
    if model in MODELS:
        return Embedder(f"{model}@{lookup(model).sha256[:_PRINT]}", functools.partial(_catalogued, model))
    if model in CATALOGUE:
        raise ConfigError(f"{model} is no embedder; the catalogue has {', '.join(MODELS)}.")
    folder = Path(model)
    if model and folder.is_dir():
        sha = _print_of(folder)
        return Embedder(f"{_OWN}{folder.resolve().name}@{sha}", functools.partial(_sentences, model, sha))
    if not model or model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise ModelError(
            f"No embedder {model!r}: it is no folder and no hub id; the catalogue has {', '.join(MODELS)}."
        )
    return Embedder(f"{_HUB}{model}", functools.partial(_sentences, model, ""))


def _print_of(folder: Path) -> str:
    """Return the fingerprint of an embedder's folder.

    Raises:
        ModelError: If it holds none.
    """
    if not any((folder / name).is_file() for name in _OF_A_FOLDER):
        raise ModelError(f"Can't load the embedder {folder}: it has neither {' nor '.join(_OF_A_FOLDER)}.")
    paths = sorted({path for pattern in _MODEL_FILES for path in folder.rglob(pattern)})
    return _hashed(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))[:_PRINT]


@functools.lru_cache(maxsize=64)
def _hashed(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Return the hash of files; their sizes and times tell when it is to be computed again."""
    return sha256_of(path for path, _, _ in files)


def named_in_artifact(name: str) -> Embedder:
    """Return the embedder a saved program names, if the catalogue has exactly it; nothing else is fetched or loaded.

    Raises:
        ModelError: If it is of the user's own, or not the same weights.
    """
    model, _, sha = name.partition("@")
    if model not in MODELS:
        raise ModelError(
            f"needs the embedder {name!r}, which the catalogue doesn't have; pass it: "
            "load(path, embedder=...), or --embedder on the command line"
        )
    if sha != lookup(model).sha256[:12]:
        raise ModelError(
            f"was made with the embedder {name!r}, and the catalogue's has the hash {lookup(model).sha256[:12]}; "
            "pass the one it was made with: load(path, embedder=...), or --embedder on the command line"
        )
    return embedder_of(model)


def _catalogued(name: str, texts: Sequence[str]) -> Any:
    return _sentences(str(fetch(name)), "", texts)


_LOCK: Final = threading.Lock()
"""A model is loaded once and asked by one thread at a time: its own threads use all cores."""


def _sentences(model: str, sha: str, texts: Sequence[str]) -> Any:
    with _LOCK:
        return _loaded(model, sha).encode(
            list(texts), batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True
        )


@functools.lru_cache(maxsize=_LOADED_AT_ONCE)
def _loaded(model: str, sha: str) -> Any:
    """Return a model; of a folder whose fingerprint is another, a new one."""
    del sha
    from sentence_transformers import SentenceTransformer

    try:
        with quiet_transformers():
            return SentenceTransformer(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"Can't load the embedder {model}: {str(error).splitlines()[0]}") from error
