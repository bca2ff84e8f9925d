"""Declared LLM tasks, compiled into programs that can be trusted.

import preceptor
from preceptor.modules import Classify
from preceptor.teleprompters import APE

program = Classify("text -> label: Literal['spam', 'mail']", instructions="Is this spam?")
compiled = APE(metric="accuracy", lm=preceptor.LocalLM("qwen2.5-coder-1.5b")).compile(program, trainset=rows)
print(compiled.evidence.verdict)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from preceptor.errors import (
    ArtifactError,
    BudgetExhausted,
    ConfigError,
    DataError,
    InputTooLong,
    LMFailed,
    MetricError,
    ModelError,
    ParseError,
    PreceptorError,
    RunError,
    Unaffordable,
)

if TYPE_CHECKING:
    from preceptor.evidence import Evidence
    from preceptor.lm.adapter import DirectAdapter
    from preceptor.lm.budget import Budget
    from preceptor.lm.local import LocalLM
    from preceptor.program import load
    from preceptor.teleprompter import Teleprompter

_LAZY = {  # these import DSPy or torch, which takes seconds; `import preceptor` should not
    "Budget": "preceptor.lm.budget",
    "DirectAdapter": "preceptor.lm.adapter",
    "Evidence": "preceptor.evidence",
    "LocalLM": "preceptor.lm.local",
    "Teleprompter": "preceptor.teleprompter",
    "load": "preceptor.program",
}

__all__ = [
    "ArtifactError",
    "Budget",
    "BudgetExhausted",
    "ConfigError",
    "DataError",
    "DirectAdapter",
    "Evidence",
    "InputTooLong",
    "LMFailed",
    "LocalLM",
    "MetricError",
    "ModelError",
    "ParseError",
    "PreceptorError",
    "RunError",
    "Teleprompter",
    "Unaffordable",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import what needs DSPy or torch when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'preceptor' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
