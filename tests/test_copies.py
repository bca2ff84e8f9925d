"""Copies of programs whose parts can't all be copied."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import dspy
import pytest

from preceptor.copies import apply, copy_of, with_own_models
from preceptor.errors import ConfigError
from preceptor.lm.adapter import declare
from preceptor.lm.seam import every_predictor, predictors
from preceptor.scoring.trial import Candidate
from preceptor.teleprompters import APE
from preceptor.testing import asked, simulated, system, toy


class Pair(NamedTuple):
    ask: Any
    lock: Any


class Stage(dspy.Module):
    """A part with what can't be copied."""

    def __init__(self, ask: Any, lock: Any) -> None:
        self.ask = ask
        self.lock = lock

    def forward(self, text: str) -> Any:
        with self.lock:
            return self.ask(text=text)


class Holding(dspy.Module):
    """A program whose predictor is in a container, beside a lock."""

    def __init__(self, hold: Callable[[Any, Any], Any]) -> None:
        self.lock = threading.Lock()
        self.parts = hold(dspy.Predict(declare("text -> label", "Sort.")), self.lock)
        self.run = self.first

    def first(self, text: str) -> Any:
        [(_, ask)] = predictors(self)
        return ask(text=text)

    def forward(self, text: str) -> Any:
        return self.run(text=text)


HOLDS: list[Callable[[Any, Any], Any]] = [
    lambda ask, lock: [ask, lock],
    lambda ask, lock: (ask, lock),
    lambda ask, lock: {"ask": ask, "lock": lock},
    lambda ask, lock: OrderedDict(ask=ask, lock=lock),
    Pair,
    Stage,
    lambda ask, lock: [Stage(ask, lock)],
    lambda ask, lock: {"stage": Stage(ask, lock)},
]


@pytest.mark.parametrize("hold", HOLDS)
def test_a_predictor_in_a_container_beside_a_lock_is_copied_and_the_lock_is_shared(hold: Any) -> None:
    program = Holding(hold)
    [(name, own)] = every_predictor(program)

    copied: Any = apply(program, Candidate({predictors(program)[0][0]: "Copy."}))

    [(found, other)] = every_predictor(copied)
    assert (found, other.signature.instructions, own.signature.instructions) == (name, "Copy.", "Sort.")
    assert other is not own
    assert type(copied.parts) is type(program.parts)
    assert copied.lock is program.lock


def test_a_copys_own_method_runs_the_copy() -> None:
    program = Holding(Pair)
    lm = simulated(lambda request: "[[ ## label ## ]]\nno")

    copied: Any = apply(program, Candidate({"parts[0]": "Copy."}))
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        copied(text="any")

    assert ["Copy." in system(request) for request in asked(lm)] == [True]


class Twice(dspy.Module):
    """A part that another part has, too, beside what can't be copied."""

    def __init__(self) -> None:
        self.ask = dspy.Predict("text -> label")
        self.parts = [self.ask]
        self.lock = threading.Lock()


def test_a_part_that_a_program_has_twice_is_copied_once() -> None:
    copied: Any = copy_of(Twice())

    assert copied.parts[0] is copied.ask
    assert [name for name, _ in predictors(copied)] == ["ask"]


class Dropping(dspy.Module):
    """Opens what can't be copied when it is needed, and leaves what it is told to out of copies."""

    def __init__(self, *dropped: str) -> None:
        self.ask = dspy.Predict("text -> label")
        self.lock = threading.Lock()
        self.dropped = dropped

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self.dropped}


def test_a_copy_lacks_what_the_class_leaves_out() -> None:
    program = Dropping("lock")

    copied: Any = copy_of(program)

    assert not hasattr(copied, "lock")
    assert copied.ask is not program.ask


def test_a_class_that_leaves_a_predictor_out_of_copies_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        ConfigError, match=r"the predictors ask became none\. .* a __getstate__ .* keep every predictor"
    ):
        copy_of(Dropping("lock", "ask"))


class Same(dspy.Module):
    """Copies itself as what it is."""

    def __init__(self) -> None:
        self.ask = dspy.Predict("text -> label")

    def __deepcopy__(self, memo: dict[int, Any]) -> Same:
        return self


class Around(dspy.Module):
    """Has such a part, which no method changes."""

    def __init__(self) -> None:
        self.part = Same()
        self.part._compiled = True
        self.ask = dspy.Predict("text -> label")


@pytest.mark.parametrize(("kind", "name"), [(Same, "ask"), (Around, r"part\.ask")])
def test_a_copy_with_the_programs_own_predictors_is_refused_with_what_to_do(kind: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"the same predictor {name}, .* a __deepcopy__, .* copy each"):
        copy_of(kind())


class Sorting(dspy.Module):
    """A pipeline whose only stage has a lock."""

    def __init__(self) -> None:
        self.stages = [Stage(toy.Sorter(), threading.Lock())]

    def forward(self, text: str) -> Any:
        return self.stages[0](text=text)


def test_a_compile_finds_the_gain_of_such_a_program_and_leaves_the_student_as_it_was(tmp_path: Path) -> None:
    student, lm = Sorting(), simulated(toy.answer)
    student.set_lm(lm)
    [(name, own)] = predictors(student)
    seed = own.signature.instructions
    writer = simulated(lambda request: toy.RIGHT, name="writer")

    method = APE(
        metric="accuracy", lm=lm, proposer=writer, candidates=2, demos=3, subsamples=1, threads=2, run_dir=tmp_path
    )
    program: Any = method.compile(student, trainset=toy.rows(20), valset=toy.rows(40, 20))

    assert program.evidence.instructions == {name: toy.RIGHT}
    assert (own.signature.instructions, own.lm) == (seed, lm)


class Frozen(dspy.Module):
    """Two predictors and a frozen one."""

    def __init__(self) -> None:
        self.first = dspy.Predict("text -> guess")
        self.second = dspy.Predict("guess -> label")
        self.frozen = dspy.ChainOfThought("label -> remark")
        self.frozen._compiled = True


def test_a_model_that_predictors_share_is_replaced_once() -> None:
    program, seen = Frozen(), list[str]()
    shared, other = simulated(toy.answer, name="shared"), simulated(toy.answer, name="other")
    program.set_lm(shared)
    program.frozen.predict.lm = other

    def replaced(lm: dspy.LM) -> dspy.LM:
        seen.append(lm.model)
        return lm.copy()

    copied: Any = with_own_models(program, replaced)

    assert seen == ["simulated/shared", "simulated/other"]
    assert copied.get_lm() is copied.first.lm is copied.second.lm
    assert copied.get_lm() not in (shared, None)
    assert copied.frozen.predict.lm.model == "simulated/other"


def test_predictors_without_a_model_of_their_own_get_none() -> None:
    copied: Any = with_own_models(Frozen(), lambda lm: lm)

    assert [predictor.lm for _, predictor in every_predictor(copied)] == [None, None, None]
