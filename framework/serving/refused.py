"""What a server answers when it doesn't answer: a status and one JSON message, in the form OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import dspy
from dspy.utils.exceptions import AdapterParseError, LMRateLimitError, LMTimeoutError

from preceptor.errors import InputTooLong, ParseError
from preceptor.lm.dispatch import hide_secrets, reason

TYPES: Final[Mapping[int, str]] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "model_error",
    503: "unavailable_error",
    504: "timeout_error",
}
"""Status -> the `type` of its error; 500 would be a fault of the server itself."""


class Refused(Exception):
    """A request that isn't answered.

    Attributes:
        status: Of HTTP.
        message: For whoever asked; it holds no secret.
        code: What went wrong, for programs: a word of a small fixed set.
        param: The part of the request that is wrong, None if it is all of it.
        headers: Beside the message.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refusal(error: Exception, lm: dspy.LM, seconds: float) -> Refused:
    """Return what a failed answer is to whoever asked.

    Args:
        error: What the program raised.
        lm: Its model, whose key and address are left out of the message.
        seconds: How long a request may take.
    """
    if isinstance(error, Refused):
        return error
    if isinstance(error, TimeoutError | LMTimeoutError):
        return Refused(504, f"No answer within {seconds:g} seconds.", "timeout")
    known = _known(error)
    if known is not None:
        return known
    if isinstance(error, dspy.LMError):
        headers = _retry_after(error)
        return Refused(502, f"The model failed. {reason(hide_secrets(error, lm))}.", "model_failed", headers=headers)
    return Refused(502, f"The program failed with {type(error).__name__}.", "program_failed")


def _known(error: Exception) -> Refused | None:
    too_long = next((each for each in (error, error.__cause__) if isinstance(each, InputTooLong)), None)
    if too_long is not None:
        return Refused(413, str(too_long), "input_too_long")
    if isinstance(error, AdapterParseError | ParseError):
        return Refused(502, "The model's answer can't be read as the program's output.", "unreadable_answer")
    return None


def _retry_after(error: dspy.LMError) -> dict[str, str]:
    asked = getattr(error, "retry_after", None)
    if isinstance(error, LMRateLimitError) and isinstance(asked, int | float):
        return {"Retry-After": str(max(1, round(asked)))}
    return {}
