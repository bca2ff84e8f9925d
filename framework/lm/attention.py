"""Attention row by row, so that a row's bits don't depend on the rows that share its forward pass.

Matrix products and norms on a processor treat each token alone, but for bfloat16 products on one with
AMX: those of few rows are summed in another order than those of many. Fused attention does not: it sums keys
in blocks, and where a row's keys fall in the blocks depends on its neighbours. Rows of one pass see
only what stands before them and themselves, so attending row by row is also less work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import torch

NAME: Final = "preceptor"
"""Under which `transformers` knows `attend`."""

Span: TypeAlias = tuple[int, int, tuple[slice, ...]]
"""First token and end of a row, and the stretches of keys it may look at, its own the last."""


def use(model: Any) -> None:
    """Make a model of `transformers` attend through `attend`, if it attends through "sdpa" now."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def is_used(model: Any) -> bool:
    """Return True if a model takes the argument `spans`."""
    return bool(model.config._attn_implementation == NAME)


def is_whole(model: Any) -> bool:
    """Return True if every layer attends to all that stands before: no sliding windows, no states."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def keeps_states(config: Any) -> bool:
    """Return True if layers of a model with these settings keep a state of all they have read, as convolutions do."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return not all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=config).layers)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    spans: Sequence[Span] | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as "sdpa" does; with `spans`, each row to its own keys alone. A row of one token sees all of them.

    Args:
        module: The attention layer.
        query: Shape (1, heads, tokens, width).
        key: Shape (1, key heads, keys, width).
        value: Shaped as `key`.
        mask: Zero where a token may look, shape (1, 1, tokens, keys).
        spans: Of each row, in order and without gaps; None for an ordinary batch.
        rest: Passed on.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    sdpa: Any = sdpa_attention_forward
    if spans is None or mask is None:
        return sdpa(module, query, key, value, mask, **rest)[0], None
    found: list[torch.Tensor] = []
    for start, stop, seen in spans:
        keys, values = (_joined([whole[:, :, part] for part in seen], 2) for whole in (key, value))
        own = _joined([mask[:, :, start:stop, part] for part in seen], 3) if stop - start > 1 else None
        found.append(sdpa(module, query[:, :, start:stop], keys, values, own, **rest)[0])
    return torch.cat(found, dim=1), None


def _joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return torch.cat([*parts], dim=dim) if len(parts) > 1 else parts[0]
