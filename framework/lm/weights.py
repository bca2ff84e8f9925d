"""Where a model's weights are: in the catalogue, in a folder, or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from preceptor.errors import ModelError
from preceptor.lm.catalogue import CATALOGUE
from preceptor.lm.fetch import WEIGHTS, Progress, fetch, sha256_of

_MODEL_FILES: Final = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""What a model outside the catalogue is made of: weights, settings, vocabulary and chat template."""


def locate(model: str, progress: Progress | None) -> tuple[str, str]:
    """Return where to load a model from, and the SHA-256 that fingerprints its weights."""
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


def _from_hub(model: str) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    known = f"The catalogue has {', '.join(CATALOGUE)}; a folder with config.json works too."
    if model.count("/") != 1:
        raise ModelError(f"No model {model!r}. {known}")
    try:
        return Path(snapshot_download(model, allow_patterns=list(_MODEL_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx.HTTPError) as error:
        raise ModelError(f"Hugging Face has no {model!r} within reach ({type(error).__name__}). {known}") from error
