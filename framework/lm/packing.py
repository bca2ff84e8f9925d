"""Scoring choices: many rows and all their choices in one forward pass, without padding.

Rows that share a prefix attend to its keys and values, computed once. Their own tokens are laid end
to end in one sequence, and so are the choices, as a tree of tokens below each row's last token. A
token sees the prefix, its ancestors and itself, which the attention mask says; its position is its
depth. At most 15 tokens of a pass are padding, and a choice of one token costs nothing extra.

Off the GPU, attention runs row by row (`attention.py`): every other operation gives a token the same
bits whoever shares the pass, once there are enough tokens, so a row's answer does not depend on the rows
beside it; with AMX its bits do (`attention.py`).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import numpy as np
import torch

from preceptor.lm import attention

Tokens = tuple[int, ...]

TILE: Final = 16
"""Tokens of a pass come in multiples of it: of fewer than 12, MKL (without FBGEMM) rounds by how many there are."""


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt below a shared prefix, with the choices to score.

    Attributes:
        suffix: The row's own tokens, at least one.
        choices: Token sequences, none of them the beginning of another.
    """

    suffix: Tokens
    choices: tuple[Tokens, ...]


@dataclass(slots=True)
class Pack:
    """Rows laid out for one forward pass.

    Attributes:
        tokens: All tokens, in order.
        parents: Index of the token before each, -1 where that is the prefix.
        depths: Distance of each token from the end of the prefix, from 0.
        spans: For each row, the index of its first token and the one after its last.
        steps: For each row and choice, the pairs (index of a token, token that should follow it).
    """

    tokens: list[int] = field(default_factory=list[int])
    parents: list[int] = field(default_factory=list[int])
    depths: list[int] = field(default_factory=list[int])
    spans: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    steps: list[list[list[tuple[int, int]]]] = field(default_factory=list[list[list[tuple[int, int]]]])

    def add(self, row: Row) -> None:
        """Append a row and the tree of its choices; a choice's last token is scored, never fed."""
        start, last = len(self.tokens), -1
        for token in row.suffix:
            last = self._append(token, last)
        nodes: dict[Tokens, int] = {(): last}
        self.steps.append([self._walk(choice, nodes) for choice in row.choices])
        self.spans.append((start, len(self.tokens)))

    def fill(self, multiple: int) -> None:
        """Append tokens that nobody reads until their number is a multiple."""
        start = len(self.tokens)
        for _ in range(-start % multiple):
            self._append(self.tokens[0], -1)
        self.spans += [(start, len(self.tokens))] if start % multiple else []

    def seen(self, prefix: int) -> list[attention.Span]:
        """Return what each row may look at: a prefix of so many tokens, and itself."""
        return [(start, stop, (slice(0, prefix), slice(prefix + start, prefix + stop))) for start, stop in self.spans]

    def _walk(self, choice: Tokens, nodes: dict[Tokens, int]) -> list[tuple[int, int]]:
        pairs: list[tuple[int, int]] = []
        for depth, token in enumerate(choice):
            head = choice[:depth]
            if head not in nodes:
                nodes[head] = self._append(head[-1], nodes[head[:-1]])
            pairs.append((nodes[head], token))
        return pairs

    def _append(self, token: int, parent: int) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(0 if parent < 0 else self.depths[parent] + 1)
        return len(self.tokens) - 1

    def mask(self, prefix: int, dtype: torch.dtype) -> torch.Tensor:
        """Return what each token may see, shape (1, 1, tokens, prefix + tokens): 0, or the lowest number."""
        size = len(self.tokens)
        seen = np.zeros((size, prefix + size), dtype=np.bool_)
        seen[:, :prefix] = True
        for index, parent in enumerate(self.parents):
            if parent >= 0:
                seen[index] = seen[parent]
            seen[index, prefix + index] = True
        hidden = torch.from_numpy(~seen)
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[None, None]


def branch(choices: Sequence[Tokens], end: int) -> tuple[Tokens, ...]:
    """Close every choice with `end` if one is the beginning of another, so that none stays open.

    Example:
        >>> branch([(5,), (5, 6)], end=0)
        ((5, 0), (5, 6, 0))
        >>> branch([(5,), (7, 6)], end=0)
        ((5,), (7, 6))
    """
    pairs = itertools.permutations(choices, 2)
    if any(long[: len(short)] == short for short, long in pairs):
        return tuple((*choice, end) for choice in choices)
    return tuple(choices)


def chunks(rows: Iterable[tuple[int, Row]], size: int) -> list[list[tuple[int, Row]]]:
    """Group rows, shortest first, into chunks of at most `size` tokens (a longer row goes alone).

    Dropping the first chunks and grouping the rest again gives the same chunks: an interrupted
    evaluation goes on with the very batches it would have run.
    """
    found: list[list[tuple[int, Row]]] = []
    room = 0
    for index, row in sorted(rows, key=lambda item: (len(item[1].suffix), item[1].suffix, item[0])):
        need = len(row.suffix) + sum(len(choice) - 1 for choice in row.choices)
        if not found or need > room:
            found.append([])
            room = size
        found[-1].append((index, row))
        room -= need
    return found


def log_probabilities(model: Any, cache: Any, rows: Sequence[Row]) -> list[list[float]]:
    """Return log P(choice | prefix, row) for every row and choice, natural logarithm.

    Args:
        model: A causal language model of `transformers`.
        cache: Keys and values of the shared prefix, batch size 1; left as it was.
        rows: What to score.
    """
    pack = Pack()
    for row in rows:
        pack.add(row)
    pack.fill(TILE)
    prefix = cache.get_seq_length()
    device = model.device
    output = model.base_model(
        input_ids=torch.tensor([pack.tokens], device=device),
        position_ids=torch.tensor([pack.depths], device=device) + prefix,
        attention_mask=pack.mask(prefix, model.dtype).to(device),
        past_key_values=_beside(cache),
        use_cache=True,
        **({"spans": pack.seen(prefix)} if device.type == "cpu" and attention.is_used(model) else {}),
    )
    pairs = [(index, token) for row in pack.steps for choice in row for index, token in choice]
    asked = sorted({index for index, _ in pairs})
    asked += asked[:1] * (-len(asked) % TILE)
    place = {index: at for at, index in enumerate(asked)}
    hidden = output.last_hidden_state[0, asked]
    found = iter(_tokens(model, hidden, [(place[index], token) for index, token in pairs]))
    return [[sum(next(found) for _ in choice) for choice in row] for row in pack.steps]


def one_by_one(model: Any, prefix: Tokens, rows: Sequence[Row]) -> list[list[float]]:
    """Return the same of a model that rows laid end to end would mislead, each choice in a pass of its own."""
    return [[_alone(model, (*prefix, *row.suffix), choice) for choice in row.choices] for row in rows]


def _alone(model: Any, prompt: Tokens, choice: Tokens) -> float:
    tokens = torch.tensor([[*prompt, *choice[:-1]]], device=model.device)
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=len(choice)).logits[0].float()
    return float(logits.log_softmax(-1)[range(len(choice)), choice].sum())


def scaled(logits: Any, config: Any) -> Any:
    """Return what a model makes of the products with its output embeddings: scaled, or capped, by some families."""
    known = config.get_text_config()
    factor = getattr(known, "logit_scale", None) or 1 / (getattr(known, "logits_scaling", None) or 1)
    cap = getattr(known, "final_logit_softcapping", None)
    return torch.tanh(logits * factor / cap) * cap if cap else logits * factor if factor != 1 else logits


def _beside(cache: Any) -> Any:
    """Return a cache that grows by itself, from the same keys and values: a layer appends by making a longer copy."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    return own


def _tokens(model: Any, hidden: Any, pairs: Sequence[tuple[int, int]]) -> list[float]:
    """Return the log-probability of each token at its place, its logit taken in float32.

    In bfloat16 logits of 16 to 32 are 1/8 apart, so that choices tie and the batch decides between
    them; one product in float32 per token settles that. The sums over all tokens have them in place of the rounded
    ones: else a token that is all but certain would have a log-probability of up to 1/16 above or below 0.
    """
    head: Any = model.get_output_embeddings()
    logits = scaled(head(hidden).float(), model.config)
    distinct = sorted(set(pairs))
    places, tokens = torch.tensor(distinct, device=hidden.device).unbind(-1)
    plain = isinstance(head, torch.nn.Linear) and cast("Any", head).bias is None
    dots = _dots(hidden[places].float(), head.weight[tokens].float()) if plain else None
    own = logits[places, tokens] if dots is None else scaled(dots, model.config)
    total = logits.logsumexp(-1)
    more = torch.exp(own - total[places]) - torch.exp(logits[places, tokens] - total[places])
    total = total + torch.log1p(torch.zeros_like(total).index_add_(0, places, more))
    exact = dict(zip(distinct, (own - total[places]).tolist(), strict=True))
    return [exact[pair] for pair in pairs]


def _dots(left: Any, right: Any) -> Any:
    """Return the products row by row: a sum over all rows at once would round by their number."""
    return torch.stack([torch.dot(one, other) for one, other in zip(left, right, strict=True)])
