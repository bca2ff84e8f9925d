"""Packing: the layout by hand, the probabilities against plain transformers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from preceptor.lm.local import LocalEngine
from preceptor.lm.packing import Pack, Row, _tokens, branch, chunks, log_probabilities


@pytest.fixture
def pack() -> Pack:
    """Return two rows: 1 2 with choices 7 8 and 7 9 and 5; then 3 with 6."""
    packed = Pack()
    packed.add(Row((1, 2), ((7, 8), (7, 9), (5,))))
    packed.add(Row((3,), ((6,),)))
    return packed


def test_rows_and_choices_are_laid_out_as_a_tree(pack: Pack) -> None:
    assert pack.tokens == [1, 2, 7, 3]  # 7 once for two choices; 8, 9, 5 and 6 are scored, never fed
    assert pack.parents == [-1, 0, 1, -1]
    assert pack.depths == [0, 1, 2, 0]
    assert pack.steps == [[[(1, 7), (2, 8)], [(1, 7), (2, 9)], [(1, 5)]], [[(3, 6)]]]


def test_a_token_sees_the_prefix_its_ancestors_and_itself(pack: Pack) -> None:
    mask = pack.mask(2, torch.float32)
    seen = [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 1]]
    assert mask.shape == (1, 1, 4, 6)
    assert (mask[0, 0] == 0).int().tolist() == seen
    assert set(mask.flatten().tolist()) == {0.0, torch.finfo(torch.float32).min}


def test_sister_choices_do_not_see_each_other() -> None:
    packed = Pack()
    packed.add(Row((1,), ((7, 8), (5, 6))))
    assert packed.tokens == [1, 7, 5]
    assert (packed.mask(0, torch.float32)[0, 0] == 0).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("choices", "closed"),
    [
        ([(5,), (5, 6)], ((5, 0), (5, 6, 0))),
        ([(5, 6), (5,)], ((5, 6, 0), (5, 0))),
        ([(5,), (7, 6)], ((5,), (7, 6))),
        ([(5, 6), (5, 7)], ((5, 6), (5, 7))),
        ([(5,), (5,)], ((5, 0), (5, 0))),
        ([(5,)], ((5,),)),
        ([], ()),
    ],
)
def test_choices_are_closed_only_if_one_begins_another(
    choices: list[tuple[int, ...]], closed: tuple[tuple[int, ...], ...]
) -> None:
    assert branch(choices, end=0) == closed


def row(length: int, token: int, choice: int = 1) -> Row:
    return Row((token,) * length, ((0,) * choice,))


def test_chunks_are_filled_shortest_first() -> None:
    rows = [(0, row(6, 1)), (1, row(2, 1)), (2, row(3, 1)), (3, row(20, 1))]
    assert [[index for index, _ in chunk] for chunk in chunks(rows, 5)] == [[1, 2], [0], [3]]


def test_choices_take_room_too() -> None:
    rows = [(0, row(2, 1, choice=3)), (1, row(2, 2))]  # 2 + 2 tokens, and 2
    assert [[index for index, _ in chunk] for chunk in chunks(rows, 6)] == [[0, 1]]
    assert [[index for index, _ in chunk] for chunk in chunks(rows, 5)] == [[0], [1]]


some_rows = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3), st.integers(1, 4)), max_size=30)


@given(some_rows, st.integers(1, 30), st.randoms(use_true_random=False))
def test_chunks_are_the_same_in_any_order_and_when_the_first_are_done(
    made: list[tuple[int, int, int]], size: int, rng: Any
) -> None:
    rows = [(index, row(*one)) for index, one in enumerate(made)]
    whole = chunks(rows, size)
    shuffled = rng.sample(rows, len(rows))

    assert chunks(shuffled, size) == whole
    for done in range(len(whole) + 1):
        left = [item for chunk in whole[done:] for item in chunk]
        assert chunks(rng.sample(left, len(left)), size) == whole[done:]


@given(some_rows, st.integers(1, 30))
def test_every_row_is_in_one_chunk_and_only_long_rows_pass_the_size(
    made: list[tuple[int, int, int]], size: int
) -> None:
    rows = [(index, row(*one)) for index, one in enumerate(made)]
    whole = chunks(rows, size)
    assert sorted(index for chunk in whole for index, _ in chunk) == list(range(len(rows)))
    for chunk in whole:
        pack = Pack()
        for _, one in chunk:
            pack.add(one)
        assert len(pack.tokens) <= size or len(chunk) == 1


def plainly(model: Any, tokens: list[int], choice: tuple[int, ...]) -> float:
    """Return log P(choice | tokens) from one sequence, no cache, no mask, no batch."""
    logits = model(input_ids=torch.tensor([[*tokens, *choice]], device=model.device)).logits[0].double()
    steps = logits.log_softmax(-1)[len(tokens) - 1 : -1]
    return float(sum(step[token] for step, token in zip(steps, choice, strict=True)))


WORDS = (" wet", " dry as a bone", " dry", " unbelievable", " wet and cold")
TEXTS = ("Water is", "The desert is", "Rain makes everything that it falls on")


def compare(engine: LocalEngine, prefix_text: str) -> list[tuple[float, float]]:
    """Return packed and plain log-probabilities of every text and word."""
    model, prefix = engine._model, list(engine._tokens(prefix_text))
    choices = branch([engine._tokens(word) for word in WORDS], end=2)
    rows = [Row(engine._tokens(text), choices) for text in TEXTS]
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        if prefix:
            model(input_ids=torch.tensor([prefix], device=model.device), past_key_values=cache, use_cache=True)
        found = log_probabilities(model, cache, rows)
        assert cache.get_seq_length() == len(prefix)
        assert log_probabilities(model, cache, rows) == found  # the cache was left as it was
        plain = [[plainly(model, [*prefix, *row.suffix], choice) for choice in choices] for row in rows]
    return list(zip(itertools.chain(*found), itertools.chain(*plain), strict=True))


@pytest.mark.parametrize("prefix", ["<|im_start|>user\nHere is a word: ", ""])
def test_packed_probabilities_are_those_of_one_sequence_at_a_time(precise: LocalEngine, prefix: str) -> None:
    pairs = compare(precise, prefix)
    assert len(pairs) == 15
    assert [packed for packed, _ in pairs] == pytest.approx([plain for _, plain in pairs], abs=2e-3)


def test_packed_probabilities_stay_close_in_the_engines_own_precision(engine: LocalEngine) -> None:
    pairs = compare(engine, "<|im_start|>user\nHere is a word: ")
    assert [packed for packed, _ in pairs] == pytest.approx([plain for _, plain in pairs], abs=1.0, rel=0.03)


def kept(cache: Any) -> list[tuple[int, int, int]]:
    """Return where each layer's keys lie, how many tokens they are, and the bytes held for them."""
    return [
        (layer.keys.data_ptr(), layer.keys.shape[-2], layer.keys.untyped_storage().nbytes()) for layer in cache.layers
    ]


@pytest.mark.parametrize("breaks", [False, True])
def test_a_pass_leaves_the_prefix_as_it_was_even_if_it_breaks_off(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, breaks: bool
) -> None:
    model, prefix = engine._model, list(engine._tokens("Here is a word:"))
    rows = [Row(engine._tokens(text), (engine._tokens(" wet"),)) for text in TEXTS]
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.tensor([prefix], device=model.device), past_key_values=cache, use_cache=True)
        before, found = kept(cache), log_probabilities(model, cache, rows)
        last = model.base_model.layers[-1].mlp

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

        if breaks:
            monkeypatch.setattr(last, "forward", broken)
            with pytest.raises(KeyboardInterrupt):
                log_probabilities(model, cache, rows)
            monkeypatch.undo()
        assert kept(cache) == before
        assert {length for _, length, _ in before} == {len(prefix)}
        assert log_probabilities(model, cache, rows) == found


@pytest.mark.parametrize("logit", [20.06, 24.06, 30.06, 30.07])
def test_a_token_that_is_all_but_certain_has_no_log_probability_above_0_nor_far_below(logit: float) -> None:
    class Headed:
        """A model of two dimensions and three tokens, of which the first is the likely one."""

        class config:  # noqa: N801  as transformers calls it
            @staticmethod
            def get_text_config() -> Any:
                return None

        head = torch.nn.Linear(2, 3, bias=False, dtype=torch.bfloat16)

        def get_output_embeddings(self) -> Any:
            return self.head

    with torch.no_grad():
        Headed.head.weight[:] = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.5]], dtype=torch.bfloat16)
        hidden = torch.tensor([[float(int(logit)), logit % 1]], dtype=torch.bfloat16)
        exact = hidden.double() @ Headed.head.weight.double().T
        found = _tokens(Headed(), hidden, [(0, 1), (0, 0), (0, 1)])

    assert found == pytest.approx([(exact - exact.logsumexp(-1))[0, token].item() for token in (1, 0, 1)], abs=1e-4)
    assert found[1] <= 0
