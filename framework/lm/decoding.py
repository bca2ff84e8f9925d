"""Decoding free text in batches: shared prefix, per-request seeds, early leave; the last text looks ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from preceptor.lm import ahead, graphs, sampling
from preceptor.lm.prefill import Read, forward
from preceptor.lm.sampling import Draw


@dataclass(slots=True)
class Text:
    """A decoded answer.

    Attributes:
        tokens: Decoded tokens, end-of-text excluded.
        logprobs: Their natural log-probabilities at temperature 1.
        reason: "stop", or "length" if `max_tokens` cut it.
        text: The answer.
    """

    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    reason: str = "length"
    text: str = ""


Detokenize = Callable[[list[int]], str]


def decode(
    model: Any, read: Read, draws: Sequence[Draw], *, ends: frozenset[int], detokenize: Detokenize
) -> list[Text]:
    """Decode all draws together; a finished one leaves the batch at once.

    Args:
        model: A causal language model of `transformers`.
        read: Their prompts, one row each; used up.
        draws: What to decode.
        ends: Tokens that end a text.
        detokenize: Turns tokens into text.
    """
    found = [Text() for _ in draws]
    generators = [torch.Generator().manual_seed(draw.seed) for draw in draws]
    logits = read.logits
    steps = _steps(model, read, draws)
    live = list(range(len(draws)))
    while live:
        drawn = sampling.drawn(logits, [draws[at] for at in live], [generators[at] for at in live])
        taken = [_take(found[at], draws[at], *one, ends, detokenize) for at, one in zip(live, drawn, strict=True)]
        stay = [place for place, goes_on in enumerate(taken) if goes_on]
        live = [live[place] for place in stay]
        if live:
            logits = steps.forward(stay, [drawn[place][0] for place in stay])
    for text in found:
        text.text = text.text if text.reason == "stop" and text.text else detokenize(text.tokens)
    return found


def _steps(model: Any, read: Read, draws: Sequence[Draw]) -> Shrinking | graphs.Replayed:
    """Return what makes the steps after the prompts have been read: on a GPU, replayed ones."""
    kind = graphs.Replayed if model.device.type == "cuda" else Shrinking
    return kind(model, read, draws)


class Shrinking:
    """The steps of one batch of texts; finished ones leave it at once, and the last one looks ahead if it can.

    Arguments as of `graphs.Replayed`; what was read is used up.
    """

    def __init__(self, model: Any, read: Read, draws: Sequence[Draw]) -> None:
        self._model, self._cache, self._mask = model, read.cache, read.mask
        self._words = [list(draw.suffix) for draw in draws]
        self._most = [draw.max_tokens for draw in draws]
        self._can_look = ahead.can_look(model)
        self._last: ahead.Ahead | None = None

    def forward(self, stay: Sequence[int], tokens: Sequence[int]) -> Any:
        """Go on with these of the rows that are left, feeding each its token; return their logits."""
        if self._last:
            return self._last.forward(tokens[0])
        if len(stay) < len(self._mask):
            self._leave(stay)
        if len(stay) == 1 and self._can_look:
            cache = ahead.alone(self._cache, self._mask)
            self._last = ahead.Ahead(self._model, cache, self._words[0], self._most[0])
            return self._last.forward(tokens[0])
        self._words = [[*words, token] for words, token in zip(self._words, tokens, strict=True)]
        self._most = [most - 1 for most in self._most]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(stay), 1)], dim=1)
        fed = torch.tensor([[token] for token in tokens], device=self._mask.device)
        return forward(self._model, self._cache, fed, self._mask)

    def _leave(self, stay: Sequence[int]) -> None:
        self._cache.batch_select_indices(torch.tensor(stay, device=self._mask.device))
        self._mask = self._mask[stay]
        self._words, self._most = [self._words[at] for at in stay], [self._most[at] for at in stay]


def _take(text: Text, draw: Draw, token: int, logprob: float, ends: frozenset[int], detokenize: Detokenize) -> bool:
    """Append a token to a text; return True if the text goes on."""
    if token in ends:
        text.reason = "stop"
        return False
    text.tokens.append(token)
    text.logprobs.append(logprob)
    if draw.stop:
        so_far = detokenize(text.tokens)
        cut = min((at for stop in draw.stop if (at := so_far.find(stop)) >= 0), default=-1)
        if cut >= 0:
            text.reason, text.text = "stop", so_far[:cut]
            text.tokens = text.tokens if cut else []
            return False
    return len(text.tokens) < draw.max_tokens
