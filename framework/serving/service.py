"""The service: one program that answers, the one that takes its place, and the one that runs in its shadow."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import logging
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import dspy
from pydantic import BaseModel

from preceptor import program as artifacts
from preceptor import routed
from preceptor.checks import check_models
from preceptor.errors import ArtifactError, PreceptorError
from preceptor.lm.adapter import bare, is_direct, output_name
from preceptor.lm.seam import predictors
from preceptor.serving import fields
from preceptor.serving.gate import Gate
from preceptor.serving.model import Counted, Tally, counting, serve_own_models, served
from preceptor.serving.refused import Refused, refusal
from preceptor.serving.settings import Limits
from preceptor.serving.watch import Metrics, note, place_of, since
from preceptor.untrusted import Malformed, content

_SHADOWS: Final = 8
"""Rows the shadow answers at a time; further ones are left out, so that it never holds up the served program."""

_SPARE_THREADS: Final = 16
_OURS: Final = ("classify", "generate", "dspy.Predict", "dspy.ChainOfThought")


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """A program that was read, checked and warmed up.

    Attributes:
        name: Of its folder, or of the link to it that was given.
        digest: First twelve digits of the SHA-256 of its manifest.
        artifact: What was read.
        program: Ready to call.
        lm: Counts and bounds its calls.
        inputs: What it takes.
        outputs: What it answers.
        awaits: True if it can be awaited; else it runs in a thread.
        names: Of its outputs.
        is_open: True if it may answer with others, too.
    """

    name: str
    digest: str
    artifact: artifacts.Artifact
    program: Any
    lm: dspy.LM
    inputs: type[BaseModel]
    outputs: type[BaseModel]
    awaits: bool
    names: tuple[str, ...]
    is_open: bool

    @property
    def is_routed(self) -> bool:
        """True if it has several experts."""
        return self.artifact.is_routed

    @property
    def model(self) -> dspy.LM:
        """The model itself, which knows its key and address."""
        return cast("Counted", self.lm.engine).lm

    @property
    def writes_text(self) -> bool:
        """True if the model's reply, as it is written, is the answer."""
        module = self.artifact.program["experts"]["student"] if self.is_routed else self.artifact.program["module"]
        signature = predictors(self.program)[-1][1].signature
        return (
            module == "generate"
            and is_direct(signature)
            and bare(signature.output_fields[output_name(signature)].annotation) is str
        )


@dataclass(slots=True)
class Source:
    """Where a program is loaded from, again and again.

    Attributes:
        path: The artifact's folder.
        lm: Makes a model of the name that the artifact holds.
        load: Makes a program of the folder.
        models: Made so far, by name; programs with the same model share it.
    """

    path: str | Path
    lm: Callable[[str], dspy.LM]
    load: Callable[[Path], dspy.Module] = artifacts.load
    models: dict[str, dspy.LM] = field(default_factory=dict[str, dspy.LM])

    def served(self, max_tokens: int) -> Served:
        """Return the program as it is on disk now; takes as long as loading its model, the first time.

        Raises:
            PreceptorError: If it is bad, or was replaced while it was read.
        """
        path = Path(self.path)
        before = _digest(path)
        saved = artifacts.read(path)
        program: Any = self.load(path)
        check_models(program)
        serve_own_models(program, max_tokens)
        name = str(saved.program["lm"])
        if name not in self.models:
            self.models[name] = served(self.lm(name), max_tokens)
        if saved.is_routed:
            program.router.refuse_another_embedder()
        is_own = str(saved.program["experts"]["student"] if saved.is_routed else saved.program["module"]) not in _OURS
        taken, answers = fields.inputs_of(program), fields.outputs_of(program, is_own_class=is_own)
        if _digest(path) != before:
            raise ArtifactError(f"{path} was replaced while it was read; load it again.")
        parts = routed.parts_of(program, is_routed=saved.is_routed).values()
        awaits = all(is_awaited(type(part)) for part in parts)
        return Served(
            _name(path),
            before,
            saved,
            program,
            self.models[name],
            taken,
            answers,
            awaits,
            tuple(answers.model_fields),
            any(map(fields.is_open, parts)),
        )


def is_awaited(kind: type) -> bool:
    """Return True if awaiting a module does what calling it does: no subclass overrides `forward` alone."""
    aforward = getattr(kind, "aforward", None)
    first: Mapping[str, Any] = next(
        (vars(each) for each in kind.__mro__ if {"aforward", "forward"} & vars(each).keys()), {}
    )
    return inspect.iscoroutinefunction(aforward) and "aforward" in first


def _name(path: Path) -> str:
    """Return what clients call a program: a link's own name, which stays when the link is switched."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def _digest(path: Path) -> str:
    """Return what tells one version of an artifact from another; "" where there is none to be read."""
    try:
        return hashlib.sha256(content(path / "manifest.json")).hexdigest()[:12]
    except (OSError, Malformed):  # of which reading the artifact tells
        return ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program made of one row.

    Attributes:
        outputs: Field -> value.
        route: Who answered and why, None where there is one prompt for all inputs.
        logprobs: Label -> log P, None where the model doesn't tell.
        tally: What was asked of the model.
        seconds: From the row's turn to its answer.
        digest: Of the program.
    """

    outputs: Mapping[str, Any]
    route: Mapping[str, Any] | None
    logprobs: Mapping[str, float] | None
    tally: Tally
    seconds: float
    digest: str


class Service:
    """Answers rows with one program at a time, and can change it for another.

    Args:
        source: Of the program.
        limits: What is taken on.
        shadow: Of a second program that answers a sample of rows too; whoever asks never sees it.
        share: Of the rows the shadow answers, in [0, 1].
        logs_inputs: True if inputs and answers are logged with each request.
        rng: Draws that sample.

    Raises:
        PreceptorError: If a program can't be loaded, or the shadow has other fields.
    """

    def __init__(
        self,
        source: Source,
        limits: Limits | None = None,
        *,
        shadow: Source | None = None,
        share: float = 0.1,
        logs_inputs: bool = False,
        rng: random.Random | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.source = source
        self.current = source.served(self.limits.output_tokens)
        self.shadow = shadow.served(self.limits.output_tokens) if shadow else None
        if self.shadow is not None:
            _refuse_other_fields(self.current, self.shadow)
        self.gate = Gate(self.limits.concurrency, self.limits.queue)
        self.is_ready = False
        self._logs_inputs = logs_inputs
        self._share = share
        self._rng = rng or random.Random()
        self._behind: set[asyncio.Task[None]] = set()
        self._reloading = asyncio.Lock()
        self.metrics.program.labels(self.current.digest, self.current.name).set(1)

    def start(self) -> None:
        """Take requests; called in the event loop."""
        threads = self.limits.concurrency + _SPARE_THREADS
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads, "serving"))
        self.is_ready = True
        self.metrics.ready.set(1)

    def drain(self) -> None:
        """Take no more requests; those that are in are still answered."""
        self.gate.is_open = False
        self.is_ready = False
        self.metrics.ready.set(0)

    async def stop(self) -> None:
        """Drop what runs in the shadow."""
        self.drain()
        for task in self._behind:
            task.cancel()
        await asyncio.gather(*self._behind, return_exceptions=True)

    def shown(self, **texts: Any) -> dict[str, Any]:
        """Return inputs and outputs for the log, if they are to be there."""
        return texts if self._logs_inputs else {}

    async def answer(
        self, inputs: Mapping[str, Any], tally: Tally | None = None, *, starting: float | None = None
    ) -> Answer:
        """Return the program's answer to one row of a request that was admitted.

        Args:
            inputs: Checked.
            tally: Counts its calls.
            starting: When the request came, by `time.perf_counter`; by default its time starts with its turn.

        Raises:
            Refused: If there is none.
        """
        program, tally = self.current, tally or Tally()
        limit = self.limits.seconds
        try:
            if starting is None:
                async with self.gate.place(), asyncio.timeout(limit):
                    answer = await ask(program, inputs, tally)
            else:
                async with asyncio.timeout(limit - (time.perf_counter() - starting)), self.gate.place():
                    answer = await ask(program, inputs, tally)
        except Exception as error:  # noqa: BLE001  the program may be of the user's own class
            refused = refusal(error, program.model, limit)
            self.metrics.failures.labels(refused.code).inc()
            if refused.code == "program_failed":
                note("program_failed", logging.ERROR, error=type(error).__name__, at=place_of(error))
            raise refused from None
        finally:
            self.metrics.count(tally, "served")
        self._count(answer)
        self._follow(inputs, answer)
        return answer

    def _count(self, answer: Answer) -> None:
        self.metrics.rows.inc()
        if answer.route is not None:
            self.metrics.routes.labels(answer.route["region"], answer.route["expert"]).inc()

    async def reload(self) -> dict[str, Any]:
        """Put the program that is on disk now in the place of the served one, if it is good; return what happened.

        Its hashes must hold, its form be right, its fields be those of the served one, and its embedder be
        here. Requests in flight are answered by the program they began with.

        Raises:
            Refused: 409 if it isn't good; the served one stays.
        """
        async with self._reloading:
            before = self.current
            try:
                found = await asyncio.to_thread(self.source.served, self.limits.output_tokens)
                _refuse_other_fields(before, found)
            except PreceptorError as error:
                self.metrics.reloads.labels("refused").inc()
                note("reload_refused", logging.WARNING, reason=str(error), serving=before.digest)
                raise Refused(409, f"The program that is served stays. {error}", "bad_program") from None
            self.current = found
            self.metrics.reloads.labels("done").inc()
            self.metrics.program.remove(before.digest, before.name)
            self.metrics.program.labels(found.digest, found.name).set(1)
            note("reloaded", before=before.digest, serving=found.digest)
            return {"before": before.digest, "serving": found.digest, "changed": before.digest != found.digest}

    def _follow(self, inputs: Mapping[str, Any], answer: Answer) -> None:
        """Let the shadow answer too, now and then."""
        if self.shadow is None or self._rng.random() >= self._share or not self.gate.is_open:
            return
        if len(self._behind) >= _SHADOWS:
            self.metrics.shadow.labels("left out").inc()
            return
        task = asyncio.create_task(self._compare(self.shadow, inputs, answer))
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)

    async def _compare(self, shadow: Served, inputs: Mapping[str, Any], answer: Answer) -> None:
        tally = Tally()
        try:
            async with asyncio.timeout(self.limits.seconds):
                other = await ask(shadow, inputs, tally)
            outcome = "agrees" if other.outputs == answer.outputs else "differs"
        except Exception:  # noqa: BLE001  the shadow's failures are counted, whatever they are
            outcome = "failed"
        finally:
            self.metrics.count(tally, "shadow")
        self.metrics.shadow.labels(outcome).inc()


async def ask(program: Served, inputs: Mapping[str, Any], tally: Tally) -> Answer:
    """Return a program's answer; nothing of it is kept."""
    start = time.perf_counter()
    with counting(tally), dspy.context(lm=program.lm, disable_history=True, trace=[]):  # BestOfN adds to it
        if program.awaits:
            prediction = await program.program.acall(**inputs)
        else:
            prediction = await _in_thread(program.program, inputs, tally)
    told = prediction.toDict()
    logprobs = told.get(fields.LOGPROBS)
    return Answer(
        fields.answered(program.names, told, is_open=program.is_open),
        told.get(fields.ROUTE) if program.is_routed else None,
        logprobs if isinstance(logprobs, dict) and all(isinstance(each, float) for each in logprobs.values()) else None,
        tally,
        since(start),
        program.digest,
    )


async def _in_thread(program: Callable[..., Any], inputs: Mapping[str, Any], tally: Tally) -> Any:
    try:
        return await asyncio.to_thread(program, **inputs)
    except asyncio.CancelledError:
        tally.give_up()
        raise


def _refuse_other_fields(known: Served, other: Served) -> None:
    for name in ("inputs", "outputs"):
        ours, theirs = (getattr(each, name).model_json_schema() for each in (known, other))
        if _shape(ours) != _shape(theirs):
            raise ArtifactError(
                f"{other.artifact.path} has other {name} than the served program: {_shape(theirs)}, not "
                f"{_shape(ours)}. Clients rely on them; start another server for it."
            )


def _shape(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema's fields and types, and those of the records in them, without their descriptions."""
    own = {name: schema[name] for name in ("properties", "$defs") if name in schema}
    return cast("dict[str, Any]", _undescribed(own))


def _undescribed(value: Any, *, is_named: bool = True) -> Any:
    """Return a schema without titles and descriptions; keys are fields' names (`is_named`), or a schema's own."""
    if isinstance(value, list):
        return [_undescribed(each, is_named=False) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {
        name: each
        for name, each in cast("dict[str, Any]", value).items()
        if is_named or name not in ("description", "title")
    }
    return {name: _undescribed(each, is_named=name in ("properties", "$defs")) for name, each in kept.items()}
