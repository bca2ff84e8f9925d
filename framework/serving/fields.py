"""A program's fields as pydantic models: what it takes, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import dspy
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic_core import to_json

from preceptor.errors import ConfigError
from preceptor.lm.adapter import takes_none
from preceptor.lm.seam import predictors
from preceptor.serving.refused import Refused
from preceptor.taken import called, taken

ROUTE: Final = "route"
LOGPROBS: Final = "logprobs"

NEVER: Final = ConfigDict(extra="forbid")


def inputs_of(program: dspy.Module) -> type[BaseModel]:
    """Return the model of what a program is called with, described as its signature describes it.

    Raises:
        ConfigError: If a field has a type that has no JSON form.
    """
    fields = dict[str, Any]()
    for name, one in taken(program).items():
        kind = one.kind if one.is_needed or takes_none(one.kind) else one.kind | None
        description = None if one.field is None else _description(one.field) or None
        fields[name] = (kind, Field(... if one.is_needed else None, description=description))
    return _made("Inputs", fields, NEVER)


def outputs_of(program: dspy.Module, *, is_own_class: bool) -> type[BaseModel]:
    """Return the model of what a program answers.

    Args:
        program: Loaded.
        is_own_class: Of the user's own: it may answer other fields than its last predictor, or fewer.

    Raises:
        ConfigError: If a field has a type that has no JSON form.
    """
    fields = dict[str, Any]()
    for name, field in predictors(program)[-1][1].signature.output_fields.items():
        info = Field(None if is_own_class else ..., description=_description(field) or None)
        fields[name] = (field.annotation | None if is_own_class else field.annotation, info)
    return _made("Outputs", fields, ConfigDict(extra="allow" if is_own_class else "forbid"))


def is_open(program: dspy.Module) -> bool:
    """Return True if a program is of the user's own class: whatever fields it returns are its answer.

    `BestOfN` and `Refine` return what their module returned.
    """
    return not type(called(program)).__module__.startswith(("dspy.", "preceptor."))


def answered(names: Sequence[str], found: Mapping[str, Any], *, is_open: bool = False) -> dict[str, Any]:
    """Return a prediction's fields of these names; if it has none, or is open, all but what says how it came about."""
    known = {name: found[name] for name in names if name in found}
    others = {name: value for name, value in found.items() if name in known or name not in (ROUTE, LOGPROBS)}
    return others if is_open else known or others


def _description(field: Any) -> str:
    """Return what the user wrote of a field; DSPy's own filler isn't that."""
    text = str((field.json_schema_extra or {}).get("desc") or "")
    return "" if text.startswith("${") else text


def _made(name: str, fields: dict[str, Any], config: ConfigDict) -> type[BaseModel]:
    try:
        model: type[BaseModel] = create_model(name, __config__=config, **fields)
        TypeAdapter(model).json_schema()
    except Exception as error:
        raise ConfigError(f"The fields {', '.join(fields)} can't be served: {type(error).__name__}: {error}") from error
    return model


def given(inputs: BaseModel) -> dict[str, Any]:
    """Return the fields that were given.

    Raises:
        Refused: If a text holds half a character, which no model can be sent.
    """
    found = {name: getattr(inputs, name) for name in type(inputs).model_fields if name in inputs.model_fields_set}
    for name, value in found.items():
        try:
            to_json(value)
        except ValueError:
            raise Refused(422, f"{name}: It holds half a character.", "invalid_field", param=name) from None
    return found


def complaint(error: ValidationError) -> str:
    """Return what is wrong with the first field that is; what was given isn't repeated."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])
