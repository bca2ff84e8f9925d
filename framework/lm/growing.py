"""Keys and values with room for more: a token's are written beside the others, where `transformers` copies them all."""

from __future__ import annotations

from typing import Any, Final

from transformers.cache_utils import DynamicLayer

ROOM: Final = 64
"""Tokens until all are copied again."""


class Growing(DynamicLayer):
    """One layer's keys and values, shape (rows, key heads, tokens, width) each, views of buffers that are longer.

    Where they are replaced, as when rows leave, the next token's begin new buffers.

    Args:
        layer: A layer of a cache of `transformers`, whose keys and values to go on with.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self._buffers: list[Any] = [None, None]

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Append keys and values; return all."""
        del args, kwargs
        self.keys = self._put(0, self.keys, key_states)
        self.values = self._put(1, self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Any) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        self._buffers = [None, None]  # not held until the next token

    def reset(self) -> None:
        """Let go of all."""
        super().reset()
        self._buffers = [None, None]

    def _put(self, side: int, held: Any, added: Any) -> Any:
        start, end = held.shape[-2], held.shape[-2] + added.shape[-2]
        buffer = self._buffers[side]
        if buffer is None or not _is_view(held, buffer) or buffer.shape[-2] < end:
            buffer = self._buffers[side] = held.new_empty(*held.shape[:-2], end + ROOM, held.shape[-1])
            buffer[..., :start, :] = held
        buffer[..., start:end, :] = added
        return buffer[..., :end, :]


def growing(cache: Any) -> Any:
    """Return a cache of `transformers`, its layers with room for more; those of sliding windows or states stay."""
    cache.layers = [
        Growing(layer) if type(layer) is DynamicLayer and layer.is_initialized else layer for layer in cache.layers
    ]
    return cache


def _is_view(held: Any, buffer: Any) -> bool:
    return bool(held.data_ptr() == buffer.data_ptr() and held.shape[0] == buffer.shape[0])
