from __future__ import annotations

import dspy
import numpy as np
import pytest

from preceptor.benchmarks import peers
from preceptor.benchmarks.peers import Case
from preceptor.lm.budget import Budget
from preceptor.lm.seam import predictors
from preceptor.modules import Classify
from preceptor.teleprompters import APE
from preceptor.testing import asked, coin_flip, graded

ROWS = 10


def case(accuracy: dict[str, float], proposals: list[str], default: float = 0.0) -> Case:
    rows = [
        dspy.Example(text=f"Row {number}", side=["heads", "tails"][number % 2]).with_inputs("text")
        for number in range(2 * ROWS)
    ]
    truth = {row.text: row.side for row in rows}
    return Case(
        student=Classify("text -> side: Literal['heads', 'tails']", instructions="Seed."),
        lm=peers.speaking(graded(truth, accuracy, proposals=proposals, default=default)),
        train=rows[:ROWS],
        val=rows[ROWS:],
        output="side",
    )


@pytest.mark.parametrize("name", list(peers.PEERS))
def test_a_peer_claims_the_whole_gain_of_a_perfect_prompt_and_says_nothing_else(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    given = case({"Seed.": 0.0, "Good.": 1.0}, ["Good."])

    claim = peers.PEERS[name](given)

    assert (claim.replaced, claim.gain, claim.calls) == (True, 1.0, len(asked(given.lm)))
    assert [predictor.signature.instructions for _, predictor in predictors(claim.program)] == ["Good."]
    assert [predictor.signature.instructions for _, predictor in predictors(given.student)] == ["Seed."]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "seed", "others"),
    [("dspy.GEPA", 0.9, 0.3), ("dspy.GEPA", 0.6, 0.4), ("dspy.MIPROv2", 0.9, 0.3), ("dspy.COPRO", 0.9, 0.3)],
)
def test_a_peer_keeps_a_prompt_that_nothing_beats_and_claims_nothing(name: str, seed: float, others: float) -> None:
    given = case({"Seed.": seed}, [f"Worse {number}." for number in range(12)], default=others)
    claim = peers.PEERS[name](given)
    assert (claim.replaced, claim.gain) == (False, 0.0)


def test_peers_are_held_to_what_they_announce() -> None:
    unhelped = {"Seed.": 0.5}
    light = peers.gepa(case(unhelped, ["Same."]))
    copro = peers.copro(case(unhelped, ["Same."]))
    # dspy.GEPA plans "light" as the seed on all rows, 6 candidates of 5 trials, 10 trials of 35, 3 times all rows
    assert light.announced == 10 + 6 * 5 + 10 * 35 + 3 * 10
    assert peers.gepa(case(unhelped, ["Same."]), max_metric_calls=40).announced == 40
    assert peers.gepa(case(unhelped, ["Same."]), max_full_evals=3).announced == 3 * (ROWS + ROWS)
    # 9 trials on all 10 rows; 10 summaries of the data, 6 proposals, 2 descriptions of the program
    assert peers.miprov2(case(unhelped, ["Same."])).announced == 9 * 10 + 10 + 6 + 2
    # 3 rounds of 10 prompts on 10 rows; 29 of them are proposed, the first is the user's
    assert (copro.announced, copro.calls) == (300, 300 + 29)


def test_our_methods_are_found_by_entry_point_and_claim_what_their_evidence_says() -> None:
    assert peers.ours()["ape"] is APE
    assert set(peers.ours(wrapped=True)) - set(peers.ours()) == {"copro", "gepa", "miprov2"}
    given = case({"Seed.": 0.0, "Good.": 1.0}, ["Good."])

    claim = peers.compile_ours(APE, given)

    assert (claim.replaced, claim.gain, claim.announced) == (True, 1.0, None)
    assert claim.evidence is not None
    assert claim.evidence.spent.calls == claim.calls == len(asked(given.lm))


def test_the_mixture_is_compiled_over_made_up_regions() -> None:
    given = case({"Seed.": 0.5}, ["Good."], default=0.5)
    claim = peers.compile_ours(peers.ours()["mixture"], given, Budget(calls=300))
    assert (claim.replaced, claim.gain, claim.announced) == (False, 0.0, 300)
    assert claim.calls <= 300
    nearest = np.argmax(peers.TOPICS([f"Row {at}" for at in range(200)]), axis=1)
    assert sorted(set(nearest)) == list(range(peers.REGIONS))


def test_a_speaking_model_fills_the_fields_it_is_asked_for_with_another_text_each_time() -> None:
    lm = peers.speaking(coin_flip(["heads", "tails"]))
    ask = dspy.Predict("task -> hint, reason")
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        chat = [ask(task="Toss.") for _ in range(2)]
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        record = ask(task="Toss.")
    texts = {one[field] for one in (*chat, record) for field in ("hint", "reason")}
    assert len(texts) == 6
    assert all(text.startswith("Decide by rule ") for text in texts)
    assert len(asked(lm)) == 3


def test_a_speaking_model_answers_the_task_as_the_model_inside_does() -> None:
    inner = coin_flip(["heads", "tails"])
    outer = peers.speaking(coin_flip(["heads", "tails"]))
    program = Classify("text -> side: Literal['heads', 'tails']", instructions="Call it.")
    answers = []
    for lm in (inner, outer):
        with dspy.context(lm=lm):
            answers.append([program(text=f"Toss {number}").side for number in range(20)])
    assert answers[0] == answers[1]
    assert set(answers[0]) == {"heads", "tails"}


@pytest.mark.parametrize("jobs", [1, 2])
def test_work_comes_back_in_order_and_is_reported(jobs: int) -> None:
    told: list[tuple[str, int, int]] = []
    found = peers.spread(abs, [-3, 1, -2], jobs, lambda *args: told.append(args), "counting")
    assert found == [3, 1, 2]
    assert told == [("counting: 30 %", 1, 3), ("counting: 65 %", 2, 3), ("counting: 100 %", 3, 3)]
