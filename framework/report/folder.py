"""What a run folder holds, read for its report. It may be anybody's, and of a run that hasn't ended."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from preceptor import form
from preceptor.errors import RunError
from preceptor.lineage import LINEAGE, Descendant, descended, key_of, read_lines
from preceptor.run import CONFIRMATION, REGIONS, read_run

_TRIALS: Final = "trials.jsonl"

_LARGEST: Final = 1e12
"""Beyond, a number can't be drawn."""

Place = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Scored:
    """What was known of a candidate when one evaluation of it ended: a line of `trials.jsonl`.

    Attributes:
        candidate: Told apart from others by it.
        key: Of its instructions; see `preceptor.lineage.key_of`.
        instructions: Predictor name -> text.
        demos: Demonstrations below them.
        calls: Of the search, by then.
        seen: Train rows it was scored on, by then.
        score: On all of them; in [0, 1], or a likelihood, at most 0.
        interval: 95 % interval of the score, None for a likelihood.
    """

    candidate: str
    key: str
    instructions: Mapping[str, str]
    demos: int
    calls: int
    seen: int
    score: float
    interval: Place | None


@dataclass(frozen=True, slots=True)
class Search:
    """One search of a run.

    Attributes:
        name: The region's, "" on all rows.
        scored: In the order it was.
        lineage: Key -> candidate, where the method tells where its candidates come from.
    """

    name: str
    scored: Sequence[Scored]
    lineage: Mapping[str, Descendant]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program answered to a row: its score is None if the call broke."""

    text: str
    score: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """A confirmation row.

    Attributes:
        inputs: By name, as text.
        gold: The label, as text.
        before: The seed's answer.
        after: The best program's.
        region: Where it lies; "" without regions, and beyond the radius.
        measures: False if it chose an expert, and so took no part in measuring.
    """

    inputs: Mapping[str, str]
    gold: str
    before: Answer
    after: Answer
    region: str
    measures: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """Where rows and regions lie, in two dimensions.

    Attributes:
        regions: Names.
        centroids: One place a region: the mean of its train rows, which the centroid has the direction of.
        train: One place a train row.
        members: Each train row's region.
        confirm: One place a confirmation row.
        routes: Each confirmation row's region, "" beyond the radius.
        explained: Share of the train rows' variance that the plane shows.
        embedder: What embedded them.
    """

    regions: Sequence[str]
    centroids: Sequence[Place]
    train: Sequence[Place]
    members: Sequence[str]
    confirm: Sequence[Place]
    routes: Sequence[str]
    explained: float
    embedder: str


@dataclass(frozen=True, slots=True)
class Findings:
    """A run.

    Attributes:
        folder: Where it is.
        known: What `run.json` says.
        result: What `result.json` says, {} before there is a result.
        searches: That on all rows, then those of the regions.
        candidates: Expert, or "", -> the instructions that were asked the confirmation rows, beside the seed.
        rows: The confirmation rows; empty before they were opened.
        plan: Of the regions, None if there are none.
    """

    folder: Path
    known: Mapping[str, Any]
    result: Mapping[str, Any]
    searches: Sequence[Search]
    candidates: Mapping[str, Mapping[str, str]]
    rows: Sequence[Row]
    plan: Plan | None


def findings(folder: Path) -> Findings:
    """Return what a run folder holds.

    Raises:
        RunError: If it is no run folder, or a file of it is damaged.
    """
    known, result, confirmation = read_run(folder), _result(folder), _object(folder / CONFIRMATION)
    with _whole(folder / CONFIRMATION):
        candidates = {str(name): _texts(one) for name, one in confirmation.get("candidates", {}).items()}
        rows = [_row(row) for row in confirmation.get("rows", [])] if result else []
    plan = _plan(folder / REGIONS)
    parts = [(name, folder / name.replace(" ", "-")) for name in (plan.regions if plan else ())]
    searches = [_search(name, place) for name, place in [("", folder), *parts] if (place / _TRIALS).is_file()]
    return Findings(folder, known, result, searches, candidates, rows, plan)


@contextmanager
def _whole(path: Path) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path} is damaged. Compile into the folder again: its ledger is used.") from error


def _object(path: Path) -> dict[str, Any]:
    """Return a JSON object, {} if there is no such file."""
    if not path.is_file():
        return {}
    with _whole(path):
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise TypeError(f"holds a {type(value).__name__}, not an object")
        return value


def _result(folder: Path) -> dict[str, Any]:
    result = _object(folder / "result.json")
    with _whole(folder / "result.json"):
        form.check_evidence(result)
        for number in _drawn(result) if result else ():
            _finite(number)
    return result


def _drawn(result: Mapping[str, Any]) -> list[Any]:
    """Return the numbers of a result that go into the drawing; a result has a verdict, and with it all others."""
    if not result["verdict"]:
        raise ValueError("there is no verdict")
    return [
        result["compiled"],
        result["baseline"],
        *result["baseline_ci"],
        *result["compiled_ci"],
        result.get("tested_gain", 0),
    ]


def _search(name: str, folder: Path) -> Search:
    lines = read_lines(folder / _TRIALS)
    with _whole(folder / _TRIALS):
        scored = [_scored(line) for line in lines if "so_far" in line]
    births = read_lines(folder / LINEAGE) if (folder / LINEAGE).is_file() else []
    return Search(name, scored, {one.key: one for one in descended(births, lines, "")} if births else {})


def _scored(line: Mapping[str, Any]) -> Scored:
    interval = line["interval"]
    return Scored(
        candidate=str(line["candidate"]),
        key=key_of(line["instructions"]),
        instructions=line["instructions"],
        demos=int(_finite(line["demos"])),
        calls=int(_finite(line["calls"])),
        seen=int(_finite(line["seen"])),
        score=_finite(line["so_far"]),
        interval=None if interval is None else _place(interval),
    )


def _row(row: Mapping[str, Any]) -> Row:
    return Row(
        inputs=_texts(row["inputs"]),
        gold=str(row["gold"]),
        before=_answer(row["before"]),
        after=_answer(row["after"]),
        region=str(row.get("region", "")),
        measures=bool(row.get("measures", True)),
    )


def _answer(answer: Mapping[str, Any]) -> Answer:
    score = answer["score"]
    return Answer(str(answer["answer"]), None if score is None else _finite(score))


def _plan(path: Path) -> Plan | None:
    known = _object(path)
    if not known:
        return None
    with _whole(path):
        plan = Plan(
            regions=[str(name) for name in known["regions"]],
            centroids=[_place(place) for place in known["centroids"]],
            train=[_place(place) for place in known["train"]],
            members=[str(name) for name in known["members"]],
            confirm=[_place(place) for place in known["confirm"]],
            routes=[str(name) for name in known["routes"]],
            explained=float(known["explained"]),
            embedder=str(known["embedder"]),
        )
        if not (len(plan.regions) == len(plan.centroids) and len(plan.train) == len(plan.members)):
            raise ValueError("places and names differ in number")
        if any("/" in name or "\\" in name or name.startswith(".") for name in plan.regions):
            raise ValueError("a region's name is no name of a folder")
    return plan


def _place(pair: Any) -> Place:
    first, second = pair
    return _finite(first), _finite(second)


def _finite(value: Any) -> float:
    number = float(value)
    if not abs(number) < _LARGEST:
        raise ValueError(f"{number} is no coordinate, score or count")
    return number


def _texts(texts: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): str(text) for name, text in texts.items()}
