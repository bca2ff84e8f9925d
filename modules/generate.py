"""A program that writes text, a number, or a record of several fields."""

from __future__ import annotations

from typing import Any

import dspy

from preceptor.lm.adapter import apredicted, declare, predicted


class Generate(dspy.Module):
    """Writes its output; one call a row. With several or nested outputs the model answers in JSON.

    Args:
        signature: Any signature.
        instructions: Replaces the signature's.

    Example:
        >>> Generate("text -> summary", instructions="Sum it up.").predict.signature.instructions
        'Sum it up.'
    """

    def __init__(self, signature: Any, instructions: str | None = None) -> None:
        super().__init__()
        self.predict = dspy.Predict(declare(signature, instructions))

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """Return a prediction with the output fields."""
        return predicted(self.predict, inputs)

    async def aforward(self, **inputs: Any) -> dspy.Prediction:
        """Return a prediction with the output fields, without blocking the event loop."""
        return await apredicted(self.predict, inputs)
