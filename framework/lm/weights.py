"""A model's weights: where they are (in the catalogue, a folder, or on the Hugging Face hub), and reading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError

from preceptor.errors import ModelError
from preceptor.lm.catalogue import CATALOGUE, known_models, refuse_unknown
from preceptor.lm.fetch import WEIGHTS, Progress, fetch, quiet_transformers, sha256_of
from preceptor.lm.prepacked import blocked, prepacked

_MODEL_FILES: Final = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""What a model outside the catalogue is made of: weights, settings, vocabulary and chat template."""


def locate(model: str, progress: Progress | None) -> tuple[str, str]:
    """Return where to load a model from, and the SHA-256 that fingerprints its weights.

    Args:
        model: A name of the catalogue, a folder with config.json, or a hub id.
        progress: Told of a download.

    Raises:
        ModelError: If there is no such model within reach, or it only embeds sentences.
    """
    if model in CATALOGUE:
        folder = fetch(model, progress=progress) if progress else fetch(model)
        if not CATALOGUE[model].weights.endswith(".gguf"):
            raise ModelError(f"{model!r} embeds sentences; it doesn't answer.")
        return str(folder / WEIGHTS), CATALOGUE[model].sha256
    folder = Path(model)
    if not (folder / "config.json").is_file():
        folder = _from_hub(model)
    names = sorted(path for pattern in _MODEL_FILES for path in folder.glob(pattern))
    return str(folder), sha256_of(names)


def read(model: str, source: str) -> Any:
    """Return a model of `transformers` with its weights, on the GPU if there is one.

    In bfloat16 there, and on processors that multiply it fast; on others in float32. Layers are laid out
    anew where FBGEMM or AMX reads them (`preceptor.lm.prepacked`).

    Args:
        model: As the user calls it.
        source: The folder with its files.

    Raises:
        ModelError: If they can't be read.
    """
    from transformers import AutoModelForCausalLM

    has_gpu = torch.cuda.is_available()
    is_half = has_gpu or has_bfloat16()
    try:
        with quiet_transformers():
            found: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.bfloat16 if is_half else "auto", attn_implementation="sdpa"
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"Can't load {model!r} from {source}: {str(error).splitlines()[0]}") from error
    if has_gpu:
        return found.to("cuda")
    return blocked(found) if is_half else prepacked(found)


def has_bfloat16() -> bool:
    """Return True if this processor multiplies bfloat16 matrices faster than float32 ones, and PyTorch may use that.

    With `ATEN_CPU_CAPABILITY=avx2` in the environment it may not: so one that has it can repeat what others compute.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _from_hub(model: str) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    refuse_unknown(model)
    try:
        return Path(snapshot_download(model, allow_patterns=list(_MODEL_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx.HTTPError) as error:
        raise ModelError(
            f"Hugging Face has no {model!r} within reach ({type(error).__name__}). {known_models()}"
        ) from error
