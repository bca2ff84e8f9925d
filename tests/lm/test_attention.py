"""Attention row by row: equal to attention over the whole pack, and the same bits in any company."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from preceptor.lm import attention
from preceptor.lm.local import LocalEngine
from preceptor.lm.packing import Pack, Row, branch, log_probabilities
from preceptor.lm.weights import has_bfloat16

TEXTS = ("Water is", "The desert is", "Rain makes everything that it falls on")


class Layer(torch.nn.Module):
    """What attention reads of a layer."""

    num_key_value_groups = 2
    is_causal = True


def test_rows_attend_to_the_prefix_and_themselves_as_the_mask_says() -> None:
    pack = Pack()
    pack.add(Row((1, 2), ((7, 8), (7, 9), (5,))))
    pack.add(Row((3,), ((6,),)))
    assert pack.spans == [(0, 3), (3, 4)]

    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 4, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    mask = pack.mask(3, torch.float32)
    whole, _ = attention.attend(Layer(), query, key, value, mask)
    rows, _ = attention.attend(Layer(), query, key, value, mask, spans=pack.seen(3))
    assert rows.shape == whole.shape == (1, 4, 4, 8)
    torch.testing.assert_close(rows, whole)


def test_an_engine_attends_through_it(engine: LocalEngine) -> None:
    assert attention.is_used(engine._model)


HAS_AMX = has_bfloat16() and torch.cpu._is_amx_tile_supported()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU attends to the whole pack at once")
@pytest.mark.skipif(HAS_AMX, reason="AMX sums the products of few rows in another order than those of many")
@pytest.mark.parametrize("words", [(" wet", " dry as a bone", " dry"), (" wet", " dry")], ids=["long", "one token"])
def test_a_rows_probabilities_are_the_same_bits_whoever_shares_its_pass(
    engine: LocalEngine, words: tuple[str, ...]
) -> None:
    model, prefix = engine._model, engine._tokens("<|im_start|>user\nHere is a word: ")
    choices = branch([engine._tokens(word) for word in words], end=2)
    rows = [Row(engine._tokens(f"{number} times {text}"), choices) for number in range(9) for text in TEXTS]
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.tensor([prefix]), past_key_values=cache, use_cache=True)
        together = log_probabilities(model, cache, rows)
        assert together == [found for row in rows for found in log_probabilities(model, cache, [row])]
        assert together[7:] == log_probabilities(model, cache, rows[7:])
