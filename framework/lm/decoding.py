"""Decoding free text in batches: shared prefix, per-request seeds, early leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from preceptor.lm import graphs, sampling
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
    model: Any, cache: Any, draws: Sequence[Draw], *, ends: frozenset[int], detokenize: Detokenize
) -> list[Text]:
    """Decode all draws together; a finished one leaves the batch at once.

    Args:
        model: A causal language model of `transformers`.
        cache: Keys and values of the shared prefix, batch size 1; used up.
        draws: What to decode. Equal prompts are read once.
        ends: Tokens that end a text.
        detokenize: Turns tokens into text.
    """
    found = [Text() for _ in draws]
    generators = [torch.Generator().manual_seed(draw.seed) for draw in draws]
    logits, mask = _prefill(model, cache, draws)
    steps = _steps(model, cache, mask, max(draw.max_tokens for draw in draws))
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


def _steps(model: Any, cache: Any, mask: Any, max_tokens: int) -> Shrinking | graphs.Replayed:
    """Return what makes the steps after the prompts have been read: on a GPU, replayed ones."""
    kind = graphs.Replayed if model.device.type == "cuda" else Shrinking
    return kind(model, cache, mask, max_tokens)


class Shrinking:
    """The steps of one batch of texts; finished ones leave it at once. Arguments as of `graphs.Replayed`."""

    def __init__(self, model: Any, cache: Any, mask: Any, max_tokens: int) -> None:
        del max_tokens
        self._model, self._cache, self._mask = model, cache, mask

    def forward(self, stay: Sequence[int], tokens: Sequence[int]) -> Any:
        """Go on with these of the rows that are left, feeding each its token; return their logits."""
        if len(stay) < len(self._mask):
            self._cache.batch_select_indices(torch.tensor(stay, device=self._mask.device))
            self._mask = self._mask[stay]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(stay), 1)], dim=1)
        fed = torch.tensor([[token] for token in tokens], device=self._mask.device)
        return _forward(self._model, self._cache, fed, self._mask)


def _prefill(model: Any, cache: Any, draws: Sequence[Draw]) -> tuple[Any, Any]:
    """Read every distinct prompt once, left-padded, then give each draw its copy."""
    places: dict[Any, int] = {}
    copied = [places.setdefault((draw.soft, draw.suffix), len(places)) for draw in draws]
    distinct = [draws[copied.index(place)] for place in range(len(places))]
    prefix, width = cache.get_seq_length(), max(draw.length for draw in distinct)
    padded = torch.tensor([[0] * (width - len(draw.suffix)) + list(draw.suffix) for draw in distinct])
    own = torch.tensor([[0] * (width - draw.length) + [1] * draw.length for draw in distinct])
    mask = torch.cat([torch.ones(len(distinct), prefix, dtype=torch.long), own], dim=1).to(model.device)
    if prefix:
        cache.batch_repeat_interleave(len(distinct))
    fed = padded.to(model.device)
    logits = _forward(model, cache, fed, mask, _embedded(model, fed, distinct))
    copies = torch.tensor(copied, device=model.device)
    cache.batch_select_indices(copies)
    return logits[copies], mask[copies]


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


def _forward(model: Any, cache: Any, tokens: Any, mask: Any, embedded: Any = None) -> Any:
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
