"""The direct adapter: instructions are the system message, fields the user's, the reply is the answer.

Small models lose answers to field markers; here there are none. A `Literal` output
is passed to the engine as choices where the engine takes them, and listed in the system message in
any case. Several or nested outputs go through DSPy's JSON adapter.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final, Literal, TypeVar, Union, cast, get_args, get_origin

import dspy
from dspy.adapters.utils import format_field_value, parse_value
from dspy.clients.backend_selection import CLIENT_KEYS
from dspy.lm15 import Message, Request, Response, request_from_openai_chat
from dspy.utils.exceptions import AdapterParseError

from preceptor.lm.ledger import rollout
from preceptor.lm.seam import said

Signature = type[dspy.Signature]
T = TypeVar("T")

_PLAIN: Final = (str, int, float, bool)
_AS_IT_IS: Final = (str, int, float, type(None))
"""Values that are text in a message, with nothing for DSPy to take apart."""

_REMEMBERED: Final = 256
"""Signatures and settings; each candidate of a search has a signature of its own."""

_PRIVILEGED: Final = {"signature", "new_signature", "demos", "config", "lm", "prediction", "_trace"}
"""What `dspy.Predict` takes for itself."""

_NOT_SENT: Final = CLIENT_KEYS | {"n", "rollout_id", "num_generations", "cache", "prompt_cache"}


class DirectAdapter(dspy.Adapter):
    """Renders a signature without field markers and parses the bare reply.

    Example:
        >>> signature = dspy.Signature("text -> label: Literal['good', 'bad']", "Judge the review.")
        >>> for message in DirectAdapter().format(signature, [], {"text": "Lovely."}):
        ...     print(f"{message['role']}: {message['content']}")
        system: Judge the review.
        <BLANKLINE>
        Answer with exactly one of: good, bad.
        user: text: Lovely.
        >>> DirectAdapter().parse(signature, " Good.")
        {'label': 'good'}
    """

    def __call__(
        self,
        lm: dspy.BaseLM,
        lm_kwargs: dict[str, Any],
        signature: Signature,
        demos: list[dict[str, Any]],
        inputs: dict[str, Any],
    ) -> list[dict[str, Any]]:
        """Ask and parse; one call, whatever the answer."""
        answers: list[dict[str, Any]]
        if is_direct(signature) and (takes_choices(lm, signature) or _takes_requests(lm, lm_kwargs)):
            with rollout(lm_kwargs.get("rollout_id", lm.kwargs.get("rollout_id"))):
                response = _ask(lm, self.request(lm, lm_kwargs, signature, demos, inputs))
            return [self._answered(signature, response)]
        asking = super().__call__ if is_direct(signature) else dspy.JSONAdapter().__call__
        answers = asking(lm, lm_kwargs, signature, demos, inputs)
        return answers

    async def acall(
        self,
        lm: dspy.BaseLM,
        lm_kwargs: dict[str, Any],
        signature: Signature,
        demos: list[dict[str, Any]],
        inputs: dict[str, Any],
    ) -> list[dict[str, Any]]:
        """Ask and parse without blocking the event loop."""
        answers: list[dict[str, Any]]
        if is_direct(signature) and (takes_choices(lm, signature) or _takes_requests(lm, lm_kwargs)):
            with rollout(lm_kwargs.get("rollout_id", lm.kwargs.get("rollout_id"))):
                response = await lm.acall(self.request(lm, lm_kwargs, signature, demos, inputs))
            return [self._answered(signature, cast("Response", response))]
        asking = super().acall if is_direct(signature) else dspy.JSONAdapter().acall
        answers = await asking(lm, lm_kwargs, signature, demos, inputs)
        return answers

    def request(
        self,
        lm: dspy.BaseLM,
        lm_kwargs: Mapping[str, Any],
        signature: Signature,
        demos: list[dict[str, Any]],
        inputs: dict[str, Any],
        answers: list[str] | None = None,
    ) -> Request:
        """Return the request that asks for one of `answers`.

        By default they are the signature's choices, where the model takes any. A setting of None is none: the
        model's own stands.
        """
        given = {name: value for name, value in lm_kwargs.items() if value is not None}
        settings = {
            name: value for name, value in {**lm.kwargs, **given}.items() if name not in _NOT_SENT and value is not None
        }
        asking = None if demos else _begun(lm.model, settings)
        if asking is not None and all(isinstance(value, _AS_IT_IS) for value in inputs.values()):
            told = self.format_system_message(signature)
            message = Message.user(self.format_user_message_content(signature, inputs))
            request = dataclasses.replace(asking, system=told or None, messages=(message,))
        else:
            messages = self.format(signature, demos, inputs)
            request = request_from_openai_chat({"model": lm.model, "messages": messages, **settings})
        if answers is None:
            answers = list(choices(signature)) if takes_choices(lm, signature) else []
        if not answers:
            return request
        return dataclasses.replace(request, config=dataclasses.replace(request.config, extensions={"choices": answers}))

    def _answered(self, signature: Signature, response: Response) -> dict[str, Any]:
        value = self.parse(signature, said(response.message))
        top = response.logprobs[0].top if response.logprobs else ()
        return {**value, "logprobs": {choice.token: choice.logprob for choice in top}} if top else value

    def format_system_message(self, signature: Signature) -> str:
        """Return the instructions, and the labels where there are any."""
        options = choices(signature)
        listed = f"\n\nAnswer with exactly one of: {', '.join(options)}." if options else ""
        return f"{signature.instructions}{listed}"

    def format_user_message_content(
        self,
        signature: Signature,
        inputs: dict[str, Any],
        prefix: str = "",
        suffix: str = "",
        main_request: bool = False,
    ) -> str:
        """Return one `name: value` line per input field."""
        given = [(name, field) for name, field in signature.input_fields.items() if inputs.get(name) is not None]
        lines = [f"{name}: {_text(field, inputs[name])}" for name, field in given]
        return "\n".join(part for part in (prefix, *lines, suffix) if part)

    def format_assistant_message_content(
        self, signature: Signature, outputs: dict[str, Any], missing_field_message: str | None = None
    ) -> str:
        """Return the bare answer of a demonstration."""
        name = output_name(signature)
        return str(format_field_value(signature.output_fields[name], outputs.get(name, missing_field_message or "")))

    def parse(self, signature: Signature, completion: str) -> dict[str, Any]:
        """Read the reply as the output field's type.

        Raises:
            AdapterParseError: If it can't be read so.
        """
        name = output_name(signature)
        annotation, text = signature.output_fields[name].annotation, completion.strip()
        try:
            options = _options(annotation)
            value = _chosen(options, annotation, text) if options else _value(text, annotation)
        except (ValueError, TypeError) as error:
            raise AdapterParseError(
                adapter_name=type(self).__name__,
                signature=cast("Any", signature),
                lm_response=completion,
                message=str(error),
            ) from error
        return {name: value}


def predicted(predict: dspy.Predict, inputs: dict[str, Any]) -> dspy.Prediction:
    """Return `predict(**inputs)` under the direct adapter.

    In an evaluation nobody listens, streams or keeps a history: what DSPy's `Predict` does for them is left out
    there. The trace is kept either way.
    """
    lm: Any = predict.lm or dspy.settings.lm
    adapter, signature = DirectAdapter(), cast("Signature", predict.signature)
    if not _is_plain(predict, lm, inputs):
        with dspy.context(adapter=adapter):
            return predict(**inputs)
    return _traced(predict, inputs, adapter(lm, dict(predict.config), signature, predict.demos, inputs))


async def apredicted(predict: dspy.Predict, inputs: dict[str, Any]) -> dspy.Prediction:
    """Return what `predicted` does, without blocking the event loop."""
    lm: Any = predict.lm or dspy.settings.lm
    adapter, signature = DirectAdapter(), cast("Signature", predict.signature)
    if not _is_plain(predict, lm, inputs):
        with dspy.context(adapter=adapter):
            return await predict.acall(**inputs)
    return _traced(predict, inputs, await adapter.acall(lm, dict(predict.config), signature, predict.demos, inputs))


def _traced(predict: dspy.Predict, inputs: dict[str, Any], answers: list[dict[str, Any]]) -> dspy.Prediction:
    prediction = dspy.Prediction.from_completions(answers, signature=cast("Signature", predict.signature))
    trace, most = dspy.settings.trace, dspy.settings.max_trace_size
    if trace is not None and most > 0:
        if len(trace) >= most:
            trace.pop(0)
        trace.append((predict, dict(inputs), prediction))
    return prediction


def _is_plain(predict: dspy.Predict, lm: Any, inputs: Mapping[str, Any]) -> bool:
    """Return True if DSPy would find nothing to warn of, to fill in or to tell anybody."""
    if type(predict) is not dspy.Predict or lm is None or not _takes_requests(lm, predict.config):
        return False
    if _is_watched(lm) or predict.callbacks or dspy.settings.track_usage:
        return False
    fields = _texts(cast("Signature", predict.signature))
    return fields is not None and fields == frozenset(inputs) and all(type(value) is str for value in inputs.values())


def _remembered(function: Callable[[Signature], T]) -> Callable[[Signature], T]:
    """Ask a signature once, of the last few hundred: DSPy makes its fields anew each time they are read."""
    return cast("Callable[[Signature], T]", lru_cache(_REMEMBERED)(function))


def declare(signature: Any, instructions: str | None = None) -> Signature:
    """Return a signature from its text or class, with other instructions where they are given."""
    declared: Any = dspy.ensure_signature(signature)
    return cast("Signature", declared if instructions is None else declared.with_instructions(instructions))


@_remembered
def _texts(signature: Signature) -> frozenset[str] | None:
    """Return the names of the inputs if all are plain text and the answer is direct, else None."""
    fields = signature.input_fields
    is_text = all(field.annotation is str and name not in _PRIVILEGED for name, field in fields.items())
    return frozenset(fields) if is_text and is_direct(signature) else None


@_remembered
def output_name(signature: Signature) -> str:
    """Return the name of the only output field."""
    [name] = signature.output_fields
    return str(name)


def labels_of(annotation: Any) -> tuple[str, ...]:
    """Return the texts that a field of this type may hold, empty if it is free."""
    return tuple(_options(annotation))


@_remembered
def is_direct(signature: Signature) -> bool:
    """Return True if the bare reply can be the answer: one output that is text, a number or a choice."""
    if len(signature.output_fields) != 1:
        return False
    annotation = signature.output_fields[output_name(signature)].annotation
    return bare(annotation) in _PLAIN or bool(_options(annotation))


@_remembered
def choices(signature: Signature) -> tuple[str, ...]:
    """Return the texts the only output may take, empty if it is free; `None` is one where the type allows it."""
    return tuple(_options(signature.output_fields[output_name(signature)].annotation))


def takes_choices(lm: dspy.BaseLM, signature: Signature) -> bool:
    """Return True if this model's engine can be handed this signature's choices."""
    return bool(getattr(getattr(lm, "engine", None), "supports_choices", False)) and bool(choices(signature))


def _ask(lm: dspy.BaseLM, request: Request) -> Response:
    """Ask a metered model at once where nobody listens to its calls: DSPy's own way there takes half as long again."""
    if _takes_requests(lm, {}) and not _is_watched(lm):
        return cast("Response", cast("Any", lm).engine.complete(request))
    return cast("Response", lm(request))


def _is_watched(lm: dspy.BaseLM) -> bool:
    settings: Any = dspy.settings
    listeners = settings.callbacks, lm.callbacks, settings.usage_tracker, settings.send_stream
    return any(listeners) or not settings.disable_history


def _takes_requests(lm: dspy.BaseLM, lm_kwargs: Mapping[str, Any]) -> bool:
    """Return True if a request can be sent as it is, for one answer: DSPy's own way there takes twice as long."""
    is_metered = bool(getattr(getattr(lm, "engine", None), "takes_requests", False))
    return is_metered and not ({"n", "tools", "functions"} & lm_kwargs.keys())


def _begun(model: str, settings: Mapping[str, Any]) -> Request | None:
    """Return a request with these settings and nothing to say yet; None if a setting isn't JSON."""
    try:
        return _asking(model, **settings)
    except TypeError:  # a list can't be remembered as it is
        pass
    try:
        return _asked_in_json(model, json.dumps(settings))
    except TypeError:
        return None


@lru_cache(_REMEMBERED, typed=True)  # 0 and 0.0 are different requests
def _asking(model: str, /, **settings: Any) -> Request:
    return request_from_openai_chat({"model": model, "messages": [{"role": "user", "content": "-"}], **settings})


@lru_cache(_REMEMBERED)
def _asked_in_json(model: str, settings: str) -> Request:
    said = [{"role": "user", "content": "-"}]
    return request_from_openai_chat({"model": model, "messages": said, **json.loads(settings)})


def _text(field: Any, value: Any) -> str:
    return value if isinstance(value, str) else str(format_field_value(field, value))


def takes_none(annotation: Any) -> bool:
    """Return True for `X | None`."""
    return get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation)


def bare(annotation: Any) -> Any:
    """Return X for `X | None`."""
    if takes_none(annotation):
        inner = [arg for arg in get_args(annotation) if arg is not type(None)]
        return inner[0] if len(inner) == 1 else annotation
    return annotation


def _options(annotation: Any) -> dict[str, Any]:
    """Return the values a type is made of by their texts, empty if it is free."""
    inner = bare(annotation)
    values: dict[str, Any] = {}
    if inner is bool:
        values = {"True": True, "False": False}
    elif isinstance(inner, enum.EnumMeta):
        values = {str(member.value): member for member in cast("Any", inner)}
    elif get_origin(inner) is Literal:
        values = {str(value): value for value in get_args(inner)}
    return {**values, "None": None} if values and takes_none(annotation) else values


def _chosen(options: Mapping[str, Any], annotation: Any, text: str) -> Any:
    inner = bare(annotation)
    if isinstance(inner, enum.EnumMeta) and text in inner.__members__ and text not in options:
        return inner.__members__[text]
    return options[_option(tuple(options), text)]


def _option(options: tuple[str, ...], text: str) -> str:
    """Return the option a reply names: exactly, or but for case, quotes, a final stop or a 'label:' before it."""
    if text in options:
        return text
    folded = {_folded(option): option for option in options}
    first = text.splitlines()[0] if text else ""
    for reply in (text, first, first.rpartition(":")[2]):
        bare = _folded(reply)
        if bare and bare in folded:
            return folded[bare]
    raise ValueError(f"The reply is none of {', '.join(options)}.")


def _folded(text: str) -> str:
    return text.strip().strip("\"'`*.").strip().casefold()


def _value(text: str, annotation: Any) -> Any:
    if not text:
        raise ValueError("The reply is empty.")
    if takes_none(annotation) and _folded(text) in ("none", "null"):
        return None
    return text if bare(annotation) is str else parse_value(text.replace(",", "").rstrip("."), annotation)
