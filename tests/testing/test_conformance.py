"""A suite that every method passes says nothing: here are methods that break one promise each."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from preceptor.errors import LMFailed
from preceptor.scoring.trial import Trial
from preceptor.task import Sampling, Task
from preceptor.teleprompter import Estimate, Teleprompter
from preceptor.testing import toy
from preceptor.testing.conformance import Conformance


@dataclass(frozen=True, kw_only=True)
class Sound(Teleprompter):
    """Asks for one instruction and scores it beside the seed."""

    formula: ClassVar[str] = "1 + 2 rows"

    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        cost = 1 + 2 * rows * len(signatures)
        return Estimate(least=cost, expected=cost)

    def search(self, task: Task) -> Sequence[Trial]:
        name = next(iter(task.signatures))
        [text] = task.propose([self.question(task)], Sampling(1.0))
        trials = task.score([task.seed, task.seed.with_instruction(name, text)], task.order)
        return sorted(trials, key=lambda trial: -trial.score)

    def question(self, task: Task) -> str:
        return f"Change it: {task.rng.random()}"


class Unseeded(Sound):
    numbers: ClassVar[Iterator[int]] = itertools.count()

    def search(self, task: Task) -> Sequence[Trial]:
        marked = task.seed.with_instruction("predict", f"{toy.RIGHT} Try {next(self.numbers)}.")
        return [*task.score([marked], task.order), *super().search(task)]


class Vandal(Sound):
    def search(self, task: Task) -> Sequence[Trial]:
        task.train[0]["text"] = "gone"
        return super().search(task)


class Idle(Sound):
    def search(self, task: Task) -> Sequence[Trial]:
        return super().search(task)[:0]


class SeedLast(Sound):
    def search(self, task: Task) -> Sequence[Trial]:
        return [*task.score([task.seed.with_instruction("predict", toy.RIGHT)], task.order), *super().search(task)]


class Unmetered(Sound):
    def search(self, task: Task) -> Sequence[Trial]:
        assert self.proposer is not None
        for _ in range(10):
            self.proposer("Change it.")
        return super().search(task)


class Optimist(Sound):
    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        return Estimate(least=rows, expected=rows)


class Forgetful(Sound):
    def question(self, task: Task) -> str:
        return f"Change it: {os.getpid()}"


class Undressed(Sound):
    def search(self, task: Task) -> Sequence[Trial]:
        bare = dataclasses.replace(task.seed, demos={"predict": ()}).with_instruction("predict", toy.RIGHT)
        return sorted(task.score([task.seed, bare], task.order), key=lambda trial: -trial.score)


class Single(Sound):
    def search(self, task: Task) -> Sequence[Trial]:
        return task.score([task.seed, task.seed.with_instruction("predict", toy.RIGHT)], task.order)


class Deaf(Sound):
    def search(self, task: Task) -> Sequence[Trial]:
        try:
            return super().search(task)
        except LMFailed as error:
            raise LMFailed("Something went wrong.") from error


def suite(broken: type[Teleprompter]) -> Conformance:
    class Suite(Conformance):
        method = broken

    return Suite()


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (Unseeded, "test_equal_seeds_give_equal_programs"),
        (Vandal, "test_student_and_rows_are_left_alone"),
        (Idle, "test_a_proposal_that_works_is_adopted"),
        (SeedLast, "test_the_seed_is_scored_first"),
        (Single, "test_a_program_of_several_predictors_works"),
        (Undressed, "test_demonstrations_of_the_student_are_kept"),
        (Deaf, "test_a_model_that_goes_down_ends_the_compile_and_costs_nothing_that_was_paid_for"),
    ],
)
def test_a_method_that_breaks_a_promise_is_found_out(tmp_path: Path, broken: type[Teleprompter], promise: str) -> None:
    getattr(suite(Sound), promise)(tmp_path / "sound")
    with pytest.raises((AssertionError, KeyError)):
        getattr(suite(broken), promise)(tmp_path / "broken")


def test_calls_past_the_meter_are_found_out(tmp_path: Path) -> None:
    suite(Sound).test_a_budget_of_calls_holds(tmp_path / "sound", 8)
    with pytest.raises(AssertionError):
        suite(Unmetered).test_a_budget_of_calls_holds(tmp_path / "broken", 8)


def test_a_wrong_estimate_is_found_out(tmp_path: Path) -> None:
    suite(Sound).test_a_search_takes_the_calls_that_were_estimated(tmp_path / "sound", None)
    with pytest.raises(AssertionError):
        suite(Optimist).test_a_search_takes_the_calls_that_were_estimated(tmp_path / "broken", None)


def test_what_differs_in_another_process_is_found_out(tmp_path: Path) -> None:
    suite(Sound).test_killed_again_and_again_it_resumes_to_the_same_program(tmp_path / "sound", 1)
    with pytest.raises(AssertionError):
        suite(Forgetful).test_killed_again_and_again_it_resumes_to_the_same_program(tmp_path / "broken", 1)
