from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Request, Response, TokenLogprob, TopLogprob

from preceptor.errors import BudgetExhausted, ConfigError, InputTooLong, LMFailed
from preceptor.lm.budget import Account, Budget
from preceptor.lm.dispatch import Patience
from preceptor.lm.meter import Meter
from preceptor.modules import Classify
from preceptor.program import candidate_of
from preceptor.run import open_run
from preceptor.scoring.evaluate import Losses, charged
from preceptor.scoring.metrics import wrap
from preceptor.scoring.trial import Candidate, Outcome
from preceptor.task import Sampling, Task
from preceptor.testing import ChatServer, Simulated, asked, prompt, simulated, system

SAMPLING = Sampling(0.9, 0.8, 77)
GOOD = Candidate({"predict": "Repeat the last word."})

OK, BAD = Outcome("scored", 1.0), Outcome("failed", None, error="Timeout: 30 s")

Open = Callable[..., AbstractContextManager[Task]]


class Twice(dspy.Module):
    """Two predictors, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Classify("text -> guess: Literal['yes', 'no']", "Guess.")
        self.second = Classify("guess -> label: Literal['yes', 'no']", "Decide.")

    def forward(self, text: str) -> Any:
        return self.second(guess=self.first(text=text).guess)


def student() -> dspy.Module:
    return Classify("text -> label: Literal['yes', 'no']", "Sort.")


def rows(count: int) -> list[dspy.Example]:
    words = [["yes", "no"][n % 2] for n in range(count)]
    return [dspy.Example(text=f"{n} {word}", label=word).with_inputs("text") for n, word in enumerate(words)]


def answer(request: Request) -> str:
    """Say yes, unless told to repeat the last word."""
    return prompt(request).split()[-1] if "Repeat" in system(request) else "yes"


@pytest.fixture
def make(tmp_path: Path) -> Open:
    @contextmanager
    def open_task(
        lm: dspy.LM,
        *,
        program: dspy.Module | None = None,
        proposer: dspy.LM | None = None,
        train: int = 8,
        calls: int | None = None,
        patience: Patience | None = None,
        report: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> Generator[Task]:
        chosen = program or student()
        with open_run(tmp_path, {}) as run:
            meter = Meter(run.ledger, Account(Budget(calls=calls)), patience=patience)
            yield Task(
                student=chosen,
                seed=candidate_of(chosen),
                train=rows(train),
                order=list(range(train)),
                output="label",
                metric=wrap("accuracy", "label"),
                lm=meter.wrap(lm),
                proposer=meter.wrap(proposer or lm),
                meter=meter,
                run=run,
                rng=random.Random(0),
                threads=4,
                report=report,
            )

    return open_task


def test_candidates_are_scored_on_the_same_rows_and_remembered(make: Open, tmp_path: Path) -> None:
    lm = simulated(answer)
    with make(lm) as task:
        trials = task.score([task.seed, GOOD], [3, 0, 5])

        assert [(trial.candidate, trial.rows, trial.score) for trial in trials] == [
            (task.seed, (3, 0, 5), pytest.approx(1 / 3)),
            (GOOD, (3, 0, 5), 1.0),
        ]
        assert [outcome.answer for outcome in trials[1].outcomes] == ["no", "yes", "no"]
        assert task.scored == trials
        assert task.meter.account.spent.calls == len(asked(lm)) == 6
        assert candidate_of(task.student) == task.seed

    lines = (tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    assert [(json.loads(line)["instructions"], json.loads(line)["scores"]) for line in lines] == [
        ({"predict": "Sort."}, [0.0, 1.0, 0.0]),
        ({"predict": "Repeat the last word."}, [1.0, 1.0, 1.0]),
    ]


def test_the_run_keeps_calls_rows_and_interval_of_all_a_candidate_has_seen(make: Open, tmp_path: Path) -> None:
    with make(simulated(answer)) as task:
        task.score([task.seed], [0, 1, 2, 3])
        task.score([task.seed], [3, 4, 5, 6])

    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["calls"], line["seen"]) for line in lines] == [(4, 4), (8, 7)]
    assert [line["so_far"] for line in lines] == [0.5, pytest.approx(4 / 7)]
    assert lines[0]["interval"] == pytest.approx([0.150, 0.850], abs=0.001)  # Wilson's, of 2 of 4
    assert lines[1]["interval"] == pytest.approx([0.250, 0.842], abs=0.001)  # of 4 of 7


def test_demonstrations_of_a_candidate_are_shown(make: Open) -> None:
    lm = simulated(answer)
    demos = ({"text": "9 no", "label": "no"},)
    with make(lm) as task:
        task.score([Candidate({"predict": "Sort."}, {"predict": demos})], [0])

    assert [message.text for message in asked(lm)[0].messages] == ["text: 9 no", "no", "text: 0 yes"]


def test_signatures_are_those_of_the_predictors_by_name(make: Open) -> None:
    with make(simulated(answer), program=Twice()) as task:
        assert list(task.signatures) == ["first.predict", "second.predict"]


def test_scoring_stops_at_the_budget_and_keeps_what_was_answered(make: Open) -> None:
    lm = simulated(answer)
    with make(lm, calls=5) as task:
        with pytest.raises(BudgetExhausted, match=r"could take calls to 6, past the budget of 5"):
            task.score([task.seed], range(8))
        assert task.scored == []
        assert len(task.run.ledger) == len(asked(lm)) == 5


def test_a_score_with_too_many_broken_calls_is_refused(make: Open) -> None:
    def broken(request: Request) -> str:
        raise ConnectionError("no route")

    with (
        make(simulated(broken)) as task,
        pytest.raises(LMFailed, match=r" rows failed \(8 to be scored\); .*no route\.$"),
    ):
        task.score([task.seed], range(8))


def test_progress_counts_rows(make: Open) -> None:
    seen: list[tuple[str, int, int]] = []
    with make(simulated(answer), report=lambda *told: seen.append(told)) as task:
        task.score([task.seed, GOOD], [0, 1])

    what = "scoring 2 candidates on 2 rows"
    assert seen == [(what, done, 4) for done in range(5)]


def test_proposals_come_prompt_by_prompt_and_every_sample_is_a_draw_of_its_own(make: Open) -> None:
    lm = simulated(lambda request: f"{prompt(request)}!", name="writer")
    with make(simulated(answer), proposer=lm) as task:
        assert task.propose(["one", "two"], SAMPLING, samples=2) == ["one!", "one!", "two!", "two!"]
        assert task.meter.account.spent.calls == len(asked(lm)) == 4

        task.propose(["two", "three"], SAMPLING, samples=2)
        assert len(asked(lm)) == task.meter.account.spent.calls == 8  # asked again, "two" is drawn anew
        assert len({request.config.seed for request in asked(lm)}) == 8

    request = asked(lm)[0]
    assert (request.model, system(request)) == ("simulated/writer", "")
    assert (request.config.temperature, request.config.top_p, request.config.max_tokens) == (0.9, 0.8, 77)


def test_a_reasoning_models_own_bound_is_kept(make: Open) -> None:
    engine = Simulated(lambda request: "text", "openai/o3")
    lm = dspy.LM("openai/o3", engine=engine, max_tokens=20_000, temperature=1.0, cache=False)
    with make(lm) as task:
        task.propose(["one"], SAMPLING)

    [request] = asked(lm)
    assert (request.config.temperature, request.config.top_p, request.config.max_tokens) == (None, None, 20_000)


def test_one_proposal_in_twenty_may_fail_and_no_more(make: Open) -> None:
    def moody(request: Request) -> str:
        if "bad" in prompt(request):
            raise ConnectionError("no route")
        return prompt(request)

    with make(simulated(moody)) as task:
        good = [f"proposal {n}" for n in range(19)]
        assert task.propose(["bad", *good], SAMPLING) == good
        assert task.propose([], SAMPLING) == []
        message = r"^The proposer simulated/model failed 1 of 3 requests; the first with: .*no route\.$"
        with pytest.raises(LMFailed, match=message):
            task.propose(["a", "bad", "b"], SAMPLING)


def test_proposals_that_are_refused_for_good_are_left_out_and_not_asked_for_again(make: Open) -> None:
    def strict(request: Request) -> str:
        if "bad" in prompt(request):
            raise dspy.lm15.InvalidRequestError("against our policy")
        return prompt(request)

    lm = simulated(strict, name="writer")
    with make(simulated(answer), proposer=lm) as task:
        with pytest.raises(LMFailed, match=r"^The proposer simulated/writer failed 2 of 2 requests; .*our policy\.$"):
            task.draw(["bad 1", "bad 2"], SAMPLING)
        assert task.draw(["a", "bad 3"], SAMPLING) == ["a", None]
        assert task.draw(["bad 4"], SAMPLING) == [None]
        assert task.propose(["bad 5", "b"], SAMPLING) == ["b"]
        assert len(asked(lm)) == 7
    with make(simulated(answer), proposer=lm) as task:
        assert task.draw(["a", "bad 3"], SAMPLING) == ["a", None]
        assert task.draw(["bad 4"], SAMPLING) == [None]
        assert task.propose(["bad 5", "b"], SAMPLING) == ["b"]
    assert len(asked(lm)) == 7


def test_a_proposer_that_goes_down_is_no_proposer_that_refuses(make: Open) -> None:
    answers = iter(["one", "two"])

    def then_down(request: Request) -> str:
        text = next(answers, None)
        if text is None:
            raise dspy.lm15.ServerError("down")
        return text

    with make(simulated(answer), proposer=simulated(then_down, name="writer"), patience=Patience(retries=0)) as task:
        assert task.draw(["a"], SAMPLING) == ["one"]
        with pytest.raises(LMFailed, match=r"^The proposer simulated/writer failed \d of 3 requests; .*down\.$"):
            task.draw(["a", "b", "c"], SAMPLING)


def test_a_prompt_that_is_drawn_again_gets_another_answer_the_same_in_every_run(make: Open) -> None:
    def seeded(request: Request) -> str:
        return f"{prompt(request)} {request.config.seed}"

    with make(simulated(answer), proposer=simulated(seeded, name="writer")) as task:
        texts = task.draw(["one", "one", "two"], SAMPLING) + task.draw(["one"], SAMPLING)
        assert [text.split()[0] for text in texts if text] == ["one", "one", "two", "one"]
        assert len(set(texts)) == 4
        task.drawn.clear()  # as in another run
        assert task.propose(["one"], SAMPLING, samples=3) == [texts[0], texts[1], texts[3]]
        assert task.meter.account.spent.calls == 7
    lm = simulated(seeded, name="writer")
    with make(simulated(answer), proposer=lm) as task:
        assert task.draw(["one", "one", "two", "one"], SAMPLING) == [texts[0], texts[1], texts[2], texts[3]]
        assert asked(lm) == []


def test_texts_to_stop_at_are_sent_to_models_in_this_process_only(make: Open) -> None:
    ending, local = Sampling(0.9, stop=("<END>",)), simulated(answer, name="writer")
    with make(simulated(answer), proposer=local) as task:
        task.draw(["one"], ending)
        task.draw(["two"], SAMPLING)
    with ChatServer(lambda body: "a proposal") as server:
        with make(simulated(answer), proposer=server.lm("writer", max_tokens=9)) as task:
            assert task.draw(["one"], ending) == ["a proposal"]
        assert "stop" not in server.requests[0].body
    assert [request.config.stop for request in asked(local)] == [("<END>",), ()]


def test_a_draw_that_failed_leaves_a_gap(make: Open) -> None:
    def moody(request: Request) -> str:
        if "bad" in prompt(request):
            raise ConnectionError("no route")
        return prompt(request)

    with make(simulated(moody)) as task:
        good = [f"proposal {n}" for n in range(19)]
        assert task.draw([*good[:3], "bad", *good[3:]], SAMPLING) == [*good[:3], None, *good[3:]]
        with pytest.raises(LMFailed, match=r"^The proposer simulated/model failed 1 of 2 requests"):
            task.draw(["a", "bad"], SAMPLING)


def test_candidates_walk_rows_of_their_own(make: Open) -> None:
    lm, seen = simulated(answer), list[str]()
    with make(lm, report=lambda what, done, total: seen.append(what)) as task:
        trials = task.score_each([(GOOD, [5]), (task.seed, [2, 3]), (GOOD, [])])

    assert [(trial.candidate, trial.rows, trial.score) for trial in trials[:2]] == [
        (GOOD, (5,), 1.0),
        (candidate_of(student()), (2, 3), 0.5),
    ]
    assert (trials[2].rows, trials[2].outcomes) == ((), ())
    assert sorted(prompt(request) for request in asked(lm)) == ["text: 2 yes", "text: 3 no", "text: 5 no"]
    assert seen[0] == "scoring 3 candidates on 0 to 2 rows"


def test_steps_are_those_of_the_candidate_that_is_asked_for(make: Open) -> None:
    with make(simulated(answer)) as task:
        [(outcome, [step])] = task.steps([1], GOOD)
        [(_, [seeds])] = task.steps([1])
    assert (outcome.score, dict(step.outputs), dict(seeds.outputs)) == (1.0, {"label": "no"}, {"label": "yes"})


def test_a_candidates_origin_is_written_once_and_the_seed_has_none(make: Open, tmp_path: Path) -> None:
    with make(simulated(answer)) as task:
        other = task.seed.with_instruction("predict", "Sort well.")
        task.made(GOOD, task.seed, "predict", "gradient", "It is vague.")
        task.made(GOOD, other, "predict", "paraphrase")
        task.made(task.seed, GOOD, "predict", "paraphrase")
    [line] = (tmp_path / "lineage.jsonl").read_text(encoding="utf-8").splitlines()
    assert (json.loads(line)["how"], json.loads(line)["because"]) == ("gradient", "It is vague.")


def test_steps_show_what_every_predictor_of_the_seed_was_given_and_answered(make: Open) -> None:
    with make(simulated(lambda request: "no"), program=Twice()) as task:
        [(outcome, steps)] = task.steps([1])

    assert (outcome.score, outcome.answer) == (1.0, "no")
    assert [(step.predictor, dict(step.inputs), dict(step.outputs)) for step in steps] == [
        ("first.predict", {"text": "1 no"}, {"guess": "no"}),
        ("second.predict", {"guess": "no"}, {"label": "no"}),
    ]


def test_the_likelihood_needs_a_model_in_this_process(make: Open) -> None:
    message = r"needs a model in this process; simulated/model only writes text\.$"
    with make(simulated(answer)) as task, pytest.raises(ConfigError, match=message):
        task.refuse_likelihood()


@pytest.mark.parametrize("program", [Twice(), dspy.Predict("text -> label, why")])
def test_the_likelihood_needs_one_predictor_with_one_plain_output(make: Open, program: dspy.Module) -> None:
    message = r"needs a program of one predictor with one plain output\.$"
    with make(simulated(answer), program=program) as task, pytest.raises(ConfigError, match=message):
        task.refuse_likelihood()


def test_the_likelihood_of_a_label_is_a_log_probability(make: Open, tmp_path: Path, smollm: dspy.LM) -> None:
    told = Candidate({"predict": "Answer with the word that ends the text."})
    with make(smollm) as task:
        task.refuse_likelihood()
        trials = task.likelihood([task.seed, told], range(8))

        assert task.meter.account.spent.calls == 16
        assert [trial.rows for trial in trials] == [tuple(range(8))] * 2
        scores = [outcome.score for trial in trials for outcome in trial.outcomes]
        assert all(score is not None and -20 < score < 0 for score in scores)
        assert trials[0].score == pytest.approx(sum(score or 0.0 for score in scores[:8]) / 8)
        assert [trial.score for trial in task.likelihood([task.seed], range(8))] == [trials[0].score]
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["interval"] for line in lines] == [None, None, None]
    assert lines[0]["so_far"] == trials[0].score


class Choosing(Simulated):
    """Answers as a model in this process does: with the odds of the choices, each a third of those before it."""

    supports_choices = True

    def complete(self, request: Request) -> Response:
        texts: Any = (request.config.extensions or {})["choices"]
        top = [TopLogprob(text, -at * math.log(3)) for at, text in enumerate(texts)]
        response = super().complete(request)
        return dataclasses.replace(response, logprobs=(TokenLogprob(texts[0], 0.0, top=tuple(top)),))


@pytest.mark.parametrize(("temperature", "first"), [(1.0, 0.75), (0.5, 0.9), (0.0, 1.0)])
def test_a_choice_is_drawn_by_the_odds_a_model_in_this_process_gives(
    make: Open, temperature: float, first: float
) -> None:
    engine = Choosing(lambda request: "a", "simulated/chooser")
    proposer = dspy.LM("simulated/chooser", engine=engine, cache=False)
    with make(simulated(answer), proposer=proposer) as task:
        picked = task.choose(400 * [("Which?", ["a", "b"])], Sampling(temperature))
    assert set(picked) <= {"a", "b"}
    assert picked.count("a") / 400 == pytest.approx(first, abs=0.06)


def test_another_model_may_answer_a_choice_as_it_likes(make: Open) -> None:
    texts = iter(["The second.", "2"])
    proposer = simulated(lambda request: next(texts), name="writer")
    with make(simulated(answer), proposer=proposer) as task:
        assert sorted(map(str, task.choose(2 * [("Which?", ["1", "2"])], SAMPLING))) == ["2", "The second."]
    assert len({request.config.seed for request in asked(proposer)}) == 2
    assert all(request.config.extensions is None for request in asked(proposer))


def test_a_proposal_is_read_without_the_thoughts_before_it(make: Open) -> None:
    def think(completion: dict[str, Any]) -> None:
        completion["choices"][0]["message"]["reasoning"] = "Let me think of an instruction."

    with ChatServer(lambda body: "Repeat the last word.") as server:
        server.shape = think
        with make(simulated(answer), proposer=server.lm()) as task:
            assert task.propose(["Write one."], SAMPLING, samples=2) == ["Repeat the last word."] * 2
            assert task.choose([("Pick one.", ["Repeat the last word."])], SAMPLING) == ["Repeat the last word."]


def test_of_a_proposal_cut_at_its_bound_what_is_whole_is_kept_and_one_without_is_told_of(make: Open) -> None:
    texts = {
        "whole": "Say it in one",
        "tagged": "<START>Name it.<END> <START>Say it in",
        "lines": "Name it.\nSay it in",
        "cut": "Say it in",
    }

    def cut(completion: dict[str, Any]) -> None:
        text = completion["choices"][0]["message"]["content"]
        completion["choices"][0]["finish_reason"] = "stop" if text == texts["whole"] else "length"
        completion["usage"]["completion_tokens"] = SAMPLING.max_tokens

    told: list[str] = []
    with ChatServer(lambda body: texts[body["messages"][-1]["content"]]) as server:
        server.shape = cut
        with make(simulated(answer), proposer=server.lm(), report=lambda what, done, total: told.append(what)) as task:
            assert task.draw([*texts], SAMPLING) == ["Say it in one", "<START>Name it.<END>", "Name it.\n", None]
    assert "1 of 4 proposals failed or were cut: left out" in told


@pytest.mark.parametrize(
    ("name", "top_p", "sent"),
    [
        ("gpt-4o-mini", 0.9, {"temperature": 0.7, "top_p": 0.9}),
        ("gpt-4o-mini", 1.0, {"temperature": 0.7}),
        ("anthropic/claude-sonnet-4-5", 0.9, {"temperature": 0.7}),
    ],
)
def test_a_hosted_proposer_is_sent_top_p_where_it_means_something_and_is_taken(
    make: Open, name: str, top_p: float, sent: dict[str, float]
) -> None:
    with ChatServer(lambda body: "Repeat the last word.") as server:
        with make(simulated(answer), proposer=server.lm(name)) as task:
            task.propose(["Write one."], Sampling(0.7, top_p))
        [received] = server.requests
    assert {key: value for key, value in received.body.items() if key in {"temperature", "top_p"}} == sent


def test_half_a_character_is_left_out_of_a_proposal(make: Open) -> None:
    with (
        ChatServer(lambda body: "Repeat \ud83d the last word.\ud83d") as server,
        make(simulated(answer), proposer=server.lm()) as task,
    ):
        [text] = task.propose(["Write one."], SAMPLING)
        assert text == "Repeat  the last word."
        assert task.score([task.seed.with_instruction("predict", text)], [0, 1])[0].score == 1.0


def test_a_candidate_that_most_rows_fail_with_does_not_win_by_the_others(make: Open) -> None:
    def answering(request: Request) -> str:
        if "Break" in system(request) and prompt(request).split()[-1] == "no":
            raise ConnectionError("no route")
        return answer(request)

    breaking = Candidate({"predict": "Break."})
    others = [Candidate({"predict": f"Say yes, {n}."}) for n in range(11)]
    with make(simulated(answering), train=20) as alone:
        task = dataclasses.replace(alone, losses=Losses(20))
        trials = task.score([breaking, *others], range(20))
        assert [trial.score for trial in trials] == [0.5] * 12  # not 1.0, over the 10 rows that were answered
        assert [outcome.kind for outcome in trials[0].outcomes].count("unparsable") == 10
        assert "no route" in trials[0].outcomes[1].error

    wrong = dataclasses.replace(BAD, kind="unparsable", score=-3.0, is_charged=True)
    assert charged((OK, *[BAD] * 2), worst=-3.0) == (OK, wrong, wrong)
    assert charged((OK, BAD)) == (OK, BAD), "one may be bad luck"
    assert charged((*[OK] * 38, BAD, BAD)) == (*[OK] * 38, BAD, BAD)


def test_a_candidate_that_makes_inputs_too_long_is_charged_and_the_search_goes_on(make: Open) -> None:
    def answering(request: Request) -> str:
        if "Long" in system(request) and prompt(request).split()[-1] == "no":
            raise InputTooLong("at most 8 tokens")
        return answer(request)

    long = Candidate({"predict": "Long."})
    with make(simulated(answering), train=20) as task:
        [trial] = task.score([long], range(20))
        assert trial.score == 0.5
        assert [outcome.kind for outcome in trial.outcomes].count("unparsable") == 10
        assert [outcome.kind for outcome, _ in task.steps(range(20), long)].count("failed") == 10
        its_own = dataclasses.replace(task, seed=long)
        with pytest.raises(LMFailed, match=r"rows failed \(20 to be scored\); the first with: InputTooLong: at most 8"):
            its_own.score([long], range(20))
