"""Checks of what a compile is given, made for nothing before anything is spent."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

import dspy

from preceptor.errors import ConfigError, DataError, MetricError
from preceptor.form import PRIVILEGED
from preceptor.lm.adapter import labels_of, takes_none
from preceptor.lm.redaction import refuse_secrets
from preceptor.lm.seam import every_predictor, predictors
from preceptor.scoring.metrics import Metric
from preceptor.scoring.texts import folded, text_of

logger = logging.getLogger(__name__)

_SHOWN: Final = 10
"""Labels named in a message."""

_MODULES: Final = "preceptor.modules."
_PLAIN: Final = (dspy.Predict, dspy.ChainOfThought)
"""DSPy's modules that give a predictor the inputs of its signature, and look at no others."""


def label_field(student: dspy.Module, row: dspy.Example) -> str:
    """Return the label the last predictor's outputs and the rows share, "" if none."""
    outputs = predictors(student)[-1][1].signature.output_fields
    labels: Mapping[str, Any] = row.labels().toDict()
    shared = [name for name in outputs if name in labels] or list(labels)
    return str(shared[-1]) if shared else ""


def forward_inputs(student: dspy.Module) -> dict[str, bool] | None:
    """Return what a call takes by name, and whether it must be given; None where it takes anything."""
    kind: Any = type(student)  # the instance's own `forward` warns when it is read
    _, *parameters = inspect.signature(getattr(kind, "forward", None) or kind.aforward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {each.name: each.default is inspect.Parameter.empty for each in parameters if each.kind in kinds}


def needed_inputs(student: dspy.Module) -> list[str]:
    """Return the inputs every row must have: what `forward` asks for, or the only predictor where it takes anything."""
    taken = forward_inputs(student)
    if taken is not None:
        return [name for name, is_needed in taken.items() if is_needed]
    parts = predictors(student)
    fields = parts[0][1].signature.input_fields if len(parts) == 1 else {}
    return [name for name, field in fields.items() if field.is_required() and not takes_none(field.annotation)]


def taken_inputs(student: dspy.Module, row: dspy.Example) -> list[str]:
    """Return a row's inputs that a call takes; all of them where several predictors' program takes anything."""
    taken: Mapping[str, Any] | None = forward_inputs(student)
    parts = predictors(student)
    if taken is None and len(parts) == 1:
        taken = parts[0][1].signature.input_fields
    names = row.inputs().keys()
    return [name for name in names if taken is None or name in taken]


def is_plain(student: dspy.Module) -> bool:
    """Return True for a program of one predictor and of no code but ours and DSPy's: a row asks it once."""
    parts = cast("list[tuple[str, Any]]", list(student.named_sub_modules()))
    kinds = [type(part) for _, part in parts]
    is_ours = all(kind in _PLAIN or kind.__module__.startswith(_MODULES) for kind in kinds)
    return is_ours and len(predictors(student)) == 1


def heard(student: dspy.Module, rows: Sequence[dspy.Example]) -> list[dspy.Example]:
    """Return the rows with no inputs but those that reach the model: an id would make rows of equal inputs differ.

    Only of a plain program of one predictor: what other code makes of an input isn't known, so theirs stay as they are.
    """
    if not is_plain(student):
        return list(rows)
    return [row.with_inputs(*taken_inputs(student, row)) for row in rows]


def check_module(student: object) -> None:
    """Raise if what is to be compiled is no program, but its class, say, or one without a predictor.

    Raises:
        ConfigError: Saying what it is.
    """
    if not isinstance(student, dspy.Module):
        kind = f"the class {student.__name__}" if isinstance(student, type) else f"a {type(student).__name__}"
        raise ConfigError(f"A compile needs a dspy.Module, an instance of it; got {kind}.")
    if not predictors(student):
        raise ConfigError(f"{type(student).__name__} has no predictor to improve.")


def check_settings(student: dspy.Module) -> None:
    """Raise if a program can't be called, or its calls can't be recorded.

    Raises:
        ConfigError: If it can only be awaited; if a predictor holds a secret, which would be recorded with each of
            its calls; or as `check_models` and `refuse_steering`.
    """
    if not hasattr(type(student), "forward"):
        raise ConfigError(f"{type(student).__name__} has no `forward`: it can only be awaited. Define one.")
    check_models(student)
    for name, predictor in every_predictor(student):
        refuse_steering(name, predictor.signature.input_fields)
        refuse_secrets(f"The predictor {name}", predictor.config)


def refuse_steering(name: str, fields: Iterable[str]) -> None:
    """Raise if a predictor has a field that DSPy would take for a setting of its call.

    Raises:
        ConfigError: Naming the field, and what to do.
    """
    steering = sorted(PRIVILEGED.intersection(fields))
    if steering:
        raise ConfigError(
            f"The predictor {name} has a field {steering[0]!r}, which DSPy takes for a setting of the call. Rename the "
            f"field; its column may keep its name: --column NEW={steering[0]}."
        )


def check_models(student: dspy.Module) -> None:
    """Raise if a predictor's own model is none that can be counted.

    Raises:
        ConfigError: Naming the predictor.
    """
    for name, predictor in every_predictor(student):
        if predictor.lm is not None and not isinstance(predictor.lm, dspy.LM):
            raise ConfigError(
                f"The model of the predictor {name} is a {type(predictor.lm).__name__}, whose calls can't be counted; "
                "make it the engine of one that can: dspy.LM(name, engine=...)."
            )


def check_metric(metric: Metric, student: dspy.Module, row: dspy.Example, name: str) -> None:
    """Score a row's own labels as if they had been the answer, before anything is spent.

    Args:
        metric: Under trial. One that asks a model is let through.
        student: Where the row lacks a label for one of its outputs, or code of the user's may answer with further
            fields, a metric that misses a field is let through.
        row: With labels.
        name: Of the rows.

    Raises:
        MetricError: If the metric raises or returns no score.
    """
    labels = row.labels().toDict()
    outputs = set(predictors(student)[-1][1].signature.output_fields)
    is_partial = not is_plain(student) or not labels.keys() >= outputs
    try:
        with dspy.context(lm=dspy.LM("none/none", engine=_Refusing(), num_retries=0, cache=False)):
            metric(row, dspy.Prediction(**labels))
    except MetricError as error:
        if _Refusing.was_asked(error) or (is_partial and isinstance(error.__cause__, (AttributeError, KeyError))):
            return
        raise MetricError(f"Tried on the first row of {name}, with its own label as the answer: {error}") from error


def check_positive(metric: Metric, rows: Sequence[dspy.Example], output: str) -> None:
    """Raise if the label that `f1:LABEL` counts is no row's: every program would score 0.

    Raises:
        ConfigError: With the labels there are.
    """
    family, _, label = metric.name.partition(":")
    found = sorted({text_of(row, output) for row in rows}) if family == "f1" and label and output else []
    if found and folded(label) not in map(folded, found):
        raise ConfigError(f"The metric {metric.name} counts a label that no row has; they have: {_listed(found)}.")


def warn(
    metric: Metric, student: dspy.Module, train: Sequence[dspy.Example], rows: Sequence[dspy.Example], output: str
) -> None:
    """Log what is no mistake, but may be none of what was meant.

    Args:
        metric: To confirm by.
        student: The program.
        train: Rows to search on.
        rows: To confirm on.
        output: The field that is compared.
    """
    _warn_of_one_label(metric, rows, output)
    _warn_of_unseen_labels(metric, train, rows, output)
    _warn_of_other_labels(metric, student, rows, output)


def _warn_of_one_label(metric: Metric, rows: Sequence[dspy.Example], output: str) -> None:
    """Log a warning if all rows to confirm on have one label: always answering it would be right on all of them."""
    found = {folded(text_of(row, output)) for row in rows} if metric.compares_labels and output else set[str]()
    if len(found) == 1:
        logger.warning(
            "All %d rows to confirm on have the label %r. A program that always answers it is right on all of them, "
            "so a gain would mean nothing. Give rows of other labels, too.",
            len(rows),
            text_of(rows[0], output),
        )


def _warn_of_unseen_labels(
    metric: Metric, train: Sequence[dspy.Example], rows: Sequence[dspy.Example], output: str
) -> None:
    """Log a warning if macro F1, in which each label weighs the same, is confirmed without any row of some label."""
    if metric.is_built_in and metric.name == "macro_f1":
        seen = {folded(text_of(row, output)) for row in rows}
        unseen = sorted({folded(text_of(row, output)) for row in train} - seen)
        if unseen:
            logger.warning(
                "No row to confirm on has the label %s. What a program loses there doesn't count in macro F1, so a "
                "gain may be none. Give rows of every label.",
                " or ".join(map(repr, unseen)),
            )


def _warn_of_other_labels(metric: Metric, student: dspy.Module, rows: Sequence[dspy.Example], output: str) -> None:
    """Log a warning if the rows hold labels of further outputs: a built-in metric compares one."""
    outputs: Mapping[str, Any] = predictors(student)[-1][1].signature.output_fields
    others = [name for name in outputs if name != output and name in rows[0].labels()]
    if metric.is_built_in and others:
        logger.warning(
            "%s compares %r; what the program says for %s counts nowhere. To score several fields together give a "
            "metric of your own: on the command line --metric FILE.py:NAME.",
            metric.name,
            output,
            " and ".join(map(repr, others)),
        )


def check_present(metric: Metric, rows: Sequence[dspy.Example], output: str, name: str) -> None:
    """Raise if a row lacks the label that a built-in metric compares answers with; one that is None or blank is given.

    Raises:
        DataError: Naming the row.
    """
    for number, row in enumerate(rows if metric.is_built_in else (), 1):
        if not output or output not in row:
            wanted = f"the label {output!r}" if output else "its label"
            raise DataError(f"{name}, row {number}: {wanted} is missing; its labels are {list(row.labels())}.")


def check_labels(metric: Metric, student: dspy.Module, rows: Sequence[dspy.Example], output: str, name: str) -> None:
    """Raise if a row's label is none that the signature names, where labels are compared: no answer could be right.

    What a `forward` of the user's own makes of the predictor's label isn't known, and so let through.

    Raises:
        DataError: Naming the row.
    """
    field = predictors(student)[-1][1].signature.output_fields.get(output)
    known = labels_of(field.annotation) if field is not None else ()
    is_own = type(student).__module__.partition(".")[0] not in ("dspy", "preceptor")
    if not known or is_own or not metric.compares_labels:
        return
    accepted = set(map(folded, known))
    for number, row in enumerate(rows, 1):
        given = text_of(row, output)
        if given and folded(given) not in accepted:
            raise DataError(f"{name}, row {number}, {output}: {given!r} is no label; expected one of {_listed(known)}.")


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:_SHOWN]) + (", ..." if len(labels) > _SHOWN else "")


class _AsksModel(Exception):
    """A metric under trial asked a language model."""


class _Refusing:
    """The engine of a model nobody may ask."""

    def complete(self, request: Any) -> Any:
        raise _AsksModel

    @staticmethod
    def was_asked(error: BaseException | None) -> bool:
        while error is not None:
            if isinstance(error, _AsksModel):
                return True
            error = error.__cause__
        return False
