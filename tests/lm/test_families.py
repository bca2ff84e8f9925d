"""Models of other families, tiny and random: scored and read as `transformers` itself does, whatever their layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers
from dspy.lm15 import Config, Message, Request
from transformers import AutoModelForCausalLM

from preceptor.errors import ModelError
from preceptor.lm import attention, prefill
from preceptor.lm.local import LocalEngine, LocalLM
from preceptor.lm.sampling import Draw

SMALL: Final[dict[str, Any]] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "whole": ("LlamaConfig", {}),
    "scaled down": ("GraniteConfig", {"logits_scaling": 8.0}),
    "scaled": ("CohereConfig", {"logit_scale": 0.0625}),
    "capped, windows": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 3.0}),
    "windows": ("MistralConfig", {"sliding_window": 16}),
    "experts": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "as many keys as heads": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}),
}
SHARED: Final = ("whole", "scaled down", "scaled", "as many keys as heads")
TEXTS: Final = ("Rain makes everything that it falls on", "A desert is", "The sea, which the ships sail on, is")
CHOICES: Final = (" wet", " dry as a bone")


def made(name: str, vocabulary: int, more: dict[str, Any]) -> Any:
    """Return a model of these settings whose weights are random, in float32 on the processor."""
    config = getattr(transformers, name)(vocab_size=vocabulary, **SMALL, **more)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    for weights in model.parameters():
        if weights.dim() > 1:
            weights.data.normal_(0, 0.15)
    return model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, engine: LocalEngine) -> tuple[str, LocalEngine]:
    """Return a family's name and an engine on a model of it."""
    name, more = FAMILIES[request.param]
    model = made(name, len(engine._tokenizer), more)
    return request.param, LocalEngine(lambda: model, model.config, engine._tokenizer, "local/tiny@0")


def question(text: str, **settings: Any) -> Request:
    return Request(model="local/tiny", messages=(Message.user(text),), config=Config(**settings))


def of_the_model(engine: LocalEngine, tokens: list[int], choice: tuple[int, ...]) -> float:
    """Return log P(choice | tokens) of a plain pass."""
    fed = torch.tensor([[*tokens, *choice]])
    logits = engine._model(input_ids=fed, use_cache=False).logits[0].float().log_softmax(-1)
    return sum(float(logits[len(tokens) - 1 + at, token]) for at, token in enumerate(choice))


def test_choices_are_scored_as_the_model_itself_does(family: tuple[str, LocalEngine]) -> None:
    _, engine = family
    asked = [question(text, extensions={"choices": list(CHOICES)}) for text in TEXTS]
    found = dict(pair for batch in engine.batches(asked) for pair in batch)
    for at, request in enumerate(asked):
        prompt = engine._prompt(request)
        with torch.inference_mode():
            expected = [of_the_model(engine, [*prompt.prefix, *prompt.suffix], one) for one in prompt.choices]
        top: Any = found[at].logprobs[0].top  # type: ignore[union-attr]  # an answer
        scores = {each.token: each.logprob for each in top}
        assert [scores[text] for text in CHOICES] == pytest.approx(expected, abs=2e-3)


def test_the_next_tokens_odds_are_those_of_the_model_itself(family: tuple[str, LocalEngine]) -> None:
    name, engine = family
    prompt = engine._prompt(question(" ".join(TEXTS)))
    assert prompt.length > FAMILIES["windows"][1]["sliding_window"]
    with torch.inference_mode():
        read = engine._read([prompt.prefix], [Draw(prompt.suffix, max_tokens=1)])
        plain = engine._model(input_ids=torch.tensor([[*prompt.prefix, *prompt.suffix]]), use_cache=False)
    torch.testing.assert_close(read.logits[0], plain.logits[0, -1].float(), atol=2e-3, rtol=1e-3)
    assert prefill.can_share(engine._model) == (engine._blocks is not None) == (name in SHARED)
    assert attention.is_whole(engine._model) == (name in (*SHARED, "experts"))


def test_a_model_whose_layers_keep_a_state_is_refused(tmp_path: Path, engine: LocalEngine) -> None:
    made("Lfm2Config", len(engine._tokenizer), {"layer_types": ["conv", "full_attention"]}).save_pretrained(tmp_path)
    engine._tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has layers that keep a state, .* Serve it \(vLLM, Ollama\) and pass --api"):
        LocalLM(str(tmp_path))
