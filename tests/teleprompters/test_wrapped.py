from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Request, ServerError
from dspy.teleprompt.gepa.gepa import AUTO_RUN_SETTINGS as GEPA_SETTINGS
from dspy.teleprompt.mipro_optimizer_v2 import AUTO_RUN_SETTINGS as MIPRO_SETTINGS

from preceptor.errors import ConfigError, LMFailed, MetricError
from preceptor.lm.budget import Budget
from preceptor.lm.dispatch import Patience
from preceptor.lm.seam import predictors
from preceptor.modules import Classify
from preceptor.teleprompter import Estimate, Teleprompter
from preceptor.teleprompters import COPRO, GEPA, MIPROv2
from preceptor.teleprompters.watched import Watch
from preceptor.teleprompters.wrapped import CANDIDATES, JUDGED
from preceptor.testing import prompt, system, toy
from preceptor.testing.toy import RIGHT, SEED, Models, Sorter

TRAIN, CONFIRM = 20, 12
Method = type[COPRO] | type[GEPA] | type[MIPROv2]

each = pytest.mark.parametrize("method", [COPRO, GEPA, MIPROv2])


def models(propose: toy.Answer = toy.lucky, answer: toy.Answer = toy.answer, **hooks: Any) -> Models:
    return Models(answer, lambda request: toy.reply(request, propose(request)), **hooks)


def made(method: Method, **settings: Any) -> Teleprompter:
    """Return the method with few calls."""
    smallest: dict[str, Any] = {"breadth": 3, "depth": 2} if method is COPRO else {}
    return method(**{"metric": "accuracy", "patience": Patience(first_wait=0.0), **smallest, **settings})


def compiled_by(method: Method, of: Models, place: Path, program: dspy.Module | None = None, **settings: Any) -> Any:
    rows = settings.pop("rows", toy.rows)
    ready = made(method, lm=of.lm, proposer=of.proposer, run_dir=place, **settings)
    return ready.compile(program or Sorter(), trainset=rows(TRAIN), valset=rows(CONFIRM, TRAIN))


def trials(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "trials.jsonl").read_text(encoding="utf-8").splitlines()]


def saved(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (place / "program").iterdir()}


def signatures(program: dspy.Module) -> dict[str, Any]:
    return {name: predictor.signature for name, predictor in predictors(program)}


class Writer:
    """Proposes what helps nobody, and keeps what it was asked, in order."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __call__(self, request: Request) -> str:
        self.requests.append(request)
        return toy.unheard(request)


@each
@pytest.mark.parametrize("threads", [1, 8])
def test_it_improves_a_task_that_can_be_taught(method: Method, tmp_path: Path, threads: int) -> None:
    compiled = compiled_by(method, models(), tmp_path, threads=threads)

    assert compiled.predict.signature.instructions == RIGHT
    assert (compiled.evidence.baseline, compiled.evidence.compiled) == (0.5, 1.0)
    assert compiled.evidence.search_score == 1.0


@each
@pytest.mark.parametrize(("bound", "room"), [(48, 1024), (4096, 4096)])
def test_a_bound_on_the_tasks_answers_cuts_no_proposal(method: Method, tmp_path: Path, bound: int, room: int) -> None:
    writer, answered = Writer(), list[int | None]()

    def answer(request: Request) -> str:
        answered.append(request.config.max_tokens)
        return toy.answer(request)

    of = models(writer, answer)
    ready = made(method, lm=of.lm.copy(max_tokens=bound), proposer=of.proposer.copy(max_tokens=bound), run_dir=tmp_path)
    ready.compile(Sorter(), trainset=toy.rows(TRAIN), valset=toy.rows(CONFIRM, TRAIN))

    assert {request.config.max_tokens for request in writer.requests} == {room}
    assert set(answered) == {bound}


@each
def test_every_candidate_is_a_trial_and_the_seed_the_first(method: Method, tmp_path: Path) -> None:
    compiled_by(method, models(), tmp_path)

    judged = TRAIN if method is COPRO else TRAIN // 2
    first, *others = trials(tmp_path)
    assert first["instructions"] == {"predict": SEED}
    assert (len(first["rows"]), first["score"]) == (judged, pytest.approx(0.5, abs=0.1))
    assert {"predict": RIGHT} in [trial["instructions"] for trial in others]
    for trial in others:
        assert trial["instructions"] != {"predict": SEED}
        assert trial["rows"] == first["rows"] or len(trial["rows"]) < judged
        assert trial["score"] == (1.0 if trial["instructions"]["predict"] == RIGHT else pytest.approx(0.5, abs=0.5))


@each
@pytest.mark.parametrize("threads", [1, 8])
def test_each_trial_says_how_many_calls_it_took_until_its_last_row_was_scored(
    method: Method, tmp_path: Path, threads: int
) -> None:
    evidence = compiled_by(method, models(), tmp_path, threads=threads).evidence

    first, *others = trials(tmp_path)
    calls = [trial["calls"] for trial in others]
    assert first["calls"] == len(first["rows"]) < min(calls)
    assert calls == sorted(calls)
    assert len(set(calls)) > 1
    assert calls[-1] <= evidence.spent.calls - CONFIRM
    paid = first["calls"]
    for trial in others:  # whatever else was asked, its rows were by then
        paid += len(trial["rows"])
        assert trial["calls"] >= paid


@each
def test_the_student_and_its_class_are_left_alone(method: Method, tmp_path: Path) -> None:
    program = Classify("text -> label: Literal['yes', 'no']", SEED)
    program._compiled = True  # by another method, earlier
    state, forward = program.dump_state(), Classify.forward

    compiled = compiled_by(method, models(), tmp_path, program)

    assert program.dump_state() == state
    assert (type(program), type(compiled), Classify.forward) == (Classify, Classify, forward)


@each
def test_equal_questions_are_paid_for_once_with_any_number_of_threads(method: Method, tmp_path: Path) -> None:
    def doubled(count: int, start: int = 0) -> list[dspy.Example]:
        return [row.copy() for row in toy.rows(count // 2, start) for _ in range(2)]

    spent: list[int] = []
    for threads in (1, 8):
        asked = models()
        evidence = compiled_by(method, asked, tmp_path / str(threads), threads=threads, rows=doubled).evidence
        spent.append(evidence.spent.calls - CONFIRM * (1 + evidence.has_candidate))
        assert evidence.billed.calls == asked.calls

    assert spent[0] == spent[1]
    assert saved(tmp_path / "1") == saved(tmp_path / "8")


@each
@pytest.mark.parametrize("room", [0, 7])
def test_an_exhausted_budget_stops_it_with_the_same_program_for_any_number_of_threads(
    method: Method, tmp_path: Path, room: int
) -> None:
    least = made(method).estimate(signatures(Sorter()), TRAIN, None).least + 2 * CONFIRM
    for threads in (1, 8):
        before, asked = set(threading.enumerate()), models()
        place = tmp_path / str(threads)
        evidence = compiled_by(method, asked, place, threads=threads, budget=Budget(calls=least + room)).evidence

        sent = asked.calls
        for thread in set(threading.enumerate()) - before:
            thread.join()
        assert "past the budget" in evidence.stopped
        assert asked.calls == sent == evidence.spent.calls <= least + room

    assert saved(tmp_path / "1") == saved(tmp_path / "8")


def test_stopped_early_the_best_of_those_judged_on_all_rows_is_confirmed(tmp_path: Path) -> None:
    numbers = iter(range(100))

    def second(request: Request) -> str:
        return RIGHT if next(numbers) == 1 else toy.unheard(request)

    budget = Budget(
        calls=TRAIN + 4 + 2 * TRAIN + TRAIN // 2 + 2 * CONFIRM
    )  # the seed, 4 proposals, 2 of them and a half

    evidence = compiled_by(COPRO, models(second), tmp_path, breadth=5, depth=1, threads=1, budget=budget).evidence

    assert [len(trial["rows"]) for trial in trials(tmp_path)] == [TRAIN, TRAIN, TRAIN, TRAIN // 2]
    assert evidence.stopped
    assert evidence.instructions == {"predict": RIGHT}


@each
@pytest.mark.parametrize("threads", [1, 8])
def test_it_is_silent_and_writes_to_the_run_folder_only(
    method: Method, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    streams, told = (sys.stdout, sys.stderr), set[str]()

    def report(what: str, done: int, total: int) -> None:
        if what not in told:
            told.add(what)
            sys.stdout.write(f"{what}\n")

    compiled_by(method, models(), tmp_path / "run", threads=threads, report=report)

    out, err = capsys.readouterr()
    assert f"{method.__name__} scores rows" in out.splitlines()
    assert set(out.splitlines()) == told
    assert err == ""
    assert (sys.stdout, sys.stderr) == streams
    assert list((tmp_path / "here").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"here", "run"}


@each
def test_what_the_program_and_the_metric_print_is_heard(
    method: Method, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Talking(Sorter):
        def forward(self, **inputs: Any) -> Any:
            sys.stdout.write("program\n")
            return super().forward(**inputs)

    def metric(example: Any, prediction: Any) -> bool:
        sys.stdout.write("metric\n")
        return bool(example.label == prediction.label)

    compiled_by(method, models(), tmp_path, Talking(), threads=1, metric=metric)

    lines = capsys.readouterr().out.splitlines()
    assert set(lines) == {"program", "metric"}
    assert lines.count("program") > 3 * TRAIN


@each
def test_compiled_again_it_asks_nothing(method: Method, tmp_path: Path) -> None:
    asked = models()
    compiled_by(method, asked, tmp_path)
    calls, program, listed = asked.calls, saved(tmp_path), trials(tmp_path)

    assert compiled_by(method, asked, tmp_path).evidence.billed.calls == 0
    assert asked.calls == calls
    assert saved(tmp_path) == program
    assert trials(tmp_path) == listed


@each
def test_set_metrics_work(method: Method, tmp_path: Path) -> None:
    evidence = compiled_by(method, models(), tmp_path, metric="f1:yes").evidence

    assert (evidence.baseline, evidence.compiled, evidence.search_score) == (0.0, 1.0, 1.0)


@each
def test_a_row_that_fails_is_no_wrong_answer(method: Method, tmp_path: Path) -> None:
    def broken(request: Request) -> str:
        if "row 1 " in prompt(request):
            raise ConnectionError("no route")
        return toy.answer(request)

    def many(count: int, start: int = 0) -> list[dspy.Example]:
        return toy.rows(3 * count, 3 * start)

    evidence = compiled_by(method, models(answer=broken), tmp_path, rows=many).evidence

    assert evidence.search_score == 1.0
    kinds = {kind for trial in trials(tmp_path) for kind in trial["kinds"]}
    assert kinds == ({"scored", "failed"} if method is COPRO else kinds & {"scored", "failed"})


class Odd(Sorter):
    """Answers some rows by what can't be scored, below the right instruction alone or below any."""

    def __init__(self, odd: Any, rows: str, *, is_any: bool) -> None:
        super().__init__()
        self.told, self.rows, self.is_any = odd, rows, is_any

    def forward(self, **inputs: Any) -> Any:
        told, [(_, asked)] = super().forward(**inputs), predictors(self)
        is_meant = self.is_any or RIGHT in asked.signature.instructions
        return self.told if is_meant and self.rows in inputs["text"] else told


ODD = [None, dspy.Prediction(other="no")]


@each
@pytest.mark.parametrize("odd", ODD)
def test_an_answer_that_cant_be_scored_fails_its_row(method: Method, tmp_path: Path, odd: Any) -> None:
    def many(count: int, start: int = 0) -> list[dspy.Example]:
        return toy.rows(3 * count, 3 * start)

    evidence = compiled_by(method, models(), tmp_path, Odd(odd, "row 1 ", is_any=True), rows=many).evidence

    assert evidence.search_score == 1.0
    kinds = {kind for trial in trials(tmp_path) for kind in trial["kinds"]}
    assert kinds == ({"scored", "failed"} if method is COPRO else kinds & {"scored", "failed"})


@each
@pytest.mark.parametrize("odd", ODD)
def test_a_candidate_with_which_no_answer_can_be_scored_ends_the_search(
    method: Method, tmp_path: Path, odd: Any
) -> None:
    with pytest.raises(ConfigError, match=r"^(The program returned a NoneType|The rows' labels are in 'label')"):
        compiled_by(method, models(toy.right), tmp_path, Odd(odd, "row", is_any=False))


@each
@pytest.mark.parametrize("threads", [1, 8])
def test_too_many_failures_end_the_search(method: Method, tmp_path: Path, threads: int) -> None:
    def broken(request: Request) -> str:
        if RIGHT in system(request):
            raise ConnectionError("no route")
        return toy.answer(request)

    with pytest.raises(LMFailed, match=r"(?s)\d of \d+ rows failed .*no route.*compile again, with run_dir="):
        compiled_by(method, models(toy.right, broken), tmp_path, threads=threads)


def test_calls_that_wait_for_a_retry_dont_hold_up_the_end(tmp_path: Path) -> None:
    def broken(request: Request) -> str:
        if RIGHT not in system(request):
            return toy.answer(request)
        raise ServerError("overloaded") if prompt(request).endswith("yes") else ValueError("no thanks")

    start = time.monotonic()
    with pytest.raises(LMFailed, match="no thanks"):
        compiled_by(
            COPRO, models(toy.right, broken), tmp_path, threads=8, patience=Patience(first_wait=400.0, retries=1)
        )
    assert time.monotonic() - start < 200


@each
def test_a_proposer_that_answers_nothing_ends_the_search(method: Method, tmp_path: Path) -> None:
    def refusing(request: Request) -> str:
        raise ValueError("no thanks")

    with pytest.raises(LMFailed, match=r"^The proposer simulated/writer failed: .*no thanks"):
        compiled_by(method, models(refusing), tmp_path)


@each
def test_a_proposer_that_goes_down_ends_the_search_at_once(method: Method, tmp_path: Path) -> None:
    writer = Writer()

    def down(request: Request) -> str:
        if writer.requests:
            raise ServerError("overloaded")
        return writer(request)

    asked = models(down)
    with pytest.raises(LMFailed, match=r"^The proposer simulated/writer failed: .*overloaded"):
        compiled_by(method, asked, tmp_path)
    assert len(writer.requests) == 1
    assert asked.calls < 2 * TRAIN


def test_gepa_goes_on_without_a_proposal_that_is_refused(tmp_path: Path) -> None:
    def refusing_some(request: Request) -> str:
        if "row 1 " in prompt(request):
            raise ValueError("no thanks")
        return toy.unheard(request)

    evidence = compiled_by(GEPA, models(refusing_some), tmp_path).evidence

    assert len(trials(tmp_path)) > 10
    assert evidence.stopped == ""


@each
def test_a_metric_that_raises_during_the_search_ends_it(method: Method, tmp_path: Path) -> None:
    tried_first = ("row 0 yes", f"row {TRAIN} yes")

    def metric(example: Any, prediction: Any) -> bool:
        if prediction.label == "yes" and example.text not in tried_first:
            raise KeyError("tone")
        return bool(example.label == prediction.label)

    with pytest.raises(MetricError, match=r"^The metric metric raised KeyError: 'tone', on .*'text': 'row \d+ yes'"):
        compiled_by(method, models(toy.right), tmp_path, metric=metric)


@each
def test_a_program_must_return_a_prediction(method: Method, tmp_path: Path) -> None:
    class Bare(Sorter):
        def forward(self, **inputs: Any) -> Any:
            return str(super().forward(**inputs).label)

    def metric(example: Any, prediction: Any) -> bool:
        return bool(example.label == prediction)

    with pytest.raises(
        ConfigError, match=r"^The program returned a str, not a dspy\.Prediction; return .*label=\.\.\.\)\.$"
    ):
        compiled_by(method, models(), tmp_path, Bare(), metric=metric)


@each
@pytest.mark.parametrize("error", [KeyboardInterrupt, ConnectionError])
def test_a_search_that_breaks_off_says_no_more_than_that(
    method: Method, error: type[BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    streams = (sys.stdout, sys.stderr)

    def breaking(request: Request) -> str:
        if RIGHT in system(request):
            raise error
        return toy.answer(request)

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else LMFailed):
        compiled_by(method, models(toy.right, breaking), tmp_path, threads=1)

    gc.collect()
    assert (sys.stdout, sys.stderr) == streams
    assert capsys.readouterr() == ("", "")


@each
def test_a_predictors_own_model_is_watched_too(method: Method, tmp_path: Path) -> None:
    own, asked, program = models(), models(), Sorter()
    program.predict.lm = own.lm

    evidence = compiled_by(method, asked, tmp_path, program, threads=8, budget=Budget(calls=150)).evidence

    assert own.calls + asked.calls == evidence.spent.calls <= 150
    assert asked.tasks == []
    assert program.predict.lm is own.lm


@each
def test_an_answer_without_field_markers_is_taken_whole(method: Method, tmp_path: Path) -> None:
    bare = Models(toy.answer, lambda request: f"  {RIGHT}\n")

    assert compiled_by(method, bare, tmp_path).evidence.instructions == {"predict": RIGHT}


@each
def test_an_instruction_that_copies_a_row_is_never_tried(method: Method, tmp_path: Path) -> None:
    copying = models(lambda request: f"{RIGHT} My parcel number 4 with the blue kettle came back broken on Monday")

    evidence = compiled_by(method, copying, tmp_path, rows=toy.letters).evidence

    assert not evidence.has_candidate
    assert [trial["instructions"] for trial in trials(tmp_path)] == [{"predict": SEED}]
    assert not [request for request in copying.tasks if "Monday" in system(request)]


def test_copros_completions_are_draws_of_their_own(tmp_path: Path) -> None:
    writer = Writer()
    compiled_by(COPRO, models(writer), tmp_path, breadth=5, depth=1)

    assert len({prompt(request) for request in writer.requests}) == 1
    assert len({request.config.seed for request in writer.requests}) == 4
    assert [len(trial["rows"]) for trial in trials(tmp_path)] == [TRAIN] * 5


def test_copros_completions_are_asked_for_together_and_replayed(tmp_path: Path) -> None:
    writer, together = Writer(), threading.Barrier(4)

    def write(request: Request) -> str:
        together.wait(timeout=300)  # none is answered until all four are under way
        return writer(request)

    first, again = (
        compiled_by(COPRO, models(write), tmp_path, breadth=5, depth=1, threads=8).evidence for _ in range(2)
    )

    assert len({request.config.seed for request in writer.requests}) == len(writer.requests) == 4
    assert (again.instructions, again.spent) == (first.instructions, first.spent)


@pytest.mark.parametrize(("method", "temperature"), [(COPRO, 1.4), (GEPA, 1.0), (MIPROv2, 1.0)])
def test_proposals_are_sampled_at_the_temperature_of_dspys_documentation_or_the_users(
    method: Method, temperature: float, tmp_path: Path
) -> None:
    for settings, expected in (({}, temperature), ({"temperature": 0.7}, 0.7)):
        writer = Writer()
        of = models(writer)
        greedy = of.proposer.copy(temperature=0.0)
        place = tmp_path / str(expected)
        ready = made(method, lm=of.lm, proposer=greedy, run_dir=place, budget=Budget(calls=150), **settings)
        ready.compile(Sorter(), trainset=toy.rows(TRAIN), valset=toy.rows(CONFIRM, TRAIN))

        proposals = [request for request in writer.requests if request.config.temperature == expected]
        assert len({request.config.seed for request in proposals}) == len(proposals) > 1
        if method is not MIPROv2:  # which describes the data and the program at other temperatures first
            assert proposals == writer.requests


@pytest.mark.parametrize(("auto", "least", "most"), [(None, 880, 900), ("light", 200, 640)])
def test_gepa_takes_what_the_budget_leaves_it_or_dspys_own_size(
    auto: Any, least: int, most: int, tmp_path: Path
) -> None:
    size = {} if auto is None else {"auto": auto}

    evidence = compiled_by(GEPA, models(toy.unheard), tmp_path, budget=Budget(calls=900), **size).evidence

    assert least <= evidence.spent.calls <= most
    ready = GEPA(metric="accuracy", **size)
    assert (ready.estimate(signatures(Sorter()), TRAIN, 900).expected == 900) == (auto is None)


def test_of_those_judged_on_all_rows_the_best_by_the_metric_wins_whatever_the_optimizer_chose(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Cautious(COPRO):
        """Tries two prompts on all rows, a third on one, and chooses the seed."""

        def _optimized(self, watch: Watch, threads: int) -> dspy.Module:
            for text, rows in (("Guess.", watch.judged), (RIGHT, watch.judged), ("Guess well.", watch.judged[:1])):
                program: Any = watch.student.deepcopy()
                program.predict.signature = program.predict.signature.with_instructions(text)
                for row in rows:
                    watch.score(row, program(**row.inputs()))
            return watch.student

    method: Any = Cautious
    assert compiled_by(method, models(), tmp_path).evidence.instructions == {"predict": RIGHT}


def test_another_seed_draws_other_proposals(tmp_path: Path) -> None:
    drawn: list[set[int | None]] = []
    for seed in (1, 2):
        writer = Writer()
        compiled_by(COPRO, models(writer), tmp_path / str(seed), breadth=5, depth=1, seed=seed)
        drawn.append({request.config.seed for request in writer.requests})

    assert not drawn[0] & drawn[1]


def test_gepa_is_told_the_right_label(tmp_path: Path) -> None:
    writer = Writer()
    compiled_by(GEPA, models(writer), tmp_path, budget=Budget(calls=150))

    shown = prompt(writer.requests[0])
    assert "The score of this answer is 0. The right label is: yes" in shown
    assert "The score of this answer is 1. The right label is: no" in shown


def test_gepa_is_told_what_the_users_metric_says(tmp_path: Path) -> None:
    def metric(example: Any, prediction: Any, trace: Any, predictor: Any, steps: Any) -> Any:
        score = example.label == prediction.label
        return dspy.Prediction(score=score, feedback=f"{predictor} read {steps[0][1]['text']}") if predictor else score

    writer = Writer()
    compiled_by(GEPA, models(writer), tmp_path, metric=metric, budget=Budget(calls=150))

    assert "predict read row" in prompt(writer.requests[0])


def test_mipro_describes_the_users_program_and_not_what_watches_it(tmp_path: Path) -> None:
    writer = Writer()
    compiled_by(MIPROv2, models(writer), tmp_path)

    told = [prompt(request) for request in writer.requests if "pseudo-code" in system(request)]
    assert len(told) == 2 * CANDIDATES["light"]
    assert all("class Sorter(dspy.Module):" in text and "watch" not in text.lower() for text in told)


class Holder(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pick = Classify("text -> label: Literal['yes', 'no']", toy.SEED)

    def forward(self, text: str) -> Any:
        return self.pick(text=text)


@pytest.mark.parametrize("kind", [Classify, Holder])
def test_mipro_is_shown_the_source_of_our_modules_as_little_as_of_dspys_own(kind: Any, tmp_path: Path) -> None:
    """The example in a docstring of ours is about other labels, which a small proposer takes for the task's."""
    writer, program = Writer(), Holder() if kind is Holder else Holder().pick
    compiled_by(MIPROv2, models(writer), tmp_path, program=program)

    told = [prompt(request) for request in writer.requests if "pseudo-code" in system(request)]
    assert len(told) == 2 * CANDIDATES["light"]
    assert all("StringSignature(text -> label" in text for text in told)
    assert not [text for text in told if "class Classify" in text or "spam" in text]
    assert {"class Holder(dspy.Module):" in text for text in told} == {kind is Holder}


def test_mipro_leaves_optunas_verbosity_as_it_was(tmp_path: Path) -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    try:
        compiled_by(MIPROv2, models(), tmp_path)
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
    finally:
        optuna.logging.set_verbosity(before)


def test_the_sizes_are_dspys() -> None:
    assert {name: settings["n"] for name, settings in GEPA_SETTINGS.items()} == CANDIDATES
    assert {name: settings["n"] for name, settings in MIPRO_SETTINGS.items()} == CANDIDATES
    assert {name: settings["val_size"] for name, settings in MIPRO_SETTINGS.items()} == JUDGED


@pytest.mark.parametrize(
    ("make", "rows", "estimate"),
    [
        # 20 for the seed, 2 proposals, 20 for the first; 5 proposals and candidates in all
        (lambda: COPRO(metric="accuracy", breadth=3, depth=2), 20, Estimate(42, 20 + 5 + 5 * 20)),
        # judged by 50: the seed and a candidate, and 3 rows before and after; 580 scores, a proposal per 6 + 50 / 3
        (lambda: GEPA(metric="accuracy"), 100, Estimate(50 + 50 + 3 + 3 + 1, 580 + 530 // 22)),
        # judged by 50, 17 rows to find demonstrations, 2 + 4 summaries and 18 more; 5 others, 4 of them tried
        (lambda: MIPROv2(metric="accuracy"), 100, Estimate(50 + 17 + 24 + 50, 50 + 17 + 24 + 202)),
    ],
)
def test_the_estimate_follows_dspys_own_budget(make: Callable[[], Any], rows: int, estimate: Estimate) -> None:
    assert make().estimate(signatures(Sorter()), rows, None) == estimate
    assert make().estimate(signatures(Sorter()), rows, estimate.least + 1).expected == estimate.least + 1


@each
def test_a_search_takes_about_the_calls_that_were_estimated(method: Method, tmp_path: Path) -> None:
    asked = models(toy.unheard)
    evidence = compiled_by(method, asked, tmp_path, rows=lambda count, start=0: toy.rows(4 * count, 4 * start)).evidence

    searched = evidence.spent.calls - 4 * CONFIRM * (1 + evidence.has_candidate)
    expected = made(method).estimate(signatures(Sorter()), 4 * TRAIN, None).expected
    assert searched == pytest.approx(expected, rel=0.5 if method is GEPA else 0.1)


def test_settings_that_cant_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^COPRO needs breadth >= 2, got 1\.$"):
        COPRO(metric="accuracy", breadth=1)
    with pytest.raises(ConfigError, match=r"^COPRO needs depth >= 1, got 0\.$"):
        COPRO(metric="accuracy", depth=0)
    bad: Any = "huge"
    with pytest.raises(ConfigError, match=r"^GEPA needs auto to be light, medium, heavy, got 'huge'\.$"):
        GEPA(metric="accuracy", auto=bad)
    with pytest.raises(ConfigError, match=r"^MIPROv2 needs temperature from 0 to 2, got -1\.$"):
        MIPROv2(metric="accuracy", temperature=-1)
    with pytest.raises(ConfigError, match=r"^MIPROv2 needs threads >= 1, got 0\.$"):
        MIPROv2(metric="accuracy", threads=0)
