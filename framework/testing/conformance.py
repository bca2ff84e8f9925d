"""What every method must keep to, as a class of tests for pytest.

A method of your own is put to them in a file `test_mine.py`:

    from preceptor.testing.conformance import Conformance

    class TestMine(Conformance):
        method = MyMethod
        settings = {"candidates": 3}

Register the module for pytest's assertion messages in your `conftest.py`:
`pytest.register_assert_rewrite("preceptor.testing.conformance")`.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random
import signal
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

import dspy
import pytest
from dspy.lm15 import Request, ServerError

from preceptor import program as artifact
from preceptor.errors import ConfigError, DataError, LMFailed, Unaffordable
from preceptor.leaks import copied
from preceptor.lm.budget import Budget
from preceptor.lm.dispatch import Patience
from preceptor.teleprompter import Teleprompter
from preceptor.testing import toy
from preceptor.testing.models import coin_flip, prompt
from preceptor.testing.toy import Models

TRAIN, CONFIRM = 10, 24
NULL_RUNS: Final = 6
"""Compiles of a task that no instruction can help; at most one may end in another instruction."""

DEADLINE_SECONDS: Final = 300.0
EAGER: Final = Patience(first_wait=0.0)


class Conformance:
    """The tests of one method; subclass it under a name that starts with `Test`.

    The models are simulated, and the task is `preceptor.testing.toy`'s. Takes about 70 short compiles.

    Attributes:
        method: What is tested.
        settings: Its fewest calls: every compile uses them.
        estimate_bound: Share of the estimated calls by which a search that never meets the same proposal
            twice may differ from the estimate.
        confirm: Confirmation rows, an even number.
    """

    method: ClassVar[type[Teleprompter]]
    settings: ClassVar[Mapping[str, Any]] = {}
    estimate_bound: ClassVar[float] = 0.1
    confirm: ClassVar[int] = CONFIRM

    def reply(self, request: Request, text: str) -> str:
        """Return `text` as the proposer would write it; override it if the method asks for a form of its own."""
        return toy.reply(request, text)

    def models(self, propose: toy.Answer = toy.lucky, answer: toy.Answer = toy.answer, **hooks: Any) -> Models:
        """Return a fresh task model and proposer."""
        return Models(answer, lambda request: self.reply(request, propose(request)), **hooks)

    def made(self, models: Models, place: Path, **settings: Any) -> Teleprompter:
        """Return the method, to run in the folder `place`."""
        given = {
            "metric": "accuracy",
            "lm": models.lm,
            "proposer": models.proposer,
            "run_dir": place,
            "patience": EAGER,
        }
        return self.method(**{**given, **self.settings, **settings})

    def compiled(
        self, models: Models, place: Path, program: dspy.Module | None = None, *, rows: Any = toy.rows, **settings: Any
    ) -> Any:
        """Return what the method makes of a program and rows of the toy task."""
        method = self.made(models, place, **settings)
        train, confirm = rows(TRAIN), rows(self.confirm, TRAIN)
        return method.compile(program or toy.Sorter(), trainset=train, valset=confirm)

    @property
    def held(self) -> int:
        """The calls that are kept for the confirmation."""
        return self.method.confirms * self.confirm

    def least(self, method: Teleprompter) -> int:
        """Return the fewest calls a compile of the toy task needs."""
        return method.estimated(toy.signatures(toy.Sorter()), TRAIN, 1).least + self.held

    def test_it_says_what_it_costs_and_needs(self) -> None:
        """`preceptor methods` shows both."""
        assert issubclass(self.method, Teleprompter)
        assert self.method.formula
        assert self.method.needs

    def test_a_proposal_that_works_is_adopted(self, tmp_path: Path) -> None:
        """The other tests say little about a method that finds nothing."""
        compiled = self.compiled(self.models(toy.right), tmp_path)

        assert toy.RIGHT in compiled.predict.signature.instructions
        assert compiled.evidence.replaced
        assert (compiled.evidence.baseline, compiled.evidence.compiled) == (0.5, 1.0)

    def test_equal_seeds_give_equal_programs(self, tmp_path: Path) -> None:
        """With any number of threads."""
        for threads in (1, 8):
            self.compiled(self.models(), tmp_path / str(threads), threads=threads, seed=5)

        assert toy.saved(tmp_path / "1") == toy.saved(tmp_path / "8")

    def test_student_and_rows_are_left_alone(self, tmp_path: Path) -> None:
        """What is returned is a copy of the student's kind."""
        program, train, confirm = toy.Sorter(), toy.rows(TRAIN), toy.rows(self.confirm, TRAIN)
        state, before = program.dump_state(), copy.deepcopy([*train, *confirm])

        compiled = self.made(self.models(toy.right), tmp_path).compile(program, trainset=train, valset=confirm)

        assert program.dump_state() == state
        assert [*train, *confirm] == before
        assert compiled is not program
        assert type(compiled) is type(program)

    def test_the_seed_is_scored_first(self, tmp_path: Path) -> None:
        """Whatever comes later is compared with it."""
        self.compiled(self.models(), tmp_path)

        first = (tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()[0]
        assert json.loads(first)["instructions"] == {"predict": toy.SEED}

    def test_no_search_step_sees_a_confirmation_row(self, tmp_path: Path) -> None:
        """They are opened once, for the seed and the winner."""
        models = self.models(toy.right)
        self.compiled(models, tmp_path)

        untouched = {row.text for row in toy.rows(self.confirm, TRAIN)}
        asked = [prompt(request).removeprefix("text: ") for request in models.tasks]
        assert all(asked.count(text) == 2 for text in untouched)

    def test_an_empty_trainset_is_refused_before_the_first_call(self, tmp_path: Path) -> None:
        """As is everything that can be checked for nothing."""
        models = self.models()
        with pytest.raises(DataError, match=r"^trainset is empty\.$"):
            self.made(models, tmp_path).compile(toy.Sorter(), trainset=[], valset=toy.rows(self.confirm))
        assert models.calls == 0

    @pytest.mark.parametrize("threads", [1, 8, 64, 512])
    def test_a_budget_of_calls_holds(self, tmp_path: Path, threads: int) -> None:
        """Counted at the models; the confirmation is always paid for."""
        models = self.models()
        calls = self.least(self.made(models, tmp_path)) + 7

        evidence = self.compiled(models, tmp_path, threads=threads, budget=Budget(calls=calls)).evidence

        assert 0 < models.spent["calls"] == evidence.billed.calls <= evidence.spent.calls <= calls

    @pytest.mark.parametrize("unit", ["tokens", "dollars"])
    def test_a_budget_of_tokens_or_dollars_holds(self, tmp_path: Path, unit: str) -> None:
        """Counted at the models; three fifths of what the compile takes without a budget, enough to confirm."""
        whole = self.models()
        self.compiled(whole, tmp_path / "whole", rows=toy.wordy)
        bound: dict[str, Any] = {unit: type(whole.spent[unit])(0.6 * whole.spent[unit])}

        for threads in (1, 8, 64, 512):
            models, budget = self.models(latency=0.002), Budget(**bound, prices=toy.PRICES)
            place = tmp_path / str(threads)
            evidence = self.compiled(models, place, rows=toy.wordy, threads=threads, budget=budget).evidence
            assert evidence.stopped
            assert getattr(evidence.billed, unit) == pytest.approx(models.spent[unit])
            assert 0 < models.spent[unit] <= bound[unit], f"with {threads} threads"

    @pytest.mark.parametrize("room", [None, 0, 40])
    def test_a_search_takes_the_calls_that_were_estimated(self, tmp_path: Path, room: int | None) -> None:
        """With so many calls more than the least, or without a budget."""
        models = self.models(toy.unheard)
        calls = None if room is None else self.least(self.made(models, tmp_path)) + room
        method = self.made(models, tmp_path, budget=Budget(calls=calls))
        estimate = method.estimated(toy.signatures(toy.Sorter()), TRAIN, None if calls is None else calls - self.held)

        evidence = self.compiled(models, tmp_path, budget=Budget(calls=calls)).evidence

        searched = evidence.spent.calls - (1 + evidence.has_candidate) * self.confirm
        assert estimate.least <= estimate.expected
        assert calls is None or estimate.expected <= calls - self.held
        assert abs(searched - estimate.expected) <= self.estimate_bound * estimate.expected, (
            f"{searched} calls, {estimate.expected} expected"
        )

    def test_a_budget_below_the_least_is_refused_before_the_first_call(self, tmp_path: Path) -> None:
        """The message says what is needed."""
        models = self.models()
        least = self.least(self.made(models, tmp_path))
        with pytest.raises(
            Unaffordable, match=rf"needs at least {least} calls here: {self.held} to confirm on {self.confirm} rows "
        ):
            self.compiled(models, tmp_path, budget=Budget(calls=least - 1))
        assert models.calls == 0

    def test_compiled_again_it_asks_nothing(self, tmp_path: Path) -> None:
        """Every answer is in the ledger."""
        models = self.models()
        self.compiled(models, tmp_path)
        calls, before = models.calls, toy.saved(tmp_path)

        assert self.compiled(models, tmp_path).evidence.billed.calls == 0
        assert models.calls == calls
        assert toy.saved(tmp_path) == before

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="kills copies of this process")
    @pytest.mark.parametrize("threads", [1, 8])
    def test_killed_again_and_again_it_resumes_to_the_same_program(self, tmp_path: Path, threads: int) -> None:
        """And asks no question twice whose answer was recorded."""
        whole, kept = self.models(), 0
        self.compiled(whole, tmp_path / "whole", threads=threads)

        for at in (1, whole.calls // 3, whole.calls // 3, None):
            self.kill(tmp_path / "killed", at, threads)
            assert not (tmp_path / "killed" / "program").exists()
            earlier, kept = kept, toy.recorded(tmp_path / "killed")
            assert threads > 1 or at is None or kept == earlier + at - 1
        resumed = self.models()
        self.compiled(resumed, tmp_path / "killed", threads=threads)

        assert toy.saved(tmp_path / "killed") == toy.saved(tmp_path / "whole")
        assert (kept, resumed.calls) == (whole.calls, 0)

    def kill(self, place: Path, at: int | None, threads: int = 1) -> None:
        """Compile in another process that dies at its call number `at`; at None when all calls are made."""

        def die(call: int) -> None:
            if call == at:
                os.kill(os.getpid(), signal.SIGKILL)

        def watch(what: str, done: int, total: int) -> None:
            if at is None and what.startswith("confirming") and done == total:
                os.kill(os.getpid(), signal.SIGKILL)

        def run() -> None:
            self.compiled(self.models(on_call=die), place, threads=threads, report=watch)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads: none holds a lock that this one needs
            process = multiprocessing.get_context("fork").Process(target=run)
            process.start()
        process.join(DEADLINE_SECONDS)
        is_over = process.exitcode is not None
        process.kill()
        assert is_over, f"the compile went on for {DEADLINE_SECONDS:g} s"
        assert process.exitcode == -signal.SIGKILL, f"the compile ended by itself before call {at}"

    def test_where_no_instruction_can_help_the_users_own_stays(self, tmp_path: Path) -> None:
        """The answers are thrown dice."""
        replaced: list[int] = []
        for seed in range(NULL_RUNS):
            rng, models = random.Random(seed), self.models(toy.unheard)
            rows = [row.copy(label=rng.choice(["yes", "no"])) for row in toy.rows(40, 100 * seed)]
            method = self.made(models, tmp_path / str(seed), lm=coin_flip(["yes", "no"], seed=seed), seed=seed)
            compiled: Any = method.compile(toy.Sorter(), trainset=rows)
            replaced += [seed] if compiled.evidence.replaced else []

        assert len(replaced) <= 1, f"replaced with the seeds {replaced}"

    def test_a_program_of_several_predictors_works(self, tmp_path: Path) -> None:
        """Every predictor's instruction may change, no other one appears."""
        program = toy.Chain()
        compiled = self.compiled(self.models(toy.right), tmp_path, program)

        assert list(toy.signatures(compiled)) == list(toy.signatures(program)) == ["first.predict", "second.predict"]
        assert toy.RIGHT in toy.signatures(compiled)["first.predict"].instructions
        assert compiled.evidence.compiled == 1.0
        assert artifact.load(tmp_path / "program", student=program).dump_state() == compiled.dump_state()

    def test_a_predictor_used_twice_works(self, tmp_path: Path) -> None:
        """It costs two calls a row."""
        compiled = self.compiled(self.models(toy.right), tmp_path, toy.Twice())

        assert toy.RIGHT in compiled.judge.predict.signature.instructions
        assert compiled.evidence.compiled == 1.0

    def test_typed_and_optional_fields_work_or_are_refused_before_the_first_call(self, tmp_path: Path) -> None:
        """The answer is a record, and a text that may be missing, as one of the inputs may."""
        models, program = self.models(toy.right, toy.typed_answer), toy.Sorter(toy.Sorting)

        def rows(count: int, start: int = 0) -> list[dspy.Example]:
            return toy.typed(toy.rows(count, start))

        try:
            compiled = self.compiled(models, tmp_path, program, rows=rows, metric=toy.is_right)
        except ConfigError:
            if models.calls:
                raise
            return
        assert compiled.evidence.replaced
        loaded = artifact.load(tmp_path / "program", student=program)
        assert toy.RIGHT in toy.signatures(loaded)["predict"].instructions

    def test_demonstrations_of_the_student_are_kept(self, tmp_path: Path) -> None:
        """They are shown in every call, and they are in the program."""
        program, models = toy.Sorter(), self.models(toy.right)
        program.predict.demos = [dspy.Example(text="row 90 yes", label="yes")]

        compiled = self.compiled(models, tmp_path, program)

        assert compiled.evidence.replaced
        assert [dict(demo) for demo in compiled.predict.demos] == [{"text": "row 90 yes", "label": "yes"}]
        assert all(request.messages[0].text == "text: row 90 yes" for request in models.tasks)

    def test_train_rows_can_be_shown_instead_of_scored(self, tmp_path: Path) -> None:
        """They stand below every instruction in the search; the student is confirmed without."""
        models = self.models(toy.right)
        assert len(self.compiled(models, tmp_path, few_shot=2).predict.demos) == 2
        told = [[message.text for message in request.messages[::2]] for request in models.tasks]
        assert all(len(one) == 3 and one[2] not in one[:2] for one in told if len(one) > 1)
        assert [len(one) for one in told].count(1) == self.confirm

    def test_a_failed_call_is_no_wrong_answer(self, tmp_path: Path) -> None:
        """Fewer than one row in twenty are left out of the comparison, for both programs."""
        lost = toy.rows(self.confirm, TRAIN)[1].text  # the seed would be right

        def broken(request: Request) -> str:
            if lost in prompt(request):
                raise ConnectionError("no route")
            return toy.answer(request)

        evidence = self.compiled(self.models(toy.right, broken), tmp_path).evidence

        assert (evidence.comparison.rows, evidence.compiled) == (self.confirm - 1, 1.0)
        assert evidence.baseline == pytest.approx((self.confirm / 2 - 1) / (self.confirm - 1))

    def test_calls_that_fail_once_change_nothing(self, tmp_path: Path) -> None:
        """They are made again."""
        failed: set[str] = set()

        def moody(request: Request) -> str:
            if repr(request) not in failed:
                failed.add(repr(request))
                raise ServerError("overloaded")
            return toy.answer(request)

        self.compiled(self.models(), tmp_path / "healthy")
        evidence = self.compiled(self.models(answer=moody), tmp_path / "moody").evidence

        assert evidence.lost.calls == len(failed) > 0
        assert toy.saved(tmp_path / "moody") == toy.saved(tmp_path / "healthy")

    def test_a_model_that_goes_down_ends_the_compile_and_costs_nothing_that_was_paid_for(self, tmp_path: Path) -> None:
        """The message says what happened, what was spent and how to go on; the program is the same in the end."""
        whole, is_down = self.models(), threading.Event()
        self.compiled(whole, tmp_path / "whole")

        def go_down(call: int) -> None:
            if is_down.is_set() or call > whole.calls // 3:
                is_down.set()
                raise ConnectionError("no route")

        broken = self.models(on_call=go_down)
        with pytest.raises(
            LMFailed, match=r"(?s)failed.*no route.*Spent so far: \d+ calls.*go on with: compile again, with run_dir="
        ):
            self.compiled(broken, tmp_path / "broken")
        assert not (tmp_path / "broken" / "program").exists()

        resumed = self.models()
        self.compiled(resumed, tmp_path / "broken")
        assert toy.saved(tmp_path / "broken") == toy.saved(tmp_path / "whole")
        assert broken.calls + resumed.calls == whole.calls

    def test_training_text_is_not_copied_into_instructions(self, tmp_path: Path) -> None:
        """Not even if the copy does better than the seed; the bound is that of `preceptor.leaks`."""
        texts = [row.text for row in toy.letters(TRAIN)]
        models = self.models(lambda request: f"{toy.RIGHT} As in: {texts[0]}")

        compiled = self.compiled(models, tmp_path, rows=toy.letters)

        instructions = [str(signature.instructions) for signature in toy.signatures(compiled).values()]
        assert [copied(instruction, texts) for instruction in instructions] == [""]

    def test_what_training_rows_order_is_not_adopted(self, tmp_path: Path) -> None:
        """Not even if the proposer obeys them, and the model answers better for it."""

        def answer(request: Request) -> str:
            return prompt(request).split()[-1] if toy.ORDER in str(request.system) else "no"

        compiled = self.compiled(self.models(toy.obedient, answer), tmp_path, rows=toy.orders)

        assert toy.ORDER not in compiled.predict.signature.instructions
