"""The mixture of experts, over APE: topics with rules of their own, in an embedding that tells them apart."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import dspy
import numpy as np
import pydantic
import pytest
from dspy.lm15 import Request

from preceptor import load
from preceptor.checks import taken_inputs
from preceptor.errors import ConfigError, InputTooLong, LMFailed, MetricError, RunError
from preceptor.life import Compile
from preceptor.lm.budget import Budget, Cost
from preceptor.lm.embedding import Embedder
from preceptor.modules import Classify, Experts
from preceptor.program import read
from preceptor.regions import divided
from preceptor.scoring.trial import Trial
from preceptor.task import Task
from preceptor.teleprompter import Estimate, Teleprompter
from preceptor.teleprompters import APE, GEPA, ConstitutionalExperts, MixtureOfExperts
from preceptor.teleprompters.layout import Layout, _half, kept
from preceptor.testing import asked, coin_flip, prompt, simulated, system, toy
from preceptor.testing.draws import draw, number

LABELS = "text -> label: Literal['yes', 'no']"
SEED = "Sort."
SAME, OTHER = "Answer with the last word.", "Answer with the opposite."
TURNED = {"yes": "no", "no": "yes"}
TOPICS = ("fruit", "tools")


def rows(count: int, start: int = 0) -> list[dspy.Example]:
    """Rows whose label is their last word, or for tools the opposite."""
    found: list[dspy.Example] = []
    for n in range(start, start + count):
        topic, word = TOPICS[n % 2], ("yes", "no")[n // 2 % 2]
        label = word if topic == "fruit" else TURNED[word]
        found.append(dspy.Example(text=f"{topic} {n} {word}", label=label).with_inputs("text"))
    return found


def fruit(count: int, start: int = 0) -> list[dspy.Example]:
    return [row for row in rows(2 * count, start) if row.text.startswith("fruit")]


def by_topic(texts: Sequence[str]) -> list[list[float]]:
    places = {"fruit": [1.0, 0.0], "tools": [0.0, 1.0]}
    return [places.get(text.split()[0], [1.0, 1.0]) for text in texts]


EMBEDDER = Embedder("topics", by_topic)


def answer(request: Request) -> str:
    """No, unless told a rule."""
    word = prompt(request).split()[-1]
    return word if SAME in system(request) else TURNED[word] if OTHER in system(request) else "no"


def propose(request: Request) -> str:
    """One of the two rules, or one that helps nobody."""
    drawn = number(draw(prompt(request), request.config.seed))
    return (SAME, OTHER, f"Think of {drawn}.")[drawn % 3]


def mixture(place: Path, kind: type[MixtureOfExperts] = MixtureOfExperts, **settings: Any) -> MixtureOfExperts:
    given: dict[str, Any] = {
        "metric": "accuracy",
        "lm": simulated(answer, name="task"),
        "proposer": simulated(propose, name="writer"),
        "run_dir": place,
        "regions": 2,
        "embedder": EMBEDDER,
        "settings": {"candidates": 8, "subsamples": 4},
    }
    return kind(**{**given, **settings})


def compiled_by(method: MixtureOfExperts, **data: Any) -> Any:
    given: dict[str, Any] = {"trainset": rows(40), "valset": rows(64, 40), **data}
    return method.compile(Classify(LABELS, SEED), **given)


def table(compiled: Any) -> list[str]:
    return [region["expert"] for region in compiled.evidence.regions]


def test_opposite_rules_are_found_and_the_mixture_solves_what_no_prompt_can(tmp_path: Path) -> None:
    compiled = compiled_by(mixture(tmp_path))

    evidence, fresh = compiled.evidence, rows(40, 200)
    assert isinstance(compiled, Experts)
    assert (evidence.baseline, evidence.compiled, evidence.replaced) == (0.5, 1.0, True)
    assert evidence.comparison.rows == 32, "half of the confirmation rows chose the experts"
    with dspy.context(lm=simulated(answer)):
        answered = [compiled(**row.inputs()) for row in fresh]
    assert [made.label for made in answered] == [row.label for row in fresh]
    assert {made.route["region"] for made in answered} == {"region 1", "region 2"}


def test_the_program_in_the_run_folder_is_the_one_returned(tmp_path: Path) -> None:
    compiled = compiled_by(mixture(tmp_path))

    loaded: Any = load(tmp_path / "program", embedder=EMBEDDER)

    assert loaded.dump_state() == compiled.dump_state()
    saved = read(tmp_path / "program")
    assert saved.instructions == compiled.evidence.instructions
    assert saved.evidence["method"] == "MixtureOfExperts of APE"
    assert saved.evidence["regions"] == [dict(region) for region in compiled.evidence.regions]
    assert len(saved.evidence["probes"]) == 3
    with dspy.context(lm=simulated(answer)):
        assert all(loaded(**probe["inputs"]).label == probe["answer"] for probe in saved.evidence["probes"])


def test_a_program_that_was_compiled_before_has_its_predictors_in_the_mixture_too(tmp_path: Path) -> None:
    before: Any = Classify(LABELS, SEED)
    before._compiled = True
    compiled = mixture(tmp_path).compile(before, trainset=rows(40), valset=rows(64, 40))
    assert table(compiled) != ["default"] * len(table(compiled))
    assert [name for name, _ in compiled.named_predictors()] != []


def test_a_region_where_nothing_better_is_found_keeps_the_default(tmp_path: Path) -> None:
    compiled = compiled_by(mixture(tmp_path, proposer=simulated(lambda request: OTHER, name="writer")))

    tools = compiled.router.route({"text": "tools 1 yes"}).region
    rows = {region["region"]: region for region in compiled.evidence.regions}
    assert list(compiled.experts) == [tools]
    assert rows.pop(tools)["expert"] == "its own"
    [fruit] = rows.values()
    assert fruit["expert"] == "default: nothing better was found"
    assert fruit["compiled"] == fruit["seed"] == 0.5
    assert compiled.evidence.instructions == {"default: predict": SEED, f"{tools}: predict": OTHER}
    assert compiled.evidence.seed_instructions == {"default: predict": SEED, f"{tools}: predict": SEED}


@pytest.mark.parametrize("threads", [1, 2, 32])
def test_equal_seeds_give_equal_programs_at_any_number_of_threads_and_whatever_the_timing(
    tmp_path: Path, threads: int
) -> None:
    def slowly(request: Request) -> str:
        time.sleep(random.random() / 500)
        return answer(request)

    compiled_by(mixture(tmp_path / "plain", threads=1))
    compiled_by(mixture(tmp_path / "timed", threads=threads, lm=simulated(slowly, name="task")))

    assert toy.saved(tmp_path / "plain") == toy.saved(tmp_path / "timed")


def test_equal_seeds_give_equal_programs_when_the_budget_is_short_of_what_all_regions_want(tmp_path: Path) -> None:
    budget = Budget(calls=340)
    for threads in (1, 16):
        place = tmp_path / str(threads)
        evidence = compiled_by(mixture(place, threads=threads, budget=budget)).evidence
        assert evidence.spent.calls <= 340
    assert toy.saved(tmp_path / "1") == toy.saved(tmp_path / "16")


def test_regions_are_searched_side_by_side_but_one_by_one_where_two_cant_be(tmp_path: Path) -> None:
    inside: list[int] = []
    lock, running, both = threading.Lock(), Counter[str](), threading.Barrier(2)

    class Slow(APE):
        def search(self, task: Task) -> Any:
            with lock:
                running["now"] += 1
                inside.append(running["now"])
                is_of_a_region = len(inside) > 1
            if is_of_a_region and most == 2:
                both.wait(60)
            time.sleep(0.05)
            found = super().search(task)
            with lock:
                running["now"] -= 1
            return found

    class Alone(Slow):
        is_alone = True

    for kind, threads, most in ((Slow, 8, 2), (Slow, 1, 1), (Alone, 8, 1)):
        inside.clear()
        compiled_by(mixture(tmp_path / f"{kind.__name__}{threads}", method=kind, threads=threads))
        assert (len(inside), max(inside)) == (3, most)
    assert GEPA.is_alone


def test_each_region_has_randomness_of_its_own(tmp_path: Path) -> None:
    drawn: list[float] = []

    class Drawing(APE):
        def search(self, task: Task) -> Any:
            drawn.append(task.rng.random())
            return super().search(task)

    for place in ("one", "two"):
        compiled_by(mixture(tmp_path / place, method=Drawing, threads=1))

    assert drawn[:3] == drawn[3:]
    assert len(set(drawn[:3])) == 3


@pytest.mark.parametrize("threads", [1, 8])
def test_progress_names_the_region_and_of_searches_side_by_side_tells_where_steps_begin(
    tmp_path: Path, threads: int
) -> None:
    told: list[tuple[str, int]] = []
    compiled_by(mixture(tmp_path, threads=threads, report=lambda what, done, total: told.append((what, done))))

    inside = [(what, done) for what, done in told if what.startswith("region ")]
    assert {what[:9] for what, _ in inside} == {"region 1:", "region 2:"}
    assert {done > 0 for _, done in inside} == ({True, False} if threads == 1 else {False})


def test_confirmation_rows_are_seen_by_no_search_and_once_by_every_program(tmp_path: Path) -> None:
    lm = simulated(answer, name="task")
    compiled = compiled_by(mixture(tmp_path, lm=lm))

    untouched = {row.text: row for row in rows(64, 40)}
    times = Counter(text for request in asked(lm) if (text := prompt(request).removeprefix("text: ")) in untouched)
    default = compiled.evidence.instructions["default: predict"]
    programs = {region["region"]: (default != SEED) + ("gain" in region) for region in compiled.evidence.regions}
    assert set(times) == set(untouched)
    for text in untouched:
        assert times[text] == 1 + programs[compiled.router.route({"text": text}).region]


def test_experts_are_chosen_on_rows_that_dont_measure_the_mixture(tmp_path: Path) -> None:
    compiled = compiled_by(mixture(tmp_path))

    regions = compiled.evidence.regions
    assert [region["choosing_rows"] + region["measuring_rows"] for region in regions] == [32, 32]
    assert sum(region["measuring_rows"] for region in regions) == compiled.evidence.comparison.rows
    tested = [region for region in regions if "gain" in region]
    assert tested
    assert all(0.4 < region["gain"] < 0.6 and region["p_value"] < 0.05 for region in tested)


def test_p_values_are_corrected_for_the_regions_that_were_tested(tmp_path: Path) -> None:
    """16 rows choose in each region, of which the right rule turns 8: p = 2 / 2^8 each, and twice that by Holm."""

    def write(request: Request) -> str:
        return "Guess." if "fruit" in prompt(request) and "tools" in prompt(request) else propose(request)

    none = simulated(write, name="writer")
    compiled = compiled_by(mixture(tmp_path, proposer=none))

    assert table(compiled) == ["its own", "its own"]
    assert [region["p_value"] for region in compiled.evidence.regions] == [2 / 128, 2 / 128]


def test_experts_that_are_better_by_a_test_alone_but_not_by_holms_are_not_adopted(tmp_path: Path) -> None:
    """12 rows choose in each region, of which the right rule turns 6: p = 2 / 2^6 each, and twice that by Holm."""

    def write(request: Request) -> str:
        return "Guess." if "fruit" in prompt(request) and "tools" in prompt(request) else propose(request)

    compiled = compiled_by(mixture(tmp_path, proposer=simulated(write, name="writer")), valset=rows(48, 40))

    assert [region["p_value"] for region in compiled.evidence.regions] == [2 / 32, 2 / 32]
    assert table(compiled) == 2 * ["default: its own wasn't confirmed"]


def test_experts_of_a_later_look_at_the_same_rows_have_a_smaller_level_to_pass(tmp_path: Path) -> None:
    """Twice 2 / 2^8 is above 0.05 / 5."""

    def write(request: Request) -> str:
        return "Guess." if "fruit" in prompt(request) and "tools" in prompt(request) else propose(request)

    def found() -> Any:
        return compiled_by(mixture(tmp_path, proposer=simulated(write, name="writer")))

    first, again, place = found(), found(), tmp_path / "run.json"
    known = json.loads(place.read_text())
    place.write_text(json.dumps({**known, "looks": ["a", "b", "c", "d"]}))
    kept = found()
    (tmp_path / "result.json").unlink()
    later = found()

    assert [compiled.evidence.comparison.look for compiled in (first, again)] == [1, 1]
    assert (table(first), table(again)) == (["its own"] * 2, ["its own"] * 2)
    assert (table(kept), type(kept)) == (table(first), Experts)
    assert "This is look 5 at these rows" in kept.evidence.later
    with dspy.context(lm=simulated(answer)):
        told = [(each(text="fruit 3 no").label, each(text="tools 3 no").label) for each in (kept, first)]
    assert told[0] == told[1]
    assert table(later) == ["default: its own wasn't confirmed"] * 2
    assert [row["p_value"] for row in later.evidence.regions] == [2 / 128, 2 / 128]


def test_regions_too_small_to_be_searched_or_confirmed_are_not_searched(tmp_path: Path) -> None:
    few = [row for row in rows(40) if row.text.startswith("fruit")] + rows(8)
    compiled = compiled_by(mixture(tmp_path / "train", least_rows=10), trainset=few)
    assert "default: fewer than 10 train rows" in table(compiled)

    confirm = [row for row in rows(64, 40) if row.text.startswith("fruit")] + rows(8, 200)
    compiled = compiled_by(mixture(tmp_path / "confirm"), valset=confirm)
    [poor] = [row["region"] for row in compiled.evidence.regions if row["expert"].endswith("few confirmation rows")]
    assert [path.name for path in (tmp_path / "confirm").glob("region-*")] == list(
        {"region-1", "region-2"} - {poor.replace(" ", "-")}
    )


def test_a_budget_that_pays_for_no_region_is_spent_as_by_the_method_alone(tmp_path: Path) -> None:
    method = mixture(tmp_path / "least")
    least = method.estimate(toy.signatures(Classify(LABELS)), 40, 1).least + 3 * 64
    compiled = compiled_by(mixture(tmp_path / "least", budget=Budget(calls=least)))

    assert table(compiled) == 2 * ["default: the budget is too small"]
    assert compiled.evidence.spent.calls <= least


def test_half_of_the_calls_go_to_the_search_on_all_rows_and_the_rest_to_the_regions_by_their_rows(
    tmp_path: Path,
) -> None:
    shares: dict[int, int | None] = {}

    class Noting(APE):
        def search(self, task: Task) -> Any:
            shares[len(task.train)] = task.meter.account.calls_left
            return []

    train = [row for row in rows(40) if row.text.startswith("fruit")] + rows(20, 200)
    compiled_by(mixture(tmp_path, method=Noting, budget=Budget(calls=1000)), trainset=train)

    # 1000 - 3 * 64 are left to search with; nobody spends any: 30 and 10 train rows
    assert shares == {40: 404, 30: 606, 10: 202}


def test_a_region_that_is_searched_later_has_lost_no_seconds_to_those_before(tmp_path: Path) -> None:
    lost: list[float] = []

    class Noting(APE):
        def search(self, task: Task) -> Any:
            account = task.meter.account
            assert account.budget.seconds is not None
            lost.append(account.budget.seconds - (account.seconds_left or 0.0))
            return super().search(task)

    compiled_by(mixture(tmp_path, method=Noting, threads=1, budget=Budget(seconds=600)))

    assert lost == [0.0, 0.0, 0.0]


def test_dear_calls_in_one_region_take_no_tokens_from_another(tmp_path: Path) -> None:
    spent: list[tuple[int, int | None]] = []

    class Spending(APE):
        def search(self, task: Task) -> Any:
            account, is_first = task.meter.account, len(task.train) == 40
            call = Cost(1, 100 if is_first else 1000)
            try:
                for _ in range(10 if is_first else 1000):
                    account.reserve(call)
                    account.settle(call, call, billed=True)
            finally:
                spent.append((account.spent.tokens, account.budget.tokens))
            return []

    compiled_by(mixture(tmp_path, method=Spending, threads=1, budget=Budget(tokens=100_000)))

    # 100,000 - 1,000 - 1.25 * 1.1 * 192 calls of 100 are left to two regions of 20 rows
    assert spent == [(1_000, 50_000), (36_000, 36_300), (36_000, 36_300)]


def test_an_expert_that_might_be_luck_is_not_adopted(tmp_path: Path) -> None:
    """8 rows choose in each region, of which the right rule turns 4: p = 2 / 2^4."""
    compiled = compiled_by(mixture(tmp_path), valset=rows(32, 40))

    assert not isinstance(compiled, Experts)
    refused = [row for row in compiled.evidence.regions if row["expert"] == "default: its own wasn't confirmed"]
    assert [row["gain"] for row in refused] == [0.5] * len(refused) != []


TOOLS = [row.text for row in rows(64, 40) if row.text.startswith("tools") and row.label == "no"]
"""Rows to confirm on that the seed and the expert for tools answer alike."""


class Open(MixtureOfExperts):
    """Tells which confirmation rows measure."""

    measuring: ClassVar[set[str]] = set()

    def _layout(self, compiling: Compile, task: Task) -> Layout:
        layout = super()._layout(compiling, task)
        self.measuring.update(row.text for at, row in enumerate(compiling.confirm) if at not in layout.gates)
        return layout


def test_rows_of_equal_inputs_choose_or_measure_together() -> None:
    confirm = [dspy.Example(text=str(at % 9), label="yn"[at % 2]).with_inputs("text") for at in range(36)]

    choose = _half(confirm, range(36), "label", "0 region")

    assert 0 < len(choose) <= 18
    assert not {at % 9 for at in choose} & {at % 9 for at in range(36) if at not in choose}


def test_no_call_is_spent_on_a_region_whose_different_inputs_are_too_few_to_confirm_anything(tmp_path: Path) -> None:
    fruit, tools = ([row for row in rows(64, 40) if row.text.startswith(topic)] for topic in TOPICS)

    compiled = compiled_by(mixture(tmp_path), valset=[*fruit, *tools[:4] * 8])

    [tools_region] = [row for row in compiled.evidence.regions if row["expert"] == "default: too few confirmation rows"]
    assert (tools_region["choosing_rows"], tools_region["train_rows"]) == (16, 20)


def test_experts_that_dont_hold_on_the_rows_that_measure_are_not_adopted(tmp_path: Path) -> None:
    """There every right answer counts as wrong, so the experts were chosen by what they can't repeat."""

    def metric(example: dspy.Example, prediction: dspy.Prediction) -> float:
        return float((example.label == prediction.label) != (example.text in Open.measuring))

    compiled = compiled_by(mixture(tmp_path, metric=metric, kind=Open))

    assert not isinstance(compiled, Experts)
    kept = [row for row in compiled.evidence.regions if row["expert"] == "default: the mixture wasn't confirmed"]
    assert kept
    assert all(row["compiled"] == row["seed"] for row in kept), "the default is the seed"
    tested = compiled.evidence.comparison
    assert (tested.rows, tested.gain < 0, tested.look) == (32, True, 1), "what was measured of it is told"
    assert (compiled.evidence.has_candidate, compiled.evidence.replaced, compiled.evidence.gain) == (True, False, 0.0)
    assert compiled.evidence.verdict.startswith("Kept: no significant improvement on 32 untouched rows.")
    assert compiled.evidence.verdict.endswith(" 0 of 2 regions have an expert of their own.")


def test_an_expert_is_not_chosen_by_leaving_out_the_rows_that_only_it_fails_with(tmp_path: Path) -> None:
    """It turns 8 of the 16 rows that choose; with 5 that the default answers it fails, and 8 to 5 may be luck."""
    Open.measuring.clear()

    def answering(request: Request) -> str:
        choosing = [text for text in TOOLS if text not in Open.measuring]
        if OTHER in system(request) and prompt(request).removeprefix("text: ") in choosing[:5]:
            raise InputTooLong("too long")
        return answer(request)

    compiled = compiled_by(mixture(tmp_path, lm=simulated(answering, name="task"), kind=Open))

    gains = {row["expert"]: row["gain"] for row in compiled.evidence.regions}
    assert gains == {"its own": 0.5, "default: its own wasn't confirmed": 3 / 16}


def test_an_expert_that_fails_with_rows_that_measure_has_them_counted_as_wrong(tmp_path: Path) -> None:
    Open.measuring.clear()

    def answering(request: Request) -> str:
        measuring = [text for text in TOOLS if text in Open.measuring]
        if OTHER in system(request) and prompt(request).removeprefix("text: ") in measuring[:3]:
            raise InputTooLong("too long")
        return answer(request)

    evidence = compiled_by(mixture(tmp_path, lm=simulated(answering, name="task"), kind=Open)).evidence

    assert (evidence.replaced, evidence.compiled, evidence.comparison.rows) == (True, 29 / 32, 32)
    assert sorted(row["compiled"] for row in evidence.regions) == [13 / 16, 1.0]
    assert evidence.compiled_ci[0] < 29 / 32 < evidence.compiled_ci[1] < 1.0


def test_where_no_prompt_can_help_no_expert_is_adopted(tmp_path: Path) -> None:
    """A coin answers. Its chance to be adopted is below one in a thousand: two tests on different rows must fail."""
    adopted: list[int] = []
    for seed in range(4):
        rng = random.Random(seed)
        data = {
            name: [row.copy(label=rng.choice(["yes", "no"])) for row in rows(40, start)]
            for name, start in (("trainset", 100 * seed), ("valset", 100 * seed + 40))
        }
        lm = coin_flip(["yes", "no"], seed=seed)
        compiled = compiled_by(
            mixture(tmp_path / str(seed), lm=lm, proposer=None, seed=seed, settings={"candidates": 4}), **data
        )
        adopted += [seed] if isinstance(compiled, Experts) else []

    assert adopted == []


def test_a_region_of_too_few_rows_beside_its_demonstrations_keeps_the_default_and_has_no_share(tmp_path: Path) -> None:
    compiled = compiled_by(mixture(tmp_path, settings={"candidates": 4, "few_shot": 11}), trainset=rows(40))
    assert table(compiled) == 2 * ["default: fewer than 21 train rows"]


def test_a_region_whose_search_refuses_its_rows_keeps_the_default(tmp_path: Path) -> None:
    class Picky(APE):
        def search(self, task: Task) -> Sequence[Trial]:
            if len(task.train) < 40:
                raise ConfigError(f"Picky needs 40 rows, got {len(task.train)}.")
            return super().search(task)

    compiled = compiled_by(mixture(tmp_path, method=Picky, settings={"candidates": 4}), trainset=rows(40))
    assert table(compiled) == 2 * ["default: Picky needs 40 rows, got 20."]


def test_demonstrations_of_an_expert_are_from_its_region(tmp_path: Path) -> None:
    compiled = compiled_by(
        mixture(tmp_path, settings={"candidates": 8, "few_shot": 2}), trainset=rows(60), valset=rows(64, 60)
    )

    for region, expert in compiled.experts.items():
        topics = {demo["text"].split()[0] for demo in expert.predict.demos}
        assert len(topics) == 1
        assert {compiled.router.route({"text": demo["text"]}).region for demo in expert.predict.demos} == {region}


def test_a_model_that_goes_down_in_a_region_ends_the_compile_which_resumes_to_the_same_program(tmp_path: Path) -> None:
    whole, calls = Counter[str](), Counter[str]()

    def counted(request: Request) -> str:
        whole["calls"] += 1
        return answer(request)

    compiled_by(mixture(tmp_path / "whole", lm=simulated(counted, name="task"), threads=1))

    def failing(request: Request) -> str:
        calls["made"] += 1
        if calls["made"] > whole["calls"] // 2:
            raise ConnectionError("no route")
        return answer(request)

    with pytest.raises(LMFailed, match=r"(?s)no route.*compile again, with run_dir="):
        compiled_by(mixture(tmp_path / "broken", lm=simulated(failing, name="task")))
    compiled_by(mixture(tmp_path / "broken"))

    assert toy.saved(tmp_path / "broken") == toy.saved(tmp_path / "whole")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise as it does in a process of one's own: where tests share the cores, their processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_the_regions_is_raised_once_the_calls_under_way_are_recorded(tmp_path: Path) -> None:
    """Two calls are sent at a time, and two wait for a place."""
    begun = Counter[str]()

    def slowly(request: Request) -> str:
        if (tmp_path / "region-2").exists():
            begun["calls"] += 1
            if begun["calls"] == 5:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.1)
        return answer(request)

    lm, writer = simulated(slowly, name="task"), simulated(propose, name="writer")
    with pytest.raises(KeyboardInterrupt):
        compiled_by(mixture(tmp_path, lm=lm, proposer=writer, threads=2))
    asked_by_then = len(asked(lm)) + len(asked(writer))
    time.sleep(0.3)

    assert begun["calls"] < 20
    assert len(asked(lm)) + len(asked(writer)) == asked_by_then == toy.recorded(tmp_path)


KILLED = """
import importlib.util, os, pathlib, signal, sys
spec = importlib.util.spec_from_file_location("mixed", sys.argv[1])
sys.modules["mixed"] = tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
left = int(sys.argv[3])

def answer(request):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return tests.answer(request)

tests.compiled_by(tests.mixture(pathlib.Path(sys.argv[2]), lm=tests.simulated(answer, name="task")))
"""


def test_killed_in_a_region_it_resumes_to_the_same_program_and_asks_nothing_twice(tmp_path: Path) -> None:
    lm = simulated(answer, name="task")
    compiled_by(mixture(tmp_path / "whole", lm=lm))
    calls = len(asked(lm))

    killed = [sys.executable, "-c", KILLED, __file__, str(tmp_path / "killed"), str(calls // 2)]
    assert subprocess.run(killed, check=False).returncode == -signal.SIGKILL
    recorded = toy.recorded(tmp_path / "killed")
    resumed = simulated(answer, name="task")
    compiled_by(mixture(tmp_path / "killed", lm=resumed))

    assert toy.saved(tmp_path / "killed") == toy.saved(tmp_path / "whole")
    assert toy.recorded(tmp_path / "killed") == toy.recorded(tmp_path / "whole")
    assert 0 < len(asked(resumed)) <= toy.recorded(tmp_path / "whole") - recorded


def test_each_regions_trials_are_in_a_folder_of_its_own_and_written_anew_on_resume(tmp_path: Path) -> None:
    compiled_by(mixture(tmp_path))
    lines = (tmp_path / "region-1" / "trials.jsonl").read_text(encoding="utf-8")
    assert max(json.loads(line)["rows"][-1] for line in lines.splitlines()) < 20

    compiled_by(mixture(tmp_path))
    assert (tmp_path / "region-1" / "trials.jsonl").read_text(encoding="utf-8") == lines


def test_texts_are_embedded_once_for_a_run_and_not_again_when_it_is_resumed(tmp_path: Path) -> None:
    seen: list[str] = []

    def embed(texts: Sequence[str]) -> Any:
        seen.extend(texts)
        return by_topic(texts)

    compiled_by(mixture(tmp_path, embedder=Embedder("topics", embed)))
    first = Counter(seen)
    assert {first[row.text] for row in (*rows(40), *rows(64, 40))} == {1}

    seen.clear()
    compiled_by(mixture(tmp_path, embedder=Embedder("topics", embed)))
    assert not {row.text for row in rows(104)} & set(seen)


def test_another_embedder_is_another_run(tmp_path: Path) -> None:
    compiled_by(mixture(tmp_path))
    with pytest.raises(ConfigError, match="belongs to another method"):
        compiled_by(mixture(tmp_path, embedder=Embedder("others", by_topic)))


def test_an_embedder_that_changed_under_its_name_embeds_all_texts_anew(tmp_path: Path) -> None:
    def trained(texts: Sequence[str]) -> list[list[float]]:
        return [[y, -x] for x, y in by_topic(texts)]

    compiled_by(mixture(tmp_path))
    compiled = compiled_by(mixture(tmp_path, embedder=Embedder("topics", trained)))

    fresh = rows(40, 200)
    assert compiled.evidence.compiled == 1.0
    with dspy.context(lm=simulated(answer)):
        assert [compiled(**row.inputs()).label for row in fresh] == [row.label for row in fresh]


@pytest.mark.parametrize("damage", ["emptied", "cut off", "overwritten", "a column", "a row short"])
def test_a_damaged_file_of_embeddings_is_told_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    embedder, texts = Embedder("topics", by_topic), ["a fruit", "some tools"]
    made = kept(tmp_path, embedder, texts, lambda *_: None)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage in ("a column", "a row short"):
        known = np.load(path)
        np.save(path, known[:, 0] if damage == "a column" else known[1:])
    else:
        path.write_bytes({"emptied": b"", "cut off": whole[:-4], "overwritten": b"?" * len(whole)}[damage])

    assert kept(tmp_path, embedder, texts, lambda *_: None).tolist() == made.tolist()
    assert path.read_bytes() == whole
    assert "is damaged; embedding all texts anew" in caplog.text


def test_a_folders_model_that_was_trained_further_is_another_run(
    tmp_path: Path, save_encoder: Callable[[Path, Mapping[str, Sequence[float]]], Path]
) -> None:
    words = {"fruit": [1.0, 0.0], "tools": [0.0, 1.0], "fox": [1.0, 1.0]}
    encoder = str(save_encoder(tmp_path / "encoder", words))
    compiled = compiled_by(mixture(tmp_path / "run", embedder=encoder))
    assert compiled.evidence.compiled == 1.0

    save_encoder(tmp_path / "encoder", {**words, "fruit": words["tools"], "tools": words["fruit"]})
    with pytest.raises(RunError, match="belongs to another method"):
        compiled_by(mixture(tmp_path / "run", embedder=encoder))


def test_a_confirmed_mixture_with_a_folders_embedder_stays_when_a_larger_budget_confirms_nothing(
    tmp_path: Path, save_encoder: Callable[[Path, Mapping[str, Sequence[float]]], Path]
) -> None:
    class Lavish(APE):
        def search(self, task: Task) -> Sequence[Trial]:
            return super().search(task) if (self.budget.calls or 0) < 3000 else []

    encoder = str(save_encoder(tmp_path / "encoder", {"fruit": [1.0, 0.0], "tools": [0.0, 1.0], "fox": [1.0, 1.0]}))
    first, second = (
        compiled_by(mixture(tmp_path / "run", embedder=encoder, method=Lavish, budget=Budget(calls=calls)))
        for calls in (2000, 4000)
    )

    assert (first.evidence.compiled, second.evidence.compiled) == (1.0, 1.0)
    assert "A search that went on from there confirmed nothing else" in second.evidence.verdict
    assert isinstance(second, Experts)
    assert read(tmp_path / "run" / "program").is_routed


def test_rows_that_repeat_count_once_where_regions_are_chosen(tmp_path: Path) -> None:
    method = mixture(tmp_path, regions=0, least_rows=30)
    compiled = compiled_by(method, trainset=[*rows(40), *rows(40)])
    assert [region["train_rows"] for region in compiled.evidence.regions] == [80], "no two of 30 different rows"


def test_rows_without_a_direction_train_and_measure_the_default(tmp_path: Path) -> None:
    def embed(texts: Sequence[str]) -> list[list[float]]:
        return [
            [0.0, 0.0] if text.startswith("?") else place for text, place in zip(texts, by_topic(texts), strict=True)
        ]

    blank = [dspy.Example(text=f"? {n} no", label="no").with_inputs("text") for n in range(8)]
    data = {"trainset": [*rows(40), *blank[:4]], "valset": [*rows(64, 40), *blank[4:]]}
    compiled = compiled_by(mixture(tmp_path, embedder=Embedder("topics", embed)), **data)

    assert sum(region["train_rows"] for region in compiled.evidence.regions) == 40
    assert isinstance(compiled, Experts)
    told = json.loads((tmp_path / "regions.json").read_text(encoding="utf-8"))
    assert (told["members"].count(""), told["routes"].count("")) == (4, 4)
    with dspy.context(lm=simulated(answer)):
        assert compiled(text="? 9 no").route["expert"] == "default"


class Note(pydantic.BaseModel):
    topic: str
    number: int
    word: str


def test_rows_of_records_are_routed_as_they_were_measured(tmp_path: Path) -> None:
    class Sort(dspy.Signature):
        """Sort."""

        note: Note = dspy.InputField()
        label: Literal["yes", "no"] = dspy.OutputField()

    def embed(texts: Sequence[str]) -> list[list[float]]:  # of one way of writing a record only
        known = {f'"topic": "{topic}"': place for topic, place in zip(TOPICS, ([1.0, 0.0], [0.0, 1.0]), strict=True)}
        return [next((place for name, place in known.items() if name in text), [1.0, 1.0]) for text in texts]

    def word(request: Request) -> str:
        said = re.findall(r"yes|no(?!t)", prompt(request).rpartition("word")[2])[0]
        return said if SAME in system(request) else TURNED[said] if OTHER in system(request) else "no"

    def records(count: int, start: int = 0) -> list[dspy.Example]:
        parts = [(row.text.split(), row.label) for row in rows(count, start)]
        notes = [(Note(topic=topic, number=int(n), word=said), label) for (topic, n, said), label in parts]
        return [dspy.Example(note=note, label=label).with_inputs("note") for note, label in notes]

    method = mixture(tmp_path, embedder=Embedder("topics", embed), lm=simulated(word, name="task"))
    compiled: Any = method.compile(Classify(Sort), trainset=records(40), valset=records(64, 40))

    told = json.loads((tmp_path / "regions.json").read_text(encoding="utf-8"))
    assert isinstance(compiled, Experts)
    measured = records(64, 40)
    assert [compiled.router.route(dict(row.inputs().items())).region for row in measured] == told["routes"]
    assert set(told["routes"]) == {"region 1", "region 2"}


def test_rows_are_routed_by_the_inputs_that_the_program_takes(tmp_path: Path) -> None:
    def queued(count: int, start: int = 0) -> list[dspy.Example]:
        return [row.copy(queue="a desk").with_inputs("queue", "text") for row in rows(count, start)]

    compiled = compiled_by(mixture(tmp_path), trainset=queued(40), valset=queued(64, 40))

    assert compiled.router.fields == ("text",)
    told = json.loads((tmp_path / "regions.json").read_text(encoding="utf-8"))
    assert [compiled.router.route({"text": row.text}).region for row in rows(64, 40)] == told["routes"]


class Naming(dspy.Module):
    """Takes two inputs, of which its predictors see one."""

    def __init__(self) -> None:
        super().__init__()
        self.draft, self.final = dspy.Predict("text -> note"), dspy.Predict("note -> label")

    def forward(self, text: str, queue: str = "") -> Any:
        return self.final(note=self.draft(text=text).note + queue)


class Taking(dspy.Module):
    """The same, by any names."""

    def __init__(self) -> None:
        super().__init__()
        self.draft, self.final = dspy.Predict("text -> note"), dspy.Predict("note -> label")

    def forward(self, **inputs: Any) -> Any:
        return self.final(note=self.draft(text=inputs["text"]).note)


@pytest.mark.parametrize(
    ("program", "taken"),
    [
        (dspy.Predict("text -> label"), ["text"]),
        (Classify(LABELS, SEED), ["text"]),
        (Naming(), ["queue", "text"]),
        (Taking(), ["queue", "number", "text"]),
    ],
)
def test_what_a_program_takes_of_a_row_is_what_it_names_or_else_what_its_only_predictor_reads(
    program: dspy.Module, taken: list[str]
) -> None:
    row = dspy.Example(queue="a", number=1, text="b", label="yes").with_inputs("queue", "number", "text")
    assert taken_inputs(program, row) == taken


class Renaming(dspy.Module):
    """Answers a field that none of its predictors has."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict("text -> label: Literal['yes', 'no']")

    def forward(self, text: str) -> Any:
        return dspy.Prediction(route=self.predict(text=text).label)


@pytest.mark.parametrize("kind", [MixtureOfExperts, ConstitutionalExperts])
@pytest.mark.parametrize(
    ("student", "label", "message"),
    [
        (
            dspy.Predict("text -> route: Literal['yes', 'no']"),
            "route",
            r"^Experts answer with a field 'route'.* Rename ",
        ),
        (Renaming(), "route", r"^Experts answer with a field 'route'.* Rename that output field, in the rows too\.$"),
        (
            "experts",
            "label",
            r"^The program is a mixture of experts already.* Compile one of its experts: `program\.de",
        ),
    ],
    ids=["its own route", "a route made of another field", "experts already"],
)
def test_what_cant_be_routed_to_is_refused_before_anything_is_asked_or_embedded(
    tmp_path: Path, kind: Any, student: Any, label: str, message: str
) -> None:
    seen: list[str] = []

    def embed(texts: Sequence[str]) -> Any:
        seen.extend(texts)
        return by_topic(texts)

    lm, own = simulated(answer), {"settings": {"candidates": 2}} if kind is MixtureOfExperts else {}
    method = kind(lm=lm, regions=2, embedder=Embedder("topics", embed), run_dir=tmp_path, metric="accuracy", **own)
    if student == "experts":
        router = divided(EMBEDDER([row.text for row in rows(8)]), 2, least_rows=1, seed=0).router(EMBEDDER, ["text"])
        student = Experts(Classify("text -> label: Literal['yes', 'no']", SEED), {}, router)
    data = [dspy.Example(text=row.text, **{label: row.label}).with_inputs("text") for row in rows(104)]

    with pytest.raises(ConfigError, match=message):
        method.compile(student, trainset=data[:40], valset=data[40:])

    assert (len(asked(lm)), seen) == (0, [])


def test_a_metric_that_fails_in_a_region_ends_the_compile(tmp_path: Path) -> None:
    def metric(example: dspy.Example, prediction: dspy.Prediction) -> float:
        if (tmp_path / "region-1").exists():
            raise ValueError("broken")
        return float(example.label == prediction.label)

    with pytest.raises(MetricError, match="broken"):
        compiled_by(mixture(tmp_path, metric=metric))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regions": 1}, r"^A mixture has 2 regions or more, or 0 to choose their number; got 1\.$"),
        ({"regions": -1}, r"^A mixture has 2 regions or more"),
        ({"least_rows": 1}, r"^A region needs least_rows >= 2, got 1\.$"),
        ({"settings": {"candidates": 0}}, r"^APE needs candidates >= 1, got 0\.$"),
        ({"settings": {"wings": 2}}, r"^APE: .*unexpected keyword argument 'wings'\.$"),
        ({"embedder": "smollm2-135m"}, r"^smollm2-135m is no embedder"),
        ({"method": MixtureOfExperts, "settings": {}}, r"^A mixture of mixtures has no router of its own"),
    ],
    ids=str,
)
def test_settings_that_cant_work_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mixture(tmp_path, **settings)


def test_the_estimate_is_that_of_the_method_on_all_rows_and_on_equal_regions(tmp_path: Path) -> None:
    class Fixed(Teleprompter):
        def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
            return Estimate(rows, 3 * rows if calls is None else min(3 * rows, max(rows, calls)))

    method = mixture(tmp_path, method=Fixed, settings={}, regions=4)
    assert method.estimate({}, 40, None) == Estimate(40, 120 + 4 * 30)
    assert method.estimate({}, 40, 200) == Estimate(40, 100 + 4 * 25)
    assert method.estimate({}, 40, 70) == Estimate(40, 40), "30 calls pay for no four regions of 10 rows"
    assert method.estimate({}, 36, None) == Estimate(36, 108), "regions of 9 rows aren't searched"
    guessed = mixture(tmp_path, method=Fixed, settings={}, regions=0)
    assert guessed.estimate({}, 39, None) == Estimate(39, 117 + 3 * 39), "of 13 rows each"


def test_the_number_of_regions_is_chosen_where_it_isnt_given(tmp_path: Path) -> None:
    compiled = compiled_by(mixture(tmp_path, regions=0))
    assert len(compiled.evidence.regions) == 2


def test_inputs_of_one_region_are_searched_once_and_confirmed_as_by_the_method_alone(tmp_path: Path) -> None:
    alike = Embedder("alike", lambda texts: [[1.0, len(text) / 1e6] for text in texts])
    data: dict[str, Any] = {"trainset": fruit(40), "valset": fruit(40, 200)}
    searched: list[int | None] = []

    class Noting(APE):
        def search(self, task: Task) -> Any:
            searched.append(task.meter.account.calls_left)
            return super().search(task)

    budget = Budget(calls=400)
    mixed = mixture(tmp_path / "mixed", regions=0, least_rows=30, embedder=alike, method=Noting, budget=budget)
    given = {name: getattr(mixed, name) for name in ("metric", "lm", "proposer", "budget")} | dict(mixed.settings)
    alone: Any = Noting(**given, run_dir=tmp_path / "alone").compile(Classify(LABELS, SEED), **data)
    compiled = compiled_by(mixed, **data)

    assert searched == [400 - 2 * 40] * 2
    assert not isinstance(compiled, Experts)
    assert compiled.evidence.replaced
    assert compiled.evidence.instructions == alone.evidence.instructions == {"predict": SAME}
    assert compiled.evidence.comparison == alone.evidence.comparison
    assert compiled.evidence.spent == alone.evidence.spent
    assert table(compiled) == ["default: there is no other region"]
    assert compiled.evidence.verdict.endswith(" The inputs fall into one region: one prompt answers all of them.")


def test_where_there_may_be_one_region_no_less_is_estimated_than_the_method_alone_would_take(tmp_path: Path) -> None:
    class Greedy(Teleprompter):
        def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
            return Estimate(rows, 2 * rows if calls is None or calls < 100 else calls)

    assert mixture(tmp_path, method=Greedy, settings={}, regions=4).estimate({}, 40, 180) == Estimate(40, 160)
    assert mixture(tmp_path, method=Greedy, settings={}, regions=0).estimate({}, 40, 180) == Estimate(40, 180)
