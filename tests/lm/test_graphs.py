"""Replayed steps: without a GPU nothing is recorded, but the steps are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from preceptor.lm import decoding, graphs
from preceptor.lm.decoding import Text, decode
from preceptor.lm.local import LocalEngine
from preceptor.lm.prefill import padded
from preceptor.lm.sampling import Draw


def chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def run(precise: LocalEngine, draws: list[Draw]) -> list[Text]:
    with torch.inference_mode():
        cache = DynamicCache(config=precise._model.config)
        tokens = torch.tensor(
            [precise._tokens("<|im_start|>system\nBe brief.<|im_end|>\n")], device=precise._model.device
        )
        precise._model(input_ids=tokens, past_key_values=cache, use_cache=True)
        read = padded(precise._model, [cache] * len(draws), draws)
        return decode(precise._model, read, draws, ends=precise._ends, detokenize=precise._detokenize)


@pytest.mark.parametrize("count", [1, 3])
def test_replayed_steps_decode_what_shrinking_batches_decode(
    precise: LocalEngine, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    questions = ["What is the capital of France?", "2 + 2 =", "Write one sentence about the sea and its ships."]
    draws = [
        Draw(precise._tokens(chat(question)), max_tokens=bound, temperature=temperature, seed=4)
        for question, bound, temperature in zip(questions[:count], (12, 3, 9), (0.0, 0.0, 0.8), strict=False)
    ]
    shrunk = run(precise, draws)
    made: list[graphs.Replayed] = []

    def steps(*given: Any) -> graphs.Replayed:
        made.append(graphs.Replayed(*given))
        return made[-1]

    monkeypatch.setattr(decoding, "_steps", steps)
    replayed = run(precise, draws)
    again = run(precise, draws)

    assert len(made) == 2
    assert made[0]._step is made[1]._step  # kept for the next batch of its size
    assert [text.tokens for text in replayed] == [text.tokens for text in shrunk]
    assert again == replayed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph is recorded on a GPU only")
def test_a_gpu_records_its_steps(precise: LocalEngine) -> None:
    with torch.inference_mode():
        assert graphs.Step(precise._model, 1, 256)._graph is not None
