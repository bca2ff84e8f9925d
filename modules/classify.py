"""A program that picks one of several labels."""

from __future__ import annotations

from typing import Any

import dspy

from preceptor.errors import ConfigError
from preceptor.lm.adapter import apredicted, choices, declare, is_direct, predicted


class Classify(dspy.Module):
    """Picks a label; one call a row, and a label's text is all the model has to produce.

    A model in this process scores the labels instead of writing one, and `prediction.logprobs` then
    holds log P of each.

    Args:
        signature: One output, a `Literal` of the labels or a `bool`.
        instructions: Replaces the signature's.

    Raises:
        ConfigError: If the signature has no such output.

    Example:
        >>> program = Classify("text -> label: Literal['spam', 'mail']", instructions="Is this spam?")
        >>> program.predict.signature.instructions
        'Is this spam?'
    """

    def __init__(self, signature: Any, instructions: str | None = None) -> None:
        super().__init__()
        declared = declare(signature, instructions)
        if not is_direct(declared) or not choices(declared):
            raise ConfigError(
                f"Classify needs one output that is a Literal of labels or a bool, got {list(declared.output_fields)}. "
                "Declare it as \"text -> label: Literal['a', 'b']\", or use Generate."
            )
        self.predict = dspy.Predict(declared)

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """Return a prediction with the label."""
        return predicted(self.predict, inputs)

    async def aforward(self, **inputs: Any) -> dspy.Prediction:
        """Return a prediction with the label, without blocking the event loop."""
        return await apredicted(self.predict, inputs)
