from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from preceptor.benchmarks import preview
from preceptor.benchmarks.preview import Round
from preceptor.cli.tools import as_command


class Order:
    """Draws in the order things stand."""

    def permutation(
        self, what: int | np.ndarray[tuple[int], np.dtype[np.int64]]
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.arange(what) if isinstance(what, int) else what


def test_a_preview_keeps_those_that_mend_most_of_their_own_parents_errors_and_pays_for_all() -> None:
    minibatch = np.zeros((2 + 28, 4))
    minibatch[0] = [0, 0, 1, 1]  # two errors
    minibatch[1] = [1, 1, 1, 0]  # one, the last
    minibatch[2 + 13, :2] = 1
    minibatch[2 + 12, 0] = 1
    minibatch[2, 2:] = 1  # right only where the parent is
    minibatch[16 + 9, 3] = 1

    kept, paid = preview._kept(2, minibatch, 16, Order())

    assert kept == [0, 1, 2, 3, 4, 5, 6, 7, 14, 15, *range(16, 23), 25]
    assert paid == 14 * 2 + 14 * 1
    one, less = preview._kept(2, minibatch, 1, Order())
    assert (one, less) == ([0, 1, 2, 3, 4, 5, 6, 7, 14, 15, *range(16, 23), 25], 28)


def test_a_draw_at_random_looks_at_no_row() -> None:
    minibatch = np.zeros((1 + 14, 4))
    minibatch[14] = 1
    assert preview._kept(1, minibatch, 0, Order()) == ([0, *range(1, 9)], 0)


def test_both_ways_spend_the_same_calls_and_a_preview_half_of_them_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []

    def ranked(rule: str, scores: object, total: int) -> range:
        left.append(total)
        return range(1)

    monkeypatch.setattr(preview, "_ranking", ranked)
    for parents, budget in ((1, 12), (1, 50), (4, 25)):
        preview.measure(Round(parents, budget, 0.5, 3))
        whole = budget * parents * 9
        random, previewed = left[0], left[1]
        errors = min(16, whole // 2 // (14 * parents))
        assert random == whole
        assert previewed == whole - 14 * parents * errors >= whole / 2
        left.clear()


def test_a_round_has_the_prompts_it_says() -> None:
    accuracy, scores = Round(4, 25, 1.0, 0).prompts()
    assert accuracy[:4].tolist() == [0.65] * 4
    assert sorted(accuracy[4:])[-2:] == [pytest.approx(0.70), 0.75]
    assert scores.shape == (60, 264)
    assert (scores[accuracy.argmax()] >= scores).all()  # at agreement 1 the better is right wherever the worse is
    apart = Round(4, 25, 0.0, 0).prompts()[1]
    assert not (apart[accuracy.argmax()] >= apart).all()


def test_the_command_prints_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "preview.json"
    as_command("preview", preview.run, ["--seeds", "20", "--budget", "25", "--jobs", "1", "--out", str(out), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text(encoding="utf-8"))
    assert [(line["agreement"], line["parents"], line["rule"]) for line in printed["measured"]] == [
        (agreement, parents, rule)
        for agreement in (0.0, 0.5, 1.0)
        for parents in (1, 4)
        for rule in ("ucb", "successive-rejects")
    ]
    for line in printed["measured"]:
        assert line["preview"] - line["random"] == pytest.approx(line["picks more"])
        assert line["better pick low"] <= line["better pick"] <= line["better pick high"]
