"""One file a run, with what was measured on test rows that no compile has seen."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import dspy
import pytest
import torch
from dspy.lm15 import Request

from preceptor.benchmarks import papers
from preceptor.benchmarks.papers import Run, _Bench, kind_of
from preceptor.benchmarks.tasks import Parts, Published
from preceptor.cli.tools import as_command
from preceptor.errors import BudgetExhausted, ConfigError
from preceptor.life import Compile
from preceptor.teleprompters import APE, MixtureOfExperts
from preceptor.testing import asked, graded, prompt, simulated, system

GOOD = "Say heads if the number is even."


def rows(start: int, count: int) -> list[dspy.Example]:
    return [
        dspy.Example(text=f"toss {n}", side=("tails", "heads")[n % 2]).with_inputs("text")
        for n in range(start, start + count)
    ]


TASK = Published(
    name="toss",
    signature="text -> side: Literal['heads', 'tails']",
    instructions="Call it.",
    metric="accuracy",
    licence="none",
    citation="none",
    sizes=(32, 32, 40),
    rows=lambda data, seed: Parts(rows(0, 32), rows(32, 32), rows(64, 40)),
)


def model() -> dspy.LM:
    truth = {row.text: row.side for row in rows(0, 104)}
    return graded(truth, {GOOD: 1.0}, default=0.4, name="toss")


def bench(lm: dspy.LM, monkeypatch: pytest.MonkeyPatch, cache: Path) -> _Bench:
    monkeypatch.setenv("PRECEPTOR_CACHE", str(cache))
    return _Bench(TASK, cache, lm, lambda what, done, total: None)


def test_a_run_is_scored_on_test_rows_after_its_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model()

    found = bench(lm, monkeypatch, tmp_path).measure(Run("toss", "ape", 0, 300, lm.model), APE)

    assert (found["compiled"], found["replaced"], found["candidate"]) == (1.0, True, 1.0)
    assert found["gain"] == pytest.approx(1 - found["seed_score"])
    assert found["low"] <= found["gain"] <= found["high"]
    assert found["instructions"] == {"predict": GOOD} == found["best_candidate"]
    assert found["calls"] <= 300
    first, *_, last = found["curve"]
    assert (first["calls"], first["instructions"], first["test"]) == (0, {"predict": "Call it."}, found["seed_score"])
    assert (last["instructions"], last["test"]) == ({"predict": GOOD}, 1.0)
    assert first["calls"] < last["calls"] == found["calls"] - 2 * found["confirm_rows"]
    assert found["data"] == "upstream"
    assert found["device"] == papers._device()
    told = [request.messages[-1].text or "" for request in asked(lm) if system(request)]
    tested = [at for at, text in enumerate(told) if int(text.split()[-1]) >= 64]
    assert tested == [*range(40), *range(len(told) - 40, len(told))]  # the seed's first, the winner's last


@pytest.mark.parametrize(
    ("gpu", "has_bfloat16", "told"),
    [
        (None, False, f"cpu, {platform.machine()}"),
        (None, True, f"cpu, {platform.machine()}, bfloat16"),
        ("NVIDIA H200", True, "NVIDIA H200"),
    ],
)
def test_a_device_is_told_by_what_it_computes_in(
    monkeypatch: pytest.MonkeyPatch, gpu: str | None, has_bfloat16: bool, told: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    monkeypatch.setattr(papers, "has_bfloat16", lambda: has_bfloat16)
    assert papers._device() == told


def test_a_test_row_that_only_the_compiled_program_fails_with_counts_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = model().engine

    def failing(request: Request) -> str:
        if GOOD in system(request) and prompt(request).endswith("toss 64"):
            raise ConnectionError("no route")
        return str(engine._answer(request))

    lm = simulated(failing, name="toss")
    found = bench(lm, monkeypatch, tmp_path).measure(Run("toss", "ape", 0, 300, lm.model), APE)
    assert (found["compiled"], found["candidate"]) == (39 / 40, 39 / 40)
    assert found["curve"][-1]["test"] == 39 / 40


def test_without_a_curve_only_the_winner_is_scored_on_test_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = model()
    bare = bench(lm, monkeypatch, tmp_path)
    bare.with_curve = False

    found = bare.measure(Run("toss", "ape", 0, 300, lm.model), APE)

    assert found["curve"] == []
    assert (found["best_candidate"], found["candidate"]) == ({"predict": GOOD}, 1.0)


def test_a_result_without_a_curve_gets_it_from_its_run_folder_and_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(papers, "lm_of", lambda name: model())
    monkeypatch.setattr("preceptor.benchmarks.tasks.find", lambda name: TASK)
    arguments = ["--data-dir", str(tmp_path), "--task", "toss", "--method", "ape", "--seeds", "1", "--calls", "300"]
    arguments += ["--out", str(tmp_path / "results")]
    as_command("papers", papers.run, [*arguments, "--no-curve"])
    [place] = (tmp_path / "results").glob("*/*.json")
    bare = json.loads(place.read_text(encoding="utf-8"))
    monkeypatch.setattr(_Bench, "measure", lambda *given: pytest.fail("it is made again"))

    as_command("papers", papers.run, [*arguments, "--no-curve"])
    assert json.loads(place.read_text(encoding="utf-8")) == bare
    as_command("papers", papers.run, arguments)

    found = json.loads(place.read_text(encoding="utf-8"))
    assert bare["curve"] == []
    assert found == {**bare, "curve": found["curve"]}
    assert [point["test"] for point in (found["curve"][0], found["curve"][-1])] == [bare["seed_score"], 1.0]
    place.write_text(json.dumps({**bare, "tokens": bare["tokens"] + 1}))  # not this folder's
    as_command("papers", papers.run, arguments)
    assert json.loads(place.read_text(encoding="utf-8"))["curve"] == []
    place.write_text(json.dumps(bare))
    [trials] = (tmp_path / "cache").glob("**/trials.jsonl")
    os.utime(trials, (time.time() + 9, time.time() + 9))  # it is being made again
    as_command("papers", papers.run, arguments)
    trials.unlink()
    as_command("papers", papers.run, arguments)
    assert json.loads(place.read_text(encoding="utf-8")) == bare


def test_rows_to_confirm_on_that_are_train_rows_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overlapping(data: Path | None, seed: int) -> Parts:
        drawn = TASK.rows(data, seed)
        return drawn._replace(val=[*drawn.train[:3], *drawn.val])

    lm = model()
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path))
    task = dataclasses.replace(TASK, rows=overlapping)
    whole = TASK.rows(tmp_path, 0)
    found = _Bench(task, tmp_path, lm, lambda what, done, total: None).measure(
        Run("toss", "ape", 0, 300, lm.model), APE
    )
    assert (found["confirm_rows"], len(overlapping(tmp_path, 0).val)) == (len(whole.val), len(whole.val) + 3)


def test_labels_have_a_macro_f1_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model()
    found = bench(lm, monkeypatch, tmp_path).measure(Run("toss", "ape", 0, 300, lm.model), APE)
    assert (found["compiled_f1"], found["compiled"]) == (1.0, 1.0)
    assert 0 < found["seed_f1"] < 1


def test_a_persons_instruction_is_scored_without_a_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model()
    task = dataclasses.replace(TASK, human=lambda data: GOOD)
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path))
    found = _Bench(task, tmp_path, lm, lambda what, done, total: None).measure(
        Run("toss", "human", 0, 9, lm.model), None
    )
    assert (found["compiled"], found["calls"], found["instructions"]) == (1.0, 0, GOOD)
    assert len(asked(lm)) == 2 * 40


def test_a_method_is_named_alone_or_in_a_mixture() -> None:
    assert kind_of("ape") is APE
    mixture: Any = kind_of("ape+mixture")
    assert (mixture.func, mixture.keywords) == (MixtureOfExperts, {"method": APE})
    assert kind_of("human") is None


def test_a_method_is_named_with_settings() -> None:
    method: Any = kind_of("ape:mode=labels,few_shot=8")
    assert (method.func, method.keywords) == (APE, {"mode": "labels", "few_shot": 8})
    mixture: Any = kind_of("ape:few_shot=8+mixture")
    assert (mixture.func, mixture.keywords) == (MixtureOfExperts, {"method": APE, "settings": {"few_shot": 8}})


def test_a_name_that_is_no_method_is_refused_with_those_there_are() -> None:
    for name in ("best", "ape+more"):
        with pytest.raises(ConfigError, match=rf"^No method '{re.escape(name)}'; there are human, ape, .*\+mixture"):
            kind_of(name)


def test_a_budget_that_a_method_refuses_is_a_result_of_no_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model()

    found = bench(lm, monkeypatch, tmp_path).measure(Run("toss", "ape", 0, 70, lm.model), APE)

    assert (found["gain"], found["replaced"], found["calls"]) == (0.0, False, 0)
    assert "needs at least" in found["refused"]


def test_a_compile_that_ends_unconfirmed_is_a_run_of_no_gain_with_what_it_has_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(*_: object) -> None:
        raise BudgetExhausted("300 of calls=300 are spent.")

    lm = model()
    monkeypatch.setattr(Compile, "conclude", ends)

    found = bench(lm, monkeypatch, tmp_path).measure(Run("toss", "ape", 0, 300, lm.model), APE)

    assert (found["gain"], found["replaced"]) == (0.0, False)
    assert found["unconfirmed"].startswith("300 of calls=300 are spent. Spent so far:")
    assert "refused" not in found
    assert found["calls"] == len(asked(lm)) - found["test_rows"] > 0
    assert found["tokens"] > 0


def test_a_quick_run_is_scored_on_fewer_test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model()
    found = bench(lm, monkeypatch, tmp_path).measure(Run("toss", "ape", 0, 300, lm.model, 10), APE)
    assert (found["test_rows"], found["compiled"]) == (10, 1.0)


def test_quick_runs_take_one_task_and_two_methods_and_stay_out_of_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[Run] = []

    def measured(one: Run, **more: Any) -> dict[str, Any]:
        asked_for.append(one)
        scores = {"seed_score": 0.5, "compiled": 0.5, "gain": 0.0, "low": 0.0, "high": 0.0}
        return {"task": one.task, "method": one.method, "seed": one.seed, "replaced": False, **scores}

    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path))
    monkeypatch.setattr(papers, "_measured", measured)
    monkeypatch.setattr(papers, "lm_of", lambda name: model())

    as_command("papers", papers.run, ["--quick"])

    assert [(run.task, run.method, run.seed, run.calls, run.test_rows) for run in asked_for] == [
        ("tickets", "ape", 0, 500, 50),
        ("tickets", "protegi", 0, 500, 50),
    ]
    assert len(list((tmp_path / "quick").glob("*/*.json"))) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("data", "SetFit/subj@1"), ("lm", "simulated/toss@1"), ("device", "NVIDIA H200")],
)
def test_results_of_other_data_another_model_or_device_are_not_taken_for_done(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(papers, "lm_of", lambda name: model())
    monkeypatch.setattr(papers, "_measured", lambda one, **more: pytest.fail("nothing is run"))
    place = tmp_path / "toss-600"
    place.mkdir()
    scores = {"seed_score": 0.5, "compiled": 0.5, "gain": 0.0, "low": 0.0, "high": 0.0}
    held = {"task": "tickets", "method": "ape", "seed": 0, "replaced": False, "lm": "simulated/toss", **scores}
    arguments = ["--task", "tickets", "--method", "ape", "--seeds", "1", "--out", str(tmp_path)]

    (place / "tickets-ape-0.json").write_text(json.dumps(held))
    as_command("papers", papers.run, arguments)  # older: it has neither data nor device
    known = {"data": "upstream", "device": papers._device()}
    (place / "tickets-ape-0.json").write_text(json.dumps(held | known))
    as_command("papers", papers.run, arguments)
    (place / "tickets-ape-0.json").write_text(json.dumps(held | known | {name: value}))
    with pytest.raises(ConfigError, match=rf"tickets-ape-0\.json was made with {name} {value}, not .*--out"):
        as_command("papers", papers.run, [*arguments, "--method", "protegi"])


def test_nothing_to_run_is_told_with_why_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(papers, "lm_of", lambda name: pytest.fail("no model is needed"))
    with pytest.raises(ConfigError, match=r"^Nothing to run: the data of trec, subj has no instruction .* wrote"):
        as_command(
            "papers", papers.run, ["--method", "human", "--task", "trec", "--task", "subj", "--out", str(tmp_path)]
        )


def test_data_that_isnt_there_is_told_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*given: Any, **more: Any) -> Any:
        raise AssertionError("it was compiled")

    monkeypatch.setattr(papers, "_measured", measured)
    with pytest.raises(ConfigError, match="The task antonyms is read from its upstream's files only; pass --data-dir"):
        as_command("papers", papers.run, ["--task", "tickets", "--task", "antonyms", "--out", str(tmp_path)])


def test_answers_of_a_gpu_have_a_ledger_of_their_own() -> None:
    assert papers._ledger_name("trec", "cpu, x86_64") == "trec-test.sqlite"
    assert papers._ledger_name("trec", "NVIDIA H200") == "trec-test-nvidia-h200.sqlite"


def test_results_of_equal_model_and_budget_go_into_one_folder() -> None:
    run = Run("subj", "ape", 1, 600, "local/qwen2.5-coder-1.5b@cc324af070c2")
    assert (run.group, run.name) == ("qwen2.5-coder-1.5b-600", "subj-ape-1")
    assert dataclasses.replace(run, test_rows=50).group == "qwen2.5-coder-1.5b-600-of-50"


@pytest.mark.parametrize(("power", "is_new"), [(1.0, True), (0.4, False)])
def test_a_candidate_with_demonstrations_is_scored_with_them_confirmed_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, power: float, is_new: bool
) -> None:
    lm = model() if is_new else graded({row.text: row.side for row in rows(0, 104)}, {GOOD: power}, default=power)

    one = bench(lm, monkeypatch, tmp_path)
    one.with_curve = False

    found = one.measure(Run("toss", "ape:few_shot=2", 0, 400, lm.model), partial(APE, few_shot=2))

    assert (found["replaced"], found["best_demos"]) == (is_new, 2)
    told = [(request, (request.messages[-1].text or "").split()[-1]) for request in asked(lm)]
    tested = [request for request, number in told if number.isdecimal() and int(number) >= 64]
    turns = [len(request.messages) for request in tested]
    assert turns == [*[1] * 40, *[5] * 40], "the prompt's, then those of the candidate: two turns a demonstration"
    scores = [found[name] for name in ("compiled", "gain", "low", "high")]
    assert [found[f"candidate{end}"] for end in ("", "_gain", "_low", "_high")] == scores
    curve = one.curve(Run("toss", "ape:few_shot=2", 0, 400, lm.model))
    ends = [(point["demos"], point["test"]) for point in (curve[0], curve[-1])]
    assert ends == [(0, found["seed_score"]), (2, found["candidate"])]
