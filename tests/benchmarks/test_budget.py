from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dspy
import pytest

from preceptor.benchmarks import budget
from preceptor.cli.tools import as_command
from preceptor.errors import ConfigError
from preceptor.lm.budget import Budget
from preceptor.teleprompters import APE
from preceptor.testing import simulated


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out: Path = tmp_path_factory.mktemp("budget") / "budget.json"
    shape = ["--rows", "10", "--latency", "0", "--threads", "1", "--threads", "16", "--calls", "5", "--calls", "150"]
    as_command("budget", budget.run, [*shape, "--method", "ape", "--out", str(out), "--json"])
    found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["measured"]
    return found


def test_no_method_of_ours_passes_a_budget_with_any_number_of_threads(rows: list[dict[str, Any]]) -> None:
    ape = [row for row in rows if row["method"] == "ape"]
    assert [(row["threads"], row["unit"], row["budget"]) for row in ape if row["threads"] == 16] == [
        (16, "calls", 5),
        (16, "calls", 150),
        (16, "tokens", 20_000),
        (16, "tokens", 200_000),
        (16, "dollars", 0.5),
        (16, "dollars", 5.0),
        (16, "none", None),
    ]
    assert len(ape) == 14
    assert {row["over"] for row in ape} == {0}
    assert all(row["spent"] <= row["budget"] for row in ape if row["budget"] is not None)


def test_a_method_there_is_not_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"^No method 'gepa'; there are ape, .*mixture, protegi\.$"):
        as_command("budget", budget.run, ["--method", "gepa"])


def test_a_budget_of_tokens_may_cut_the_search_short() -> None:
    bench = budget._Bench(rows=10, latency=0.0, threads=1)
    ends = [bench.ours("ape", APE, Budget(tokens=bound))["end"] for bound in (3_000, 100_000)]
    assert ends == ["search cut short", "whole search"]


def test_a_budget_that_cannot_pay_for_the_least_is_refused_before_any_call(rows: list[dict[str, Any]]) -> None:
    refused = [row for row in rows if row["end"] == "refused"]
    assert {(row["method"], row["budget"], row["calls"]) for row in refused} >= {("ape", 5, 0)}


def test_the_estimate_before_is_what_was_asked_after(rows: list[dict[str, Any]]) -> None:
    # 10 candidates fit 150 calls: 10 proposals, 11 programs on 10 rows, 2 programs on 10 rows to confirm
    ape = [row for row in rows if row["method"] == "ape" and row["end"] == "whole search" and row["budget"] == 150]
    assert [(row["threads"], row["estimate"], row["calls"]) for row in ape] == [(1, 140, 140), (16, 140, 140)]
    unbound = [row for row in rows if row["method"] == "ape" and row["unit"] == "none"]
    assert [(row["estimate"], row["calls"]) for row in unbound] == [(50 + 510 + 20, 580)] * 2


def test_a_peer_is_over_by_what_the_model_was_asked_beyond_its_bound(rows: list[dict[str, Any]]) -> None:
    peers = [row for row in rows if row["method"].startswith("dspy.")]
    assert [row["method"] for row in peers if row["threads"] == 1] == [
        "dspy.GEPA max_metric_calls",
        "dspy.GEPA max_metric_calls",
        "dspy.GEPA max_full_evals",
        "dspy.GEPA max_full_evals",
        "dspy.MIPROv2 estimate",
        "dspy.COPRO breadth * depth",
    ]
    assert all(row["over"] == max(0, row["calls"] - row["budget"]) for row in peers)
    copro = [row for row in peers if row["method"].startswith("dspy.COPRO")]
    assert [(row["budget"], row["calls"], row["over"]) for row in copro] == [(300, 329, 29)] * 2


def test_the_till_counts_calls_tokens_and_dollars() -> None:
    till = budget.Till(simulated(lambda request: "two words"), 0.0)
    lm = dspy.LM("simulated/model", engine=till, cache=False)
    lm("three words in")
    lm("one")
    assert (till.spent("calls"), till.spent("tokens")) == (2, 4 + 4)
    assert till.spent("dollars") == pytest.approx((4 * 20 + 4 * 60) / 1_000_000)


def test_the_table_shows_what_was_over(capsys: pytest.CaptureFixture[str]) -> None:
    budget._print(
        {"rows": 10, "measured": [{"method": "x", "budget": 10, "over": 3}, {"method": "y", "budget": None, "over": 0}]}
    )
    title, header, first, second = capsys.readouterr().out.splitlines()
    assert title == "Spent and over budget, 10 train and validation rows"
    assert (header.split(), first.split(), second.split()) == (
        ["method", "budget", "over"],
        ["x", "10", "3"],
        ["y", "0"],
    )
