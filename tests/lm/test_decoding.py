"""Decoding: greedy as transformers does it, sampled by seed, ended by stop texts and bounds."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from preceptor.lm.decoding import Text, decode
from preceptor.lm.local import LocalEngine
from preceptor.lm.prefill import padded
from preceptor.lm.sampling import Draw

QUESTIONS = (
    "What is the capital of France?",
    "Name a colour.",
    "Write one sentence about the sea and the ships that sail on it.",
    "2 + 2 =",
)


def chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def run(precise: LocalEngine, draws: list[Draw], *, prefix: str = "") -> list[Text]:
    with torch.inference_mode():
        cache = DynamicCache(config=precise._model.config)
        if prefix:
            tokens = torch.tensor([precise._tokens(prefix)])
            precise._model(input_ids=tokens, past_key_values=cache, use_cache=True)
        read = padded(precise._model, [cache] * len(draws), draws)
        return decode(precise._model, read, draws, ends=precise._ends, detokenize=precise._detokenize)


def draw(precise: LocalEngine, question: str, **settings: Any) -> Draw:
    chosen: dict[str, Any] = {"max_tokens": 12, **settings}
    return Draw(precise._tokens(chat(question)), **chosen)


def generated(precise: LocalEngine, question: str, tokens: int) -> list[int]:
    """Return what `transformers` itself decodes greedily for one prompt."""
    prompt = torch.tensor([precise._tokens(chat(question))])
    output = precise._model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=copy.deepcopy(precise._model.generation_config),
        do_sample=False,
        max_new_tokens=tokens,
    )
    return [token for token in output[0, prompt.shape[1] :].tolist() if token not in precise._ends]


def test_a_greedy_batch_decodes_what_transformers_decodes(precise: LocalEngine) -> None:
    texts = run(precise, [draw(precise, question) for question in QUESTIONS])
    assert [text.tokens[:8] for text in texts] == [generated(precise, question, 8) for question in QUESTIONS]
    assert "Paris" in texts[0].text


def test_a_shared_prefix_changes_nothing(precise: LocalEngine) -> None:
    prefix = "<|im_start|>user\n"
    rests = [chat(question).removeprefix(prefix) for question in QUESTIONS]
    shared = run(precise, [Draw(precise._tokens(rest), max_tokens=8) for rest in rests], prefix=prefix)
    assert [text.tokens for text in shared] == [generated(precise, question, 8) for question in QUESTIONS]


def test_log_probabilities_are_those_of_the_decoded_tokens(precise: LocalEngine) -> None:
    [text] = run(precise, [draw(precise, QUESTIONS[0], max_tokens=5)])
    prompt = list(precise._tokens(chat(QUESTIONS[0])))
    with torch.inference_mode():
        logits = precise._model(input_ids=torch.tensor([prompt + text.tokens])).logits[0].float().log_softmax(-1)
    expected = [float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(text.tokens)]
    assert len(text.logprobs) == 5
    assert text.logprobs == pytest.approx(expected, abs=0.1)


def test_equal_seeds_draw_equal_texts_and_others_differ(precise: LocalEngine) -> None:
    draws = [draw(precise, QUESTIONS[2], temperature=1.0, seed=seed) for seed in (1, 2, 3, 1)]
    first, again = run(precise, draws), run(precise, draws)
    assert [text.text for text in first] == [text.text for text in again]
    assert first[0].text == first[3].text
    assert len({text.text for text in first}) == 3


def test_a_request_draws_the_same_text_whoever_shares_its_batch(precise: LocalEngine) -> None:
    mine = draw(precise, QUESTIONS[1], temperature=0.7, seed=5, max_tokens=6)
    others = [draw(precise, question, temperature=1.0, seed=9, max_tokens=3) for question in QUESTIONS[2:]]
    assert run(precise, [*others, mine])[2].tokens == run(precise, [mine])[0].tokens


def test_a_bound_on_tokens_cuts_with_reason_length(precise: LocalEngine) -> None:
    short, long = run(precise, [draw(precise, QUESTIONS[2], max_tokens=n) for n in (3, 6)])
    assert (len(short.tokens), short.reason) == (3, "length")
    assert (len(long.tokens), long.reason) == (6, "length")
    assert long.text.startswith(short.text)


def test_an_end_of_text_ends_with_reason_stop_and_leaves_the_batch(precise: LocalEngine) -> None:
    whole = run(precise, [draw(precise, QUESTIONS[0], max_tokens=60)])[0]
    assert whole.reason == "stop"
    assert not set(whole.tokens) & precise._ends
    assert "<|im_end|>" not in whole.text


@pytest.mark.parametrize("stops", [("capital",), ("nothing like this", "capital"), (" of France", "capital")])
def test_a_stop_text_ends_the_answer_before_it(precise: LocalEngine, stops: tuple[str, ...]) -> None:
    free = run(precise, [draw(precise, QUESTIONS[0])])[0].text
    stopped = run(precise, [draw(precise, QUESTIONS[0], stop=stops)])[0]
    assert free.startswith("The capital of France")
    assert (stopped.text, stopped.reason) == ("The ", "stop")


def test_a_stop_text_at_the_start_leaves_an_empty_answer(precise: LocalEngine) -> None:
    [text] = run(precise, [draw(precise, QUESTIONS[0], stop=("The",))])
    assert (text.text, text.reason) == ("", "stop")


class Fixed:
    """A model of four tokens whose next-token probabilities are always the same."""

    device = torch.device("cpu")

    def get_output_embeddings(self) -> None:
        return None

    def __init__(self, probabilities: list[float]) -> None:
        self._logits = torch.tensor([math.log(p) for p in probabilities])

    def __call__(self, *, input_ids: Any, past_key_values: Any, **rest: Any) -> Any:
        del past_key_values, rest
        logits = self._logits.expand(len(input_ids), 1, -1)
        return type("Output", (), {"logits": logits})()


def drawn(**settings: Any) -> set[int]:
    """Return the tokens that 64 seeds draw from a model with probabilities .5, .3, .15 and .05."""
    draws = [Draw((1,), max_tokens=1, temperature=1.0, seed=seed, **settings) for seed in range(64)]
    model = Fixed([0.5, 0.3, 0.15, 0.05])
    texts = decode(
        model, padded(model, [DynamicCache()] * len(draws), draws), draws, ends=frozenset({9}), detokenize=str
    )
    return {text.tokens[0] for text in texts}


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.4}, {0}),
        ({"top_p": 0.79}, {0, 1}),
        ({"top_p": 0.9}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.79}, {0, 1}),
    ],
)
def test_only_the_likeliest_tokens_are_drawn(settings: dict[str, Any], tokens: set[int]) -> None:
    assert drawn(**settings) == tokens
