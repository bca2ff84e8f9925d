from __future__ import annotations

import asyncio
import copy
import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest
from dspy.lm15 import Config, Message, Request

from preceptor.errors import ConfigError
from preceptor.lm.adapter import DirectAdapter
from preceptor.modules import Classify
from preceptor.testing import asked, coin_flip, graded, prompt, scripted, simulated, system

LABELS = ["yes", "no"]
TRUTH = {f"row {number}": ("red", "green", "blue")[number % 3] for number in range(2000)}
SIX_SIGMA = 6.0
"""A fair draw falls outside of so many standard deviations once in five hundred million times."""


def flips(lm: dspy.LM, instructions: str, rows: int) -> list[str]:
    program = Classify("text -> label: Literal['yes', 'no']", instructions)
    with dspy.context(lm=lm):
        return [str(program(text=f"row {row}").label) for row in range(rows)]


def told(lm: dspy.LM, instruction: str, text: str, seed: int | None = None) -> str:
    """Ask as the direct adapter does, with an instruction and one input."""
    messages = (Message.user(f"text: {text}"),)
    request = Request(model=lm.model, messages=messages, system=instruction, config=Config(seed=seed))
    return lm(request).message.text or ""


def hits(lm: dspy.LM, instruction: str) -> list[bool]:
    return [told(lm, instruction, text) == label for text, label in TRUTH.items()]


def test_a_scripted_model_answers_in_order_and_fails_when_asked_once_too_often() -> None:
    lm = scripted(["one", "two"])

    assert [lm("a"), lm("b")] == [["one"], ["two"]]
    with pytest.raises(dspy.LMError, match=r"2 answers scripted, asked once more: 'c'"):
        lm("c")
    assert [prompt(request) for request in asked(lm)] == ["a", "b", "c"]


def test_a_simulated_model_sees_the_whole_request() -> None:
    lm = simulated(lambda request: f"{system(request)}/{prompt(request)}/{request.config.temperature}")
    request = Request(model=lm.model, messages=(Message.user("hi"),), system="Be brief.")

    assert lm(request).message.text == "Be brief./hi/None"
    assert lm("ho", temperature=0.5) == ["/ho/0.5"]


@pytest.mark.parametrize(
    ("setting", "value"), [("temperature", 0.5), ("top_p", 0.25), ("max_tokens", 3), ("stop", ["."]), ("seed", 7)]
)
def test_the_settings_it_says_it_supports_reach_the_engine(setting: str, value: object) -> None:
    lm = simulated(lambda request: "yes")

    lm("hi", **{setting: value})

    assert lm.supported_params == {"temperature", "top_p", "max_tokens", "stop", "seed"}
    reached = getattr(asked(lm)[0].config, setting)
    assert (list(reached) if setting == "stop" else reached) == value


def test_tokens_are_counted_as_words() -> None:
    lm = simulated(lambda request: "three words now")

    usage = lm(Request(model=lm.model, messages=(Message.user("c d e"),), system="a b")).usage

    assert (usage.input_tokens, usage.output_tokens) == (5, 3)


def test_a_copy_of_a_simulated_model_shares_its_requests() -> None:
    lm = simulated(lambda request: "ok")
    copy.deepcopy(lm)("hi")

    assert [prompt(request) for request in asked(lm)] == ["hi"]


def test_no_request_is_lost_between_threads() -> None:
    lm = simulated(lambda request: prompt(request))

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: lm(f"row {n}")[0], range(200)))

    assert answers == [f"row {n}" for n in range(200)]
    assert sorted(prompt(request) for request in asked(lm)) == sorted(answers)


def test_latency_is_waited_for_in_each_thread_and_off_the_event_loop() -> None:
    lm = simulated(lambda request: "ok", latency=1)

    async def ask_both() -> list[list[str]]:
        return [list(answer) for answer in await asyncio.gather(lm.acall("a"), lm.acall("b"))]

    start = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(lambda _: lm("hi")[0], range(32))) == ["ok"] * 32
    assert asyncio.run(ask_both()) == [["ok"], ["ok"]]

    assert 2 <= time.monotonic() - start < 34  # 34 x 1 s, were they asked one by one


def test_a_coin_has_both_sides_under_every_instruction() -> None:
    for instructions in ("Guess.", "Say yes.", "Answer with the text's mood."):
        share = flips(coin_flip(LABELS), instructions, 200).count("yes") / 200
        assert 0.4 < share < 0.6, instructions


def test_a_coin_falls_the_same_way_for_the_same_request_and_seed() -> None:
    first = flips(coin_flip(LABELS, seed=1), "Guess.", 40)

    assert flips(coin_flip(LABELS, seed=1), "Guess.", 40) == first
    assert flips(coin_flip(LABELS, seed=2), "Guess.", 40) != first
    assert flips(coin_flip(LABELS, seed=1), "Guess well.", 40) != first


def test_a_coin_falls_anew_with_other_demonstrations() -> None:
    lm = coin_flip(LABELS)

    def after(demo: str) -> list[str]:
        rows = [(Message.user(demo), Message.assistant("yes"), Message.user(f"row {row}")) for row in range(40)]
        return [lm(Request(model=lm.model, messages=row, system="Guess.")).message.text for row in rows]

    assert after("one") == after("one") != after("two")


def test_a_coin_writes_another_instruction_for_each_seed_of_the_request() -> None:
    lm = coin_flip(LABELS)

    texts = [lm("Write an instruction.", seed=seed)[0] for seed in range(50)]

    assert len(set(texts)) == 50
    assert lm("Write an instruction.", seed=7) == [texts[7]]
    assert all(text.startswith("Decide by rule ") for text in texts)


@pytest.mark.parametrize("lm", [coin_flip(LABELS), graded(TRUTH, {"Sort.": 0.5, "Judge.": 0.7}, seed=3)])
def test_answers_depend_on_the_request_alone(lm: dspy.LM) -> None:
    asks = [Request(lm.model, (Message.user("Write one."),), config=Config(seed=seed)) for seed in range(30)]
    asks += [Request(lm.model, (Message.user(f"text: row {row}"),), system="Sort.") for row in range(30)]
    in_order = [lm(request).message.text for request in asks]

    with ThreadPoolExecutor(16) as pool:
        backwards = list(pool.map(lambda request: lm(request).message.text, reversed(asks)))

    assert backwards[::-1] == in_order


@pytest.mark.parametrize("agreement", [0.0, 0.5, 1.0])
def test_a_graded_models_accuracy_is_what_was_declared(agreement: float) -> None:
    declared = {"Guess.": 0.35, "Judge it well.": 0.8, "Anything else.": 0.6}
    accuracy = {"Guess.": 0.35, "Judge it well.": 0.8}
    lm = graded(TRUTH, accuracy, default=0.6, agreement=agreement, seed=11)

    for instruction, true in declared.items():
        deviation = math.sqrt(true * (1 - true) / len(TRUTH))
        assert abs(sum(hits(lm, instruction)) / len(TRUTH) - true) < SIX_SIGMA * deviation, instruction


def test_accuracies_of_0_and_1_are_exact() -> None:
    lm = graded(TRUTH, {"Never.": 0.0, "Always.": 1.0})

    assert (sum(hits(lm, "Never.")), sum(hits(lm, "Always."))) == (0, len(TRUTH))


def test_in_full_agreement_the_better_instruction_is_right_wherever_the_worse_one_is() -> None:
    lm = graded(TRUTH, {"Guess.": 0.3, "Judge.": 0.7}, agreement=1.0)

    worse, better, same = (hits(lm, instruction) for instruction in ("Guess.", "Judge.", "Please Judge."))

    assert all(above for above, below in zip(better, worse, strict=True) if below)
    assert same == better


def test_without_agreement_two_instructions_are_right_independently() -> None:
    lm = graded(TRUTH, {"Guess.": 0.5, "Judge.": 0.5}, agreement=0.0)

    both = sum(a and b for a, b in zip(hits(lm, "Guess."), hits(lm, "Judge."), strict=True))

    assert abs(both / len(TRUTH) - 0.25) < SIX_SIGMA * math.sqrt(0.25 * 0.75 / len(TRUTH))


def test_agreement_is_the_share_of_rows_with_the_same_luck() -> None:
    lm = graded(TRUTH, {}, default=0.5, proposals=["Guess."], agreement=0.6)

    equal = sum(a == b for a, b in zip(hits(lm, "One."), hits(lm, "Two."), strict=True))

    # the same luck in 0.6 of the rows, equal by chance in half of the others
    assert abs(equal / len(TRUTH) - 0.8) < SIX_SIGMA * math.sqrt(0.8 * 0.2 / len(TRUTH))


def test_the_longest_instruction_found_counts_else_the_default() -> None:
    lm = graded(TRUTH, {"Judge.": 0.0, "Judge. Take care.": 1.0, "care": 0.0}, default=1.0)

    assert told(lm, "Judge. Take care.\n\nAnswer with exactly one of: red, green, blue.", "row 0") == "red"
    assert told(lm, "Judge. Now!", "row 0") != "red"
    assert told(lm, "Sort.", "row 0") == "red"


def test_wrong_answers_are_the_other_labels_evenly() -> None:
    lm = graded(TRUTH, {"Never.": 0.0})

    wrong = Counter(told(lm, "Never.", text) for text, label in TRUTH.items() if label == "red")

    assert sorted(wrong) == ["blue", "green"]
    assert abs(wrong["blue"] / wrong.total() - 0.5) < SIX_SIGMA * math.sqrt(0.25 / wrong.total())


def test_a_graded_model_proposes_evenly_and_anew_for_each_seed_of_the_request() -> None:
    lm = graded(TRUTH, {"Guess.": 0.3}, proposals=["One.", "Two.", "Three."])

    texts = Counter(lm("Write an instruction.", seed=seed)[0] for seed in range(900))

    assert sorted(texts) == ["One.", "Three.", "Two."]
    assert all(abs(count / 900 - 1 / 3) < SIX_SIGMA * math.sqrt(2 / 9 / 900) for count in texts.values())


def test_a_graded_model_proposes_the_instructions_it_knows_by_default() -> None:
    lm = graded(TRUTH, {"Guess.": 0.3, "Judge.": 0.9})

    assert {lm("Write.", seed=seed)[0] for seed in range(20)} == {"Guess.", "Judge."}


def test_seeds_of_graded_models_draw_other_rows() -> None:
    first, again, other = (graded(TRUTH, {"Guess.": 0.5}, seed=seed) for seed in (1, 1, 2))

    assert hits(first, "Guess.") == hits(again, "Guess.") != hits(other, "Guess.")


def test_a_graded_model_reads_what_the_direct_adapter_writes() -> None:
    lm = graded({"it: rains": "no", "it: shines": "yes"}, {"Judge.": 1.0})
    program = Classify("weather -> good: Literal['yes', 'no']", "Judge.")

    with dspy.context(lm=lm, adapter=DirectAdapter()):
        assert [program(weather=f"it: {it}").good for it in ("rains", "shines")] == ["no", "yes"]


def test_several_inputs_are_one_text_with_their_names() -> None:
    lm = graded({"day: Monday\nmood: good": "yes", "day: Monday\nmood: bad": "no"}, {"Judge.": 1.0})
    program = Classify("day, mood -> go: Literal['yes', 'no']", "Judge.")

    with dspy.context(lm=lm, adapter=DirectAdapter()):
        assert [program(day="Monday", mood=mood).go for mood in ("good", "bad")] == ["yes", "no"]


def test_an_unknown_input_says_what_was_looked_for() -> None:
    lm = graded({"row 1": "yes", "row 2": "no"}, {"Judge.": 1.0})
    with pytest.raises(
        dspy.LMError,
        match=r"graded\(\) knows no answer for 'text: row 10': neither this message nor what follows its first ': ' "
        r"is one of the 2 texts of truth, the first of which is 'row 1'\.",
    ):
        told(lm, "Judge.", "row 10")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"truth": {"a": "yes", "b": "yes"}}, r"needs at least 2 distinct answers in truth, got \['yes'\]\."),
        ({"accuracy": {}}, r"has nothing to propose: give it proposals, or instructions in accuracy\."),
        ({"accuracy": {"default": 1.5}}, r"needs a share in \[0, 1\] for 'default', got 1\.5\."),
        ({"default": -0.1}, r"needs a share in \[0, 1\] for 'default', got -0\.1\."),
        ({"agreement": float("nan")}, r"needs a share in \[0, 1\] for 'agreement', got nan\."),
    ],
)
def test_what_cant_be_graded_is_refused(settings: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"truth": {"a": "yes", "b": "no"}, "accuracy": {"Judge.": 0.5}, **settings}
    with pytest.raises(ConfigError, match=rf"^graded\(\) {message}$"):
        graded(**given)  # type: ignore[arg-type]  # as parametrized


def test_requests_of_another_kind_of_model_cant_be_listed() -> None:
    with pytest.raises(AssertionError, match=r"asked\(\) is for the models of preceptor\.testing"):
        asked(dspy.LM("openai/gpt", api_key="none"))
