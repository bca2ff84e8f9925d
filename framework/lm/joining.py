"""Texts that are decoded together, and that others join meanwhile: whoever has an answer needn't wait for the rest."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeAlias, TypeVar

from dspy.lm15 import Request, Response

from preceptor.errors import ConfigError, InputTooLong
from preceptor.lm.decoding import Text, Together
from preceptor.lm.prefill import Read
from preceptor.lm.prompts import Prompt
from preceptor.lm.sampling import Draw, Tokens

K = TypeVar("K", bound=Hashable)
Result: TypeAlias = Response | Exception


@dataclass(frozen=True, slots=True)
class Decoder:
    """What an engine does for them.

    Attributes:
        together: Decodes the texts.
        prompted: Returns a request in tokens, and what is to be decoded; raises what is wrong with it.
        read: Reads prompts, given their prefixes.
        answer: Returns the answer that a decoded text is.
        fitting: How many texts there is memory for, if the longest has so many tokens, those of its prompt included.
        turn: Nobody else has the model meanwhile.
    """

    together: Together
    prompted: Callable[[Request], tuple[Prompt, Draw]]
    read: Callable[[Sequence[Tokens], Sequence[Draw]], Read]
    answer: Callable[[Prompt, Text], Response]
    fitting: Callable[[int], int]
    turn: Callable[[], AbstractContextManager[None]]


class Joining(Generic[K]):
    """Requests whose texts are decoded together, those that come later with those that are on their way.

    What is decoded together depends on what is added between the ends of which texts, not on when.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._numbers = count()
        self._left: dict[int, tuple[Prompt, Draw]] = {}
        self._live: dict[int, tuple[Prompt, Draw]] = {}
        self._keys: dict[int, K] = {}
        self._refused: dict[K, Result] = {}

    def add(self, requests: Mapping[K, Request]) -> None:
        """Have more requests answered, none of them with choices, each told by its key."""
        for key, request in requests.items():
            try:
                told = self._decoder.prompted(request)
            except (InputTooLong, ConfigError) as error:  # is the answer to its request
                self._refused[key] = error
            else:
                number = next(self._numbers)
                self._left[number], self._keys[number] = told, key

    def ended(self) -> dict[K, Result]:
        """Decode until some texts end; return their answers by key, {} if there is nothing to be answered."""
        if self._refused:
            refused, self._refused = self._refused, {}
            return refused
        texts: dict[int, Text] = {}
        with self._decoder.turn():
            if several := self._fitting():
                self._join(several)
            while self._live and not texts:
                texts = self._decoder.together.step()
        return {self._keys.pop(at): self._decoder.answer(self._live.pop(at)[0], text) for at, text in texts.items()}

    def _fitting(self) -> list[int]:
        """Return those that can join now, the first first."""
        several: list[int] = []
        longest = max((prompt.length + draw.max_tokens for prompt, draw in self._live.values()), default=0)
        for at, (prompt, draw) in self._left.items():
            longest = max(longest, prompt.length + draw.max_tokens)
            if len(self._live) + len(several) >= self._decoder.fitting(longest):
                break
            several.append(at)
        return several

    def _join(self, numbers: Sequence[int]) -> None:
        told = {at: self._left.pop(at) for at in numbers}
        draws = {at: draw for at, (_, draw) in told.items()}
        read = self._decoder.read([prompt.prefix for prompt, _ in told.values()], list(draws.values()))
        self._decoder.together.join(read, draws)
        self._live |= told
