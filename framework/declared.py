"""A predictor as an artifact declares it: its fields and the settings of its calls, written down and made again.

Whatever changes what is asked is written down, if it is plain: the texts, the types, bounds and defaults of fields,
and the usual settings of a call. What isn't plain, such as a tool or a pattern, is named, and comes with the
user's own instance only: see `program.load`.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from typing import Any, cast

import dspy
import pydantic
import pydantic_core
from dspy.signatures.field import PYDANTIC_CONSTRAINT_MAP

from preceptor import form, untrusted
from preceptor.untrusted import Malformed, shown


def described(predictor: Any) -> dict[str, Any]:
    """Return a predictor as JSON, without its demonstrations; what is no JSON is named under `own`."""
    sides = {"inputs": predictor.signature.input_fields, "outputs": predictor.signature.output_fields}
    written = {side: {name: _field(info) for name, info in fields.items()} for side, fields in sides.items()}
    own = [each for fields in sides.values() for name, info in fields.items() for each in _own(name, info)]
    config = {name: value for name, value in predictor.config.items() if form.is_setting(name, value)}
    own += [f"the setting {name}" for name in predictor.config if name not in config]
    return {
        "instructions": str(predictor.signature.instructions),
        **written,
        **({"config": config} if config else {}),
        **({"own": own} if own else {}),
    }


def _field(info: Any) -> dict[str, Any]:
    extra: dict[str, Any] = info.json_schema_extra or {}
    bounds, default = _bounds(info), {"default": info.default} if _has_plain_default(info) else {}
    return {
        "type": type_text(info.annotation),
        "description": str(extra.get("desc") or ""),
        **({"bounds": bounds} if bounds else {}),
        **default,
    }


def _bounds(info: Any) -> dict[str, Any]:
    """Return a field's bounds in the order in which prompts tell them."""
    told = str((info.json_schema_extra or {}).get("constraints", ""))
    known = {
        name: getattr(each, name)
        for each in info.metadata
        for name in form.BOUNDS
        if form.is_bound(name, getattr(each, name, None))
    }
    return {name: known[name] for name in sorted(known, key=lambda name: told.find(PYDANTIC_CONSTRAINT_MAP[name]))}


def _has_plain_default(info: Any) -> bool:
    try:
        return bool(not _lacks_default(info) and json.loads(json.dumps(info.default)) == info.default)
    except (TypeError, ValueError):
        return False


def _lacks_default(info: Any) -> bool:
    return info.default is pydantic_core.PydanticUndefined


def _own(name: str, info: Any) -> list[str]:
    """Return what of a field can't be written down."""
    bounds = _bounds(info)
    strange = [each for each in info.metadata if not any(hasattr(each, bound) for bound in bounds)]
    has_default = info.default_factory is not None or not (_lacks_default(info) or _has_plain_default(info))
    return [*([f"a default of {name}"] if has_default else []), *([f"a rule for {name}"] if strange else [])]


def signature(saved: Mapping[str, Any]) -> Any:
    """Return the signature that was saved; nothing is imported or evaluated.

    Raises:
        Malformed: If it can't be made of what a file may hold.
    """
    fields: dict[str, Any] = {}
    for side, make in (("inputs", dspy.InputField), ("outputs", dspy.OutputField)):
        for name, field in saved[side].items():
            if not name.isidentifier() or name.startswith("_") or name in form.PRIVILEGED:
                raise Malformed(f"it has the name {shown(name)}")
            kind = untrusted.annotation(field["type"])
            fields[name] = (kind, make(desc=field["description"], **_given(name, kind, field)))
    try:
        return cast("Any", dspy.Signature)(fields, saved["instructions"])
    except (TypeError, ValueError, pydantic_core.SchemaError) as error:  # such as names that Pydantic keeps for itself
        raise Malformed(f"DSPy refuses it: {str(error)[:200]}") from error


def _given(name: str, kind: Any, field: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved field's bounds and default, as DSPy takes them."""
    if "default" not in field:
        return dict(field.get("bounds", {}))
    try:
        pydantic.TypeAdapter(kind).validate_python(field["default"])
    except ValueError as error:
        raise Malformed(f"the default of {shown(name)} is of another type") from error
    return {**field.get("bounds", {}), "default": field["default"]}


def type_text(annotation: Any) -> str:
    """Return a type as it is written in a signature.

    Example:
        >>> from typing import Literal
        >>> type_text(Literal["a", "b"]), type_text(list[str]), type_text(int)
        ("Literal['a', 'b']", 'list[str]', 'int')
    """
    origin = typing.get_origin(annotation)
    if annotation is type(None):
        return "None"
    if origin is None:
        return getattr(annotation, "__name__", str(annotation))
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, typing.get_args(annotation)))}]"
    if origin is type(int | None):
        return " | ".join(map(type_text, typing.get_args(annotation)))
    inner = ", ".join(map(type_text, typing.get_args(annotation)))
    return f"{getattr(origin, '__name__', origin)}[{inner}]"
