"""Methods side by side: ours, found by entry point, and DSPy's own optimizers, raw, as their users run them.

All of them compile the same student on the same rows with the same simulated model, and every call is
counted at that model, proposals included.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import dspy
from dspy.lm15 import Message, Request

from preceptor.cli.inputs import entries
from preceptor.evidence import Evidence
from preceptor.lm.budget import Budget
from preceptor.lm.embedding import Embedder
from preceptor.lm.seam import predictors
from preceptor.scoring.metrics import wrap
from preceptor.task import Report
from preceptor.teleprompter import Teleprompter
from preceptor.teleprompters import MixtureOfExperts
from preceptor.testing import Simulated, asked, simulated, system
from preceptor.testing.draws import draw, number, uniform

Given = TypeVar("Given")
Found = TypeVar("Found")

MINIBATCH: Final = 35
FULL_EVAL_STEPS: Final = 5
"""MIPROv2's own defaults, which its estimate of calls takes as arguments."""

REGIONS: Final = 4
"""Of the mixture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One compile to be made.

    Attributes:
        student: The program; left as it is.
        lm: A simulated model, for the task and for proposals; asked nothing yet.
        train: Rows to search on.
        val: Rows to confirm or select on.
        output: The field that holds the label; the metric is accuracy on it.
        seed: Of the method.
        threads: Calls in flight.
    """

    student: dspy.Module
    lm: dspy.LM
    train: list[dspy.Example]
    val: list[dspy.Example]
    output: str
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a method said of its result, and what it took.

    Attributes:
        program: What it returned.
        replaced: True if the instructions it returned differ from the student's, those of any expert included.
        gain: Its best score minus the student's, both as it reports them, in [-1, 1].
        calls: Requests the model got, proposals included.
        announced: Calls it was bound to or announced beforehand, None if it did neither.
        evidence: What one of our methods measured; DSPy's have none.
    """

    program: dspy.Module
    replaced: bool
    gain: float
    calls: int
    announced: int | None
    evidence: Evidence | None = None


def ours(*, wrapped: bool = False) -> dict[str, Callable[..., Teleprompter]]:
    """Return the installed methods of this package, by name, and the mixture of APE over made-up regions.

    Args:
        wrapped: Also DSPy's optimizers inside our contract.
    """
    kinds = {name: entry.load() for name, entry in sorted(entries("teleprompters").items())}
    return {
        name: partial(MixtureOfExperts, embedder=TOPICS, regions=REGIONS) if kind is MixtureOfExperts else kind
        for name, kind in kinds.items()
        if kind.__module__.startswith("preceptor.teleprompters") and (wrapped or kind.__module__ != WRAPPED)
    }


def _topics(texts: Sequence[str]) -> list[list[float]]:
    """Embed texts in the regions that their hashes draw, each somewhere about its middle."""
    vectors: list[list[float]] = []
    for text in texts:
        drawn = draw("topic", text)
        near = [0.3 * uniform(draw(drawn.hex(), axis)) for axis in range(REGIONS)]
        near[number(drawn) % REGIONS] += 1.0
        vectors.append(near)
    return vectors


TOPICS: Final = Embedder("topics", _topics)
"""Stands in for an embedder: inputs fall into `REGIONS` regions that have nothing to do with their labels."""


def compile_ours(kind: Callable[..., Teleprompter], case: Case, budget: Budget | None = None) -> Claim:
    """Compile with one of our methods, at its defaults; the gain is that of its evidence.

    Raises:
        BudgetExhausted: If the budget ended before anything was confirmed.
    """
    with tempfile.TemporaryDirectory() as folder:
        method = kind(
            metric="accuracy",
            lm=case.lm,
            budget=budget or Budget(),
            run_dir=folder,
            threads=case.threads,
            seed=case.seed,
        )
        program = method.compile(case.student, trainset=case.train, valset=case.val)
    evidence = cast("Evidence", getattr(program, "evidence"))  # noqa: B009  not a field of DSPy's
    return _claim(case, program, evidence.gain, method.budget.calls, evidence)


def gepa(case: Case, *, max_metric_calls: int | None = None, max_full_evals: int | None = None) -> Claim:
    """Compile with `dspy.GEPA`, auto="light" unless a bound is given.

    The gain is the best of `detailed_results.val_aggregate_scores` (on `val`) minus the first, the
    student's. What it is bound to is its own `max_metric_calls`, whichever way it was set.
    """
    bound = max_metric_calls is not None or max_full_evals is not None
    with _as_users_do(case):
        method = dspy.GEPA(
            metric=_metric(case.output),
            auto=None if bound else "light",
            max_metric_calls=max_metric_calls,
            max_full_evals=max_full_evals,
            reflection_lm=case.lm,
            num_threads=case.threads,
            track_stats=True,
            seed=case.seed,
        )
        program: Any = method.compile(case.student, trainset=case.train, valset=case.val)
    scores = program.detailed_results.val_aggregate_scores
    return _claim(case, program, max(scores) - scores[0], method.max_metric_calls)


def miprov2(case: Case) -> Claim:
    """Compile with `dspy.MIPROv2`, auto="light", instructions only.

    The gain is the returned program's `score` (best full evaluation on at most 100 rows of `val`) minus
    the first entry of its `trial_logs`, the student's, in percent both. It has no bound; announced is
    the sum of prompt and task model calls of its own estimate.
    """
    with _as_users_do(case):
        method = dspy.MIPROv2(
            metric=_metric(case.output),
            prompt_model=case.lm,
            task_model=case.lm,
            auto="light",
            max_bootstrapped_demos=0,
            max_labeled_demos=0,
            num_threads=case.threads,
            seed=case.seed,
        )
        program: Any = method.compile(case.student, trainset=case.train, valset=case.val)
        announced = _estimate(method, case)
    gain = program.score - program.trial_logs[1]["full_eval_score"]
    return _claim(case, program, gain / 100, announced)


def copro(case: Case) -> Claim:
    """Compile with `dspy.COPRO` at its defaults, breadth 10 and depth 3; it doesn't take `val`.

    The gain is the best score of the returned program's `candidate_programs` (on `train`, in percent)
    minus that of the student's instructions among them. It has no bound; announced is what `breadth` and
    `depth` are documented to mean: so many new prompts an iteration, so many iterations, on all rows.
    """
    with _as_users_do(case):
        method = dspy.COPRO(prompt_model=case.lm, metric=_metric(case.output))
        program: Any = method.compile(case.student, trainset=case.train, eval_kwargs={"num_threads": case.threads})
    scores = [candidate["score"] for candidate in program.candidate_programs]
    [instructions] = _instructions(case.student).values()
    written = instructions.strip('"').strip()  # as COPRO itself cleans every candidate
    seed = max(one["score"] for one in program.candidate_programs if one["instruction"] == written)
    return _claim(case, program, (max(scores) - seed) / 100, method.breadth * method.depth * len(case.train))


PEERS: Final[Mapping[str, Callable[[Case], Claim]]] = {
    "dspy.GEPA": gepa,
    "dspy.MIPROv2": miprov2,
    "dspy.COPRO": copro,
}
"""DSPy's own optimizers."""

WRAPPED: Final = "preceptor.teleprompters.wrapped"
"""The module that holds them inside our contract."""


def speaking(lm: dspy.LM, *, latency: float = 0.0) -> dspy.LM:
    """Return a model that answers as a simulated `lm` does, and also fills the output fields of DSPy's adapters.

    DSPy's optimizers ask for proposals through its chat or JSON adapter. Each field they ask for gets a
    text the inner model proposes; asked the same again, as sampling does, it gets another.

    Args:
        lm: A simulated model that proposes when asked without a system message.
        latency: Seconds each answer takes at least.
    """
    engine = lm.engine
    assert isinstance(engine, Simulated), "speaking() is for the models of preceptor.testing"
    times: Counter[str] = Counter()
    lock = threading.Lock()

    def answer(request: Request) -> str:
        fields = _fields(system(request))
        if not fields:
            return engine.complete(request).message.text or ""
        told = json.dumps([system(request), *[message.text for message in request.messages], request.config.seed])
        with lock:
            times[told] += 1
            drawn = hashlib.sha256(f"{times[told]}\n{told}".encode()).hexdigest()
        texts = {field: _proposed(engine, lm.model, f"{drawn} {field}") for field in fields}
        if "Outputs will be a JSON object" in system(request):
            return json.dumps(texts)
        return "\n".join(f"[[ ## {field} ## ]]\n{text}\n" for field, text in texts.items()) + "[[ ## completed ## ]]"

    return simulated(answer, name=lm.model.partition("/")[2], latency=latency)


def spread(work: Callable[[Given], Found], given: Sequence[Given], jobs: int, report: Report, what: str) -> list[Found]:
    """Return `work` of each in order, done in `jobs` processes; in this one if `jobs` is 1."""
    found: list[Found] = []
    with _mapped(jobs) as mapped:
        for result in mapped(work, given):
            found.append(result)
            twentieths = 20 * len(found) // len(given)
            report(f"{what}: {5 * twentieths} %", len(found), len(given))
    return found


@contextmanager
def _mapped(jobs: int) -> Generator[Callable[..., Any]]:
    if jobs == 1:
        yield map
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield pool.map


@contextmanager
def _as_users_do(case: Case) -> Generator[None]:
    """Set the model in DSPy's context, and silence what its optimizers print, log and warn."""
    log = logging.getLogger("dspy")
    level = log.level
    with (
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
        warnings.catch_warnings(),
        dspy.context(lm=case.lm),
    ):
        warnings.simplefilter("ignore")
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)


def _metric(output: str) -> Callable[..., float]:
    accuracy = wrap("accuracy", output)

    def score(
        gold: dspy.Example, answer: dspy.Prediction, trace: Any = None, pred_name: Any = None, pred_trace: Any = None
    ) -> float:
        del trace, pred_name, pred_trace
        return accuracy(gold, answer)

    return score


def _claim(
    case: Case, program: dspy.Module, gain: float, announced: int | None, evidence: Evidence | None = None
) -> Claim:
    return Claim(
        program=program,
        replaced=_instructions(program) != _instructions(case.student),
        gain=gain,
        calls=len(asked(case.lm)),
        announced=announced,
        evidence=evidence,
    )


def _instructions(program: dspy.Module) -> dict[str, str]:
    return {name: predictor.signature.instructions for name, predictor in predictors(program)}


def _estimate(method: Any, case: Case) -> int:
    """Return the calls that MIPROv2's own estimate adds up to; since 3.x it no longer prints it."""
    method._set_random_seeds(case.seed)
    trials, val, minibatch, candidates, _ = method._set_hyperparams_from_run_mode(
        case.student, None, True, True, case.val, None, None
    )
    lines = method._estimate_lm_calls(
        case.student, trials, minibatch, MINIBATCH, FULL_EVAL_STEPS, val, True, candidates
    )
    totals = [re.search(r"= (\d+) ", re.sub(r"\x1b\[[\d;]*m", "", line)) for line in lines]
    return sum(int(total[1]) for total in totals if total)


def _fields(told: str) -> list[str]:
    r"""Return the output fields that a system message of DSPy's adapters asks for, in order.

    Example:
        >>> _fields("Your output fields are:\n1. `hint` (str): A hint.\nAll interactions will be structured")
        ['hint']
    """
    asked_for = told.partition("Your output fields are:")[2].partition("All interactions will be structured")[0]
    return re.findall(r"^\d+\. `(\w+)`", asked_for, flags=re.MULTILINE)


def _proposed(engine: Simulated, model: str, text: str) -> str:
    return engine.complete(Request(model=model, messages=(Message.user(text),))).message.text or ""
