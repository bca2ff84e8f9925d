"""`preceptor bench principles`: a hidden policy of five rules, found by editing principles or by rewriting the prompt.

Each row names one of five things, and a rule says which label goes with it. The task model is right about a row
as often as what the instruction says of its thing allows, so a program's true accuracy is known. The
proposer sees what a method shows it, reads a rule off a wrong answer, and writes it down; now and then a wrong one, or
one about something that never occurs. Where it rewrites a whole prompt, each rule the prompt held is lost with
the chance `forgets`: that is what single edits are meant to avoid, and how often a real proposer does it is not
known, so the table shows several.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import fmean, stdev
from typing import Annotated, Any, Final

import dspy
import typer
from dspy.lm15 import Request
from scipy import stats

from preceptor.benchmarks import peers
from preceptor.benchmarks.peers import Case
from preceptor.benchmarks.result import Json, Out, give
from preceptor.cli.view import print_table, progress
from preceptor.lm.budget import Budget
from preceptor.lm.seam import predictors
from preceptor.modules import Classify
from preceptor.scoring.statistics import CONFIDENCE
from preceptor.testing import prompt, simulated, system
from preceptor.testing.draws import draw, number, uniform

POLICY: Final = {"kettle": "kitchen", "drill": "tools", "novel": "books", "scarf": "clothes", "puzzle": "games"}
"""What a row names, and the label that goes with it."""

ELSEWHERE: Final = ("anchor", "violin", "ladder")
"""What no row names."""

LABELS: Final = tuple(POLICY.values())
SEED: Final = "Say which shelf the parcel goes to."
UNTOLD: Final = 0.25
TOLD: Final = 0.95
"""How often the model is right about a thing of which nothing is said, and of which the rule is told."""

MISREADS: Final = 0.2
"""How often the proposer writes a wrong rule, and how often one about something that never occurs."""

METHODS: Final = ("constitutional_experts", "protegi")
GOAL: Final = 0.8
"""The true accuracy whose price in calls is told; all five rules reach `TOLD`."""

_RULE: Final = re.compile(r"If the parcel holds an? (\w+), the answer is (\w+)\.")
_EDIT: Final = re.compile(r"^(\d+)\. (Add|Revise|Remove|Merge)\b(.*)$", re.MULTILINE)
_WRONG: Final = re.compile(r"Parcel \S+ holds an? (\w+)[^\n]*\n(?:.*\n)*?Right answer: (\w+)")


@dataclass(frozen=True, slots=True)
class Compile:
    """One compile of the benchmark.

    Attributes:
        method: One of `METHODS`.
        calls: Its budget, proposals and confirmation included.
        forgets: Chance that a rule is lost when a prompt is rewritten.
        seed: Of the method, the rows and both models.
    """

    method: str
    calls: int
    forgets: float
    seed: int


def run(
    seeds: Annotated[int, typer.Option(min=2, help="Compiles per line.")] = 20,
    calls: Annotated[list[int] | None, typer.Option(help="Budgets.")] = None,
    forgets: Annotated[list[float] | None, typer.Option(help="Chances that a rewritten prompt loses a rule.")] = None,
    rows: Annotated[int, typer.Option(min=10, help="Train rows; as many validation rows.")] = 200,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Compile with growing budgets and read the rules off the programs."""
    groups = [
        [(Compile(name, budget, share, seed), rows) for seed in range(seeds)]
        for share in (forgets if forgets is not None else [0.0, 0.1, 0.3])
        for name in METHODS
        for budget in calls or [600, 1000, 1500, 2500, 4000]
    ]
    start = time.monotonic()
    with progress() as report:
        found = iter(peers.spread(measure, [one for group in groups for one in group], jobs, report, "compiling"))
    measured = [_summary(group[0][0], list(islice(found, len(group)))) for group in groups]
    seconds = round(time.monotonic() - start)
    result = {"goal": GOAL, "seconds": seconds, "measured": measured, "reached": reached(measured)}
    give(result, out, as_json=as_json, show=_print)


def measure(asked: tuple[Compile, int]) -> dict[str, float]:
    """Compile once; return the true accuracy of the program, its rules, and the calls."""
    compiled, rows = asked
    told = _rows(compiled.seed, 2 * rows)
    case = Case(
        student=Classify(f"text -> shelf: Literal{list(LABELS)}", SEED),
        lm=models(compiled),
        train=told[:rows],
        val=told[rows:],
        output="shelf",
        seed=compiled.seed,
    )
    kind = partial(peers.ours()[compiled.method], few_shot=0)  # which would tell the rules too
    claim = peers.compile_ours(kind, case, Budget(calls=compiled.calls))
    [(_, predictor)] = predictors(claim.program)
    return {**checked(predictor.signature.instructions), "calls": claim.calls, "replaced": claim.replaced}


def checked(instruction: str) -> dict[str, float]:
    """Return how many rules of the policy an instruction tells, and tells wrongly, and how many others it holds.

    Where it says two things of one, the first counts, and the second is superfluous.

    Example:
        >>> rule = "If the parcel holds a {}, the answer is {}. "
        >>> checked(rule.format("drill", "tools") + rule.format("scarf", "books"))
        {'found': 1, 'wrong': 1, 'superfluous': 0, 'accuracy': 0.34}
    """
    told = _told(instruction)
    found = sum(told.get(thing) == label for thing, label in POLICY.items())
    wrong = sum(told.get(thing, label) != label for thing, label in POLICY.items())
    return {
        "found": found,
        "wrong": wrong,
        "superfluous": len(_RULE.findall(instruction)) - found - wrong,
        "accuracy": round((found * TOLD + (len(POLICY) - found - wrong) * UNTOLD) / len(POLICY), 4),
    }


def models(compiled: Compile) -> dspy.LM:
    """Return a model that keeps the shelves and writes proposals: what has a system message is a row."""

    def answer(request: Request) -> str:
        told = system(request)
        return _sorted(told, prompt(request), compiled.seed) if told else _proposed(request, compiled)

    return simulated(answer, name=f"shelves-{compiled.seed}-{compiled.forgets}")


def reached(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the smallest budget whose programs are as good as `GOAL` on average, per method; None if none is."""
    lines: list[dict[str, Any]] = []
    for share in dict.fromkeys(row["forgets"] for row in measured):
        good = [row for row in measured if row["forgets"] == share and row["accuracy"] >= GOAL]
        enough = {name: min((row["budget"] for row in good if row["method"] == name), default=None) for name in METHODS}
        lines.append({"forgets": share, **enough})
    return lines


def _told(instruction: str) -> dict[str, str]:
    """Return what an instruction says of each thing: the first word counts."""
    return dict(reversed(_RULE.findall(instruction)))


def _sorted(told: str, text: str, seed: int) -> str:
    thing = next(thing for thing in POLICY if thing in text)
    said, luck = _told(told).get(thing), draw("row", seed, text)
    right = said == POLICY[thing] if said else uniform(luck) < UNTOLD
    if said and uniform(luck) < TOLD:
        return said
    others = [label for label in LABELS if label != POLICY[thing]]
    return POLICY[thing] if right and not said else others[number(luck[8:]) % len(others)]


def _proposed(request: Request, compiled: Compile) -> str:
    """Answer a meta-prompt: choose an edit, write a principle, rewrite or paraphrase a prompt, or explain."""
    asked = prompt(request)
    drawn = draw(compiled.seed, asked, request.config.seed)
    wrong = _WRONG.findall(asked)
    if "Answer with its number only" in asked:
        return _chosen(asked, wrong)
    if "principle" in asked and wrong:
        return f"<START>{_rule(wrong[0][0], wrong[0][1], drawn)}<END>"
    if asked.startswith("Say these instructions in other words") or "Write better instructions" in asked:
        texts = (_rewritten(asked, wrong, draw(drawn.hex(), at), compiled.forgets) for at in range(4))
        return "".join(f"<START>{text}<END>" for text in texts)
    return f"<START>Nothing is said of parcels with a {wrong[0][0] if wrong else 'thing'} in them.<END>"


def _chosen(asked: str, wrong: Sequence[tuple[str, str]]) -> str:
    """Choose to revise the principle about the thing that was got wrong, else to add one."""
    menu = [(at, kind, of) for at, kind, of in _EDIT.findall(asked) if kind in ("Add", "Revise")]
    about = [at for at, kind, of in menu if kind == "Revise" and wrong and wrong[0][0] in of]
    return next(iter(about), None) or next((at for at, kind, _ in menu if kind == "Add"), "1")


def _rule(thing: str, label: str, drawn: bytes) -> str:
    luck = uniform(drawn)
    if luck < MISREADS:
        label = LABELS[number(drawn[8:]) % len(LABELS)]
    elif luck < 2 * MISREADS:
        thing = ELSEWHERE[number(drawn[8:]) % len(ELSEWHERE)]
    return f"If the parcel holds {'an' if thing[0] in 'aeiou' else 'a'} {thing}, the answer is {label}."


def _rewritten(asked: str, wrong: Sequence[tuple[str, str]], drawn: bytes, forgets: float) -> str:
    """Write the prompt anew: most of its rules, and one more for one of the wrong answers."""
    shown = asked.partition("\n\n")[2].partition("\n\nWith them,")[0].partition("\n\nWrite ")[0]
    held = [found[0] for found in _RULE.finditer(shown)]
    kept = [rule for at, rule in enumerate(held) if uniform(draw(drawn.hex(), at)) >= forgets]
    if wrong:
        thing, label = wrong[number(drawn) % len(wrong)]
        kept = [rule for rule in kept if f" {thing}," not in rule] + [_rule(thing, label, drawn[8:])]
    return " ".join([f"{SEED[:-1]}, way {drawn.hex()[:4]}.", *kept])


def _rows(seed: int, count: int) -> list[dspy.Example]:
    things = list(POLICY)
    named = ((at, things[number(draw("thing", seed, at)) % len(things)]) for at in range(count))
    return [
        dspy.Example(text=f"Parcel {seed}-{at} holds a {thing}.", shelf=POLICY[thing]).with_inputs("text")
        for at, thing in named
    ]


def _summary(compiled: Compile, found: list[dict[str, float]]) -> dict[str, Any]:
    accuracy = [one["accuracy"] for one in found]
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1)) * stdev(accuracy) / len(found) ** 0.5
    return {
        "forgets": compiled.forgets,
        "method": compiled.method,
        "budget": compiled.calls,
        "seeds": len(found),
        "replaced": round(sum(one["replaced"] for one in found)),
        "accuracy": fmean(accuracy),
        "low": fmean(accuracy) - half,
        "high": fmean(accuracy) + half,
        **{name: fmean(one[name] for one in found) for name in ("found", "wrong", "superfluous")},
        "calls": round(fmean(one["calls"] for one in found)),
    }


def _print(result: dict[str, Any]) -> None:
    table, goals = result["measured"], result["reached"]
    print_table(
        f"True accuracy of the programs and their rules, mean over seeds; {UNTOLD} without rules, {TOLD} with all five",
        list(table[0]),
        [list(row.values()) for row in table],
    )
    print_table(f"Smallest budget of calls that reaches {GOAL}", list(goals[0]), [list(row.values()) for row in goals])
