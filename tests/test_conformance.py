"""What every method must keep to, from its smallest constructor call."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Request

from preceptor.errors import DataError, Unaffordable
from preceptor.lm.budget import Budget
from preceptor.lm.seam import predictors
from preceptor.modules import Classify
from preceptor.teleprompter import Teleprompter
from preceptor.testing import asked, coin_flip, prompt, simulated, system

METHODS = sorted(entry_points(group="preceptor.teleprompters"), key=lambda entry: entry.name)
SMALLEST: dict[str, dict[str, Any]] = {"ape": {"candidates": 3, "demos": 2, "subsamples": 3}}
SEED, RIGHT = "Sort.", "Answer with the last word."
TRAIN, CONFIRM = 10, 12

Make = Callable[..., Teleprompter]
each = pytest.mark.parametrize("make", METHODS, ids=[entry.name for entry in METHODS], indirect=True)


@pytest.fixture
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Return a constructor of the method with the fewest calls."""
    method, knobs = request.param.load(), SMALLEST[request.param.name]

    def smallest(lm: dspy.LM, place: str = "run", **settings: Any) -> Any:
        return method(metric="accuracy", lm=lm, run_dir=tmp_path / place, **{**knobs, **settings})

    return smallest


def student() -> dspy.Module:
    return Classify("text -> label: Literal['yes', 'no']", SEED)


def signatures(program: dspy.Module) -> dict[str, Any]:
    return {name: predictor.signature for name, predictor in predictors(program)}


ONE = signatures(student())


def rows(count: int, start: int = 0) -> list[dspy.Example]:
    words = [["yes", "no"][n % 2] for n in range(start, start + count)]
    return [
        dspy.Example(text=f"row {start + n} {word}", label=word).with_inputs("text") for n, word in enumerate(words)
    ]


def teachable(request: Request) -> str:
    """Right under one instruction; asked for one, writes it for about half of the prompts."""
    if not system(request):
        number = sum(prompt(request).encode())
        return RIGHT if number % 2 else f"Rule {number}."
    return prompt(request).split()[-1] if RIGHT in system(request) else "no"


def compiled_by(method: Teleprompter, **settings: Any) -> Any:
    data: dict[str, Any] = {"trainset": rows(TRAIN), "valset": rows(CONFIRM, start=TRAIN), **settings}
    return method.compile(student(), **data)


def artifact(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "program").iterdir()}


def test_every_method_has_its_smallest_call_here() -> None:
    assert [entry.name for entry in METHODS] == sorted(SMALLEST)


@each
def test_it_is_a_method_of_a_paper_and_of_dspys(make: Make) -> None:
    method = make(simulated(teachable))

    assert isinstance(method, Teleprompter)
    assert isinstance(method, dspy.teleprompt.Teleprompter)
    assert type(method).paper.startswith("arXiv:")
    assert type(method).formula
    assert type(method).__module__.startswith("preceptor.teleprompters.")


@each
def test_equal_seeds_give_equal_programs(make: Make, tmp_path: Path) -> None:
    for place, threads in (("first", 1), ("second", 8)):
        compiled_by(make(simulated(teachable), place, threads=threads, seed=5))

    assert artifact(tmp_path / "first") == artifact(tmp_path / "second")


@each
def test_student_and_rows_are_left_alone(make: Make) -> None:
    program, train, valset = student(), rows(TRAIN), rows(CONFIRM, start=TRAIN)
    state, before = program.dump_state(), copy.deepcopy([*train, *valset])

    compiled = make(simulated(teachable)).compile(program, trainset=train, valset=valset)

    assert program.dump_state() == state
    assert [*train, *valset] == before
    assert compiled is not program
    assert type(compiled) is type(program)


@each
def test_the_seed_is_the_first_trial(make: Make, tmp_path: Path) -> None:
    compiled_by(make(simulated(teachable)))

    lines = (tmp_path / "run" / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["instructions"] == {"predict": SEED}


@each
def test_an_empty_trainset_is_refused_before_the_first_call(make: Make) -> None:
    lm = simulated(teachable)
    with pytest.raises(DataError, match=r"^trainset is empty\.$"):
        compiled_by(make(lm), trainset=[])
    assert asked(lm) == []


@each
@pytest.mark.parametrize("threads", [1, 8, 64])
def test_the_budget_holds(make: Make, threads: int) -> None:
    lm = simulated(teachable)
    least = make(lm).estimate(ONE, TRAIN, 1).least + 2 * CONFIRM

    evidence = compiled_by(make(lm, threads=threads, budget=Budget(calls=least + 7))).evidence

    assert len(asked(lm)) <= evidence.spent.calls <= least + 7


@each
def test_a_budget_below_the_least_is_refused_before_the_first_call(make: Make) -> None:
    lm = simulated(teachable)
    least = make(lm).estimate(ONE, TRAIN, 1).least + 2 * CONFIRM
    with pytest.raises(Unaffordable, match=rf"needs at least {least} calls here: 24 to confirm on 12 rows and "):
        compiled_by(make(lm, budget=Budget(calls=least - 1)))
    assert asked(lm) == []


@each
def test_compiled_again_it_asks_nothing(make: Make, tmp_path: Path) -> None:
    lm = simulated(teachable)
    compiled_by(make(lm))
    calls, before = len(asked(lm)), artifact(tmp_path / "run")

    assert compiled_by(make(lm)).evidence.billed.calls == 0
    assert len(asked(lm)) == calls
    assert artifact(tmp_path / "run") == before


@each
def test_where_no_instruction_can_help_the_users_own_stays(make: Make) -> None:
    replaced: list[int] = []
    for seed in range(12):
        rng = random.Random(seed)
        data = [row.copy(label=rng.choice(["yes", "no"])) for row in rows(40, start=100 * seed)]
        lm = coin_flip(["yes", "no"], seed=seed)
        compiled = compiled_by(make(lm, f"run {seed}", threads=1, seed=seed), trainset=data, valset=None)
        replaced += [seed] if compiled.evidence.replaced else []

    assert len(replaced) <= 1, f"replaced with the seeds {replaced}"
