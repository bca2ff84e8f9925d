"""The form of a saved program's files: what each field must be, checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import Any, Final, TypeVar

from preceptor.canonical import written
from preceptor.untrusted import Malformed, json_object, shown

T = TypeVar("T")

PRIVILEGED: Final = frozenset({"self", "signature", "new_signature", "demos", "config", "lm", "completions"})
"""Keyword arguments that steer a call of a DSPy module, to another server say, and so are never taken from a file."""

MOST_INSTRUCTIONS: Final = 1_000_000
"""Characters of one predictor's instructions."""

MOST_FIELDS: Final = 1_000
"""Inputs of one predictor, and outputs."""

MOST_REGIONS: Final = 1_000
"""Regions of a router."""

MOST_DEMOS: Final = 10_000
"""Demonstrations of one predictor."""

BOUNDS: Final = ("gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length", "allow_inf_nan")
"""Bounds of a field's values, by Pydantic's names."""

SETTINGS: Final = (
    *("temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "seed", "rollout_id"),
    *("presence_penalty", "frequency_penalty", "reasoning_effort", "stop"),
)
"""Settings of a predictor's calls that are taken from a file."""

_LONGEST_PROBE: Final = 100_000
"""Bytes; a probe that is longer, of pictures perhaps, isn't kept."""
_LARGEST: Final = 1e300
"""Whole numbers above it can't be written as decimals."""
_WORDS: Final[Mapping[type, str]] = {str: "a text", dict: "an object", list: "a list", bool: "true or false"}
_OF_A_VERDICT: Final = (
    *("metric", "baseline", "baseline_ci", "compiled", "compiled_ci", "gain", "replaced", "rows"),
    *("search_score", "calls", "tokens", "dollars", "instructions", "seed_instructions"),
)


def replayable(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Return evidence with those of its probes that can be kept, read and asked safely again."""
    if "probes" not in evidence:
        return dict(evidence)
    safe = [each for each in evidence["probes"] if PRIVILEGED.isdisjoint(each["inputs"]) and _can_be_kept(each)]
    return {**evidence, "probes": safe}


def _can_be_kept(probe: Mapping[str, Any]) -> bool:
    """Return False for one that is too long, or holds half a character, as a cut-off answer may end in."""
    try:
        text = written({"probes": [probe]})
        json_object(text)
    except ValueError:
        return False
    return len(text) <= _LONGEST_PROBE


def check_program(saved: Mapping[str, Any]) -> None:
    """Refuse a `program.json` that isn't of the form `save` writes.

    Raises:
        Malformed: Naming the field.
    """
    for name in ("module", "lm", "preceptor", "dspy"):
        _printable(_need(saved, name, str), name)
    if "://" in saved["lm"]:
        raise Malformed("lm holds an address; only the name of a model is taken from a file")
    _is(saved.get("has_address", False), bool, "has_address")
    for name, predictor in _need(saved, "predictors", dict).items():
        _printable(name, "the name of a predictor")
        _check_predictor(_is(predictor, dict, f"predictor {name}"), f"predictor {name}")
    for name, digest in _is(saved.get("frozen", {}), dict, "frozen").items():
        _printable(name, "the name of a frozen predictor")
        _is(digest, str, "the digest of a frozen predictor")
    if ("experts" in saved) != (saved["module"] == "experts"):
        raise Malformed("module must be 'experts' where there are experts, and only there")
    if "experts" in saved:
        _check_experts(_is(saved["experts"], dict, "experts"), saved["predictors"])


def _check_experts(saved: Mapping[str, Any], predictors: Mapping[str, Any]) -> None:
    for name in ("student", "embedder"):
        _printable(_need(saved, name, str, "experts"), f"experts.{name}")
    if saved["student"] == "experts":
        raise Malformed("experts.student must be another module")
    for name, most in (("fields", MOST_FIELDS), ("regions", MOST_REGIONS)):
        _distinct_lines(_need(saved, name, list, "experts"), most, f"experts.{name}")
    _number(saved.get("radius"), "experts.radius")
    if not 0 <= saved["radius"] <= 2:
        raise Malformed(f"experts.radius must be in [0, 2], got {shown(saved['radius'])}")
    steering = PRIVILEGED.intersection(saved["fields"])
    if steering:
        raise Malformed(f"experts.fields has {min(steering)!r}, which would steer the call")
    _check_predictors_of_experts(saved["regions"], predictors)


def _check_predictors_of_experts(regions: list[str], predictors: Mapping[str, Any]) -> None:
    fields: dict[str, dict[str, Any]] = {}
    for name, predictor in predictors.items():
        expert, _, own = name.partition(": ")
        fields.setdefault(expert, {})[own] = [list(predictor[side].items()) for side in ("inputs", "outputs")]
    unknown = set(fields) - {"default", *regions}
    if unknown or "default" not in fields:
        raise Malformed(f"predictors of {_short(min(unknown, default='no default'))}, who is no expert")
    others = [expert for expert, own in fields.items() if own != fields["default"]]
    if others:
        raise Malformed(f"{_short(others[0])} has other predictors or fields than the default")


def _distinct_lines(values: list[Any], most: int, where: str) -> None:
    _refuse_more(values, most, where)
    for value in values:
        _printable(_is(value, str, f"one of {where}"), f"one of {where}")
    if not values or len(set(values)) < len(values):
        raise Malformed(f"{where} must be distinct names, at least one")


def _check_predictor(saved: Mapping[str, Any], place: str) -> None:
    instructions = _need(saved, "instructions", str, place)
    if len(instructions) > MOST_INSTRUCTIONS:
        raise Malformed(
            f"{_short(place)} has instructions of {len(instructions):,} characters, more than {MOST_INSTRUCTIONS:,}"
        )
    for side in ("inputs", "outputs"):
        fields: dict[str, Any] = _need(saved, side, dict, place)
        _refuse_more(fields, MOST_FIELDS, f"{place}.{side}")
        for name, field in fields.items():
            _printable(name, f"the name of a field of {place}")
            where = f"{place}.{side}.{name}"
            _printable(_need(_is(field, dict, where), "type", str, where), f"{where}.type")
            _need(field, "description", str, where)
            _check_named(field.get("bounds", {}), f"{where}.bounds", is_bound)
    _check_named(saved.get("config", {}), f"{place}.config", is_setting)
    for own in _is(saved.get("own", []), list, f"{place}.own"):
        _printable(_is(own, str, f"{place}.own"), f"{place}.own")
    demos: list[Any] = _need(saved, "demos", list, place)
    _refuse_more(demos, MOST_DEMOS, f"{place}.demos")
    for demo in demos:
        _is(demo, dict, f"a demonstration of {place}")


def _check_named(values: Any, where: str, is_known: Callable[[str, Any], bool]) -> None:
    for name, value in _is(values, dict, where).items():
        if not is_known(name, value):
            raise Malformed(f"{_short(f'{where}.{name}')} can't be {shown(value)}")


def is_bound(name: str, value: Any) -> bool:
    """Return True for a bound of a field that a file may hold."""
    if name == "allow_inf_nan":
        return type(value) is bool
    if name in ("min_length", "max_length"):
        return type(value) is int and 0 <= value < 2**31
    return name in BOUNDS and _is_plain(value) and (name != "multiple_of" or value > 0)


def is_setting(name: str, value: Any) -> bool:
    """Return True for a setting of a predictor's calls that a file may hold: it sends no call elsewhere."""
    if name == "stop":
        return isinstance(value, list) and all(type(each) is str for each in value)
    if name == "reasoning_effort":
        return type(value) is str
    return name in SETTINGS and _is_plain(value)


def _is_plain(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 2**53


def check_evidence(evidence: Mapping[str, Any]) -> None:
    """Refuse an `evidence.json` that can't be shown; it may hold less than a compile writes, and other fields.

    Raises:
        Malformed: Naming the field.
    """
    for name, check in _CHECKS.items():
        if name in evidence:
            check(evidence[name], name)
    missing = [name for name in _OF_A_VERDICT if name not in evidence] if "verdict" in evidence else []
    missing += ["run"] if "program" in evidence and "run" not in evidence else []
    if missing:
        raise Malformed(f"{missing[0]} is missing")


def _text(value: Any, where: str) -> None:
    _is(value, str, where)


def _number(value: Any, where: str) -> None:
    if type(value) not in (int, float) or (type(value) is int and abs(value) > _LARGEST):
        raise Malformed(f"{where} must be a number, got {shown(value)}")


def _number_or_none(value: Any, where: str) -> None:
    if value is not None:
        _number(value, where)


def _flag(value: Any, where: str) -> None:
    _is(value, bool, where)


def _interval(value: Any, where: str) -> None:
    bounds = _is(value, list, where)
    if len(bounds) != 2:
        raise Malformed(f"{where} must be two numbers, got {len(bounds)}")
    for bound in bounds:
        _number(bound, where)


def _texts_by_name(value: Any, where: str) -> None:
    for name, text in _is(value, dict, where).items():
        _is(text, str, f"{where}.{name}")


def _texts(value: Any, where: str) -> None:
    for text in _is(value, list, where):
        _printable(_is(text, str, where), where)


def _regions(value: Any, where: str) -> None:
    for region in _is(value, list, where):
        _flat(region, "a region")


def _principles(value: Any, where: str) -> None:
    for principle in _is(value, list, where):
        _flat(principle, "a principle")


def _flat(value: Any, where: str) -> None:
    for name, cell in _is(value, dict, where).items():
        if isinstance(cell, (list, dict)):
            raise Malformed(f"{_short(f'{where}.{name}')} must be a text or a number, got {shown(cell)}")


def _probes(value: Any, where: str) -> None:
    for probe in _is(value, list, where):
        _need(_is(probe, dict, "a probe"), "answer", str, "a probe")
        steering = PRIVILEGED.intersection(_need(probe, "inputs", dict, "a probe"))
        if steering:
            raise Malformed(f"a probe has the input {min(steering)!r}, which would steer the call")


_CHECKS: Final[Mapping[str, Callable[[Any, str], None]]] = {
    **dict.fromkeys(("method", "metric", "test", "verdict", "lm", "proposer", "stopped", "run", "program"), _text),
    **dict.fromkeys(("baseline", "compiled", "gain", "tested_gain", "p_value", "smallest_gain"), _number),
    **dict.fromkeys(("rows", "train_rows", "calls", "tokens", "dollars", "seconds", "seed", "demos", "look"), _number),
    **dict.fromkeys(("billed_calls", "billed_tokens", "billed_dollars", "unparsable", "repeated_rows"), _number),
    **dict.fromkeys(("baseline_ci", "compiled_ci", "ci"), _interval),
    **dict.fromkeys(("instructions", "seed_instructions"), _texts_by_name),
    **dict.fromkeys(("search_score", "seed_search_score"), _number_or_none),
    **dict.fromkeys(("replaced", "has_candidate", "own_metric"), _flag),
    "unpriced": _texts,
    "probes": _probes,
    "regions": _regions,
    "principles": _principles,
}


def _need(holder: Mapping[str, Any], name: str, kind: type[T], place: str = "") -> T:
    where = f"{place}.{name}" if place else name
    if name not in holder:
        raise Malformed(f"{_short(where)} is missing")
    return _is(holder[name], kind, where)


def _is(value: Any, kind: type[T], where: str) -> T:
    if type(value) is not kind:
        raise Malformed(f"{_short(where)} must be {_WORDS[kind]}, got {shown(value)}")
    return value


def _printable(text: str, where: str) -> None:
    if not text or not text.isprintable():
        raise Malformed(f"{_short(where)} must be one line of printable text, got {shown(text)}")


def _refuse_more(values: Sized, most: int, where: str) -> None:
    if len(values) > most:
        raise Malformed(f"{_short(where)}: {len(values):,} of them, more than {most:,}")


def _short(where: str) -> str:
    return shown(where)[1:-1]
