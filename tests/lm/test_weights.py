"""Where a model's weights are, and what tells one model's files from another's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from preceptor.lm.weights import has_bfloat16, locate


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "merges.txt", "tokenizer.model", "config.json", "x.safetensors"]
)
def test_a_models_fingerprint_tells_of_each_of_its_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("A model.")
    before = locate(str(tmp_path), None)[1]
    (tmp_path / "README.md").write_text("A good model.")
    assert locate(str(tmp_path), None)[1] == before
    (tmp_path / name).write_text("{ }")
    assert locate(str(tmp_path), None)[1] != before


@pytest.mark.parametrize(
    ("capability", "has_bf16", "has_amx", "expected"),
    [
        ("AVX512", True, False, True),
        ("AVX512", False, True, True),
        ("AVX512", False, False, False),
        ("AVX2", True, True, False),  # ATEN_CPU_CAPABILITY=avx2
        ("DEFAULT", True, True, False),
    ],
)
def test_bfloat16_is_used_where_it_is_fast_and_pytorch_may_use_it(
    monkeypatch: pytest.MonkeyPatch, capability: str, has_bf16: bool, has_amx: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert has_bfloat16() is expected
