from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import count, permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy
import pytest
from dspy.lm15 import Request

from preceptor.cli import run
from preceptor.constitution import Constitution, Edit, Principle
from preceptor.errors import ConfigError, Unaffordable
from preceptor.lm.budget import Budget
from preceptor.lm.embedding import Embedder
from preceptor.lm.seam import predictors
from preceptor.modules import Classify, Experts, Generate
from preceptor.program import candidate_of, read
from preceptor.scoring.known import Known
from preceptor.scoring.metrics import mean
from preceptor.scoring.trial import Candidate, Outcome, Trial
from preceptor.task import Task
from preceptor.teleprompters import ConstitutionalExperts, MixtureOfExperts
from preceptor.teleprompters.constitutional_experts import Plan, _ablated
from preceptor.testing import asked, prompt, simulated, system, toy

SEED = "Sort."
CONFIRM = 12
POLICY = {"red": "yes", "blue": "yes", "green": "yes", "black": "yes", "white": "yes", "grey": "no"}
"""Five rules of a hidden policy, and what needs none."""


def student(instructions: str = SEED) -> dspy.Module:
    return Classify("text -> label: Literal['yes', 'no']", instructions)


def rows(count: int, start: int = 0) -> list[dspy.Example]:
    colours = list(POLICY)
    made = [(n, colours[n % len(colours)]) for n in range(start, start + count)]
    return [dspy.Example(text=f"row {n} {colour}", label=POLICY[colour]).with_inputs("text") for n, colour in made]


def answer(request: Request) -> str:
    """Answer as the instructions say of the colour, the last to say so; else no."""
    colour = prompt(request).split()[-1]
    said = re.findall(rf"{colour} is (yes|no)", system(request))
    return said[-1] if said else "no"


def menu(text: str) -> dict[str, str]:
    """Return the options of a request for a choice by their numbers."""
    return dict(re.findall(r"^(\d+)\. (.*)$", text.partition("One of these edits is made:")[2], re.MULTILINE))


def kind_of(text: str) -> str:
    """Return X, C or the first letter of what is to be written, for a request to explain, choose or write."""
    starts = {
        "Explain in one": "X",
        "Which one mends": "C",
        "Write one new": "A",
        "Rewrite this": "R",
        "Write one pr": "M",
    }
    return next(kind for start, kind in starts.items() if start in text)


def choosing(wanted: str, write: Callable[[str], str] = lambda text: "Be kind.") -> Callable[[Request], str]:
    """Explain, choose the first option that begins with `wanted`, if there is one, and write."""

    def said(request: Request) -> str:
        text = prompt(request)
        kind = kind_of(text)
        if kind == "C":
            return next((number for number, option in menu(text).items() if option.startswith(wanted)), "1")
        return "<START>It is silent.<END>" if kind == "X" else f"<START>{write(text)}<END>"

    return said


def right_rule(text: str) -> str:
    """Write the rule that the case calls for."""
    colour, label = re.findall(r"row \d+ (\w+)\nAnswer: \w*\nRight answer: (\w+)", text)[0]
    return f"{colour} is {label}."


def constitutional(tmp_path: Path, proposer: dspy.LM, **settings: Any) -> ConstitutionalExperts:
    given = {"metric": "accuracy", "lm": simulated(answer), "run_dir": tmp_path / "run", "threads": 1, "few_shot": 0}
    return ConstitutionalExperts(proposer=proposer, **{**given, **settings})


def compiled_by(method: ConstitutionalExperts, train: int, program: dspy.Module | None = None, **settings: Any) -> Any:
    data: dict[str, Any] = {"trainset": rows(train), "valset": rows(CONFIRM, start=train), **settings}
    return method.compile(program or student(), **data)


def prompts(lm: dspy.LM) -> list[str]:
    return [prompt(request) for request in asked(lm)]


def kinds(lm: dspy.LM) -> str:
    return "".join(map(kind_of, prompts(lm)))


def lines(tmp_path: Path, name: str) -> list[dict[str, Any]]:
    texts = (tmp_path / "run" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in texts]


def scored(tmp_path: Path) -> dict[str, list[int]]:
    """Return the rows each instruction was scored on, in order."""
    found: dict[str, list[int]] = {}
    for line in lines(tmp_path, "trials.jsonl"):
        found.setdefault(next(iter(line["instructions"].values())), []).extend(line["rows"])
    return found


def principles(text: str) -> list[str]:
    return [one.text for one in Constitution.parsed(text).principles]


def with_principles(*texts: str) -> str:
    return "\n".join(["Sort.\n\nPrinciples:", *(f"{number}. {text}" for number, text in enumerate(texts, 1))])


def signatures(program: dspy.Module) -> dict[str, Any]:
    return {name: predictor.signature for name, predictor in predictors(program)}


def test_the_librarys_numbers_are_the_defaults() -> None:
    method = ConstitutionalExperts(metric="accuracy")
    assert (method.errors, method.edits, method.rows, method.temperature) == (3, 2, 100, 0.9)


@pytest.mark.parametrize(("train", "few_shot", "demos"), [(32, None, 8), (31, None, 0), (32, 0, 0), (31, 4, 4)])
def test_eight_rows_are_shown_where_there_are_enough(
    tmp_path: Path, train: int, few_shot: int | None, demos: int
) -> None:
    proposer = simulated(choosing("Add", right_rule), name="writer")
    found = compiled_by(constitutional(tmp_path, proposer, few_shot=few_shot, steps=8, edits=1), train)
    assert found.evidence.replaced
    [(_, predictor)] = predictors(found)
    assert len(predictor.demos) == demos
    known = {(row.text, row.label) for row in rows(train)}
    assert {(demo["text"], demo["label"]) for demo in predictor.demos} <= known


def test_the_rules_of_a_hidden_policy_are_found_one_by_one(tmp_path: Path) -> None:
    proposer = simulated(choosing("Add", right_rule), name="writer")
    method = constitutional(tmp_path, proposer, steps=8, edits=1)

    compiled = compiled_by(method, 72, valset=rows(60, 72))

    found = principles(compiled.predict.signature.instructions)
    assert sorted(found) == sorted(f"{colour} is yes." for colour, label in POLICY.items() if label == "yes")
    assert compiled.predict.signature.instructions.startswith("Sort.\n\nPrinciples:\n1. ")
    assert (compiled.evidence.baseline, compiled.evidence.compiled) == (pytest.approx(1 / 6), 1.0)


@pytest.mark.parametrize(("join", "count"), [(True, 2), (False, 1)])
def test_edits_of_one_step_that_help_alone_are_tried_together(tmp_path: Path, join: bool, count: int) -> None:
    proposer = simulated(choosing("Add", right_rule), name="writer")
    method = constitutional(tmp_path, proposer, steps=1, errors=4, edits=1, join=join)

    compiled_by(method, 72)

    told = [line for line in lines(tmp_path, "lineage.jsonl") if line["how"] != "ablation"]
    rules = [set(principles(line["instructions"]["predict"])) for line in told if line["how"] == "add"]
    assert all(len(rule) == 1 for rule in rules)
    joined = [line for line in told if line["how"] == "join"]
    assert bool(joined) is join
    for line in joined:
        both = set(principles(line["instructions"]["predict"]))
        assert len(both) >= count
        assert both <= set().union(*rules)
        assert line["because"] == " ".join(["It is silent."] * len(both))
    best = max(scored(tmp_path), key=lambda text: (len(scored(tmp_path)[text]), len(principles(text))))
    assert len(principles(best)) >= count


@pytest.mark.parametrize(("calls", "is_joined"), [(276, False), (288, True)])
def test_edits_are_joined_only_where_a_step_and_the_end_can_still_be_paid(
    tmp_path: Path, calls: int, is_joined: bool
) -> None:
    proposer = simulated(choosing("Add", right_rule), name="writer")
    budget = Budget(calls=calls + 2 * CONFIRM)

    evidence = compiled_by(constitutional(tmp_path, proposer, steps=2, join=True, budget=budget), 72).evidence

    assert any(line["how"] == "join" for line in lines(tmp_path, "lineage.jsonl")) is is_joined
    assert evidence.stopped == ""


def test_edits_of_one_principle_are_not_joined(tmp_path: Path) -> None:
    texts = count()
    proposer = simulated(choosing("Revise", lambda text: f"{right_rule(text)} {next(texts)}"), name="writer")
    method = constitutional(tmp_path, proposer, steps=1, errors=2, edits=1)
    compiled_by(method, 72, student(with_principles("Be kind.")))
    told = lines(tmp_path, "lineage.jsonl")
    assert {len(principles(line["instructions"]["predict"])) for line in told if line["how"] == "revise"} == {1}
    assert all(len(principles(line["instructions"]["predict"])) == 1 for line in told if line["how"] == "join")


def test_the_three_requests_show_the_instructions_as_the_model_reads_them(tmp_path: Path) -> None:
    proposer = simulated(choosing("Revise", lambda text: "red is yes."), name="writer")
    only = [row for row in rows(24) if row.text.endswith("red")]
    program = student(with_principles("red is no."))
    compiled_by(constitutional(tmp_path, proposer, steps=1, errors=1, edits=1), 4, program, trainset=only)

    explain, choose, write = prompts(proposer)
    start, _, explained = explain.partition("It got this case wrong:\n\n")
    assert start == (
        "A language model is given these instructions:\n\nSort.\n\nPrinciples:\n1. red is no.\n\n"
        "Answer with exactly one of: yes, no.\n\n"
    )
    assert re.match(r"Input: text: row \d+ red\nAnswer: no\nRight answer: yes\n\nExplain in one or two ", explained)
    assert choose.startswith(
        explain.partition("Explain in one")[0] + "The explanation is this: It is silent.\n\nOne of"
    )
    assert sorted(menu(choose).values()) == [
        "Add a new principle.",
        "Remove this principle: red is no.",
        "Revise this principle: red is no.",
    ]
    assert list(menu(choose)) == ["1", "2", "3"]
    assert write.startswith(choose.partition("One of")[0] + "Rewrite this principle of the instructions so that it ")
    assert "mends this: red is no.\nA principle is one sentence of at most 40 words that names" in write
    assert write.endswith("It has this form: If ..., the answer is yes.\nWrite it between <START> and <END>.")
    assert {(request.config.temperature, request.config.max_tokens) for request in asked(proposer)} == {(0.9, 256)}
    assert {request.config.stop for request in asked(proposer)} == {("<END>", "</END>", "</START>")}


def test_with_nothing_to_choose_from_no_choice_is_asked_for(tmp_path: Path) -> None:
    proposer = simulated(choosing("Add"), name="writer")
    compiled_by(constitutional(tmp_path, proposer, steps=1, errors=2), 12)
    assert kinds(proposer) == "XXAAAA"


def test_a_removal_takes_no_request_for_a_text_and_mends_what_an_addition_spoilt(tmp_path: Path) -> None:
    proposer = simulated(choosing("Remove this principle: grey"), name="writer")
    program = student(with_principles("grey is yes.", *(f"{one} is yes." for one in list(POLICY)[:5])))
    compiled = compiled_by(constitutional(tmp_path, proposer, steps=1, errors=1, edits=1), 48, program)

    assert kinds(proposer) == "XC"
    assert principles(lines(tmp_path, "lineage.jsonl")[0]["instructions"]["predict"])[0] == "red is yes."
    assert lines(tmp_path, "lineage.jsonl")[0]["how"] == "remove"
    assert "grey" not in compiled.evidence.instructions["predict"] or not compiled.evidence.replaced
    assert compiled.evidence.search_score == 1.0


def test_two_principles_are_merged_into_one(tmp_path: Path) -> None:
    proposer = simulated(choosing("Merge", lambda text: "red is yes, blue is yes, green is yes."), name="writer")
    program = student(with_principles("black is yes.", "red is yes or so.", "blue is yes or so."))
    compiled_by(constitutional(tmp_path, proposer, steps=1, errors=1, edits=1), 12, program)

    assert kinds(proposer) == "XCM"
    assert (
        "what these two say, and mends this:\nred is yes or so.\nblue is yes or so.\nA principle"
        in prompts(proposer)[2]
    )
    birth = lines(tmp_path, "lineage.jsonl")[0]
    assert (birth["how"], birth["because"]) == ("merge", "It is silent.")
    assert principles(birth["instructions"]["predict"]) == ["black is yes.", "red is yes, blue is yes, green is yes."]


@pytest.mark.parametrize(
    ("said", "is_taken"), [("2", True), ("Number 2.", True), ("0", False), ("9", False), ("?", False)]
)
def test_a_choice_is_read_leniently_and_drawn_where_none_is_on_the_menu(
    tmp_path: Path, said: str, is_taken: bool
) -> None:
    picked: set[bool] = set()
    for seed in range(5):
        place = tmp_path / str(seed)
        proposer = simulated(
            lambda request: said if kind_of(prompt(request)) == "C" else choosing("")(request), name="writer"
        )
        program = student(with_principles("red is no.", "blue is no."))
        compiled_by(constitutional(place, proposer, steps=1, errors=1, edits=1, seed=seed), 12, program)
        second = menu(next(text for text in prompts(proposer) if kind_of(text) == "C"))["2"]
        done = lines(place, "lineage.jsonl")[0]["how"] if (place / "run" / "lineage.jsonl").exists() else ""
        picked.add(second.split()[0].lower() == done)
    assert picked == {True} if is_taken else False in picked


def test_one_error_leads_to_two_edits_and_not_twice_to_the_same_removal(tmp_path: Path) -> None:
    proposer = simulated(choosing("Remove"), name="writer")
    program = student(with_principles("red is no.", "blue is no."))
    compiled_by(constitutional(tmp_path, proposer, steps=1, errors=1), 12, program)

    first, second = (menu(text) for text in prompts(proposer) if kind_of(text) == "C")
    removed = next(option for option in first.values() if option.startswith("Remove"))
    assert kinds(proposer) == "XCC"
    assert set(first.values()) - set(second.values()) == {removed}
    assert [principles(line["instructions"]["predict"]) for line in lines(tmp_path, "lineage.jsonl")[:2]] in [
        [["blue is no."], ["red is no."]],
        [["red is no."], ["blue is no."]],
    ]


def test_a_removal_that_leads_back_is_not_on_the_menu(tmp_path: Path) -> None:
    proposer = simulated(choosing("Add", right_rule), name="writer")
    compiled_by(constitutional(tmp_path, proposer, steps=3, errors=1, edits=1, beam=1), 60)

    second, third = (sorted(menu(text).values()) for text in prompts(proposer) if kind_of(text) == "C")
    assert [option.split()[0] for option in second] == ["Add", "Revise"]
    assert [option.split()[0] for option in third] == ["Add", "Merge", "Remove", "Revise", "Revise"]
    assert third[2].removeprefix("Remove") == second[1].removeprefix("Revise")  # the older one


def test_the_menu_has_another_order_every_time(tmp_path: Path) -> None:
    orders: set[tuple[str, ...]] = set()
    for seed in (0, 1):
        proposer = simulated(choosing("Add"), name="writer")
        program = student(with_principles("red is no.", "blue is no."))
        compiled_by(constitutional(tmp_path / str(seed), proposer, steps=1, seed=seed), 12, program)
        orders |= {tuple(menu(text).values()) for text in prompts(proposer) if kind_of(text) == "C"}
    assert len(orders) == 12  # two requests each for three errors, with two seeds
    assert len({frozenset(order) for order in orders}) == 1


def test_no_principle_is_added_beyond_the_bound(tmp_path: Path) -> None:
    proposer = simulated(choosing("Add", right_rule), name="writer")
    compiled = compiled_by(constitutional(tmp_path, proposer, principles=2, steps=5), 72, valset=rows(60, 72))

    assert max(len(principles(line["instructions"]["predict"])) for line in lines(tmp_path, "trials.jsonl")) == 2
    assert len(principles(compiled.predict.signature.instructions)) == 2
    assert any("Add a new principle." not in menu(text).values() for text in prompts(proposer) if kind_of(text) == "C")


def test_the_parents_race_too_and_win_ties(tmp_path: Path) -> None:
    numbers = count()
    proposer = simulated(choosing("Add", lambda text: f"Be kind {next(numbers)}."), name="writer")
    evidence = compiled_by(constitutional(tmp_path, proposer, steps=2), 36).evidence

    assert not evidence.has_candidate
    assert len(scored(tmp_path)) > 6
    assert len(set(scored(tmp_path)[SEED])) == len(scored(tmp_path)[SEED]) == 36  # each row was asked for once


def test_a_parent_that_a_race_drops_keeps_its_place_by_its_score_on_all_rows(tmp_path: Path) -> None:
    """A is poor on the first rows and good on the others; the second step's six C are better on the first alone."""
    settings: dict[str, Any] = {"steps": 1, "join": False}
    compiled_by(constitutional(tmp_path / "order", simulated(choosing("Add")), **settings), 60)
    order = lines(tmp_path / "order", "trials.jsonl")[0]["rows"]
    right = {"A": {*order[14:]}, "B": {*order[:38]}, "C": {*order[:10]}}

    def ruled(request: Request) -> str:
        _, number, colour = prompt(request).split()[-3:]
        rules = re.findall(r"Rule ([A-Z])", system(request))
        is_right = bool(rules) and int(number) in right.get(rules[-1], set())
        return POLICY[colour] if is_right else {"yes": "no", "no": "yes"}[POLICY[colour]]

    names = iter(["A1", "B1", *(f"D{n}" for n in range(4)), *(f"C{n}" for n in range(6)), *(f"E{n}" for n in range(9))])
    proposer = simulated(choosing("Add", lambda text: f"Rule {next(names)}."), name="writer")
    compiled_by(constitutional(tmp_path, proposer, lm=simulated(ruled), **{**settings, "steps": 3}), 60)

    explained = [re.findall(r"Rule ([A-Z])", text) for text in prompts(proposer) if kind_of(text) == "X"]
    assert explained == [*3 * [[]], *2 * [["B"], ["A"], ["B"]]]


def test_a_step_that_makes_things_worse_is_taken_back(tmp_path: Path) -> None:
    """The library lost its parent there."""
    proposer = simulated(
        choosing("Add", lambda text: f"{right_rule(text).split()[0]} is no, grey is yes."), name="writer"
    )
    compiled = compiled_by(constitutional(tmp_path, proposer, steps=3), 36)
    assert compiled.predict.signature.instructions == SEED


def test_rows_set_aside_are_neither_raced_on_nor_shown(tmp_path: Path) -> None:
    proposer = simulated(choosing("Add", right_rule), name="writer")
    compiled_by(constitutional(tmp_path, proposer, steps=3), 60)

    trials = lines(tmp_path, "trials.jsonl")
    raced = set(trials[0]["rows"])
    aside = set(range(60)) - raced
    shown = {int(number) for text in prompts(proposer) for number in re.findall(r"row (\d+)", text)}
    races = [set(line["rows"]) for line in trials if set(line["rows"]) & raced]
    assert len(aside) == 20
    assert shown <= raced
    assert len(shown) > 3
    assert all(seen <= raced for seen in races)
    assert any(set(line["rows"]) == aside for line in trials)


def test_principles_that_earn_nothing_are_dropped_in_the_end(tmp_path: Path) -> None:
    """The second says all that the first says, and more."""
    texts = iter(["blue is yes.", "blue is yes, red is yes."])
    proposer = simulated(choosing("Add", lambda text: next(texts)), name="writer")
    method = constitutional(tmp_path, proposer, steps=2, errors=1, edits=1, beam=1)
    compiled = compiled_by(method, 72, valset=rows(60, 72))

    raced = [line["instructions"]["predict"] for line in lines(tmp_path, "trials.jsonl")]
    assert with_principles("blue is yes.", "blue is yes, red is yes.") in raced
    assert principles(compiled.predict.signature.instructions) == ["blue is yes, red is yes."]


def test_principles_are_left_out_in_turn_the_last_first(tmp_path: Path) -> None:
    proposer = simulated(choosing("Add", lambda text: "green is yes."), name="writer")
    program = student(with_principles("red is yes.", "blue is yes."))
    compiled = compiled_by(constitutional(tmp_path, proposer, steps=1, errors=1, edits=1), 72, program)

    left_out = [line["because"] for line in lines(tmp_path, "lineage.jsonl") if line["how"] == "ablation"]
    assert left_out == ["without: blue is yes.", "without: red is yes."]  # without the last it is the seed
    assert len(principles(compiled.evidence.instructions["predict"])) >= 2


def test_errors_are_read_in_turn_from_each_of_the_beam(tmp_path: Path) -> None:
    proposer = simulated(choosing("Add", right_rule), name="writer")
    compiled_by(constitutional(tmp_path, proposer, steps=2, errors=2, edits=1, seed=3), 60)

    explained = [text.partition("Answer with exactly")[0] for text in prompts(proposer) if kind_of(text) == "X"]
    assert explained[0] == explained[1]
    assert len(set(explained)) == 3  # the seed, then the two that were best


def test_a_principle_of_the_users_own_is_dropped_only_if_it_harms(tmp_path: Path) -> None:
    proposer = simulated(choosing("Add", lambda text: "red is yes."), name="writer")
    program = student(with_principles("Never shout.", "grey is yes."))
    method = constitutional(tmp_path, proposer, steps=1, errors=1, edits=1)
    compiled = compiled_by(method, 72, program, valset=rows(60, 72))
    assert principles(compiled.predict.signature.instructions) == ["Never shout.", "red is yes."]


def ablated(constitution: Constitution, scores: Mapping[str, float]) -> Trial:
    """Return what the ablation leaves, where a constitution scores as told of the first letters of its principles."""

    def score(walks: Sequence[tuple[Candidate, Sequence[int]]]) -> list[Trial]:
        found: list[Trial] = []
        for candidate, asked_on in walks:
            held = candidate.constitutions["predict"].principles
            value = scores["".join(one.text[0] for one in held)]
            found.append(Trial(candidate, tuple(asked_on), (Outcome("scored", value),) * len(asked_on), value))
        return found

    account = SimpleNamespace(calls_left=None)
    task: Any = SimpleNamespace(meter=SimpleNamespace(account=account), calls_a_row=1, made=lambda *told: None)
    best = Candidate({"predict": ""}).with_constitution("predict", constitution)
    return _ablated(task, "predict", best, Known(score, mean), range(4), 0)


@pytest.mark.parametrize(
    ("edit", "kept"),
    [
        (Edit("revise", (1,), "Route a legal letter to desk."), ["Route a legal letter to desk."]),
        (Edit("merge", (1, 2), "Legal letters never go to bench."), ["Legal letters never go to bench."]),
        (Edit("merge", (2, 3), "Be brief and kind."), ["Never to bench.", "Be brief and kind."]),
        (Edit("revise", (3,), "Always be kind."), ["Never to bench."]),
    ],
)
def test_a_principle_of_the_users_own_that_was_edited_is_not_dropped_on_a_tie(edit: Edit, kept: list[str]) -> None:
    own = Constitution("", (Principle(1, "Never to bench."), Principle(2, "Be brief.")))
    edited = own.edited(Edit("add", text="Kind."), 3).edited(edit, because="why")
    scores = {"".join(letters): 1.0 for count in range(4) for letters in permutations("NBKRLA", count)}
    left = principles(ablated(edited, scores).candidate.instructions["predict"])
    assert [text for text in left if text in kept] == kept
    assert not {"Kind.", "Always be kind."} & set(left)


def test_what_a_principle_was_worth_beside_one_that_was_dropped_is_not_told() -> None:
    added = Constitution("")
    for at, letter in enumerate("ABC", 1):
        added = added.edited(Edit("add", text=letter), at)
    # C is worth .2 beside both others; without B, which is dropped next, nobody knows
    scores = {"ABC": 0.75, "AB": 0.55, "AC": 0.75, "C": 0.25}
    found = ablated(added, scores)
    assert [(row["principle"], row["worth"], row["rows"]) for row in found.candidate.principles] == [
        ("A", 0.5, 4),
        ("C", None, 0),
    ]


@pytest.mark.parametrize(
    ("own", "added", "settings", "count", "is_told"),
    [
        ((), ["red is yes."], {"steps": 1}, 72, True),
        ((), ["blue is yes.", "red is yes."], {"steps": 2, "beam": 1}, 72, False),
        (("Never shout.", "grey is yes."), ["red is yes."], {"steps": 1}, 24, True),
        ((), ["blue is yes.", "blue is yes, red is yes."], {"steps": 2, "beam": 1}, 24, False),
    ],
    ids=["none dropped", "none dropped, seed not in the last beam", "one dropped", "one dropped, seed not there"],
)
def test_the_seeds_score_in_the_search_is_told_if_it_is_on_the_winners_rows(
    tmp_path: Path, own: tuple[str, ...], added: list[str], settings: dict[str, Any], count: int, is_told: bool
) -> None:
    seen: list[Any] = []

    class Open(ConstitutionalExperts):
        def search(self, task: Task) -> Any:
            trials = super().search(task)
            of_seed = [trial for trial in task.scored if trial.candidate.key == task.seed.key]
            seen.extend([trials[0], *of_seed])
            return trials

    texts = iter(added)
    method = constitutional(tmp_path, simulated(choosing("Add", lambda text: next(texts)), name="writer"))
    given = {name: getattr(method, name) for name in ("metric", "lm", "proposer", "run_dir", "threads", "few_shot")}
    program = student(with_principles(*own)) if own else student()
    evidence = compiled_by(Open(**given, errors=1, edits=1, **settings), 72, program).evidence

    winner, *of_seed = seen
    assert [len(winner.rows), *(trial.rows for trial in of_seed)] == [count, *(is_told * [winner.rows])]
    assert evidence.seed_search_score == (of_seed[0].score if is_told else None)
    assert evidence.search_score == winner.score


@pytest.mark.parametrize(
    "text", ["", "Say yes to everybody at once.", " ".join(41 * ["word"]), "Ignore.", "<START>Be kind.<END>"]
)
def test_what_cannot_be_a_principle_is_not_scored(tmp_path: Path, text: str) -> None:
    train = [row.copy(text=f"Say yes to everybody at once. Parcel {row.text}") for row in rows(12)]
    proposer = simulated(choosing("Add", lambda _: text), name="writer")
    compiled_by(constitutional(tmp_path, proposer, steps=1, errors=1, edits=2), 12, trainset=train)
    made = {"Ignore.": ["Ignore."], "<START>Be kind.<END>": ["Be kind."]}.get(text, [])
    assert [principles(found) for found in scored(tmp_path)] == [
        [],
        *([made] if made else []),
    ]  # once, though written twice


def test_what_was_made_before_does_not_race_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    proposer = simulated(choosing("Add", lambda text: "Be kind."), name="writer")
    compiled_by(constitutional(tmp_path, proposer, steps=2), 36)
    steps = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Step")]
    assert [text.partition(",")[0] for text in steps] == [
        "Step 1: 1 new constitutions",
        "Step 2: 1 new constitutions",  # twice kind; the seed and once kind were there
    ]


def test_without_errors_nothing_is_asked_of_the_proposer(tmp_path: Path) -> None:
    proposer = simulated(choosing("Add"), name="writer")
    program = student(with_principles(*(f"{colour} is {label}." for colour, label in POLICY.items())))
    evidence = compiled_by(constitutional(tmp_path, proposer), 30, program).evidence
    assert asked(proposer) == []
    assert not evidence.replaced


def test_the_lineage_tells_what_was_edited_and_why(tmp_path: Path) -> None:
    proposer = simulated(choosing("Add", right_rule), name="writer")
    compiled_by(constitutional(tmp_path, proposer, steps=2, errors=1, edits=1, beam=1), 12)

    first, second, *ablations = lines(tmp_path, "lineage.jsonl")
    assert (first["how"], first["because"], second["how"]) == ("add", "It is silent.", "add")
    assert second["parent"] == first["key"]
    assert len(principles(second["instructions"]["predict"])) == 2
    assert {line["how"] for line in ablations} == {"ablation"}
    assert not set(scored(tmp_path)) - {
        SEED,
        *(line["instructions"]["predict"] for line in (first, second, *ablations)),
    }


def test_it_works_on_free_text(tmp_path: Path) -> None:
    def echo(request: Request) -> str:
        word = prompt(request).split()[-1]
        return word[::-1] if "backwards" in system(request) else word

    proposer = simulated(choosing("Add", lambda text: "Write it backwards."), name="writer")
    free = [
        dspy.Example(question=f"Say {n} {word}", reply=word[::-1]).with_inputs("question")
        for n in range(5)
        for word in POLICY
    ]
    method = constitutional(tmp_path, proposer, lm=simulated(echo), metric="exact_match", steps=1)
    program = Generate("question -> reply", "Echo.")
    compiled = compiled_by(method, 18, program, trainset=free[: 3 * len(POLICY)], valset=free[3 * len(POLICY) :])
    assert compiled.evidence.compiled == 1.0
    assert "Echo.\n\nIt got this case wrong:\n\nInput: question: Say " in prompts(proposer)[0]
    assert "It has this form: If ..., then ...\nWrite" in next(
        text for text in prompts(proposer) if kind_of(text) == "A"
    )


class Twice(dspy.Module):
    """Shortens, then decides; wrong until the first predictor is told what to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Classify("text -> gist: Literal['yes', 'no']", "Shorten.")
        self.second = Classify("gist -> label: Literal['yes', 'no']", "Decide.")

    def forward(self, text: str) -> Any:
        return self.second(gist=self.first(text=text).gist)


def test_each_predictor_is_improved_by_its_own_inputs_outputs_and_errors(tmp_path: Path) -> None:
    def piped(request: Request) -> str:
        is_told = "Decide." in system(request) or "Keep" in system(request)
        return prompt(request).split()[-1] if is_told else "no"

    proposer = simulated(choosing("Add", lambda text: "Keep the word."), name="writer")
    method = constitutional(tmp_path, proposer, lm=simulated(piped), steps=1)
    compiled = compiled_by(method, 30, Twice(), trainset=toy.rows(30), valset=toy.rows(CONFIRM, 30))

    told = dict(candidate_of(compiled).instructions)
    assert told == {"first.predict": "Shorten.\n\nPrinciples:\n1. Keep the word.", "second.predict": "Decide."}
    assert "Answer: gist: no\nAnswer of the whole program: no\nRight answer: yes" in prompts(proposer)[0]
    assert all("text: row" in text for text in prompts(proposer))  # the second has no errors to learn from


@pytest.mark.parametrize(
    ("calls", "plan", "steps"),
    [
        (None, (3, 2, 64, 32), 6),
        (49, None, 0),
        (50, (1, 1, 16, 8), 1),  # 16 for the seed, 2 requests and 16, 2 * 8 for the last two; no ablation is paid for
        (84, (1, 1, 16, 8), 1),  # 8 more
        (85, (1, 1, 16, 8), 2),  # 3 requests, 16 and 8 more
        (104, (1, 1, 16, 8), 3),
        (147, (1, 1, 16, 8), 5),
        (148, (2, 1, 32, 16), 1),  # 32; 4 and 2 * 32; 2 * 16; 16
        (222, (2, 2, 32, 24), 1),  # 32; 6, 4 * 16 and 3 * 16; 2 * 24; 24
        (233, (2, 2, 32, 24), 1),
        (234, (2, 1, 32, 16), 2),  # 148, and 6, 2 * 32 and 16
        (303, (2, 1, 32, 16), 2),
        (304, (2, 1, 32, 16), 3),
        (489, (2, 1, 32, 16), 5),
        (514, (2, 1, 32, 16), 6),
        (733, (2, 1, 32, 16), 6),
        (734, (2, 2, 32, 24), 5),  # 222, four times 10, 4 * 16 and 3 * 16, and 24
        (990, (2, 2, 48, 24), 5),
        (1460, (2, 2, 48, 24), 6),
        (1461, (3, 2, 64, 32), 5),  # 64; 9 and four times 15, five times 6 * 16 and 3 * 48; 2 * 32; 2 * 32
        (1715, (3, 2, 64, 32), 5),
        (1716, (3, 2, 64, 32), 6),
        (9999, (3, 2, 64, 32), 6),
    ],
)
def test_the_settings_shrink_with_the_calls_that_are_left(
    calls: int | None, plan: tuple[int, int, int, int] | None, steps: int
) -> None:
    method = ConstitutionalExperts(metric="accuracy")
    found = method._affordable(96, calls, 0, 1.0)
    assert found == (None if plan is None else (Plan(*plan), steps))
    assert method.estimate(signatures(student()), 96, calls).least == 50


@pytest.mark.parametrize(
    ("train", "calls", "steps"), [(12, 60, 1), (12, 400, 6), (60, 110, 3), (60, 400, 4), (96, 700, 6), (96, None, 6)]
)
def test_a_search_that_finds_nothing_takes_the_calls_that_were_estimated(
    tmp_path: Path, train: int, calls: int | None, steps: int
) -> None:
    numbers = count()
    proposer = simulated(choosing("Add", lambda text: f"Be kind {next(numbers)}."), name="writer")
    method = constitutional(tmp_path, proposer, budget=Budget(calls=None if calls is None else calls + 2 * CONFIRM))
    estimate = method.estimate(signatures(student()), train, calls)

    evidence = compiled_by(method, train).evidence

    searched = evidence.spent.calls - CONFIRM
    assert evidence.stopped == ""
    assert not evidence.has_candidate
    assert searched == pytest.approx(estimate.expected, rel=0.2)
    assert searched <= (calls or estimate.expected)
    assert estimate.least <= estimate.expected <= (calls or estimate.expected)
    assert len(re.findall("X+", kinds(proposer))) == steps


def test_with_600_calls_and_100_rows_a_better_constitution_is_found(tmp_path: Path) -> None:
    proposer = simulated(choosing("Add", right_rule), name="writer")
    evidence = compiled_by(
        constitutional(tmp_path, proposer, budget=Budget(calls=600)), 100, valset=rows(90, 100)
    ).evidence

    assert evidence.replaced
    assert evidence.stopped == ""
    assert evidence.gain >= 0.3
    assert evidence.spent.calls <= 600


def test_a_budget_below_one_small_step_is_refused(tmp_path: Path) -> None:
    proposer = simulated(choosing("Add"), name="writer")
    with pytest.raises(
        Unaffordable, match=r"^ConstitutionalExperts needs at least 74 calls here: 24 to confirm on 12 "
    ):
        compiled_by(constitutional(tmp_path, proposer, budget=Budget(calls=73)), 96)
    assert asked(proposer) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({name: 0}, rf"^ConstitutionalExperts needs {name} >= 1, got 0\.$")
            for name in ("steps", "beam", "errors", "edits", "rows", "principles", "words", "max_tokens")
        ),
        ({"temperature": -0.1}, r"^ConstitutionalExperts needs temperature from 0 to 2, got -0\.1\.$"),
        ({"temperature": float("nan")}, r"^ConstitutionalExperts needs temperature from 0 to 2, got nan\.$"),
        ({"threads": 0}, r"^ConstitutionalExperts needs threads >= 1, got 0\.$"),
    ],
)
def test_a_knob_out_of_range_is_refused_when_it_is_set(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConstitutionalExperts(metric="accuracy", **settings)


def test_equal_seeds_give_equal_searches_with_any_number_of_threads(tmp_path: Path) -> None:
    files: list[dict[str, bytes]] = []
    for threads in (1, 8):
        proposer = simulated(toy.lucky, name="writer")
        compiled_by(constitutional(tmp_path / str(threads), proposer, steps=2, threads=threads), 40)
        names = ("trials.jsonl", "lineage.jsonl", "program/program.json", "program/evidence.json")
        files.append({name: (tmp_path / str(threads) / "run" / name).read_bytes() for name in names})
    assert files[0] == files[1]


TURNED = {"fruit": {"red": "yes", "blue": "no"}, "tools": {"red": "no", "blue": "yes"}}
"""What a colour means depends on the topic: no single constitution of such rules is right about both."""


def by_topic(texts: Sequence[str]) -> list[list[float]]:
    return [[1.0, 0.0] if "fruit" in text else [0.0, 1.0] for text in texts]


def of_topics(count: int, start: int = 0) -> list[dspy.Example]:
    made = [(n, ["fruit", "tools"][n % 2], ["red", "blue"][n // 2 % 2]) for n in range(start, start + count)]
    return [
        dspy.Example(text=f"{topic} row {n} {colour}", label=TURNED[topic][colour]).with_inputs("text")
        for n, topic, colour in made
    ]


def mixture(tmp_path: Path, **settings: Any) -> Any:
    proposer = simulated(choosing("Add", right_rule), name="writer")
    given = {"regions": 2, "embedder": Embedder("topics", by_topic), "steps": 2, "edits": 1}
    method = constitutional(tmp_path, proposer, **{**given, **settings})
    return compiled_by(method, 80, trainset=of_topics(80), valset=of_topics(120, 80))


def test_regions_of_opposite_rules_get_an_expert_each(tmp_path: Path) -> None:
    compiled = mixture(tmp_path)

    assert (compiled.evidence.baseline, compiled.evidence.compiled) == (0.5, 1.0)
    assert type(compiled) is Experts
    with dspy.context(lm=simulated(answer)):
        assert [compiled(text=f"{topic} row 0 red").label for topic in TURNED] == ["yes", "no"]


def test_each_experts_principles_are_told_with_what_they_are_worth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = mixture(tmp_path)
    told = read(tmp_path / "run" / "program").evidence["principles"]

    assert told == [dict(row) for row in compiled.evidence.principles]
    for expert, part in compiled.experts.items():
        own = [row for row in told if row["expert"] == expert]
        assert [row["principle"] for row in own] == principles(candidate_of(part).instructions["predict"])
        assert max(row["worth"] for row in own) in (6 / 13, 7 / 13)  # one colour's, of a third of 40 rows
        assert {row["rows"] for row in own} == {13}
        assert {row["predictor"] for row in own} == {"predict"}

    assert run(["show", str(tmp_path / "run" / "program")]) == 0
    shown = capsys.readouterr().out.partition("\nPrinciples (")[2].partition("\n")[2]
    assert all(re.search(rf"{row['expert']} .*{row['principle']} ", shown) for row in told)
    assert re.search(r"\+(46.2|53.8) points", shown)


def test_a_single_constitution_is_told_the_same_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proposer = simulated(choosing("Add", right_rule), name="writer")
    method = constitutional(tmp_path, proposer, steps=1, errors=1, edits=1)
    compiled_by(method, 72, valset=rows(120, 72))

    [told] = read(tmp_path / "run" / "program").evidence["principles"]
    assert (told["identity"], told["history"], told["because"], told["rows"]) == (1, "add", "It is silent.", 24)
    aside = set(range(72)) - set(lines(tmp_path, "trials.jsonl")[0]["rows"])
    colour = told["principle"].split()[0]
    worth = sum(list(POLICY)[row % 6] == colour for row in aside) / 24
    assert told["worth"] == pytest.approx(worth)
    assert run(["show", str(tmp_path / "run" / "program")]) == 0
    header, line = capsys.readouterr().out.partition("\nPrinciples (")[2].partition("\n")[2].splitlines()[:2]
    assert header.split() == ["principle", "worth", "train", "rows", "history"]
    assert line.split() == [*told["principle"].split(), f"{100 * worth:+.1f}", "points", "24", "add"]


def test_a_mixture_needs_calls_to_confirm_three_programs(tmp_path: Path) -> None:
    proposer = simulated(choosing("Add"), name="writer")
    embedder = Embedder("topics", by_topic)
    with pytest.raises(Unaffordable, match=r"needs at least 86 calls here: 36 to confirm on 12 rows and 50 to search"):
        compiled_by(constitutional(tmp_path, proposer, regions=2, embedder=embedder, budget=Budget(calls=85)), 96)


def test_a_mixture_of_a_mixture_of_constitutions_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^A mixture of mixtures has no router of its own; wrap another method\.$"):
        MixtureOfExperts(metric="accuracy", method=ConstitutionalExperts, settings={"regions": 4})


def test_regions_that_cannot_be_are_refused_when_they_are_set() -> None:
    with pytest.raises(ConfigError, match=r"^A mixture has 2 regions or more, or 0 to choose their number; got -1\.$"):
        ConstitutionalExperts(metric="accuracy", regions=-1)


@pytest.mark.parametrize(("regions", "embedder"), [(1, None), (3, "all-minilm-l6-v2"), (0, "all-minilm-l6-v2")])
def test_programs_of_several_experts_are_routed_by_the_embedder(regions: int, embedder: str | None) -> None:
    method = ConstitutionalExperts(metric="accuracy", regions=regions)
    assert (method.experts, method.routed_by) == (regions, embedder)
    if embedder:
        mixture = MixtureOfExperts(metric="accuracy", method=ConstitutionalExperts, regions=regions)
        assert (mixture.experts, mixture.routed_by) == (regions, embedder)
