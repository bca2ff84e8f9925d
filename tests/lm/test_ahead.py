"""Looking ahead: fewer passes for a text that repeats itself, and not a bit of it another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preceptor.lm import ahead, prefill
from preceptor.lm.ahead import Ahead, followers
from preceptor.lm.decoding import Text, decode
from preceptor.lm.local import LocalEngine
from preceptor.lm.prefill import forward, padded
from preceptor.lm.prepacked import prepacked
from preceptor.lm.sampling import Draw
from tests.lm.test_families import FAMILIES, made

SENTENCE = "The ships that sail on the sea are old."
REPEATING = f"<|im_start|>user\nSay it ten times.<|im_end|>\n<|im_start|>assistant\n{3 * f'{SENTENCE} '}The ships"
FREE = "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def looking(precise: LocalEngine) -> LocalEngine:
    if not ahead.can_look(precise._model):
        pytest.skip("torch has no FBGEMM for this processor")
    return precise


@pytest.fixture
def passes(looking: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many tokens each of the model's passes was fed, from now on."""
    fed: list[int] = []
    own = looking._model.forward

    def counted(**arguments: Any) -> Any:
        fed.append(arguments["input_ids"].numel())
        return own(**arguments)

    monkeypatch.setattr(looking._model, "forward", counted)
    return fed


def texts(engine: LocalEngine, *prompts: str, tokens: int = 20, **settings: Any) -> list[Text]:
    draws = [Draw(engine._tokens(prompt), max_tokens=tokens, **settings) for prompt in prompts]
    read = engine._read([()] * len(draws), draws)
    return decode(engine._model, read, draws, ends=engine._ends, detokenize=engine._detokenize)


def one_token_a_step(engine: LocalEngine, prompt: list[int], fed: list[int]) -> list[torch.Tensor]:
    """Return the logits after each of these tokens, fed one after the other."""
    read = engine._read([()], [Draw(tuple(prompt), max_tokens=1)])
    mask, found = read.mask, []
    for token in fed:
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        found.append(forward(engine._model, read.cache, torch.tensor([[token]]), mask))
    return found


@pytest.mark.parametrize("agreeing", [0, 1, 3, 5, 9])
def test_the_logits_are_those_of_one_token_a_step_to_the_bit_however_many_guesses_were_right(
    looking: LocalEngine, agreeing: int
) -> None:
    prompt = list(looking._tokens(REPEATING))
    start = prompt.index(looking._tokens(" ships")[0])
    fed = [*prompt[start : start + agreeing + 1], *looking._tokens(" never ever. The ships"), *prompt[start + 1 :][:4]]
    read = looking._read([()], [Draw(tuple(prompt), max_tokens=1)])
    steps = Ahead(looking._model, read.cache, prompt, most=len(fed) + 20)

    found = [steps.forward(token) for token in fed]

    expected = one_token_a_step(looking, prompt, fed)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "seed": 3}, {"temperature": 1.0, "top_p": 0.9}])
@pytest.mark.parametrize("prompt", [REPEATING, FREE])
def test_a_text_and_its_probabilities_are_the_same_without(
    looking: LocalEngine, monkeypatch: pytest.MonkeyPatch, prompt: str, settings: dict[str, Any]
) -> None:
    found = texts(looking, prompt, **settings)
    monkeypatch.setattr(ahead, "can_look", lambda model: False)
    assert found == texts(looking, prompt, **settings)


def test_a_text_that_repeats_its_prompt_takes_fewer_passes(looking: LocalEngine, passes: list[int]) -> None:
    [text] = texts(looking, REPEATING, tokens=40)
    assert text.text == SENTENCE.removeprefix("The ships")
    assert len(text.tokens) == 8
    assert passes == [6, 6]


def test_no_more_is_fed_than_can_be_drawn(looking: LocalEngine, passes: list[int]) -> None:
    texts(looking, REPEATING, tokens=4)
    assert passes == [3]  # the fourth token is drawn from the third's logits and never fed


def test_the_last_text_of_a_batch_goes_on_as_if_it_had_been_alone(looking: LocalEngine, passes: list[int]) -> None:
    [alone] = texts(looking, REPEATING)
    passes.clear()
    draws = [Draw(looking._tokens(REPEATING), 24), *(Draw(looking._tokens(FREE), tokens) for tokens in (1, 3))]
    read = looking._read([()] * len(draws), draws)
    first, *_ = decode(looking._model, read, draws, ends=looking._ends, detokenize=looking._detokenize)
    assert first.text == alone.text
    assert passes[:2] == [2, 2]
    assert max(passes[2:]) == 6


def test_places_that_are_filled_up_are_let_go(looking: LocalEngine) -> None:
    draws = [Draw(looking._tokens(prompt), max_tokens=1) for prompt in (REPEATING, FREE)]
    read = padded(looking._model, [prefill._empty(looking._model)] * 2, draws)
    read.cache.batch_select_indices(torch.tensor([1]))
    cache = ahead.alone(read.cache, read.mask[1:])
    assert cache.get_seq_length() == len(draws[1].suffix) < len(draws[0].suffix)

    steps = Ahead(looking._model, cache, draws[1].suffix, most=9)
    fed = list(looking._tokens("Blue is a colour."))
    expected = one_token_a_step(looking, list(draws[1].suffix), fed)
    for token, logits in zip(fed, expected, strict=True):
        torch.testing.assert_close(steps.forward(token), logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_models_look_ahead_whose_weights_are_all_laid_out_and_that_attend_to_all(
    name: str, looking: LocalEngine
) -> None:
    kind, more = FAMILIES[name]
    model = made(kind, len(looking._tokenizer), more)
    assert not ahead.can_look(model)
    engine = LocalEngine(lambda: prepacked(model), model.config, looking._tokenizer, "local/tiny@0")
    assert ahead.can_look(engine._model) == (name in ("whole", "scaled down", "scaled"))


@pytest.mark.parametrize("name", ["whole", "scaled down", "scaled"])
def test_other_families_texts_are_the_same_without(
    name: str, looking: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, more = FAMILIES[name]
    model = made(kind, len(looking._tokenizer), more)
    engine = LocalEngine(lambda: prepacked(model), model.config, looking._tokenizer, "local/tiny@0")
    found = texts(engine, REPEATING, tokens=40, temperature=0.5, seed=1)
    monkeypatch.setattr(ahead, "can_look", lambda model: False)
    assert found == texts(engine, REPEATING, tokens=40, temperature=0.5, seed=1)
    assert len(found[0].tokens) == 40


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 6))
def test_what_is_fed_along_followed_the_last_token_somewhere(words: list[int], most: int) -> None:
    found = followers(words, most)
    assert len(found) <= most
    places = [at for at, word in enumerate(words[:-1]) if word == words[-1]]
    assert bool(found) == bool(places and most)
    assert not found or any(words[at + 1 : at + 1 + len(found)] == found for at in places)
