"""`preceptor bench budget`: what methods spend over their budget, with up to 512 threads, counted at the model.

Ours get budgets in calls, tokens and dollars, and none at all. DSPy's own optimizers, raw, get theirs in
their own terms: GEPA's `max_metric_calls` and `max_full_evals`; MIPROv2 and COPRO have none and are held
to the number of calls they announce (`preceptor.benchmarks.peers`). Answers take a while, so that calls overlap.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final

import dspy
import typer
from dspy.lm15 import Request, Response

from preceptor.benchmarks import peers
from preceptor.benchmarks.peers import Case, Claim
from preceptor.benchmarks.result import Json, Out, give
from preceptor.cli.view import print_table, progress
from preceptor.errors import BudgetExhausted, ConfigError, Unaffordable
from preceptor.lm.budget import Budget
from preceptor.lm.prices import MILLION
from preceptor.lm.seam import InThread, predictors
from preceptor.modules import Classify
from preceptor.teleprompter import Teleprompter
from preceptor.testing import Simulated, coin_flip

LABELS: Final = ("heads", "tails")
CALLS: Final = (300, 1000, 3000)
TOKENS: Final = (20_000, 200_000)
DOLLARS: Final = (0.5, 5.0)
FULL_EVALS: Final = (2, 5)
RATES: Final = (20.0, 60.0)
"""Dollars per million input and output tokens of the simulated model; a word is a token."""


def run(
    calls: Annotated[list[int] | None, typer.Option(help="Budgets in calls.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Calls in flight.")] = None,
    rows: Annotated[int, typer.Option(min=2, help="Train rows; as many validation rows.")] = 60,
    latency: Annotated[float, typer.Option(help="Seconds an answer takes.")] = 0.005,
    method: Annotated[list[str] | None, typer.Option(help="Of ours; by default all.")] = None,
    wrapped: Annotated[bool, typer.Option("--wrapped", help="DSPy's optimizers inside our contract too.")] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Compile with every method, budget and number of threads."""
    kinds = peers.ours(wrapped=wrapped)
    unknown = set(method or ()) - set(kinds)
    if unknown:
        raise ConfigError(f"No method {sorted(unknown)[0]!r}; there are {', '.join(kinds)}.")
    start = time.monotonic()
    work: list[Callable[[], dict[str, Any]]] = []
    for count in threads or [1, 8, 64, 512]:
        bench = _Bench(rows, latency, count)
        for name in method or kinds:
            work += [partial(bench.ours, name, kinds[name], budget) for budget in _budgets(calls or list(CALLS))]
        work += bench.peers(calls or list(CALLS))
    with progress() as report:
        measured = peers.spread(lambda each: each(), work, 1, report, "compiling")
    result = {"rows": rows, "latency": latency, "seconds": round(time.monotonic() - start), "measured": measured}
    give(result, out, as_json=as_json, show=_print)


class Till(Simulated):
    """A simulated engine that adds up the tokens of its answers.

    Attributes:
        inputs: Input tokens so far.
        outputs: Output tokens so far.
    """

    def __init__(self, lm: dspy.LM, latency: float) -> None:
        engine = lm.engine
        assert isinstance(engine, Simulated), "a till is for the models of preceptor.testing"
        super().__init__(lambda request: engine.complete(request).message.text or "", lm.model, latency)
        self.inputs = self.outputs = 0

    def complete(self, request: Request) -> Response:
        """Answer one request and count its tokens."""
        response = super().complete(request)
        with self._lock:
            self.inputs += response.usage.input_tokens or 0
            self.outputs += response.usage.output_tokens or 0
        return response

    def spent(self, unit: str) -> float:
        """Return what was asked of this model, in calls, tokens or dollars."""
        dollars = (self.inputs * RATES[0] + self.outputs * RATES[1]) / MILLION
        return {"calls": len(self.requests), "tokens": self.inputs + self.outputs, "dollars": dollars}[unit]


@dataclass(frozen=True, slots=True)
class _Bench:
    """The task that every method compiles: tossing a coin.

    Attributes:
        rows: Train rows; as many validation rows.
        latency: Seconds an answer takes.
        threads: Calls in flight.
    """

    rows: int
    latency: float
    threads: int

    def ours(self, name: str, kind: Callable[..., Teleprompter], budget: Budget) -> dict[str, Any]:
        """Compile with one of our methods."""
        case, till = self._case()
        unit = next((unit for unit in ("calls", "tokens", "dollars") if getattr(budget, unit)), "none")
        estimate = self._estimate(kind, case, budget.calls) if unit in ("calls", "none") else None
        return self._row(name, till, unit, getattr(budget, unit, None), estimate, _end(kind, case, budget))

    def peers(self, calls: list[int]) -> list[Callable[[], dict[str, Any]]]:
        """Return the compiles of DSPy's optimizers, to be made."""
        named: list[tuple[str, Callable[[Case], Claim]]] = [
            *(("dspy.GEPA max_metric_calls", partial(peers.gepa, max_metric_calls=bound)) for bound in calls),
            *(("dspy.GEPA max_full_evals", partial(peers.gepa, max_full_evals=count)) for count in FULL_EVALS),
            ("dspy.MIPROv2 estimate", peers.miprov2),
            ("dspy.COPRO breadth * depth", peers.copro),
        ]
        return [partial(self._peer, name, compiled) for name, compiled in named]

    def _peer(self, name: str, compiled: Callable[[Case], Claim]) -> dict[str, Any]:
        case, till = self._case()
        claim = compiled(case)
        return self._row(name, till, "calls", claim.announced, None, "")

    def _row(
        self, name: str, till: Till, unit: str, budget: float | None, estimate: int | None, end: str
    ) -> dict[str, Any]:
        spent = till.spent("calls" if unit == "none" else unit)
        return {
            "method": name,
            "threads": self.threads,
            "unit": unit,
            "budget": budget,
            "spent": spent,
            "over": 0 if budget is None else max(0, spent - budget),
            "estimate": estimate,
            "calls": till.spent("calls"),
            "end": end,
        }

    def _case(self) -> tuple[Case, Till]:
        inner = peers.speaking(coin_flip(LABELS))
        till = Till(inner, self.latency)
        lm = dspy.LM(inner.model, engine=till, async_engine=InThread(till), cache=False, num_retries=0, **inner.kwargs)
        tosses = [
            dspy.Example(text=f"Toss {number}", side=LABELS[number % 2]).with_inputs("text")
            for number in range(2 * self.rows)
        ]
        return Case(
            student=Classify("text -> side: Literal['heads', 'tails']", instructions="Call the toss."),
            lm=lm,
            train=tosses[: self.rows],
            val=tosses[self.rows :],
            output="side",
            threads=self.threads,
        ), till

    def _estimate(self, kind: Callable[..., Teleprompter], case: Case, calls: int | None) -> int:
        """Return the calls our contract announces before a compile: the search's and the confirmation's."""
        signatures = {name: predictor.signature for name, predictor in predictors(case.student)}
        method = kind(metric="accuracy")
        confirm = method.confirmed * len(case.val) * len(signatures)
        search = None if calls is None else calls - confirm
        return confirm + method.estimate(signatures, len(case.train), search).expected


def _end(kind: Callable[..., Teleprompter], case: Case, budget: Budget) -> str:
    """Compile, and return how it ended."""
    try:
        claim = peers.compile_ours(kind, case, budget)
    except Unaffordable:
        return "refused"
    except BudgetExhausted:
        return "ended before confirming"
    return "search cut short" if claim.evidence is not None and claim.evidence.stopped else "whole search"


def _budgets(calls: list[int]) -> list[Budget]:
    prices = {"simulated/coin-0": RATES}
    return [
        *(Budget(calls=bound) for bound in calls),
        *(Budget(tokens=bound) for bound in TOKENS),
        *(Budget(dollars=bound, prices=prices) for bound in DOLLARS),
        Budget(),
    ]


def _print(result: dict[str, Any]) -> None:
    names = list(result["measured"][0])
    cells = [["" if row[name] is None else row[name] for name in names] for row in result["measured"]]
    print_table(f"Spent and over budget, {result['rows']} train and validation rows", names, cells)
