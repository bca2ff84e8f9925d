"""Decoding one text several tokens a step: those that may come next are fed along, and read no further if they don't.

On a processor a step waits for the weights, and takes about as long for FBGEMM's six rows as for one (`prepacked.py`).
So the step of a text that is alone feeds its last token and up to five that followed the same words earlier, in its
prompt or in itself: prompt lookup (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding). A token is
drawn from its own logits as ever; while the draws agree with what was fed, the next logits are there already.

Each token fed attends by itself, to what stands before it, and all other operations treat each token alone: its logits
are, to the bit, those of one token a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from preceptor.lm import prefill
from preceptor.lm.prepacked import ROWS, Prepacked

_LONGEST: Final = 3
"""Tokens that have to be the same for what followed them to be fed; fewer where so many aren't found."""


def can_look(model: Any) -> bool:
    """Return True if further tokens of a step cost next to nothing and change no bit: FBGEMM has all weights."""
    if not isinstance(model.get_output_embeddings(), Prepacked):
        return False
    matrices = (layer for layer in model.modules() if any(one.dim() > 1 for one in layer.parameters(recurse=False)))
    return prefill.can_share(model) and all(isinstance(layer, (torch.nn.Embedding, Prepacked)) for layer in matrices)


class Ahead:
    """The steps of one text.

    Args:
        model: A causal language model of `transformers`, one that `can_look` ahead.
        cache: Keys and values of the text so far, without its last token; one row, nothing filled up.
        words: The text's tokens that what follows may repeat: its prompt, and what was drawn.
        most: Most tokens that will be drawn from now on.
    """

    def __init__(self, model: Any, cache: Any, words: Sequence[int], most: int) -> None:
        self._model, self._cache, self._most = model, cache, most
        self._words = list(words)
        self._fed: list[int] = []
        self._logits: list[Any] = []

    def forward(self, token: int) -> Any:
        """Go on after this token; return logits of the next in float32, shape (1, vocabulary)."""
        self._words.append(token)
        self._most -= 1
        if self._fed[:1] == [token]:
            del self._fed[0]
        else:
            self._read(token)
        return self._logits.pop(0)

    def _read(self, token: int) -> None:
        """Feed a token and those that may follow it; let go of those fed before that didn't."""
        self._cache.crop(-len(self._fed))
        self._fed = followers(self._words, min(ROWS, self._most) - 1)
        tokens = [token, *self._fed]
        start = self._cache.get_seq_length()
        output = self._model(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.arange(start, start + len(tokens))[None],
            past_key_values=self._cache,
            use_cache=True,
            spans=[(at, at + 1, (slice(0, start + at + 1),)) for at in range(len(tokens))],
        )
        self._logits = list(output.logits[0].float().split(1))


def alone(cache: Any, mask: Any) -> Any:
    """Return a cache of one row without the places that its row of the mask, shape (1, tokens), says are filled up."""
    if not bool(mask.all()):
        kept = mask[0].bool()
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    return cache


def followers(words: Sequence[int], most: int) -> list[int]:
    """Return what followed the last tokens where they stood before: as many of them as are found, the latest first.

    Example:
        >>> followers([1, 2, 3, 4, 1, 2], most=3)
        [3, 4, 1]
        >>> followers([5, 2, 7, 1, 2, 9, 2], most=3)
        [9, 2]
        >>> followers([1, 2, 3], most=3)
        []
    """
    for size in range(min(_LONGEST, len(words) - 1), 0, -1):
        tail = words[-size:]
        for at in reversed(range(len(words) - size)):
            if words[at : at + size] == tail:
                return list(words[at + size : at + size + most])
    return []
