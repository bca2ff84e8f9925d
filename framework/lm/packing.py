"""Scoring choices: many rows and all their choices in one forward pass, without padding.

Rows that share a prefix attend to its keys and values, computed once. Their own tokens are laid end
to end in one sequence, and so are the choices, as a tree of tokens below each row's last token. A
token sees the prefix, its ancestors and itself, which the attention mask says; its position is its
depth. No token is padding, and a choice of one token costs nothing extra.

Off the GPU, attention runs row by row (`attention.py`): every other operation gives a token the same
bits whoever shares the pass, so a row's answer does not depend on the rows beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from preceptor.lm import attention

Tokens = tuple[int, ...]


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
        seen = torch.zeros(size, size, dtype=torch.bool)
        for index, parent in enumerate(self.parents):
            if parent >= 0:
                seen[index] = seen[parent]
            seen[index, index] = True
        seen = torch.cat([torch.ones(size, prefix, dtype=torch.bool), seen], dim=1)
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


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
    prefix = cache.get_seq_length()
    device = model.device
    output = model.base_model(
        input_ids=torch.tensor([pack.tokens], device=device),
        position_ids=torch.tensor([pack.depths], device=device) + prefix,
        attention_mask=pack.mask(prefix, model.dtype).to(device),
        past_key_values=cache,
        use_cache=True,
        **({"spans": pack.spans} if device.type == "cpu" and attention.is_used(model) else {}),
    )
    cache.crop(-len(pack.tokens))
    asked = sorted({index for row in pack.steps for choice in row for index, _ in choice})
    place = {index: at for at, index in enumerate(asked)}
    hidden = output.last_hidden_state[0, asked]
    logits = model.get_output_embeddings()(hidden).float()
    normalizer = logits.logsumexp(-1)
    return [
        [sum(_token(model, hidden, logits, normalizer, place[at], token) for at, token in choice) for choice in row]
        for row in pack.steps
    ]


def _token(model: Any, hidden: Any, logits: Any, normalizer: Any, at: int, token: int) -> float:
    """Return one token's log-probability, its logit taken in float32.

    In bfloat16 logits of 16 to 32 are 1/8 apart, so that choices tie and the batch decides between
    them; one dot product in float32 per choice settles that.
    """
    head: Any = model.get_output_embeddings()
    plain = isinstance(head, torch.nn.Linear) and cast("Any", head).bias is None and not _is_scaled(model.config)
    logit = torch.dot(hidden[at].float(), head.weight[token].float()) if plain else logits[at, token]
    return float(logit - normalizer[at])


def _is_scaled(config: Any) -> bool:
    return any(getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
