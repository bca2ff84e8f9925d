"""What the endpoints answer, as the OpenAPI document describes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic_core import to_json

from preceptor.serving.model import Tally
from preceptor.serving.service import Answer, Served

_SAYS: Final[Mapping[int, str]] = {
    400: "The request is no JSON.",
    401: "No token, or a wrong one.",
    404: "No such model, or no experts to choose from.",
    408: "The request took too long to arrive.",
    409: "The program on disk isn't good; the served one stays.",
    413: "The request, or an input, is too large.",
    415: "The request isn't JSON.",
    421: "The server was called by a name that isn't its own.",
    422: "A field is missing, unknown or of another type.",
    429: "Too many requests are waiting; Retry-After says when to come again.",
    502: "The model failed.",
    503: "The server isn't ready.",
    504: "The answer took too long.",
}


class Problem(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str


class Refusal(BaseModel):
    """The body of every answer whose status isn't 200."""

    error: Problem


class Usage(BaseModel):
    """What was asked of the model."""

    calls: int
    input_tokens: int
    output_tokens: int
    dollars: float | None = Field(description="None where the model's price isn't known.")


class Route(BaseModel):
    """Who answered, of several experts."""

    model_config = ConfigDict(extra="allow")

    expert: str = Field(description="Who answered: a region's own expert, or default.")
    region: str = Field(description="Where the input is; empty beyond the radius.")
    nearest: str = Field(description="The region of the nearest centroid.")
    distance: float = Field(description="1 - cosine to the nearest centroid, in [0, 2].")


class Place(BaseModel):
    """Where an input is among the regions."""

    expert: str
    region: str
    nearest: str
    distance: float
    radius: float = Field(description="Beyond it the default answers.")
    distances: dict[str, float] = Field(description="Region -> 1 - cosine to its centroid.")
    experts: dict[str, str] = Field(description="Region -> who answers there.")


def answer_model(program: Served) -> type[BaseModel]:
    """Return the model of the answer to one row."""
    return create_model(
        "Answer",
        answer=(program.outputs, Field(description="The program's outputs.")),
        route=(Route | None, Field(description="Who answered, of several experts.")),
        logprobs=(dict[str, float] | None, Field(description="Label -> log P, where the model tells.")),
        truncated=(bool, Field(description="True if the model was cut off at its most tokens.")),
        usage=(Usage, ...),
        seconds=(float, ...),
        program=(str, Field(description="First digits of the program's SHA-256.")),
    )


def told(answer: Answer) -> dict[str, Any]:
    """Return an answer as it is sent."""
    return {
        "answer": answer.outputs,
        "route": answer.route,
        "logprobs": answer.logprobs,
        "truncated": answer.tally.was_cut,
        "usage": used(answer.tally),
        "seconds": answer.seconds,
        "program": answer.digest,
    }


def used(tally: Tally) -> dict[str, Any]:
    """Return what was asked of the model, as it is sent."""
    return {
        "calls": tally.calls,
        "input_tokens": tally.input_tokens,
        "output_tokens": tally.output_tokens,
        "dollars": tally.dollars,
    }


def said(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the refusals that an endpoint may answer with."""
    return {status: {"model": Refusal, "description": _SAYS.get(status, "Not allowed.")} for status in statuses}


def written(value: Any) -> bytes:
    """Return JSON of values of any kind; numbers that JSON doesn't know are null, halves of characters escaped."""
    try:
        return to_json(value, inf_nan_mode="null", fallback=str)
    except ValueError:  # half a character, which a model may write
        return json.dumps(value, default=str).encode()
