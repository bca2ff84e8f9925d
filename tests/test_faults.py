"""Compiles against a server that fails in every way: the same program as without faults, or a clear stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dspy
import pytest

from preceptor.errors import LMFailed
from preceptor.lm.budget import Budget
from preceptor.lm.dispatch import Patience
from preceptor.modules import Classify
from preceptor.teleprompters import APE
from preceptor.testing import ChatServer, Faults, Kind

RIGHT = "Answer with the last word."
PATIENCE = Patience(timeout=60, first_wait=0.01)
HASTY = Patience(timeout=2, first_wait=0.01)
"""For answers that never come, or come after `LATE` seconds."""

LATE = 600
PASSING: tuple[Kind, ...] = (
    "rate_limit",
    "rate_limit_after",
    "server_error",
    "unavailable",
    "dropped",
    "reset",
    "cut",
    "hang",
    "slow",
    "garbage",
    "misshapen",
    "empty",
    "truncated",
)
LASTING: tuple[Kind, ...] = ("unauthorized", "forbidden", "not_found", "bad_request", "no_quota")


def answer(body: dict[str, Any]) -> str:
    """Answer right under one instruction; asked for one, write it for about half of the prompts."""
    last = str(body["messages"][-1]["content"])
    if body["messages"][0]["role"] != "system":
        number = sum(last.encode())
        return RIGHT if number % 2 else f"Please follow rule number {number}."
    return last.split()[-1] if RIGHT in str(body["messages"][0]["content"]) else "no"


def rows(start: int, count: int) -> list[dspy.Example]:
    words = [["yes", "no"][n % 2] for n in range(start, start + count)]
    return [
        dspy.Example(text=f"row {start + n} {word}", label=word).with_inputs("text") for n, word in enumerate(words)
    ]


def compiled(lm: dspy.LM, run: Path, **settings: Any) -> Any:
    given: dict[str, Any] = {"patience": PATIENCE, "budget": Budget(calls=200), **settings}
    method = APE(metric="accuracy", lm=lm, run_dir=run, candidates=4, subsamples=4, demos=2, **given)
    student = Classify("text -> label: Literal['yes', 'no']", "Sort.")
    return method.compile(student, trainset=rows(0, 10), valset=rows(10, 20))


def program(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "program" / "program.json").read_text(encoding="utf-8"))["predictors"]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = tmp_path_factory.mktemp("undisturbed")
    with ChatServer(answer) as server:
        evidence = compiled(server.lm(max_tokens=16), run).evidence
    assert evidence.replaced
    return {"program": program(run), "calls": evidence.spent.calls, "tokens": evidence.spent.tokens}


@pytest.mark.parametrize("kind", PASSING)
def test_one_call_in_ten_that_fails_and_passes_changes_nothing(
    kind: Kind, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    patience = HASTY if kind in ("hang", "slow") else PATIENCE
    with ChatServer(answer, faults=Faults(kinds=(kind,), share=0.1, seed=1, slow_seconds=LATE)) as server:
        evidence = compiled(server.lm(max_tokens=16), tmp_path / "run", patience=patience).evidence

    assert server.faults[kind] > 0
    assert program(tmp_path / "run") == undisturbed["program"]
    assert (evidence.spent.calls, evidence.spent.tokens) == (undisturbed["calls"], undisturbed["tokens"])
    assert evidence.lost.calls == sum(server.faults.values())


def test_all_kinds_of_faults_together_change_nothing(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    with ChatServer(answer, faults=Faults(kinds=PASSING, share=0.3, seed=2, slow_seconds=LATE)) as server:
        evidence = compiled(server.lm(max_tokens=16), tmp_path / "run", patience=HASTY).evidence

    assert len(server.faults) > 6
    assert program(tmp_path / "run") == undisturbed["program"]
    assert evidence.spent.calls == undisturbed["calls"]


@pytest.mark.parametrize("kind", LASTING)
def test_a_provider_that_refuses_stops_the_compile_at_once_and_resuming_ends_it(
    kind: Kind, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with ChatServer(answer) as server:
        lm = server.lm(max_tokens=16)
        server.inject(Faults(kinds=(kind,)))
        with pytest.raises(
            LMFailed, match=r"Spent so far: 0 calls, .*go on with: compile again, with run_dir='.*run'$"
        ):
            compiled(lm, tmp_path / "run")
        assert server.count <= 10
        server.inject(None)
        evidence = compiled(lm, tmp_path / "run").evidence

    assert program(tmp_path / "run") == undisturbed["program"]
    assert evidence.spent.calls == undisturbed["calls"]


@pytest.mark.parametrize(("kind", "threads"), [("hang", 8), ("server_error", 8), ("dropped", 1), ("rate_limit", 64)])
def test_a_provider_that_is_down_stops_the_compile_soon(kind: Kind, threads: int, tmp_path: Path) -> None:
    patience = Patience(timeout=0.3, retries=1, first_wait=0.01)
    server = ChatServer(answer, faults=Faults(kinds=(kind,)))
    with server, pytest.raises(LMFailed, match=r"Spent so far: 0 calls, "):
        compiled(server.lm(max_tokens=16), tmp_path / "run", patience=patience, threads=threads)

    assert server.count <= 8  # each of 4 proposals is asked for twice at most, and no row at all


def test_a_provider_that_goes_down_keeps_what_was_answered(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    answered = 0

    def then_down(body: dict[str, Any]) -> str:
        nonlocal answered
        answered += 1
        if answered == 20:
            server.inject(Faults(kinds=("server_error",)))
        return answer(body)

    patience = Patience(timeout=60, retries=0)
    with ChatServer(then_down) as server:
        lm = server.lm(max_tokens=16)
        with pytest.raises(LMFailed, match=r"rows failed .*Spent so far: [12]\d calls, "):
            compiled(lm, tmp_path / "run", patience=patience, threads=1)
        server.inject(None)
        first = server.answered
        evidence = compiled(lm, tmp_path / "run").evidence
        second = server.answered - first

    assert program(tmp_path / "run") == undisturbed["program"]
    assert evidence.spent.calls == undisturbed["calls"] == first + second
    assert evidence.billed.calls == second


def test_what_failed_attempts_may_have_cost_counts_against_dollars(tmp_path: Path) -> None:
    prices = {"openai/model": (1_000_000.0, 1_000_000.0)}  # a dollar a token
    budget = Budget(calls=200, dollars=100_000, prices=prices)
    with ChatServer(answer, faults=Faults(kinds=("truncated",), share=0.2, seed=3)) as server:
        evidence = compiled(server.lm(max_tokens=16), tmp_path / "run", budget=budget).evidence
        lost = evidence.lost
        again = compiled(server.lm(max_tokens=16), tmp_path / "run", budget=budget).evidence

    assert lost.calls == server.faults["truncated"] > 0
    assert lost.dollars == lost.tokens > 0
    assert (again.lost, again.billed.calls) == (lost, 0)
