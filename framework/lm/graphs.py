"""Decoding steps on a GPU, recorded once as a CUDA graph and replayed.

A step of a small model is hundreds of small kernels: starting them from Python takes several times longer than
running them. A graph starts them all at once. It needs tensors that stay in their places, so keys and values lie in a
`StaticCache` as long as the longest text can become, and rows that are finished go on unread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch

from preceptor.lm.prefill import Read
from preceptor.lm.sampling import Draw

_ROWS: Final = (1, 4, 16, 32)
_LENGTHS: Final = 256
"""Rows and lengths are rounded up to these, so that few graphs serve many batches."""

_KEPT: Final = 4
"""Graphs of a model that are kept, with their keys and values."""

_WARM_UPS: Final = 2


class Step:
    """One decoding step of so many rows, recorded if the model is on a GPU.

    Args:
        model: A causal language model of `transformers`.
        rows: Texts decoded together.
        length: Most tokens of one, its prompt included.
    """

    def __init__(self, model: Any, rows: int, length: int) -> None:
        from transformers import StaticCache

        device, self._closed = model.device, torch.finfo(model.dtype).min
        self._model = model
        self._cache: Any = StaticCache(config=model.config, max_cache_len=length)
        self._tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._mask = torch.zeros(rows, 1, 1, length, dtype=model.dtype, device=device)
        self._logits = self._forward()
        self._graph = self._recorded() if device.type == "cuda" else None

    def fill(self, cache: Any, mask: Any) -> None:
        """Take over the prompts' keys and values.

        Args:
            cache: Of the prompts, one row each; no more rows than this step has.
            mask: 1 where a prompt has a token, shape (rows, tokens).
        """
        count, self._at = mask.shape
        for own, given in zip(self._cache.layers, cache.layers, strict=True):
            own.keys[:count, :, : self._at] = given.keys
            own.values[:count, :, : self._at] = given.values
            own.cumulative_length.fill_(self._at)
        self._mask.fill_(self._closed)
        self._mask[:, ..., 0] = 0  # a row without any token to look at has no attention
        self._mask[:count, 0, 0, : self._at] = torch.where(mask.bool(), 0, self._closed).to(self._mask.dtype)
        self._positions.zero_()
        self._positions[:count, 0] = mask.sum(-1) - 1

    def forward(self, rows: Sequence[int], tokens: Sequence[int]) -> Any:
        """Feed a token to each of these rows; return their logits in float32, shape (rows, vocabulary)."""
        device = self._tokens.device
        places = torch.tensor(rows, device=device)
        self._tokens[places, 0] = torch.tensor(tokens, device=device)
        self._positions += 1
        self._mask[..., self._at] = 0
        self._at += 1
        if self._graph is None:
            self._logits = self._forward()
        else:
            self._graph.replay()
        return self._logits[places].float()

    def _forward(self) -> Any:
        output = self._model(
            input_ids=self._tokens,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _recorded(self) -> Any:
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._forward()
        return graph


def fitting(rows: int) -> int:
    """Return how many texts to decode together where there is memory for so many: rows are rounded up, and take it.

    Example:
        >>> [fitting(rows) for rows in (1, 3, 5, 17, 32, 64)]
        [1, 1, 4, 16, 32, 32]
    """
    return max(size for size in _ROWS if size <= rows)


_STEPS: Final[WeakKeyDictionary[Any, OrderedDict[tuple[int, int], Step]]] = WeakKeyDictionary()


class Replayed:
    """The steps of one batch of texts.

    Args:
        model: A causal language model of `transformers`.
        read: Their prompts, one row each.
        draws: What is decoded, one a row.
    """

    def __init__(self, model: Any, read: Read, draws: Sequence[Draw]) -> None:
        count, width = read.mask.shape
        max_tokens = max(draw.max_tokens for draw in draws)
        rows = next((size for size in _ROWS if size >= count), count)
        length = -(-(width + max_tokens) // _LENGTHS) * _LENGTHS
        kept = _STEPS.setdefault(model, OrderedDict())
        if (rows, length) not in kept:
            while len(kept) >= _KEPT:
                kept.popitem(last=False)
            kept[rows, length] = Step(model, rows, length)
        kept.move_to_end((rows, length))
        self._step = kept[rows, length]
        self._step.fill(read.cache, read.mask)
        self._rows = list(range(count))

    def forward(self, stay: Sequence[int], tokens: Sequence[int]) -> Any:
        """Go on with these of the rows that are left, feeding each its token; return their logits."""
        self._rows = [self._rows[place] for place in stay]
        return self._step.forward(self._rows, tokens)
