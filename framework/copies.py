"""Copies of a program, with its own instructions and demonstrations or with others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import dspy

from preceptor.errors import ConfigError
from preceptor.lm.seam import every_predictor, own_models, predictors
from preceptor.scoring.trial import Candidate


def candidate_of(program: dspy.Module) -> Candidate:
    """Return a program's instructions."""
    return Candidate({name: str(predictor.signature.instructions) for name, predictor in predictors(program)})


def apply(program: dspy.Module, candidate: Candidate) -> dspy.Module:
    """Return a copy of `program` with the candidate's instructions and demonstrations; the original stays as it is."""
    copied = copy_of(program)
    for name, predictor in predictors(copied):
        predictor.signature = predictor.signature.with_instructions(candidate.instructions[name])
        if name in candidate.demos:
            predictor.demos = [dspy.Example(dict(demo)) for demo in candidate.demos[name]]
    return copied


def copy_of(program: dspy.Module) -> dspy.Module:
    """Return a copy that shares no predictor with the program; what can't be copied, such as a lock, both have.

    Raises:
        ConfigError: If the copy has other predictors, or the program's own: a class of it copies itself so.
    """
    copied = cast("dspy.Module", _copied(program, {}))
    own, found = ({id(one): name for name, one in every_predictor(each)} for each in (program, copied))
    names, others = ([name for name, _ in predictors(each)] for each in (program, copied))
    if names != others:
        wrong = f"the predictors {', '.join(names)} became {', '.join(others) or 'none'}"
    elif shared := [name for key, name in own.items() if key in found]:
        wrong = f"its copy has the same predictor {shared[0]}, and changing one would change the other"
    else:
        return copied
    raise ConfigError(
        f"The program can't be copied: {wrong}. One of its classes has a __deepcopy__, a __getstate__ or a __reduce__ "
        "that does this; let it keep every predictor, and copy each."
    )


def with_own_models(program: dspy.Module, replaced: Callable[[dspy.LM], dspy.LM]) -> dspy.Module:
    """Return a copy whose predictors' own models, if any, are replaced; those of frozen parts as well.

    Each is replaced once, so that predictors that share one still do: `BestOfN` refuses a module of several.
    """
    copied = copy_of(program)
    own = {id(lm): lm for _, lm in own_models(copied)}
    made = {key: replaced(lm) for key, lm in own.items()}
    for _, predictor in every_predictor(copied):
        predictor.lm = made.get(id(predictor.lm))
    return copied


def _copied(value: Any, made: dict[int, Any]) -> Any:
    """Return a deep copy; where there can be none, one whose parts are copied as far as they can be.

    DSPy's own `deepcopy` copies a list with a part that can't be copied as a whole: its predictors are shared then.

    Args:
        value: A program, or a part of one.
        made: Copies by the original's id, as `copy.deepcopy` keeps them.
    """
    if id(value) in made:
        return made[id(value)]
    attempt = dict(made)  # one that fails leaves half-made copies in it
    try:
        copied = copy.deepcopy(value, attempt)
    except Exception:  # noqa: BLE001  the user's object may refuse in any way
        return _copied_by_parts(value, made)
    made.setdefault(id(made), []).append(attempt.pop(id(attempt), None))  # temporary originals, whose ids stay taken
    made.update(attempt)
    return copied


def _copied_by_parts(value: Any, made: dict[int, Any]) -> Any:
    """Return a copy with copied parts; of what has none that may hold predictors, a shallow one, else itself."""
    kind: Any = type(value)
    copied: Any
    if issubclass(kind, tuple):
        parts = [_copied(part, made) for part in value]
        copied = getattr(kind, "_make", kind)(parts)  # a named one takes its parts one by one
        return made.setdefault(id(value), copied)
    if issubclass(kind, dspy.Module):
        copied = made[id(value)] = kind.__new__(kind)
        for name, part in vars(value).items():
            vars(copied)[name] = _copied(part, made)
        return copied
    try:
        copied = made[id(value)] = copy.copy(value)
    except Exception:  # noqa: BLE001  as above
        return made.setdefault(id(value), value)
    if issubclass(kind, list):
        copied[:] = [_copied(part, made) for part in value]
    elif issubclass(kind, dict):
        copied.update({key: _copied(part, made) for key, part in value.items()})
    return copied
