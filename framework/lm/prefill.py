"""Reading the prompts of texts to be decoded, before their first token is drawn.

`Blocks` reads them in float32 on a processor: cut into blocks of 64 tokens, laid end to end without padding. A block's
keys and values depend on the tokens up to its end alone, to the bit: it attends by itself (`attention.py`), and all
other operations treat each token alone. So prompts that begin alike, such as a criticism's and its edit's, read their
common blocks once, those of a batch and those of later ones, and no answer depends on what was kept.

`padded` reads a batch in one pass, filled up from the left: on a GPU, and where there are soft tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from preceptor.lm import attention
from preceptor.lm.sampling import Draw, Tokens

BLOCK: Final = 64
"""Tokens of a block: prompts share whole ones only, and each is an attention of its own."""

_TILE: Final = 16
"""Tokens of a pass come in multiples of it: of fewer than 12, products in float32 round by how many there are (MKL)."""


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
    """The tokens of a prompt from `start` on; `tokens` has what stands before them too."""

    tokens: Tokens
    start: int

    @property
    def own(self) -> Tokens:
        return self.tokens[self.start :]

    @property
    def before(self) -> Iterator[Tokens]:
        return (self.tokens[:end] for end in range(BLOCK, self.start + 1, BLOCK))


Kept = tuple[Any, Any]
"""Keys and values of a block, each of shape (layers, heads, tokens, width)."""


class Blocks:
    """Reads prompts block by block, and keeps the blocks.

    Args:
        model: A causal language model of `transformers` that attends through `attention.attend`.
        room: Most tokens that are kept for later prompts.
        most: Most tokens of one pass.
    """

    def __init__(self, model: Any, room: int, most: int) -> None:
        self._model, self._room, self._most = model, room, most
        self._kept: OrderedDict[Tokens, Kept] = OrderedDict()

    def read(self, prompts: Sequence[Tokens]) -> Read:
        """Read prompts of at least one token each; equal ones are read once."""
        wanted = list(dict.fromkeys(prompts))
        lasts = [_Block(prompt, (len(prompt) - 1) // BLOCK * BLOCK) for prompt in wanted]
        self._run([_Block(head, len(head) - BLOCK) for head in self._missing(lasts)])
        hidden = self._run(lasts)
        found = [self._joined([*last.before, last.tokens]) for last in lasts]
        for last in lasts:
            del self._kept[last.tokens]
        while len(self._kept) * BLOCK > self._room:
            self._kept.popitem(last=False)
        rows = [wanted.index(prompt) for prompt in prompts]
        return Read(self._logits(hidden)[rows], *_filled_up([found[row] for row in rows], self._model.config))

    def _missing(self, lasts: Sequence[_Block]) -> list[Tokens]:
        """Return what has to be read before the last blocks, shortest first; what is there counts as used now."""
        heads = dict.fromkeys(head for last in lasts for head in last.before)
        for head in heads:
            if head in self._kept:
                self._kept.move_to_end(head)
        return sorted((head for head in heads if head not in self._kept), key=len)

    def _run(self, blocks: Sequence[_Block]) -> Any:
        """Read blocks, those that begin a prompt before those that go on; return their last hidden states."""
        hidden = [self._pass(part) for part in _parts(blocks, self._most)]
        return torch.cat(hidden) if hidden else None

    def _pass(self, blocks: Sequence[_Block]) -> Any:
        """Read blocks in one pass, keep them, and return the hidden state of each one's last token."""
        fresh: dict[Tokens, slice] = {}
        tokens: list[int] = []
        for block in blocks:
            fresh[block.tokens] = slice(len(tokens), len(tokens) + len(block.own))
            tokens += block.own
        filling = -len(tokens) % _TILE
        old = list(dict.fromkeys(head for block in blocks for head in block.before if head not in fresh))
        start = len(old) * BLOCK
        places = {head: slice(at * BLOCK, (at + 1) * BLOCK) for at, head in enumerate(old)}
        places |= {head: slice(start + own.start, start + own.stop) for head, own in fresh.items()}
        positions = [block.start + at for block in blocks for at in range(len(block.own))]
        mask = _closed(len(tokens) + filling, start, self._model.dtype)
        spans: list[attention.Span] = []
        for block in blocks:
            own, seen = fresh[block.tokens], [places[head] for head in (*block.before, block.tokens)]
            _open(mask[0, 0, own], seen)
            spans.append((own.start, own.stop, tuple(seen)))
        if filling:
            spans.append((len(tokens), len(tokens) + filling, (slice(start, start + 1),)))
            mask[..., len(tokens) :, start] = 0
        cache = _cache([self._joined(old)] if old else [], self._model.config)
        output = self._model.base_model(
            input_ids=torch.tensor([[*tokens, *tokens[:1] * filling]]),
            position_ids=torch.tensor([[*positions, *positions[:1] * filling]]),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            spans=spans,
        )
        for head in fresh:
            part = places[head]
            self._kept[head] = (
                torch.stack([layer.keys[0, :, part] for layer in cache.layers]),
                torch.stack([layer.values[0, :, part] for layer in cache.layers]),
            )
        return output.last_hidden_state[0, [own.stop - 1 for own in fresh.values()]]

    def _joined(self, heads: Iterable[Tokens]) -> Kept:
        keys, values = zip(*(self._kept[head] for head in heads), strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def _logits(self, hidden: Any) -> Any:
        count = len(hidden)
        filled = torch.cat([hidden, hidden[:1].expand(-count % _TILE, -1)])
        return self._model.get_output_embeddings()(filled)[:count].float()


def can_share(model: Any) -> bool:
    """Return True if `Blocks` can read for a model: whole attention only, float32, on a processor."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=model.config).layers
    is_exact = model.device.type == "cpu" and model.dtype == torch.float32
    return is_exact and attention.is_used(model) and all(type(layer) is DynamicLayer for layer in layers)


def padded(model: Any, cache: Any, draws: Sequence[Draw]) -> Read:
    """Read every distinct prompt once, left-padded, then give each draw its copy.

    Args:
        model: A causal language model of `transformers`.
        cache: Keys and values of the shared prefix, batch size 1; used up.
        draws: What to decode.
    """
    places: dict[Any, int] = {}
    copied = [places.setdefault((draw.soft, draw.suffix), len(places)) for draw in draws]
    distinct = [draws[copied.index(place)] for place in range(len(places))]
    prefix, width = cache.get_seq_length(), max(draw.length for draw in distinct)
    tokens = torch.tensor([[0] * (width - len(draw.suffix)) + list(draw.suffix) for draw in distinct])
    own = torch.tensor([[0] * (width - draw.length) + [1] * draw.length for draw in distinct])
    mask = torch.cat([torch.ones(len(distinct), prefix, dtype=torch.long), own], dim=1).to(model.device)
    if prefix:
        cache.batch_repeat_interleave(len(distinct))
    fed = tokens.to(model.device)
    logits = forward(model, cache, fed, mask, _embedded(model, fed, distinct))
    copies = torch.tensor(copied, device=model.device)
    cache.batch_select_indices(copies)
    return Read(logits[copies], cache, mask[copies])


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


def _parts(blocks: Sequence[_Block], most: int) -> Iterator[list[_Block]]:
    """Group blocks, in order, into passes of at most so many tokens."""
    part: list[_Block] = []
    for block in blocks:
        if part and sum(len(one.own) for one in part) + len(block.own) > most:
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


def _cache(rows: Sequence[Kept], config: Any) -> Any:
    """Return a cache of these rows, all of the same length."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    for at in range(len(cache.layers)) if rows else ():
        keys, values = (torch.stack([row[side][at] for row in rows]) for side in (0, 1))
        cache.update(keys, values, at)
    return cache


def _filled_up(rows: Sequence[Kept], config: Any) -> tuple[Any, Any]:
    """Return a cache of rows of any length, filled up from the left, and its mask."""
    lengths = [keys.shape[2] for keys, _ in rows]
    width = max(lengths)
    missing = [(0, 0, width - length, 0) for length in lengths]
    pad = torch.nn.functional.pad
    even = [(pad(keys, more), pad(values, more)) for (keys, values), more in zip(rows, missing, strict=True)]
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    return _cache(even, config), mask
