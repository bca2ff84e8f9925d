"""A layer with room: the same keys and values as the plain one, whatever is replaced from outside, seldom copied."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from preceptor.lm.decoding import Shrinking
from preceptor.lm.growing import ROOM, Growing, growing
from preceptor.lm.prefill import padded
from preceptor.lm.sampling import Draw


def filled(tokens: int, rows: int = 3) -> Any:
    layer = DynamicLayer()
    layer.update(*appended(tokens, rows))
    return layer


def appended(tokens: int, rows: int) -> tuple[Any, Any]:
    return torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 4)


@given(st.lists(st.one_of(st.integers(1, 40), st.sampled_from(["leave", "crop"])), max_size=12), st.integers(0, 5))
def test_it_holds_what_the_plain_layer_holds(steps: list[int | str], seed: int) -> None:
    torch.manual_seed(seed)
    plain = filled(5)
    room: Any = Growing(plain)
    for step in steps:
        rows = plain.keys.shape[0]
        if step == "leave":
            stay = torch.arange(rows)[seed % rows :]
            plain.batch_select_indices(stay)
            room.batch_select_indices(stay)
        elif step == "crop":
            plain.crop(-1)
            room.crop(-1)
        else:
            more = appended(int(step), rows)
            for mine, own in zip(room.update(*more), plain.update(*more), strict=True):
                assert torch.equal(mine, own)
    assert room.get_seq_length() == plain.get_seq_length()
    assert torch.equal(room.keys, plain.keys)
    assert torch.equal(room.values, plain.values)


def test_tokens_are_written_in_place_until_the_room_is_used_up() -> None:
    room: Any = Growing(filled(5))
    places = [room.update(*appended(1, 3))[0].data_ptr() for _ in range(ROOM + 2)]
    assert len(set(places[: ROOM + 1])) == 1
    assert places[-1] != places[0]


def test_rows_that_were_cut_off_from_outside_begin_a_buffer_of_their_own() -> None:
    room: Any = Growing(filled(5))
    keys, values = room.update(*appended(1, 3))
    room.keys, room.values = keys[:2], values[:2]
    more = appended(1, 2)
    assert torch.equal(room.update(*more)[0], torch.cat([keys[:2], more[0]], dim=2))


def test_what_was_given_is_left_as_it_was() -> None:
    plain = filled(5)
    before = plain.keys.clone()
    room = Growing(plain)
    room.update(*appended(2, 3))
    assert torch.equal(plain.keys, before)


@pytest.mark.parametrize(
    "leave", [lambda room: room.reset(), lambda room: room.batch_select_indices(torch.tensor([0]))]
)
def test_nothing_is_held_of_rows_that_left(leave: Callable[[Any], None]) -> None:
    room = Growing(filled(5))
    held = weakref.ref(room.update(*appended(1, 3))[0].untyped_storage())
    assert held() is not None
    leave(room)
    assert held() is None


def test_only_layers_that_keep_all_tokens_get_room() -> None:
    class Sliding(DynamicLayer):
        pass

    cache: Any = DynamicCache()
    cache.layers = [filled(2), Sliding(), DynamicLayer()]
    assert [type(layer) for layer in growing(cache).layers] == [Growing, Sliding, DynamicLayer]


def test_texts_are_decoded_with_room_before_and_after_others_join() -> None:
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    model: Any = LlamaForCausalLM(settings)
    draws = [Draw((1, 2, 3), max_tokens=4)]
    with torch.inference_mode():
        steps = Shrinking(model, padded(model, [DynamicCache()], draws), draws)
        assert {type(layer) for layer in steps._cache.layers} == {Growing}
        steps.join(padded(model, [DynamicCache()], draws), draws)
    assert {type(layer) for layer in steps._cache.layers} == {Growing}
    assert [layer.keys.shape[:2] for layer in steps._cache.layers] == [(2, 2)] * 2
