"""The seam to DSPy: its inferred types are narrower or wider than what it does, so they are set right here."""

from __future__ import annotations

from typing import Any, cast

import dspy


def predictors(program: dspy.Module) -> list[tuple[str, Any]]:
    """Return a program's predictors by name; each has `signature`, `demos`, `config` and `lm`."""
    return cast("list[tuple[str, Any]]", program.named_predictors())


def text_of_parts(parts: Any) -> str:
    """Return a message's or a system prompt's text, whether it came as one text or in parts."""
    if not parts:
        return ""
    return parts if isinstance(parts, str) else "".join(str(part.text) for part in parts)
