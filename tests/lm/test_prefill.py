"""Reading prompts in blocks: what transformers reads, to the bit the same in any company, and shared tokens once."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preceptor.lm import prefill
from preceptor.lm.local import LocalEngine
from preceptor.lm.prefill import BLOCK, Blocks, Read

Tokens = tuple[int, ...]

PASS = 384
ROOM = 4096


def made(length: int, start: int = 100) -> Tokens:
    """Return so many tokens that don't repeat."""
    return tuple(range(start, start + length))


def reader(precise: LocalEngine, *, room: int = ROOM, most: int = PASS) -> Blocks:
    return Blocks(precise._model, room, most)


def read(blocks: Blocks, prompts: Sequence[Tokens]) -> Read:
    with torch.inference_mode():
        return blocks.read(prompts)


def fed(precise: LocalEngine, blocks: Blocks, prompts: Sequence[Tokens]) -> list[int]:
    """Return how many tokens each pass over these prompts reads, what fills it up to a multiple of 16 included."""
    passes: list[int] = []

    def count(module: Any, args: Any, given: Any) -> None:
        del module, args
        passes.append(given["input_ids"].numel())

    hook = precise._model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        read(blocks, prompts)
    finally:
        hook.remove()
    return passes


def own(found: Read, row: int) -> list[Any]:
    """Return the logits of a row and the keys and values of its tokens, without what fills it up."""
    count = int(found.mask[row].sum())
    sides = [side[row, :, -count:] for layer in found.cache.layers for side in (layer.keys, layer.values)]
    return [found.logits[row], *sides]


def are_equal(left: Read, at: int, right: Read, other: int) -> bool:
    return all(torch.equal(a, b) for a, b in zip(own(left, at), own(right, other), strict=True))


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_a_prompt_is_read_as_transformers_reads_it(precise: LocalEngine, length: int) -> None:
    prompt = made(length)
    found = read(reader(precise), [prompt])
    with torch.inference_mode():
        plain = precise._model(input_ids=torch.tensor([prompt]), use_cache=True)
    torch.testing.assert_close(found.logits[0], plain.logits[0, -1], atol=2e-3, rtol=1e-3)
    for ours, theirs in zip(found.cache.layers, plain.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(ours.values, theirs.values, atol=2e-3, rtol=1e-3)


def test_rows_are_filled_up_from_the_left(precise: LocalEngine) -> None:
    found = read(reader(precise), [made(3), made(5, 300)])
    assert found.mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert found.logits.shape == (2, precise._model.config.vocab_size)
    assert found.logits.dtype == torch.float32
    keys = found.cache.layers[0].keys
    assert keys.shape[0] == 2
    assert keys.shape[2] == found.cache.get_seq_length() == 5
    assert not keys[0, :, :2].any()


def test_equal_prompts_are_read_once_and_have_a_row_each(precise: LocalEngine) -> None:
    twice = [made(20), made(10, 300), made(20)]
    assert fed(precise, reader(precise), twice) == [32]  # 20 and 10, and 2 that fill up
    found = read(reader(precise), twice)
    assert are_equal(found, 0, found, 2)
    assert not torch.equal(found.logits[0], found.logits[1])


def test_prompts_of_a_batch_that_begin_alike_read_whole_blocks_once(precise: LocalEngine) -> None:
    common = made(2 * BLOCK + 10)
    prompts = [(*common, 7), (*common, 8), (*common, 9, 9)]
    assert fed(precise, reader(precise), prompts) == [176]  # 128 in common, then 11, 11 and 12 of their own


def test_a_later_prompt_reads_only_what_is_new_since_the_last_whole_block(precise: LocalEngine) -> None:
    blocks = reader(precise)
    criticised = made(3 * BLOCK)
    assert fed(precise, blocks, [(*criticised, 5, 6)]) == [208]
    assert fed(precise, blocks, [(*criticised, *made(40, 900))]) == [48]
    assert fed(precise, blocks, [criticised]) == [BLOCK]  # its last block is read for the next token


def test_a_pass_has_at_most_so_many_tokens(precise: LocalEngine) -> None:
    prompts = [made(2 * BLOCK, 100), made(2 * BLOCK, 600)]
    assert fed(precise, reader(precise, most=BLOCK), prompts) == [BLOCK] * 4
    assert fed(precise, reader(precise, most=2 * BLOCK), prompts) == [2 * BLOCK] * 2
    assert fed(precise, reader(precise, most=1), [made(BLOCK)]) == [BLOCK]


def test_the_blocks_used_last_are_kept_within_the_room(precise: LocalEngine) -> None:
    blocks = reader(precise, room=2 * BLOCK)
    first, second = made(BLOCK + 16, 100), made(BLOCK + 16, 600)
    third = made(BLOCK + 16, 1200)
    read(blocks, [first])
    read(blocks, [second])
    read(blocks, [first])
    read(blocks, [third])
    assert fed(precise, blocks, [first]) == fed(precise, blocks, [third]) == [16]
    assert fed(precise, blocks, [second]) == [BLOCK + 16]


def test_nothing_is_kept_without_room(precise: LocalEngine) -> None:
    blocks = reader(precise, room=0)
    assert fed(precise, blocks, [made(BLOCK + 1)]) == fed(precise, blocks, [made(BLOCK + 1)]) == [BLOCK + 16]
    assert not blocks._kept


def test_a_prompt_may_be_the_whole_blocks_of_another(precise: LocalEngine) -> None:
    short, long = made(2 * BLOCK), made(2 * BLOCK + 7)
    for prompts in ([short, long], [long, short]):
        together = read(reader(precise), prompts)
        assert are_equal(together, prompts.index(short), read(reader(precise), [short]), 0)
        assert are_equal(together, prompts.index(long), read(reader(precise), [long]), 0)


@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_prompt_is_the_same_bits_whoever_was_read_before_it_and_beside_it(
    precise: LocalEngine, data: st.DataObject
) -> None:
    common = made(150)
    prompt = st.tuples(st.integers(0, 150), st.integers(1, 80), st.integers(400, 900)).map(
        lambda drawn: (*common[: drawn[0]], *made(drawn[1], drawn[2]))
    )
    blocks = reader(precise, room=data.draw(st.sampled_from([0, 2 * BLOCK, ROOM])))
    for _ in range(2):
        batch = data.draw(st.lists(prompt, min_size=1, max_size=4))
        found = read(blocks, batch)
        for row, each in enumerate(batch):
            assert are_equal(found, row, read(reader(precise), [each]), 0)


def test_an_engine_in_float32_on_a_processor_reads_in_blocks(precise: LocalEngine) -> None:
    assert precise._blocks is not None
    assert prefill.can_share(precise._model)


@pytest.mark.parametrize("change", ["bfloat16", "cuda", "eager", "sliding"])
def test_what_can_not_be_shared_to_the_bit_is_read_in_one_pass(precise: LocalEngine, change: str) -> None:
    config = precise._model.config.__class__(**precise._model.config.to_dict())
    config._attn_implementation = "eager" if change == "eager" else precise._model.config._attn_implementation
    if change == "sliding":
        config.sliding_window, config.layer_types = 8, ["sliding_attention"] * config.num_hidden_layers
    model = SimpleNamespace(
        config=config,
        device=torch.device("cuda" if change == "cuda" else "cpu"),
        dtype=torch.bfloat16 if change == "bfloat16" else torch.float32,
    )
    assert not prefill.can_share(model)


def test_a_read_that_is_interrupted_keeps_no_more_than_the_room(
    precise: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, plain, passes = reader(precise, room=BLOCK, most=BLOCK), Blocks._pass, 0

    def interrupted(self: Blocks, part: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 3:
            raise KeyboardInterrupt
        return plain(self, part)

    monkeypatch.setattr(Blocks, "_pass", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(blocks, [made(3 * BLOCK + 1)])
    assert len(blocks._kept) == 1
    assert fed(precise, blocks, [made(BLOCK + 1)]) == [16]  # what is kept is the beginning, which others may share


def test_equal_blocks_in_other_places_are_other_blocks(precise: LocalEngine) -> None:
    block = made(BLOCK)
    prompt = (*block, *block, *made(5, 900))
    blocks = reader(precise)
    assert fed(precise, blocks, [prompt]) == [144]  # 64, 64 and 5, and 11 that fill up
    with torch.inference_mode():
        plain = precise._model(input_ids=torch.tensor([prompt]))
    torch.testing.assert_close(read(blocks, [prompt]).logits[0], plain.logits[0, -1], atol=2e-3, rtol=1e-3)
