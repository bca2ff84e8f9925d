"""Reading the prompts of texts to be decoded, before their first token is drawn.

`Blocks` reads them in float32 on a processor: cut into blocks of 64 tokens, laid end to end without padding. A block's
keys and values depend on the tokens up to its end alone, to the bit: it attends by itself (`attention.py`), and all
other operations treat each token alone. So prompts that begin alike, such as a criticism's and its edit's, read their
common blocks once, those of a batch and those of later ones, and no answer depends on what was kept.

`padded` reads a batch in one pass, filled up from the left: on a GPU, and where there are soft tokens.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from preceptor.lm import attention, packing
from preceptor.lm.sampling import Draw, Tokens

BLOCK: Final = 64
"""Tokens of a block: prompts share whole ones only, and each is an attention of its own."""


@dataclass(frozen=True, slots=True)
class Read:
    """Prompts that were read, one row each.

    Attributes:
        logits: Of each prompt's next token, in float32, shape (rows, vocabulary).
        cache: Keys and values of the prompts, filled up from the left.
        mask: 1 where a prompt has a token, shape (rows, tokens).
    """

    logits: Any
    cache: Any
    mask: Any


@dataclass(frozen=True, slots=True)
class _Block:
    """Some tokens of a prompt.

    Attributes:
        key: Equal for equal tokens after equal blocks.
        before: Keys of the blocks before it, the first first; they are whole.
        tokens: At most `BLOCK`; fewer at the end of a prompt only.
    """

    key: bytes
    before: tuple[bytes, ...]
    tokens: Tokens

    @property
    def start(self) -> int:
        return len(self.before) * BLOCK


Kept = tuple[Any, Any]
"""Keys and values of a block, each of shape (layers, heads, tokens, width)."""


class Blocks:
    """Reads prompts block by block, and keeps the whole blocks before each prompt's last.

    Args:
        model: A causal language model of `transformers` for which `can_share` holds.
        room: Most tokens that are kept for later prompts.
        most: Most tokens of one pass.
    """

    def __init__(self, model: Any, room: int, most: int) -> None:
        self._model, self._room, self._most = model, room, most
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()

    def read(self, prompts: Sequence[Tokens]) -> Read:
        """Read prompts of at least one token each; equal ones are read once."""
        wanted = {prompt: _blocks(prompt) for prompt in prompts}
        try:
            hidden: dict[bytes, Any] = {}
            for part in _parts(self._missing(wanted.values()), self._most):
                hidden |= self._pass(part)
            logits = self._logits(torch.stack([hidden[wanted[prompt][-1].key] for prompt in prompts]))
            return Read(logits, *self._filled_up([wanted[prompt] for prompt in prompts]))
        finally:
            self._clear(wanted.values())

    def _missing(self, several: Iterable[Sequence[_Block]]) -> list[_Block]:
        """Return the blocks to be read, each after those before it: those not kept, and the last of each prompt."""
        blocks: dict[bytes, _Block] = {}
        for prompt in several:
            for block in prompt:
                if block is prompt[-1] or block.key not in self._kept:
                    blocks.setdefault(block.key, block)
        return list(blocks.values())

    def _clear(self, several: Iterable[Sequence[_Block]]) -> None:
        """Let go of last blocks, and of whole ones beyond the room, those used longest ago and their ends first."""
        for prompt in several:
            self._kept.pop(prompt[-1].key, None)
            for key in reversed(prompt[-1].before):
                if key in self._kept:
                    self._kept.move_to_end(key)
        while len(self._kept) * BLOCK > self._room:
            self._kept.popitem(last=False)

    def _pass(self, blocks: Sequence[_Block]) -> dict[bytes, Any]:
        """Read blocks in one pass, keep them, and return the hidden state of each one's last token."""
        fresh: dict[bytes, slice] = {}
        tokens: list[int] = []
        for block in blocks:
            fresh[block.key] = slice(len(tokens), len(tokens) + len(block.tokens))
            tokens += block.tokens
        filling = -len(tokens) % packing.TILE
        old = list(dict.fromkeys(key for block in blocks for key in block.before if key not in fresh))
        start = len(old) * BLOCK
        places = {key: slice(at * BLOCK, (at + 1) * BLOCK) for at, key in enumerate(old)}
        places |= {key: slice(start + own.start, start + own.stop) for key, own in fresh.items()}
        positions = [block.start + at for block in blocks for at in range(len(block.tokens))]
        mask = _closed(len(tokens) + filling, start, self._model.dtype)
        spans: list[attention.Span] = []
        for block in blocks:
            own, seen = fresh[block.key], [places[key] for key in (*block.before, block.key)]
            _open(mask[0, 0, own], seen)
            spans.append((own.start, own.stop, tuple(seen)))
        if filling:
            spans.append((len(tokens), len(tokens) + filling, (slice(start, start + 1),)))
            mask[..., len(tokens) :, start] = 0
        cache = self._joined(old)
        output = self._model.base_model(
            input_ids=torch.tensor([[*tokens, *tokens[:1] * filling]]),
            position_ids=torch.tensor([[*positions, *positions[:1] * filling]]),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            spans=spans,
        )
        for key in fresh:
            part = places[key]
            self._kept[key] = (
                torch.stack([layer.keys[0, :, part] for layer in cache.layers]),
                torch.stack([layer.values[0, :, part] for layer in cache.layers]),
            )
        return {key: output.last_hidden_state[0, own.stop - 1] for key, own in fresh.items()}

    def _joined(self, keys: Sequence[bytes]) -> Any:
        """Return a cache of one row: these blocks, one after the other."""
        cache = _empty(self._model)
        for at in range(len(cache.layers)) if keys else ():
            sides = (torch.cat([self._kept[key][side][at] for key in keys], dim=1)[None] for side in (0, 1))
            cache.update(*sides, at)
        return cache

    def _filled_up(self, rows: Sequence[Sequence[_Block]]) -> tuple[Any, Any]:
        """Return a cache of prompts, filled up from the left, and its mask; built layer by layer."""
        lengths = [row[-1].start + len(row[-1].tokens) for row in rows]
        width, cache = max(lengths), _empty(self._model)
        for at in range(len(cache.layers)):
            sides: list[Any] = []
            for side in (0, 1):
                one = self._kept[rows[0][0].key][side][at]
                filled = one.new_zeros(len(rows), one.shape[0], width, one.shape[2])
                for row, blocks, length in zip(filled, rows, lengths, strict=True):
                    row[:, width - length :] = torch.cat([self._kept[each.key][side][at] for each in blocks], dim=1)
                sides.append(filled)
            cache.update(*sides, at)
        return cache, torch.tensor([[0] * (width - length) + [1] * length for length in lengths])

    def _logits(self, hidden: Any) -> Any:
        filled = torch.cat([hidden, hidden[:1].expand(-len(hidden) % packing.TILE, -1)])
        logits = self._model.get_output_embeddings()(filled)[: len(hidden)].float()
        return packing.scaled(logits, self._model.config)


def can_share(model: Any) -> bool:
    """Return True if `Blocks` can read for a model: float32, on a processor, whole attention, no experts.

    Of experts each gets a few tokens of a pass, and so few that products round by how many there are.
    """
    settings = model.config.get_text_config().to_dict()
    is_exact = model.device.type == "cpu" and model.dtype == torch.float32
    has_experts = any("experts" in name and value for name, value in settings.items())
    return is_exact and not has_experts and attention.is_used(model) and attention.is_whole(model)


def padded(model: Any, before: Sequence[Any], draws: Sequence[Draw]) -> Read:
    """Read every distinct prompt once, left-padded, then give each draw its copy.

    Args:
        model: A causal language model of `transformers`, of whole attention where prefixes differ.
        before: Keys and values of each draw's prefix, batch size 1, one object for equal ones; they stay as they are.
        draws: What to decode.
    """
    places: dict[Any, int] = {}
    prompts = [(id(cache), draw.soft, draw.suffix) for cache, draw in zip(before, draws, strict=True)]
    copied = [places.setdefault(prompt, len(places)) for prompt in prompts]
    firsts = [copied.index(place) for place in range(len(places))]
    distinct = [draws[at] for at in firsts]
    cache, seen = _side_by_side(model, [before[at] for at in firsts])
    width = max(draw.length for draw in distinct)
    tokens = torch.tensor([[0] * (width - len(draw.suffix)) + list(draw.suffix) for draw in distinct])
    own = torch.tensor([[0] * (width - draw.length) + [1] * draw.length for draw in distinct])
    mask = torch.cat([seen, own], dim=1).to(model.device)
    fed = tokens.to(model.device)
    logits = forward(model, cache, fed, mask, _embedded(model, fed, distinct))
    copies = torch.tensor(copied, device=model.device)
    cache.batch_select_indices(copies)
    return Read(logits[copies], cache, mask[copies])


def _side_by_side(model: Any, caches: Sequence[Any]) -> tuple[Any, torch.Tensor]:
    """Return one cache of prefixes, a row each, filled up from the left, and its mask."""
    lengths = [cache.get_seq_length() for cache in caches]
    width = max(lengths)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths], dtype=torch.long)
    if len(set(map(id, caches))) == 1:
        one = copy.deepcopy(caches[0])
        if width:
            one.batch_repeat_interleave(len(caches))
        return one, mask
    joined = _empty(model)
    some = next(cache for cache, length in zip(caches, lengths, strict=True) if length)
    for at in range(len(joined.layers)):
        parts = [cache.layers[at] if length else None for cache, length in zip(caches, lengths, strict=True)]
        joined.update(*(_rows(parts, getattr(some.layers[at], side), side, width) for side in ("keys", "values")), at)
    return joined, mask


def _rows(layers: Sequence[Any], like: Any, side: str, width: int) -> Any:
    """Return keys or values of prefixes in one layer, None for an empty one: shape (rows, heads, tokens, width)."""
    rows = like.new_zeros(len(layers), like.shape[1], width, like.shape[3])
    for row, layer in zip(rows, layers, strict=True):
        if layer is not None:
            own = getattr(layer, side)[0]
            row[:, width - own.shape[1] :] = own
    return rows


def below(model: Any, first: tuple[Any, Any], second: tuple[Any, Any]) -> tuple[Any, Any]:
    """Return one cache of two batches' rows and its mask, filled up from the left, without places that no row has.

    Both are used up, layer by layer, so that they are never held beside the new one as a whole.

    Args:
        model: A causal language model of `transformers`, of whole attention.
        first: Keys and values, and the mask.
        second: The same of the rows that stand below.
    """
    widths = [mask.shape[1] - int(mask.any(0).int().argmax()) for _, mask in (first, second)]
    width, joined = max(widths), _empty(model)

    def wide(several: Any, side: int) -> Any:
        own = several[..., -widths[side] :, :]
        return torch.nn.functional.pad(own, (0, 0, width - widths[side], 0))

    for at, pair in enumerate(zip(first[0].layers, second[0].layers, strict=True)):
        keys = torch.cat([wide(layer.keys, side) for side, layer in enumerate(pair)])
        joined.update(keys, torch.cat([wide(layer.values, side) for side, layer in enumerate(pair)]), at)
        for layer in pair:
            layer.reset()
    return joined, torch.cat([wide(mask[..., None], side)[..., 0] for side, (_, mask) in enumerate((first, second))])


def forward(model: Any, cache: Any, tokens: Any, mask: Any, embedded: Any = None) -> Any:
    """Go on with a left-padded batch; return the logits after each row's last token, in float32."""
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
    output = model(
        input_ids=tokens if embedded is None else None,
        inputs_embeds=embedded,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float()


def _embedded(model: Any, tokens: Any, draws: Sequence[Draw]) -> Any:
    """Return the embeddings to be read, soft tokens in their places; None if no draw has any."""
    if not any(draw.soft for draw in draws):
        return None
    embedded = model.get_input_embeddings()(tokens)
    for at, draw in enumerate(draws):
        start = tokens.shape[1] - draw.length
        if draw.soft:
            embedded[at, start : start + len(draw.soft)] = torch.tensor(draw.soft, dtype=embedded.dtype)
    return embedded


def _blocks(prompt: Tokens) -> list[_Block]:
    """Cut a prompt into blocks."""
    blocks: list[_Block] = []
    for start in range(0, len(prompt), BLOCK):
        tokens, before = prompt[start : start + BLOCK], tuple(block.key for block in blocks)
        key = hashlib.sha256((blocks[-1].key if blocks else b"") + repr(tokens).encode()).digest()
        blocks.append(_Block(key, before, tokens))
    return blocks


def _parts(blocks: Sequence[_Block], most: int) -> Iterator[list[_Block]]:
    """Group blocks, in order, into passes of at most so many tokens."""
    part: list[_Block] = []
    for block in blocks:
        if part and sum(len(one.tokens) for one in part) + len(block.tokens) > most:
            yield part
            part = []
        part.append(block)
    if part:
        yield part


def _closed(tokens: int, before: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((1, 1, tokens, before + tokens), torch.finfo(dtype).min, dtype=dtype)


def _open(rows: torch.Tensor, seen: Sequence[slice]) -> None:
    """Let the rows of a block see what stands before it, and itself up to each token."""
    for part in seen[:-1]:
        rows[:, part] = 0
    rows[:, seen[-1]].triu_(1)


def _empty(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)
