"""Anytime performance: what the searches of `preceptor bench papers` would have returned after how many calls.

A search that is stopped returns the best of the candidates that have seen the most rows, as a compile does when its
budget ends; ProTeGi, which sets rows aside to choose by, the best on those. A run's curve is what that was, each time
it changed: in its run folder's `held.jsonl`, where the method tells, else by its `trials.jsonl`: a method of ours has
scored a candidate when the evaluation that it is part of ends, DSPy's optimizers when its last row is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from preceptor.benchmarks.compared import (
    PEERS,
    Run,
    Scores,
    base,
    by_task,
    interval,
    is_ours,
    mean_of_tasks,
    means_by_task,
)
from preceptor.run import CONFIRMATION, HELD, REGIONS, fingerprint
from preceptor.scoring.trial import Candidate, Demos

TESTED: Final = 6
"""Instructions of a curve that are scored on test rows, at most: the first, the last and others between them."""

SHARE: Final = 0.95
"""Of the final score, or of the final gain; what is there then is as good as reached."""


@dataclass(frozen=True, slots=True)
class Point:
    """What a search held for best.

    Attributes:
        calls: From then on.
        instructions: Predictor name -> text.
        search_score: On the train rows it was scored on by then, or on those set aside to choose by; None before
            anything was scored.
        test: On the test rows; None where they were not scored.
        demos: Demonstrations below the instructions, those that all candidates of a search show.
    """

    calls: int
    instructions: Mapping[str, str]
    search_score: float | None
    test: float | None = None
    demos: int = 0


def curve(run: Path) -> list[Point]:
    """Return what a run's search held for best: the seed at no calls, the best once something was scored, each change.

    The last is the winner that was confirmed, at the end of the search. A mixture has no curve, for it has many
    searches; nor has one whose candidates bring demonstrations of their own, which `trials.jsonl` doesn't hold. Those
    that all of them show, as with `few_shot`, are the winner's.
    """
    lines, last = _lines(run / "trials.jsonl"), held_last(run)
    if last is None or not all(_shows(line, last.demos) for line in lines):
        return []
    demos = sum(map(len, last.demos.values()))
    seed = json.loads((run / "result.json").read_text(encoding="utf-8"))["seed_instructions"]
    best = _lines(run / HELD) if (run / HELD).is_file() else list(_leaders(lines))
    points = [Point(0, seed, None)]
    for line in best:
        if len(points) == 1 or line["instructions"] != points[-1].instructions:
            points.append(Point(line["calls"], line["instructions"], line["score"], demos=demos))
    winner = last.instructions
    scored = [*({**line, "score": line["so_far"]} for line in lines), *best]
    score = next((line["score"] for line in reversed(scored) if line["instructions"] == winner), None)
    return [*points, Point(lines[-1]["calls"], winner, score, demos=demos)]


def is_lacking(result: Run, run: Path) -> bool:
    """Return True if a result was made without a curve, and its own run folder tells one.

    The folder may be gone, another run's of the same name, or one that is being made again.
    """
    trials, end = run / "trials.jsonl", run / "result.json"
    if result.get("curve") != [] or not all(path.is_file() for path in (trials, end, run / CONFIRMATION)):
        return False
    told = json.loads(end.read_text(encoding="utf-8"))
    is_its_own = all(told[name] == result[name] for name in ("calls", "tokens", "search_score", "instructions"))
    return is_its_own and trials.stat().st_mtime <= end.stat().st_mtime and bool(curve(run))


def _shows(line: Mapping[str, Any], demos: Mapping[str, Demos]) -> bool:
    """Return True if a line of `trials.jsonl` is of a candidate with these demonstrations."""
    if not line["demos"] or not demos:
        return not line["demos"] and not demos
    return bool(line["candidate"] == fingerprint(Candidate(line["instructions"], demos).key))


def held_last(run: Path) -> Candidate | None:
    """Return what a run's search held for best in the end, confirmed or not: the seed if it found nothing.

    None of a mixture, which has many searches, and of a run that was made before demonstrations were written down.
    """
    lines = _lines(run / "trials.jsonl")
    told = json.loads((run / CONFIRMATION).read_text(encoding="utf-8"))
    demos = told.get("demos", {}).get("", {})
    if (run / REGIONS).is_file() or not lines or (any(line["demos"] for line in lines) and not demos):
        return None
    seed = json.loads((run / "result.json").read_text(encoding="utf-8"))["seed_instructions"]
    return Candidate(told["candidates"].get("", seed), {name: tuple(shown) for name, shown in demos.items()})


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _leaders(lines: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Return the best of the candidates that had seen the most rows, each time an evaluation ended."""
    known = dict[str, dict[str, Any]]()
    for at, line in enumerate(lines):
        known[line["candidate"]] = line
        if at + 1 < len(lines) and lines[at + 1]["calls"] == line["calls"]:
            continue  # scored in one evaluation
        most = max(each["seen"] for each in known.values())
        best = max((each for each in known.values() if each["seen"] == most), key=lambda each: float(each["so_far"]))
        yield {"calls": line["calls"], "instructions": best["instructions"], "score": best["so_far"]}


def scored_on_test(run: Path, score: Callable[[Candidate], float]) -> list[dict[str, Any]]:
    """Return a run's curve with scores on test rows, as it is kept in the results' files.

    Args:
        run: The run folder.
        score: Of a candidate, on test rows; asked at most `TESTED` times.
    """
    points, last = curve(run), held_last(run)
    demos = last.demos if last else {}
    texts = {_key(point): Candidate(point.instructions, demos if point.demos else {}) for point in points}
    ends = {_key(point): None for point in (*points[:1], *points[-1:])}
    between = [key for key in texts if key not in ends]
    scores = {key: score(texts[key]) for key in (*ends, *(between[at] for at in spread(len(between), TESTED - 2)))}
    return [asdict(point) | {"test": scores.get(_key(point))} for point in points]


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the first `count` numbers, evenly spread, the first and the last among them.

    Example:
        >>> spread(3, 4), spread(10, 4)
        ([0, 1, 2], [0, 3, 6, 9])
    """
    if count <= most:
        return list(range(count))
    return [round(at * (count - 1) / (most - 1)) for at in range(most)]


def steps(run: Run) -> list[tuple[float, float]]:
    """Return the places where a run's curve is known on test rows: calls and score, the first at no calls."""
    return [(point["calls"], point["test"]) for point in run.get("curve", ()) if point["test"] is not None]


def held(places: Sequence[tuple[float, float]], calls: float) -> float:
    """Return the score after so many calls.

    Example:
        >>> held([(0, 0.5), (100, 0.7)], 99), held([(0, 0.5), (100, 0.7)], 100)
        (0.5, 0.7)
    """
    return [score for begun, score in places if begun <= calls][-1]


def reached(run: Run, *, of_gain: bool) -> float | None:
    """Return the calls after which a search holds what is worth 95 % of its final score, or of its final gain.

    Nothing is held before the first evaluation ends. None if there is no gain, or no curve.
    """
    places = steps(run)
    if len(places) < 2:
        return None
    first, last = places[0][1], places[-1][1]
    if of_gain and last <= first:
        return None
    goal = first + SHARE * (last - first) if of_gain else SHARE * last
    return next(calls for calls, score in places[1:] if score >= goal or (calls, score) == places[-1])


def speeds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a line for each method: calls to 95 % of the final score and gain, with Student's intervals over tasks.

    Of several runs of a task, their mean is taken first; `gained` counts the runs.
    """
    lines: list[dict[str, Any]] = []
    for name in sorted({run["method"] for run in runs if run.get("curve")}):
        own = [run for run in runs if run["method"] == name and run.get("curve")]
        scores, gains = (means_by_task(own, partial(reached, of_gain=of_gain)) for of_gain in (False, True))
        lines.append(
            {"method": name, "runs": len(own), "final": fmean(means_by_task(own, lambda run: steps(run)[-1][1]))}
            | _spread_of("calls_to_score", scores)
            | {"gained": sum(reached(run, of_gain=True) is not None for run in own)}
            | _spread_of("calls_to_gain", gains)
        )
    return lines


def ratios(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a line for each method of ours against each peer, and for all against all: calls of ours / of theirs.

    The geometric mean over tasks both have curves on, with Student's interval of its logarithm; of several seeds, and
    of all pairs of ours and peers, the geometric mean is taken first. Paired by seed: only those count that both have,
    and of the gain those where both gained.
    """
    names = sorted({run["method"] for run in runs if run.get("curve")})
    ours, peers = [name for name in names if is_ours(name)], [name for name in names if base(name) in PEERS]
    pairs = [([one], [other]) for one in ours for other in peers]
    if len(pairs) > 1:
        pairs.append((ours, peers))
    lines: list[dict[str, Any]] = []
    for some, others in pairs:
        named = [", ".join(group) if len(group) == 1 else f"all {len(group)}" for group in (some, others)]
        line: dict[str, Any] = {"ours": named[0], "peers": named[1]}
        for kind, of_gain in (("score", False), ("gain", True)):
            logs = _logs(runs, of_gain)
            gaps = {f"{one} {other}": by_task(logs, one, other) for one in some for other in others}
            line |= _ratio(kind, mean_of_tasks(gaps))
        lines.append(line)
    return lines


def _ratio(kind: str, gaps: Sequence[float]) -> dict[str, Any]:
    low, high = interval(gaps)
    found = (fmean(gaps), low, high) if gaps else (math.nan, math.nan, math.nan)
    names = (f"ratio_to_{kind}", f"{kind}_low", f"{kind}_high")
    return {f"{kind}_tasks": len(gaps)} | dict(zip(names, map(math.exp, found), strict=True))


def _logs(runs: Sequence[Run], of_gain: bool) -> Scores:
    """Return the logarithms of the calls by task, method and seed."""
    found: Scores = {}
    for run in runs:
        if (calls := reached(run, of_gain=of_gain)) is not None:
            found.setdefault((run["task"], run["method"]), {})[run.get("seed", 0)] = math.log(calls)
    return found


def _spread_of(name: str, values: Sequence[float]) -> dict[str, float]:
    low, high = interval(values)
    return {name: fmean(values) if values else math.nan, f"{name}_low": low, f"{name}_high": high}


def _key(point: Point) -> str:
    return json.dumps([dict(point.instructions), point.demos], sort_keys=True)
