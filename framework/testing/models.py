"""Stand-ins for language models, in this process.

They are engines behind a real `dspy.LM`: adapters, metering, ledger and threads are the real ones. What
they answer depends on the request only, so that a run is the same with any number of threads and after
it was resumed; `scripted` alone answers in order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import dspy
from dspy.lm15 import Message, Request, Response, TextPart, Usage

from preceptor.errors import ConfigError, DataError
from preceptor.lm.seam import InThread, text_of_parts
from preceptor.lm.soft import EmbeddingSpace, soft_tokens
from preceptor.testing.draws import draw, number, uniform


class Simulated:
    """An engine that answers by a function; safe to share between threads.

    It takes soft tokens too, as a model in this process does. A proposal's request seed is drawn from
    them (`Task.propose_from`), so a function of the seed is one of the embeddings, as `coin_flip` and
    `graded` are; `preceptor.lm.soft.soft_tokens(request)` returns the embeddings themselves.

    Attributes:
        requests: What it was asked, in order.
        supported_params: The settings of a request that reach the function.
        embedding_space: What soft tokens for it have to look like.
    """

    supported_params: Final = frozenset({"temperature", "top_p", "max_tokens", "stop", "seed"})
    embedding_space: Final = EmbeddingSpace(width=8, norm=1.0)

    def __init__(self, answer: Callable[[Request], str], name: str, latency: float = 0.0) -> None:
        self._answer = answer
        self._name = name
        self._latency = latency
        self._lock = threading.Lock()
        self.requests: list[Request] = []

    def __deepcopy__(self, memo: dict[int, object]) -> Simulated:
        return self

    def complete(self, request: Request) -> Response:
        """Answer one request; tokens are counted as words, and soft tokens as one each."""
        with self._lock:
            self.requests.append(request)
        if self._latency:
            time.sleep(self._latency)
        text = self._answer(request)
        words = sum(len((message.text or "").split()) for message in request.messages) + len(system(request).split())
        words += len(soft_tokens(request))
        return Response(
            id=None,
            model=self._name,
            message=Message.assistant([TextPart(text)]),
            finish_reason="stop",
            usage=Usage(input_tokens=words, output_tokens=len(text.split())),
        )


def simulated(answer: Callable[[Request], str], *, name: str = "model", latency: float = 0.0) -> dspy.LM:
    """Return a `dspy.LM` that answers by a function of the request.

    Args:
        answer: Makes the answer's text.
        name: Told apart from other models by it, in the ledger too.
        latency: Seconds each answer takes at least.

    Example:
        >>> lm = simulated(lambda request: prompt(request).upper())
        >>> lm("hello")
        ['HELLO']
    """
    full = f"simulated/{name}"
    engine = Simulated(answer, full, latency)
    settings: dict[str, Any] = {"cache": False, "num_retries": 0, "temperature": 0.0, "max_tokens": 64}
    return dspy.LM(full, engine=engine, async_engine=InThread(engine), **settings)


def scripted(answers: Sequence[str], *, name: str = "script") -> dspy.LM:
    """Return a `dspy.LM` that answers from a list, in order, and fails when asked once too often.

    Example:
        >>> lm = scripted(["yes"])
        >>> lm("Sure?"), len(asked(lm))
        (['yes'], 1)
    """
    left = iter(answers)

    def answer(request: Request) -> str:
        try:
            return next(left)
        except StopIteration:
            raise AssertionError(
                f"{len(answers)} answers scripted, asked once more: {prompt(request)[:80]!r}"
            ) from None

    return simulated(answer, name=name)


def coin_flip(labels: Sequence[str], *, seed: int = 0) -> dspy.LM:
    """Return a `dspy.LM` whose answers have nothing to do with the labels: no instruction can help.

    Each answer is drawn evenly by a hash of `seed`, the messages and the request's own seed, so equal
    requests are answered equally. Asked to write an instruction (a request without system message), it
    writes one that no other request gets.

    Example:
        >>> lm = coin_flip(["heads", "tails"])
        >>> lm("Write an instruction.", seed=1), lm("Write an instruction.", seed=2)
        (['Decide by rule 25cac894.'], ['Decide by rule 95bd4f73.'])
    """

    def answer(request: Request) -> str:
        said = [[message.role, message.text] for message in request.messages]
        drawn = draw(seed, system(request), said, request.config.seed)
        return labels[number(drawn) % len(labels)] if system(request) else f"Decide by rule {drawn.hex()[:8]}."

    return simulated(answer, name=f"coin-{seed}")


def graded(
    truth: Mapping[str, str],
    accuracy: Mapping[str, float],
    *,
    proposals: Sequence[str] = (),
    default: float = 0.5,
    agreement: float = 0.5,
    seed: int = 0,
    name: str = "graded",
) -> dspy.LM:
    """Return a `dspy.LM` whose true accuracy under each instruction is known.

    It is right about a row if the row's luck, uniform in [0, 1), is below the accuracy of the
    instruction; else it answers with one of the other labels, evenly. Luck and wrong answers are drawn by
    hashes. Asked to write an instruction (a request without system message), it writes one of
    `proposals`, evenly, by a hash of `seed`, the prompt and the request's own seed.

    Args:
        truth: Input text -> right answer. An input text is the last message, or what follows its first
            `name: `, as the direct adapter renders a program with one input field.
        accuracy: Instruction -> true accuracy in [0, 1]. The longest one found in the system message counts.
        proposals: Instructions to propose; by default those of `accuracy`.
        default: Accuracy under any other system message, in [0, 1].
        agreement: Share of rows, in [0, 1], whose luck is the same under every instruction; the others'
            luck is drawn anew for each system message. At 1, a better instruction is right wherever a
            worse one is; at 0, they are right independently of each other.
        seed: Of all draws.
        name: Told apart from other models by it, in the ledger too.

    Raises:
        ConfigError: If fewer than two answers are distinct, a share is outside [0, 1], or there is nothing to propose.

    Example:
        >>> lm = graded({"good day": "yes", "bad day": "no"}, {"Judge it.": 1.0, "Misjudge it.": 0.0})
        >>> asked_for = [Message.user("text: good day")]
        >>> for instruction in ("Judge it.", "Misjudge it."):
        ...     print(lm(Request(model=lm.model, system=instruction, messages=tuple(asked_for))).message.text)
        yes
        no
    """
    labels = sorted(set(truth.values()))
    proposed = list(proposals) or list(accuracy)
    _refuse_ungradable(labels, proposed, [*accuracy.items(), ("default", default), ("agreement", agreement)])

    def answer(request: Request) -> str:
        told = system(request)
        if not told:
            return proposed[number(draw(seed, prompt(request), request.config.seed)) % len(proposed)]
        row = _row(truth, prompt(request))
        is_shared = uniform(draw(seed, "agreement", row)) < agreement
        luck = draw(seed, "luck", row) if is_shared else draw(seed, "luck", row, told)
        known = [instruction for instruction in accuracy if instruction in told]
        if uniform(luck) < (accuracy[max(known, key=len)] if known else default):
            return truth[row]
        wrong = [label for label in labels if label != truth[row]]
        return wrong[number(luck[8:]) % len(wrong)]

    return simulated(answer, name=name)


def asked(lm: dspy.LM) -> list[Request]:
    """Return the requests a simulated model was asked, in order."""
    engine = lm.engine
    assert isinstance(engine, Simulated), "asked() is for the models of preceptor.testing"
    return engine.requests


def prompt(request: Request) -> str:
    """Return a request's last message."""
    return request.messages[-1].text or ""


def system(request: Request) -> str:
    """Return a request's system message, "" if it has none."""
    return text_of_parts(request.system)


def _refuse_ungradable(labels: list[str], proposed: list[str], shares: list[tuple[str, float]]) -> None:
    if len(labels) < 2:
        raise ConfigError(f"graded() needs at least 2 distinct answers in truth, got {labels}.")
    if not proposed:
        raise ConfigError("graded() has nothing to propose: give it proposals, or instructions in accuracy.")
    for name, share in shares:
        if not 0 <= share <= 1:
            raise ConfigError(f"graded() needs a share in [0, 1] for {name!r}, got {share}.")


def _row(truth: Mapping[str, str], message: str) -> str:
    """Return the input text that a message holds."""
    for text in (message, message.partition(": ")[2]):
        if text in truth:
            return text
    raise DataError(
        f"graded() knows no answer for {message[:80]!r}: neither this message nor what follows its first ': ' "
        f"is one of the {len(truth)} texts of truth, the first of which is {next(iter(truth))[:80]!r}."
    )
