"""What a compile is given: checked for nothing, and told apart from what another one is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import dspy

from preceptor import demonstrated
from preceptor.affordable import FEWEST
from preceptor.canonical import lasting, without_addresses
from preceptor.checks import (
    check_labels,
    check_metric,
    check_positive,
    check_present,
    check_settings,
    heard,
    label_field,
    needed_inputs,
)
from preceptor.copies import apply, candidate_of
from preceptor.data import check_examples
from preceptor.errors import ConfigError
from preceptor.lm.seam import adapter_state, answering, frozen_predictors, predictors, state_of
from preceptor.program import check_savable
from preceptor.scoring.metrics import Metric, wrap
from preceptor.splits import different, split, unseen

if TYPE_CHECKING:
    from preceptor.teleprompter import Teleprompter

_UNKNOWN: Final = "any/model"
"""The name of a model where none is given yet."""


def checked(
    method: Teleprompter,
    student: dspy.Module,
    trainset: Sequence[dspy.Example],
    valset: Sequence[dspy.Example] | None,
) -> tuple[Teleprompter, list[dspy.Example], list[dspy.Example], str, Metric]:
    """Return the method, the rows to search on, those to confirm on, the label's field and the metric; asks no model.

    The method is the one given, with the number of its demonstrations.

    Raises:
        ConfigError: If something can't work, or the rows are too few to confirm any gain.
    """
    check_settings(student)
    inputs = needed_inputs(student)
    train = check_examples(trainset, inputs, name="trainset")
    output = label_field(student, train[0])
    method.check_program(student, output)
    train = heard(student, train)
    if valset is None:
        train, confirm = split(train, output, seed=method.seed)
    else:
        confirm = unseen(heard(student, check_examples(valset, inputs, name="valset")), train, name="valset")
    count = different(confirm)
    if len(train) < 2 or count < FEWEST:
        told = f"{count} of different inputs" if count < len(confirm) else str(count)
        raise ConfigError(
            f"Too few rows: {len(train)} to search on, {told} to confirm on; at least 2 and {FEWEST}: "
            "fewer can't tell a gain from chance, however large it is."
        )
    method = demonstrated.settled(method, student, train)
    _refuse_unsavable(method, student, train)
    metric = wrap(method.metric, output)
    for name, rows in (("trainset", train), ("valset", confirm)):
        check_present(metric, rows, output, name)
        check_labels(metric, student, rows, output, name)
        check_metric(metric, student, rows[0], name)
    check_positive(metric, [*train, *confirm], output)
    return method, train, confirm, output, metric


def counted(name: str, lm: Any) -> dspy.LM:
    """Return the model that was given under a name, if its calls can be counted.

    Raises:
        ConfigError: If there is none, or it is none of DSPy's; saying what was given.
    """
    if lm is None:
        raise ConfigError("No language model: pass lm=, or call dspy.configure(lm=...).")
    if isinstance(lm, str):
        raise ConfigError(f"{name} is the text {lm!r}, and a compile needs a model: {name}=dspy.LM({lm!r}).")
    if not isinstance(lm, dspy.LM):
        raise ConfigError(
            f"{name} is a {type(lm).__name__}, whose calls can't be counted; a compile needs a dspy.LM. Make it the "
            f"engine of one: {name}=dspy.LM(name, engine=...)."
        )
    return lm


def _refuse_unsavable(method: Teleprompter, student: dspy.Module, train: Sequence[dspy.Example]) -> None:
    """Raise if the rows can't be shown as the method says, or what it compiles couldn't be saved in the end."""
    signatures = {name: predictor.signature for name, predictor in predictors(student)}
    demonstrated.refuse(method, train, signatures)
    seed, experts = candidate_of(student), method.experts
    if method.demonstration_rows:
        longest = sorted(train, key=lambda row: -len(str(row.toDict())))[: method.demonstration_rows]
        seed = demonstrated.showing(seed, signatures, longest)
    given: Any = method.lm or dspy.settings.lm
    name = answering(student, given).model if isinstance(given, dspy.LM) else _UNKNOWN
    check_savable(apply(student, seed), name, copies=1 if experts == 1 else experts + 1)


def parts_of(
    method: Teleprompter,
    student: dspy.Module,
    train: Sequence[dspy.Example],
    confirm: Sequence[dspy.Example],
    metric: Metric,
) -> dict[str, Any]:
    """Return what a run depends on, by name, but for its models: the same parts take the same path."""
    parts = {
        "method": [type(method).__name__, method.knobs],
        "student": [*_student_state(student), *adapter_state()],
        "trainset": [row.toDict() for row in train],
        "valset": [row.toDict() for row in confirm],
        "metric": metric.name,
    }
    return {name: lasting(part) for name, part in parts.items()}


def _student_state(student: dspy.Module) -> list[Any]:
    frozen = [_state(*named) for named in frozen_predictors(student)]
    return [*(_state(*named) for named in predictors(student)), *([frozen] if frozen else [])]


def _state(name: str, predictor: Any) -> list[Any]:
    own = [] if predictor.lm is None else [state_of(predictor.lm)]
    signature = without_addresses(str(predictor.signature))
    return [name, signature, predictor.config, [dict(demo) for demo in predictor.demos], *own]
