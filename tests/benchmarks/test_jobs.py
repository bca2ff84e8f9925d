"""Compiles at a time: in processes of their own, on one model."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import pytest

from preceptor.benchmarks.jobs import _as_they_come, _settled, is_shared, spread
from preceptor.errors import ConfigError, RunError
from preceptor.testing import asked, simulated


@dataclass(frozen=True)
class One:
    name: str


def silent(what: str, done: int, total: int) -> None:
    del what, done, total


def asking(one: One, *, lm: dspy.LM, report: Any = silent) -> dict[str, Any]:
    """Ask the model for two texts; or fail, or be killed."""
    del report
    if one.name == "fails":
        raise ConfigError("no such data")
    if one.name == "breaks":
        raise dspy.lm15.InvalidRequestError("no such luck")  # which can't be sent
    if one.name == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    said = [lm(text, max_tokens=6, temperature=0)[0] for text in (f"Say {one.name}.", "Say it again.")]
    return {"said": said, "process": os.getpid()}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes that are begun here import this module."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])


def test_runs_side_by_side_have_a_process_each_and_share_the_model(smollm: dspy.LM) -> None:
    assert is_shared(smollm)
    runs = [One("yes"), One("no"), One("maybe")]
    with spread(asking, runs, 2, smollm, silent) as results:
        found = dict(results)

    alone = {one: asking(one, lm=smollm) for one in runs}
    assert {one: end["said"] for one, end in found.items()} == {one: end["said"] for one, end in alone.items()}
    processes = {end["process"] for end in found.values()}
    assert len(processes) == 3
    assert os.getpid() not in processes


def test_a_run_that_fails_or_is_killed_leaves_the_others_theirs(
    smollm: dspy.LM, capsys: pytest.CaptureFixture[str]
) -> None:
    ends, reports = list[str](), list[tuple[str, int, int]]()

    def report(*told: Any) -> None:
        reports.append(told)

    def make_all() -> None:
        with spread(asking, [*map(One, ("fails", "is killed", "breaks", "yes"))], 4, smollm, report) as results:
            for one, _ in results:
                ends.append(one.name)

    with pytest.raises((ConfigError, RunError)):
        make_all()

    assert ends == ["yes"]
    assert reports == [("making runs", done, 4) for done in range(5)]
    told = capsys.readouterr().err
    assert "fails: no such data" in told
    assert "breaks: InvalidRequestError: no such luck" in told
    assert "is killed: Its process ended, and told nothing. Resume with the same command." in told


def test_one_job_is_done_in_this_process() -> None:
    lm = simulated(lambda request: "x")

    def here(one: One, *, report: Any) -> dict[str, Any]:
        del report
        return asking(one, lm=lm)

    with spread(here, [One("a")], 1, lm, silent) as results:
        assert list(results) == [(One("a"), {"said": ["x", "x"], "process": os.getpid()})]
    assert len(asked(lm)) == 2
    assert not is_shared(lm)


def test_what_one_of_several_processes_raises_is_told_when_the_others_results_are_there() -> None:
    def failed() -> dict[str, Any]:
        raise ConfigError("no such data")

    with ThreadPoolExecutor() as pool:
        begun = {pool.submit(failed): One("liar"), pool.submit(dict, gain=0.1): One("subj")}
        wait(begun)
        told = _settled(_as_they_come(begun), silent, 2)
        assert [next(told)] == [(One("subj"), {"gain": 0.1})]
        with pytest.raises(ConfigError, match=r"^no such data$"):
            next(told)
