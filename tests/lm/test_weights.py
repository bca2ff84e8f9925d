"""Where a model's weights are, and what tells one model's files from another's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from preceptor.lm.prepacked import Blocked, Prepacked
from preceptor.lm.weights import has_bfloat16, locate, read


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU lays out nothing")
@pytest.mark.skipif(not has_bfloat16(), reason="this processor computes in float32")
@pytest.mark.parametrize("has_amx", [True, False])
def test_a_model_is_read_with_the_layers_that_this_processor_multiplies_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_amx: bool
) -> None:
    settings = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(settings).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    layers = [layer for layer in read("tiny", str(tmp_path)).modules() if isinstance(layer, torch.nn.Linear)]
    assert {type(layer) for layer in layers} == {Blocked if has_amx else torch.nn.Linear}
    monkeypatch.setattr("preceptor.lm.weights.has_bfloat16", lambda: False)
    layers = [layer for layer in read("tiny", str(tmp_path)).modules() if isinstance(layer, torch.nn.Linear)]
    assert {type(layer) for layer in layers} == {Prepacked}
