"""What a program takes: the fields it is called with, for rows, for a batch and for a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import dspy

from preceptor.checks import forward_inputs
from preceptor.lm.adapter import takes_none
from preceptor.lm.seam import predictors

_AROUND: Final = (dspy.BestOfN, dspy.Refine)
"""DSPy's modules that call another one with what they are called with."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A field that a program takes.

    Attributes:
        field: As a signature declares it, None if none does.
        is_needed: True if every call must give it.
    """

    field: Any
    is_needed: bool

    @property
    def kind(self) -> Any:
        """Its type."""
        return Any if self.field is None else self.field.annotation


def called(program: dspy.Module) -> dspy.Module:
    """Return the program that is called in the end: the one inside of DSPy's `BestOfN` and `Refine`, else itself."""
    while isinstance(program, _AROUND):
        program = program.module
    return program


def names_inputs(program: dspy.Module) -> bool:
    """Return True if the program's own code names what it takes: it may be called with more than predictors read."""
    return forward_inputs(called(program)) is not None


def taken(program: dspy.Module) -> dict[str, Taken]:
    """Return what a program takes, by name.

    That is what `forward` takes by name. Where it takes anything, it is the inputs of the program's own signature, as
    `dspy.ReAct` has one; else what some predictor reads and none writes.
    """
    inner = called(program)
    read, named = _read(inner), forward_inputs(inner)
    if named is not None:
        return {name: Taken(read.get(name), is_needed) for name, is_needed in named.items()}
    own: Any = getattr(inner, "signature", None)
    has_own = isinstance(own, type) and issubclass(own, dspy.Signature)
    fields: dict[str, Any] = own.input_fields if has_own else read
    return {
        name: Taken(field, bool(field.is_required()) and not takes_none(field.annotation))
        for name, field in fields.items()
    }


def _read(program: dspy.Module) -> dict[str, Any]:
    """Return the fields that some predictor reads and none writes."""
    parts = [predictor.signature for _, predictor in predictors(program)]
    written = {name for part in parts for name in part.output_fields}
    return {name: field for part in parts for name, field in part.input_fields.items() if name not in written}
