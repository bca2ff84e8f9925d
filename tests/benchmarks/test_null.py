from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from preceptor import ConfigError
from preceptor.benchmarks import null
from preceptor.benchmarks.null import Compile
from preceptor.cli.tools import as_command
from preceptor.scoring.metrics import wrap
from preceptor.scoring.statistics import compare
from preceptor.scoring.trial import Outcome

PEERS = ["dspy.GEPA", "dspy.MIPROv2", "dspy.COPRO"]


def measured(tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    out = tmp_path / "null.json"
    sizes = ["--seeds", "2", "--peer-seeds", "2", "--rows", "10", "--jobs", "1"]
    as_command("null", null.run, [*sizes, *arguments, "--out", str(out), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = printed["measured"]
    return rows


def test_on_a_coin_flip_ours_keeps_the_prompt_and_claims_nothing_where_the_peers_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = measured(tmp_path, capsys, "--method", "ape", *(f"--method={peer}" for peer in PEERS))
    assert [row["method"] for row in rows] == ["ape", *PEERS]
    for row in rows:
        assert (row["rows"], row["seeds"], row["share"]) == (10, 2, row["replaced"] / 2)
        assert row["share_low"] <= row["share"] <= row["share_high"]
        assert row["claimed_low"] <= row["claimed"] <= row["claimed_high"]
    ours, *others = rows
    assert (ours["replaced"], ours["claimed"], ours["true"]) == (0, 0.0, 0.0)
    assert ours["promised"] > 0
    for row in others:
        assert row["replaced"] > 0
        assert row["claimed"] == row["promised"] > row["true"]
        assert 0 < abs(row["true"]) < 0.1  # of up to 2 programs, on 500 tosses each
    assert rows[-1]["calls"] == 3 * 10 * 10 + 29  # COPRO: 30 prompts on 10 rows, 29 of them proposed


def test_with_an_effect_the_true_gain_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = measured(tmp_path, capsys, "--effect", "--method", "dspy.COPRO", "--method", "ape")
    assert [(row["agreement"], row["method"]) for row in rows] == list(product([0.5, 0.0], ["ape", "dspy.COPRO"]))
    for row in rows:
        assert (row["proposals"], row["power"]) == (8, null.effect_power(10, row["agreement"]))
        assert round(row["true"], 3) in (0.0, 0.075, 0.15)  # none, one or both of two seeds


def test_the_table_shows_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_command("null", null.run, ["--seeds", "2", "--rows", "10", "--jobs", "1", "--method", "ape"])
    title, header, row = capsys.readouterr().out.splitlines()
    assert title.startswith("A coin flip: no prompt can help.")
    assert header.split("  ")[0] == "method"
    assert row.split()[:4] == ["ape", "10", "2", "0"]


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^No method 'gepa'; there are ape, .*dspy\.COPRO\.$"):
        as_command("null", null.run, ["--method", "gepa"])


def test_one_proposal_in_eight_is_better_than_the_seed() -> None:
    case = null._graded(Compile("ape", 10, 0, 0.5, proposals=16), 0.5)
    texts = {text for seed in range(300) for text in case.lm("Write an instruction.", seed=seed)}
    assert sorted(text for text in texts if null.BETTER in text) == [
        "Call the toss by its number, way 0.",
        "Call the toss by its number, way 1.",
    ]
    assert len(texts) == 16


def test_a_summary_is_as_computed_by_hand() -> None:
    found = [
        {"replaced": number == 0, "claimed": number / 10, "true": 0.1, "promised": 0.2, "calls": 7} for number in (0, 1)
    ]
    row = null._summary(Compile("ape", 10, 0), found)
    assert (row["replaced"], row["share"], row["claimed"], row["true"], row["calls"]) == (1, 0.5, 0.05, 0.1, 7)
    # exact binomial interval of 1 in 2: 1 - 0.975 ** 0.5; Student's t with 1 degree of freedom: 12.706 * 0.05
    assert (round(row["share_low"], 4), round(row["share_high"], 4)) == (0.0126, 0.9874)
    assert (round(row["claimed_low"], 3), round(row["claimed_high"], 3)) == (-0.585, 0.685)


@pytest.mark.parametrize(("better", "worse"), [(0.6, 0.1), (0.3, 0.3), (0.9, 0.0)])
def test_the_power_is_that_of_the_test_that_confirms(better: float, worse: float) -> None:
    chances = {1: better, -1: worse, 0: 1 - better - worse}
    total = 0.0
    for changes in product(chances, repeat=6):
        before = [Outcome("scored", float(change == -1)) for change in changes]
        after = [Outcome("scored", float(change == 1)) for change in changes]
        chance = 1.0
        for change in changes:
            chance *= chances[change]
        total += chance * compare(before, after, wrap("accuracy", "side")).is_confirmed
    assert null.power(6, better, worse) == pytest.approx(total)
