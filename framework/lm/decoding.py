"""Decoding free text in batches: shared prefix, per-request seeds, early leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Draw:
    """One text to decode.

    Attributes:
        suffix: The prompt's tokens after the shared prefix, at least one.
        soft: Embeddings that stand before the suffix, in place of tokens.
        max_tokens: Most tokens to decode.
        temperature: 0 takes the likeliest token.
        top_p: Mass of the likeliest tokens to sample from, in (0, 1].
        top_k: Number of likeliest tokens to sample from; 0 means all.
        stop: Texts that end the answer; they are not part of it.
        seed: Of this request's own generator.
    """

    suffix: Tokens
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0
    soft: tuple[tuple[float, ...], ...] = ()

    @property
    def length(self) -> int:
        """How many places of the sequence it takes, soft tokens included."""
        return len(self.soft) + len(self.suffix)


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
    live = list(range(len(draws)))
    while live:
        tokens = [
            _step(found[at], draws[at], row, generators[at], ends, detokenize)
            for at, row in zip(live, logits, strict=True)
        ]
        stay = [place for place, token in enumerate(tokens) if token is not None]
        if len(stay) < len(live) and stay:
            cache.batch_select_indices(torch.tensor(stay, device=model.device))
            mask = mask[stay]
        live = [live[place] for place in stay]
        if live:
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            fed = torch.tensor([[tokens[place]] for place in stay], device=model.device)
            logits = _forward(model, cache, fed, mask)
    for text in found:
        text.text = text.text if text.reason == "stop" and text.text else detokenize(text.tokens)
    return found


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
    return logits[copies.cpu()], mask[copies]


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
    return output.logits[:, -1].float().cpu()


def _step(
    text: Text, draw: Draw, logits: Any, generator: Any, ends: frozenset[int], detokenize: Detokenize
) -> int | None:
    """Take one token for one draw; return None once its text is complete."""
    token = _sample(logits, draw, generator)
    if token in ends:
        text.reason = "stop"
        return None
    text.tokens.append(token)
    text.logprobs.append(float(logits[token] - logits.logsumexp(-1)))
    if draw.stop:
        so_far = detokenize(text.tokens)
        cut = min((at for stop in draw.stop if (at := so_far.find(stop)) >= 0), default=-1)
        if cut >= 0:
            text.reason, text.text = "stop", so_far[:cut]
            text.tokens = text.tokens if cut else []
            return None
    return token if len(text.tokens) < draw.max_tokens else None


def _sample(logits: Any, draw: Draw, generator: Any) -> int:
    if draw.temperature <= 0:
        return int(logits.argmax())
    scaled = logits / draw.temperature
    if draw.top_k:
        lowest = scaled.topk(min(draw.top_k, scaled.numel())).values[-1]
        scaled = scaled.masked_fill(scaled < lowest, -math.inf)
    ordered, order = scaled.softmax(-1).sort(descending=True)
    kept = ordered.cumsum(-1) - ordered < draw.top_p
    return int(order[torch.multinomial(ordered * kept, 1, generator=generator)])
