"""Decoding free text in batches: shared prefix, per-request seeds, early leave, late joining; the last looks ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from preceptor.lm import ahead, graphs, sampling
from preceptor.lm.prefill import Read, below, forward
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
    """Decode all draws together; a finished one leaves the batch at once, and the last one looks ahead if it can.

    Args:
        model: A causal language model of `transformers`.
        read: Their prompts, one row each; used up.
        draws: What to decode.
        ends: Tokens that end a text.
        detokenize: Turns tokens into text.
    """
    together, found = Together(model, ends=ends, detokenize=detokenize), dict[int, Text]()
    together.join(read, dict(enumerate(draws)))
    while together.rows:
        found |= together.step()
    return [found[at] for at in range(len(draws))]


@dataclass(slots=True)
class _Row:
    """A text on its way."""

    key: int
    draw: Draw
    generator: Any
    text: Text = field(default_factory=Text)


class Together:
    """Texts that are decoded together, a token a step; a finished one leaves at once.

    Args:
        model: A causal language model of `transformers`.
        ends: Tokens that end a text.
        detokenize: Turns tokens into text.
        is_open: Others may join those on their way: on a processor only, and then the last one doesn't look ahead.
    """

    def __init__(self, model: Any, *, ends: frozenset[int], detokenize: Detokenize, is_open: bool = False) -> None:
        self._model, self._ends, self._detokenize, self._is_open = model, ends, detokenize, is_open
        self._live: list[_Row] = []
        self._logits: Any = None
        self._steps: Any = None

    @property
    def rows(self) -> int:
        """Texts that are on their way."""
        return len(self._live)

    def join(self, read: Read, draws: Mapping[int, Draw]) -> None:
        """Have texts decoded from the next step on.

        Args:
            read: Their prompts, one row each; used up.
            draws: What to decode, by the number that it is told by.
        """
        if self._live:
            self._steps.join(read, list(draws.values()))
            self._logits = torch.cat([self._logits, read.logits])
        else:
            begin = Shrinking if self._is_open else _steps
            self._steps, self._logits = begin(self._model, read, list(draws.values())), read.logits
        self._live += [_Row(key, draw, torch.Generator().manual_seed(draw.seed)) for key, draw in draws.items()]

    def step(self) -> dict[int, Text]:
        """Draw a token for each text; return those that ended."""
        draws, generators = [row.draw for row in self._live], [row.generator for row in self._live]
        drawn = sampling.drawn(self._logits, draws, generators)
        taken = [
            _take(row.text, row.draw, *one, self._ends, self._detokenize)
            for row, one in zip(self._live, drawn, strict=True)
        ]
        ended = {row.key: self._whole(row.text) for row, goes_on in zip(self._live, taken, strict=True) if not goes_on}
        stay = [place for place, goes_on in enumerate(taken) if goes_on]
        self._live = [self._live[place] for place in stay]
        if not stay:
            self._steps = self._logits = None
        else:
            self._logits = self._steps.forward(stay, [drawn[place][0] for place in stay])
        return ended

    def _whole(self, text: Text) -> Text:
        text.text = text.text if text.reason == "stop" and text.text else self._detokenize(text.tokens)
        return text


def _steps(model: Any, read: Read, draws: Sequence[Draw]) -> Shrinking | graphs.Replayed:
    """Return what makes the steps after the prompts have been read: on a GPU, replayed ones."""
    is_on_gpu = model.device.type == "cuda"
    return graphs.Replayed(model, read, draws) if is_on_gpu else Shrinking(model, read, draws, looks=True)


class Shrinking:
    """The steps of one batch of texts; finished ones leave it at once, and the last one may look ahead if it can.

    Arguments as of `graphs.Replayed`; what was read is used up.
    """

    def __init__(self, model: Any, read: Read, draws: Sequence[Draw], *, looks: bool = False) -> None:
        self._model, self._cache, self._mask = model, _roomy(read.cache), read.mask
        self._words = [list(draw.suffix) for draw in draws]
        self._most = [draw.max_tokens for draw in draws]
        self._can_look = looks and ahead.can_look(model)
        self._last: ahead.Ahead | None = None

    def join(self, read: Read, draws: Sequence[Draw]) -> None:
        """Go on with these, too, from the next step on."""
        cache, self._mask = below(self._model, (self._cache, self._mask), (read.cache, read.mask))
        self._cache = _roomy(cache)
        self._words += [list(draw.suffix) for draw in draws]
        self._most += [draw.max_tokens for draw in draws]

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


def _roomy(cache: Any) -> Any:
    from preceptor.lm.growing import growing  # needs transformers

    return growing(cache)


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
