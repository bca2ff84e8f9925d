"""Requests in tokens."""

from __future__ import annotations

from dataclasses import dataclass

from dspy.lm15 import Request

from preceptor.lm.sampling import Draw, Tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenized request: what it may share with others, what is its own, and the choices if it has any."""

    request: Request
    prefix: Tokens
    suffix: Tokens
    choices: tuple[Tokens, ...]
    soft: tuple[tuple[float, ...], ...] = ()

    @property
    def length(self) -> int:
        """Tokens that are read."""
        return len(self.prefix) + len(self.soft) + len(self.suffix)

    @property
    def place(self) -> tuple[int, Tokens, int, Tokens]:
        """What texts are decoded in the order of: those below one prefix side by side, short ones first."""
        return len(self.prefix), self.prefix, len(self.suffix), self.suffix

    def draw(self, context: int, most: int) -> Draw:
        """Return what is decoded after the prefix.

        Args:
            context: Tokens that the model can read and write.
            most: Tokens that are written where the request names no bound.
        """
        config = self.request.config
        return Draw(
            suffix=self.suffix,
            max_tokens=min(config.max_tokens or most, context - self.length),
            temperature=config.temperature or 0.0,
            top_p=config.top_p or 1.0,
            top_k=config.top_k or 0,
            stop=config.stop,
            seed=config.seed or 0,
            soft=self.soft,
        )
