"""Whole compiles of programs people write: several predictors, shared ones, typed fields, models of their own."""

from __future__ import annotations

import enum
import itertools
import json
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import dspy
import pydantic
import pytest
from dspy.lm15 import Request

import preceptor
from preceptor.cli import run
from preceptor.lm.adapter import is_direct
from preceptor.lm.budget import Budget
from preceptor.lm.seam import predictors
from preceptor.modules import Classify, Generate
from preceptor.teleprompters import APE
from preceptor.testing import asked, prompt, simulated, system

Worker = Callable[[Request], str]

Signature: Any = dspy.Signature


def given(request: Request, field: str) -> str:
    """Return an input field of a request, as the chat adapter or the direct adapter wrote it."""
    text = prompt(request)
    found = re.search(rf"\[\[ ## {field} ## \]\]\n(.*?)(?:\n\n|\Z)", text, re.DOTALL) or re.search(
        rf"^{field}: (.*)$", text, re.MULTILINE
    )
    return found[1] if found else ""


def chat(**outputs: Any) -> str:
    """Answer as DSPy's chat adapter asks for it."""
    parts = [
        f"[[ ## {name} ## ]]\n{value if isinstance(value, str) else json.dumps(value)}"
        for name, value in outputs.items()
    ]
    return "\n\n".join([*parts, "[[ ## completed ## ]]"])


def proposing(texts: dict[str, str]) -> dspy.LM:
    """Return a proposer that answers by what it is shown: text in the prompt -> instruction."""

    def answer(request: Request) -> str:
        return next(text for shown, text in texts.items() if shown in prompt(request))

    return simulated(answer, name="writer")


def compiled(
    student: dspy.Module,
    rows: Sequence[dspy.Example],
    folder: Path,
    lm: dspy.LM,
    proposer: dspy.LM,
    **settings: Any,
) -> Any:
    """Compile with APE: a third of the rows to search on, the rest to confirm on."""
    third = len(rows) // 3
    knobs = {"metric": "accuracy", "candidates": 2, "demos": 3, "subsamples": 1, "threads": 2, **settings}
    method = APE(lm=lm, proposer=proposer, run_dir=folder, **knobs)
    return method.compile(student, trainset=list(rows[:third]), valset=list(rows[third:]))


def answers(program: dspy.Module, rows: Sequence[dspy.Example], lm: dspy.LM, *fields: str) -> list[Any]:
    with dspy.context(lm=lm):
        predictions = [program(**row.inputs()) for row in rows]
    return [[getattr(prediction, field) for field in fields] for prediction in predictions]


class Triage(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sum_up = dspy.Predict(Signature("ticket -> gist", "Sum up."))
        self.route = dspy.Predict(Signature("gist, channel -> queue: Literal['door', 'vault']", "Pick one."))

    def forward(self, ticket: str, channel: str) -> Any:
        return self.route(gist=self.sum_up(ticket=ticket).gist, channel=channel)


def queue(number: int) -> str:
    return ("door", "vault")[number // 4 % 2]


def tickets(count: int) -> list[dspy.Example]:
    """Every other ticket is hard to sum up, every other pair is hard to route."""
    return [
        dspy.Example(ticket=f"ticket {n}", channel="mail", queue=queue(n)).with_inputs("ticket", "channel")
        for n in range(count)
    ]


def clerk(request: Request) -> str:
    """Sum up and route; hard ones only where the instructions are good."""
    if given(request, "ticket"):
        number = int(given(request, "ticket").split()[1])
        is_clear = number % 2 == 0 or "Keep the facts." in system(request)
        return chat(gist=f"case {number} {'clear' if is_clear else 'vague'}")
    _, case, quality = given(request, "gist").split()
    is_right = quality == "clear" and (int(case) // 2 % 2 == 0 or "Sort by case." in system(request))
    return chat(queue=queue(int(case)) if is_right else queue(int(case) + 4))


def test_every_predictor_of_a_pipeline_is_improved_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, lm = tickets(96), simulated(clerk)
    writer = proposing({"Input: ticket: ": "Keep the facts.", "Input: gist: ": "Sort by case."})

    program = compiled(Triage(), rows, tmp_path, lm, writer)

    evidence = program.evidence
    assert (evidence.baseline, evidence.compiled, evidence.replaced) == (0.25, 1.0, True)
    assert evidence.instructions == {"sum_up": "Keep the facts.", "route": "Sort by case."}
    first, second = (prompt(request) for request in (asked(writer)[0], asked(writer)[-1]))
    assert re.search(r"Input: ticket: ticket \d+\nOutput: case \d+ clear\n", first)
    assert "channel" not in first
    assert re.search(r"Input: gist: case \d+ clear\nchannel: mail\nOutput: (door|vault)\n", second)
    assert "ticket" not in second

    loaded = preceptor.load(tmp_path / "program", student=Triage())
    assert answers(loaded, rows, lm, "queue") == answers(program, rows, lm, "queue") == [[row.queue] for row in rows]
    assert run(["show", str(tmp_path / "program")]) == 0
    shown = capsys.readouterr().out
    assert "sum_up: ticket: str -> gist: str\nKeep the facts." in shown
    assert "route: gist: str, channel: str -> queue: Literal['door', 'vault']\nSort by case." in shown


class Twice(dspy.Module):
    """Asks one predictor about both texts."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = dspy.Predict(Signature("text -> is_rude: bool", "Judge."))

    def forward(self, first: str, second: str) -> Any:
        rude = [bool(self.rate(text=text).is_rude) for text in (first, second)]
        return dspy.Prediction(rude=str(sum(rude)))


def judge(request: Request) -> str:
    rude = "rude" in given(request, "text")
    return chat(is_rude=rude if "Spot insults." in system(request) else False)


def remarks(count: int) -> list[dspy.Example]:
    pairs = [(("kind", "rude")[n % 2], ("kind", "rude")[n // 2 % 2]) for n in range(count)]
    return [
        dspy.Example(first=f"{a} {n}", second=f"{b} {n + 1000}", rude=str((a == "rude") + (b == "rude"))).with_inputs(
            "first", "second"
        )
        for n, (a, b) in enumerate(pairs)
    ]


def test_a_predictor_may_be_asked_twice_a_row(tmp_path: Path) -> None:
    rows, lm = remarks(60), simulated(judge)
    writer = proposing({"": "Spot insults."})
    program = compiled(Twice(), rows, tmp_path, lm, writer)
    assert re.search(r"Input: text: kind \d+\nOutput: False\n", prompt(asked(writer)[0]))
    assert (program.evidence.baseline, program.evidence.compiled) == (0.25, 1.0)
    assert program.evidence.instructions == {"rate": "Spot insults."}
    assert program.evidence.spent.calls >= len(asked(lm)) + 2  # the proposer's; some were asked for again


def test_the_best_of_several_answers_of_a_pipeline_with_a_model_of_its_own_is_compiled(tmp_path: Path) -> None:
    rows, lm = tickets(96), simulated(clerk)
    student = dspy.BestOfN(Triage(), N=2, reward_fn=lambda given, answer: 1.0, threshold=1.0)
    student.set_lm(lm)
    writer = proposing({"Input: ticket: ": "Keep the facts.", "Input: gist: ": "Sort by case."})

    program = compiled(student, rows, tmp_path, lm, writer)

    assert (program.evidence.baseline, program.evidence.compiled) == (0.25, 1.0)
    assert student.get_lm() is lm


def test_the_confirmation_of_a_predictor_asked_twice_a_row_is_paid_for(tmp_path: Path) -> None:
    """What is set aside must be what a row takes, not one call a predictor."""
    rows = remarks(60)
    program = compiled(
        Twice(), rows, tmp_path, simulated(judge), proposing({"": "Spot insults."}), budget=Budget(calls=240)
    )
    assert program.evidence.comparison.rows == 40
    assert program.evidence.spent.calls <= 240


def test_of_a_predictor_asked_twice_a_row_no_more_candidates_are_drawn_than_can_be_raced(tmp_path: Path) -> None:
    """Else the budget ends before the first rung is over, and nothing is known of any."""
    numbers = itertools.count()
    writer = simulated(lambda request: f"Spot insults. {next(numbers)}", name="writer")
    few = {"budget": Budget(calls=600), "candidates": 50}
    program = compiled(Twice(), remarks(80), tmp_path, simulated(judge), writer, **few)
    assert (program.evidence.compiled, program.evidence.stopped) == (1.0, "")
    assert program.evidence.spent.calls <= 600


class Shared(dspy.Module):
    """One predictor under two names, and a lock, which can't be copied."""

    def __init__(self, *, has_lock: bool = False) -> None:
        super().__init__()
        self.ask = dspy.Predict(Signature("text -> is_rude: bool", "Judge."))
        self.ask_again = self.ask
        if has_lock:
            self.lock = threading.Lock()

    def forward(self, first: str, second: str) -> Any:
        rude = bool(self.ask(text=first).is_rude) + bool(self.ask_again(text=second).is_rude)
        return dspy.Prediction(rude=str(rude))


@pytest.mark.parametrize("has_lock", [False, True])
def test_a_predictor_shared_under_two_names_is_improved_once(has_lock: bool, tmp_path: Path) -> None:
    rows, lm, student = remarks(60), simulated(judge), Shared(has_lock=has_lock)
    program = compiled(student, rows, tmp_path, lm, proposing({"": "Spot insults."}))
    assert program.evidence.instructions == {"ask": "Spot insults."}
    assert (program.evidence.baseline, program.evidence.compiled) == (0.25, 1.0)
    loaded = preceptor.load(tmp_path / "program", student=student)
    assert answers(loaded, rows, lm, "rude") == [[row.rude] for row in rows]
    assert dict(predictors(student))["ask"].signature.instructions == "Judge."


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Rank(enum.Enum):
    LOW = 1
    HIGH = 2


class Place(pydantic.BaseModel):
    city: str
    code: int


class Person(pydantic.BaseModel):
    name: str
    home: Place


def equal(example: Any, prediction: Any) -> bool:
    return bool(example.out == prediction.out)


ADA = Person(name="Ada", home=Place(city="London", code=5))
BOB = Person(name="Bob", home=Place(city="Paris", code=7))
TYPES: list[tuple[str, Any, Any, Any]] = [
    ("int", int, 3, 14),
    ("float", float, 0.5, 2.25),
    ("bool", bool, True, False),
    ("texts", list[str], ["a", "b"], ["c"]),
    ("label", Literal["good", "bad"], "good", "bad"),
    ("number label", Literal[1, 2], 1, 2),
    ("enum", Mood, Mood.GOOD, Mood.BAD),
    ("number enum", Rank, Rank.LOW, Rank.HIGH),
    ("optional int", int | None, 3, None),
    ("optional text", str | None, "a", "b"),
    ("optional label", Literal["good", "bad"] | None, "good", "bad"),
    ("model", Person, ADA, BOB),
    ("models", list[Person], [ADA, BOB], [BOB]),
    ("mapping", dict[str, int], {"a": 1}, {"b": 2}),
]


def plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    return pydantic.TypeAdapter(type(value)).dump_python(value, mode="json")


def typed_rows(values: tuple[Any, Any], count: int = 60) -> list[dspy.Example]:
    return [dspy.Example(text=f"case {n}", out=values[n % 2]).with_inputs("text") for n in range(count)]


def typist(values: tuple[Any, Any], signature: Any) -> Worker:
    """Answer right where the instruction is good, else the first value whatever is asked."""

    def answer(request: Request) -> str:
        number = int(given(request, "text").split()[1])
        value = plain(values[number % 2 if "Look closely." in system(request) else 0])
        return str(value) if is_direct(signature) else json.dumps({"reasoning": "So.", "out": value})

    return answer


@pytest.mark.parametrize(("annotation", "first", "second"), [row[1:] for row in TYPES], ids=[row[0] for row in TYPES])
@pytest.mark.parametrize("kind", [dspy.Predict, dspy.ChainOfThought])
def test_outputs_of_every_type_are_compiled_saved_and_loaded(
    kind: Any, annotation: Any, first: Any, second: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signature = dspy.make_signature(
        {"text": (str, dspy.InputField()), "out": (annotation, dspy.OutputField())}, "Answer."
    )
    rows, student = typed_rows((first, second)), kind(signature)
    [(_, predictor)] = student.named_predictors()
    lm = simulated(typist((first, second), predictor.signature))
    with dspy.context(adapter=preceptor.DirectAdapter()):
        program = compiled(student, rows, tmp_path, lm, proposing({"": "Look closely."}), metric=equal)

    assert (program.evidence.baseline, program.evidence.compiled) == (0.5, 1.0)
    [name] = program.evidence.instructions
    assert program.evidence.instructions == {name: "Look closely."}
    loaded = preceptor.load(tmp_path / "program", student=student)
    with dspy.context(adapter=preceptor.DirectAdapter()):
        found = answers(loaded, rows[:4], lm, "out")
    assert found == [[first], [second]] * 2
    assert [type(each[0]) for each in found] == [type(first), type(second)] * 2
    assert run(["show", str(tmp_path / "program")]) == 0
    assert f"{name}: text: str -> " in capsys.readouterr().out


class Assess(dspy.Signature):
    """Assess."""

    text: str = dspy.InputField()
    hint: str | None = dspy.InputField(default=None)
    mood: Literal["good", "bad"] = dspy.OutputField()
    tags: list[str] = dspy.OutputField()
    place: Place | None = dspy.OutputField()


def assessed(number: int) -> dict[str, Any]:
    place = {"city": "Rome", "code": number} if number % 3 else None
    return {"mood": ("good", "bad")[number % 2], "tags": [f"t{number % 4}"], "place": place}


def assessor(request: Request) -> str:
    number = int(given(request, "text").split()[1])
    answer = assessed(number)
    return json.dumps(answer if "Look closely." in system(request) else {**answer, "mood": "good"})


def cases(count: int) -> list[dspy.Example]:
    """Every third has a hint; the hint of the others is None or not there at all."""
    rows: list[dspy.Example] = []
    for n in range(count):
        hints: list[dict[str, str | None]] = [{"hint": f"hint {n}"}, {"hint": None}, {}]
        rows.append(
            dspy.Example(text=f"case {n}", mood=assessed(n)["mood"], **hints[n % 3]).with_inputs("text", "hint")
        )
    return rows


@pytest.mark.parametrize("kind", [Generate, dspy.Predict])
def test_several_outputs_and_inputs_that_some_rows_lack(kind: Any, tmp_path: Path) -> None:
    rows, lm, writer = cases(60), simulated(assessor), proposing({"": "Look closely."})
    student = kind(Assess)
    program = compiled(student, rows, tmp_path, lm, writer)

    assert (program.evidence.baseline, program.evidence.compiled) == (0.5, 1.0)
    assert program.evidence.spent.calls == len(asked(lm)) + len(asked(writer))
    pairs = re.findall(r"Input: (.*?)\nOutput: (.*?)\n", prompt(asked(writer)[0]), re.DOTALL)
    assert len(pairs) == 3
    for shown, answer in pairs:
        number = int(shown.split()[2])
        assert shown == f"text: case {number}" + (f"\nhint: hint {number}" if number % 3 == 0 else "")
        assert answer == assessed(number)["mood"]  # the rows have no other label
    loaded = preceptor.load(tmp_path / "program", student=kind(Assess))
    found = answers(loaded, rows[:3], lm, "mood", "tags", "place")
    assert found == [
        ["good", ["t0"], None],
        ["bad", ["t1"], Place(city="Rome", code=1)],
        ["good", ["t2"], Place(city="Rome", code=2)],
    ]


def test_a_hint_is_shown_to_the_model_where_a_row_has_one(tmp_path: Path) -> None:
    lm = simulated(assessor)
    compiled(Generate(Assess), cases(12), tmp_path, lm, proposing({"": "Look closely."}))
    shown = {given(request, "text"): given(request, "hint") for request in asked(lm)}
    assert {text: hint for text, hint in shown.items() if hint not in ("", "None")} == {
        f"case {n}": f"hint {n}" for n in (0, 3, 6, 9)
    }


def test_a_required_input_that_a_row_lacks_is_refused_before_any_call(tmp_path: Path) -> None:
    lm, rows = simulated(clerk), tickets(12)
    rows[1] = dspy.Example(ticket="ticket 1", queue="door").with_inputs("ticket")
    with pytest.raises(preceptor.ConfigError, match=r"trainset, row 2: the input 'channel' is missing"):
        compiled(Triage(), rows, tmp_path, lm, lm)
    assert asked(lm) == []


class Reasoned(dspy.Module):
    """A chain of thought that keeps a demonstration, before a predictor with a model of its own."""

    def __init__(self, own: dspy.LM) -> None:
        super().__init__()
        self.think = dspy.ChainOfThought(Signature("text -> gist", "Think."))
        self.think.predict.demos = [dspy.Example(text="case 100", reasoning="Even.", gist="100 even")]
        self.name = dspy.Predict(Signature("gist -> parity: Literal['even', 'odd']", "Name it."))
        self.name.lm = own

    def forward(self, text: str) -> Any:
        return self.name(gist=self.think(text=text).gist)


def thinker(request: Request) -> str:
    number = int(given(request, "text").split()[1])
    parity = ("even", "odd")[number % 2] if "Divide by two." in system(request) else "even"
    return chat(reasoning="Halved.", gist=f"{number} {parity}")


def test_chains_of_thought_demonstrations_and_models_of_their_own_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [dspy.Example(text=f"case {n}", parity=("even", "odd")[n % 2]).with_inputs("text") for n in range(60)]
    lm, own = simulated(thinker), simulated(lambda request: chat(parity=given(request, "gist").split()[1]), name="own")
    writer = proposing({"Input: text: ": "Divide by two.", "Input: gist: ": "Say which."})
    student = Reasoned(own)

    program = compiled(student, rows, tmp_path, lm, writer)

    assert (program.evidence.baseline, program.evidence.compiled) == (0.5, 1.0)
    assert program.evidence.instructions["think.predict"] == "Divide by two."
    assert program.evidence.spent.calls >= len(asked(lm)) + len(asked(own)) + len(asked(writer))
    assert len(asked(own)) > 0
    assert re.search(r"Input: text: case \d+\nOutput: Halved\., \d+ even\n", prompt(asked(writer)[0]))
    parts = dict(program.named_predictors())
    assert [dict(demo) for demo in parts["think.predict"].demos] == [
        {"text": "case 100", "reasoning": "Even.", "gist": "100 even"}
    ]
    assert parts["think.predict"].lm is None
    assert parts["name"].lm.engine is own.engine
    assert dict(predictors(student))["think.predict"].signature.instructions == "Think."

    asked_before = len(asked(own))
    loaded = preceptor.load(tmp_path / "program", student=Reasoned(own))
    assert answers(loaded, rows, lm, "parity") == [[row.parity] for row in rows]
    assert len(asked(own)) == asked_before + 60
    assert any("case 100" in (message.text or "") for message in asked(lm)[-1].messages[:-1])
    assert run(["show", str(tmp_path / "program")]) == 0
    assert "Divide by two.\n\nwith 1 demonstration\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [Generate, dspy.Predict])
def test_answers_that_cant_be_read_count_as_wrong_of_their_own_kind(kind: Any, tmp_path: Path) -> None:
    """Under the user's instruction every other answer is no JSON; the better one mends that."""

    def broken(request: Request) -> str:
        number = int(given(request, "text").split()[1])
        is_read = number % 2 == 0 or "Look closely." in system(request)
        return json.dumps(assessed(number)) if is_read else "I'd rather not say."

    rows, lm = cases(60), simulated(broken)
    program = compiled(kind(Assess), rows, tmp_path, lm, proposing({"": "Look closely."}))

    assert (program.evidence.baseline, program.evidence.compiled) == (0.5, 1.0)
    trials = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()]
    [seed, *_] = [trial for trial in trials if trial["instructions"] == {next(iter(trial["instructions"])): "Assess."}]
    assert [kind for row, kind in zip(seed["rows"], seed["kinds"], strict=True) if row % 2] == ["unparsable"] * len(
        [row for row in seed["rows"] if row % 2]
    )
    assert "failed" not in seed["kinds"]


def test_a_pipeline_is_compiled_with_the_real_small_model(smollm: dspy.LM, tmp_path: Path) -> None:
    class Desk(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gist = Generate("text -> gist", "Name the topic in three words.")
            self.label = Classify("gist -> label: Literal['sport', 'food']", "Sport or food?")

        def forward(self, text: str) -> Any:
            return self.label(gist=self.gist(text=text).gist)

    texts = ["The striker scored twice.", "Bake the bread slowly.", "She won the race.", "Add salt to the soup."]
    rows = [
        dspy.Example(text=f"{texts[n % 4]} {n}", label=("sport", "food")[n % 2]).with_inputs("text") for n in range(11)
    ]
    lm = smollm.copy(max_tokens=8)
    method = APE(
        metric="accuracy", lm=lm, candidates=2, demos=2, max_tokens=12, budget=Budget(calls=150), run_dir=tmp_path
    )
    program: Any = method.compile(Desk(), trainset=rows[:5], valset=rows[5:])

    assert program.evidence.comparison.rows == 6
    assert 0 < program.evidence.spent.calls <= 150
    assert set(program.evidence.instructions) == {"gist.predict", "label.predict"}
    loaded = preceptor.load(tmp_path / "program", student=Desk())
    assert answers(loaded, rows, lm, "label") == answers(program, rows, lm, "label")
    again: Any = method.compile(Desk(), trainset=rows[:5], valset=rows[5:])
    assert again.evidence.billed.calls == 0
    assert again.evidence.stable() == program.evidence.stable()
