"""`preceptor bench papers`: published tasks x methods x seeds, one model, one budget of all calls; one file a run.

A method is one of those installed, `NAME+mixture` the same in a mixture of experts, and `human` no method: the
instruction that a person wrote for a task, where its data has one.

Nothing is tuned on test rows: they are scored once a compile is over, with answers in a ledger that no compile
sees. All methods get the same rows, model, adapter and budget, the confirmation's calls included. A run that is
in the folder of results, made of the same data, with the same model and on the same device, is not made again, and one
that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final, cast

import dspy
import torch
import typer

from preceptor.benchmarks import anytime, tasks
from preceptor.benchmarks.jobs import is_shared, spread
from preceptor.benchmarks.result import Json
from preceptor.benchmarks.table import FOLDER, summary
from preceptor.benchmarks.tasks import Parts, Published
from preceptor.cli.inputs import DEFAULT_LM, entries, lm_of
from preceptor.cli.view import print_json, progress, say
from preceptor.errors import BudgetExhausted, ConfigError, Unaffordable
from preceptor.lm.budget import Account, Budget
from preceptor.lm.catalogue import cache_folder
from preceptor.lm.ledger import Ledger
from preceptor.lm.meter import Meter, batching_engine
from preceptor.lm.weights import has_bfloat16
from preceptor.program import apply
from preceptor.scoring.evaluate import Counter, Evaluator, Job, held_against
from preceptor.scoring.metrics import wrap
from preceptor.scoring.statistics import compare
from preceptor.scoring.trial import Candidate, Outcome
from preceptor.splits import unseen
from preceptor.task import Report
from preceptor.teleprompter import Teleprompter
from preceptor.teleprompters import MixtureOfExperts

DEFAULT_TASKS: Final = ("subj", "trec", "ethos", "antonyms")
HUMAN: Final = "human"
DEFAULT_METHODS: Final = ("ape", "protegi", "instruct_zero")
QUICK_TASKS, QUICK_METHODS, QUICK_CALLS, QUICK_ROWS = ("tickets",), ("ape", "protegi"), 500, 50
PACKAGES: Final = ("dspy-ai", "transformers", "torch", "preceptor")


@dataclass(frozen=True, slots=True)
class Run:
    """One compile of the benchmark, and where its result goes."""

    task: str
    method: str
    seed: int
    calls: int
    model: str
    test_rows: int | None = None

    @property
    def name(self) -> str:
        """Of the run folder and the file of the result."""
        return f"{self.task}-{self.method}-{self.seed}"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return cache_folder() / "runs" / "papers" / self.group / self.name

    @property
    def group(self) -> str:
        """Of the folder that holds it: what must be equal for results to be compared."""
        short = self.model.rpartition("/")[2].partition("@")[0]
        return f"{short}-{self.calls}" if self.test_rows is None else f"{short}-{self.calls}-of-{self.test_rows}"


def run(
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder that holds the data sets in their upstream's layout; by default, the hub's."),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help=f"By default {', '.join(DEFAULT_TASKS)}.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help=f"By default {', '.join(DEFAULT_METHODS)}; NAME+mixture, human.")
    ] = None,
    lm: Annotated[str, typer.Option("--lm")] = DEFAULT_LM,
    seeds: Annotated[int, typer.Option(min=1, help="Compiles per task and method.")] = 2,
    calls: Annotated[int, typer.Option(min=1, help="Budget of one compile.")] = 600,
    jobs: Annotated[
        int, typer.Option(min=1, help="Compiles at a time; on a processor they share one model, and its batches.")
    ] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="One task that needs no data, two methods, 500 calls, 50 test rows.")
    ] = False,
    curve: Annotated[
        bool, typer.Option(help="Score on test rows what each search held for best: up to half of a run's time.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Folder of results.")] = None,
    as_json: Json = False,
) -> None:
    """Compile, score on test rows, write one file a run, and print the table.

    Results without a curve get theirs, unless with --no-curve, if their run folders are still in the cache. With
    --quick the results go into the cache: they say that everything runs, and nothing of the methods.
    """
    kinds = {name: kind_of(name) for name in method or (QUICK_METHODS if quick else DEFAULT_METHODS)}
    out = out or (cache_folder() / "quick" if quick else FOLDER)
    names = [tasks.find(name).name for name in task or (QUICK_TASKS if quick else DEFAULT_TASKS)]
    pairs = [(name, how) for name in names for how in kinds if how != HUMAN or tasks.find(name).human is not None]
    if not pairs:
        raise ConfigError(f"Nothing to run: the data of {', '.join(names)} has no instruction that a person wrote.")
    asked = lm_of(lm)
    runs = [
        Run(name, how, seed, QUICK_CALLS if quick else calls, asked.model, QUICK_ROWS if quick else None)
        for seed in range(1 if quick else seeds)
        for name, how in pairs
    ]
    places = {one: out / one.group / f"{one.name}.json" for one in runs}
    _refuse_others(places, data_dir)
    known = {one: json.loads(place.read_text(encoding="utf-8")) for one, place in places.items() if place.is_file()}
    bare = {one: held for one, held in known.items() if curve and anytime.is_lacking(held, one.folder)}
    missing = [one for one in runs if one in bare or one not in known]
    for name in dict.fromkeys(one.task for one in missing):
        tasks.find(name).rows(data_dir, 0)  # whose data isn't there is said before anything is compiled
    together = min(jobs, len(missing)) if is_shared(asked) else 1
    measure = partial(_measured, data_dir=data_dir, lm=lm, with_curve=curve, together=together, bare=bare)
    with progress() as report, spread(measure, missing, jobs, asked, report) as results:
        for one, result in results:
            places[one].parent.mkdir(parents=True, exist_ok=True)
            places[one].write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            say(f"{one.name}: {result['seed_score']:.3f} -> {result['compiled']:.3f}")
    found = [json.loads(place.read_text(encoding="utf-8")) for place in places.values()]
    print_json({"runs": found}) if as_json else summary(found)


def _refuse_others(places: Mapping[Run, Path], data: Path | None) -> None:
    """Raise if a result that would be taken for done is of other rows, another model or another device.

    Raises:
        ConfigError: Naming its file, and what differs.
    """
    for one, place in places.items():
        held = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
        other = made_elsewhere(held, {"lm": one.model, **made_here(one.task, data)})
        if other:
            raise ConfigError(
                f"{place} was made with {other}: it can't stand for this run. "
                "Pass another folder with --out, and set PRECEPTOR_CACHE to another for its answers."
            )


def made_here(task: str, data: Path | None) -> dict[str, str]:
    """Return what tells results of a task made here, from a folder of data or the hub, from those made elsewhere."""
    return {"data": tasks.find(task).source(data), "device": _device()}


def made_elsewhere(held: Mapping[str, Any], meant: Mapping[str, str]) -> str:
    """Return in what a result differs from what is meant, "" if in nothing that it tells."""
    differing = (f"{name} {held[name]}, not {value}" for name, value in meant.items() if held.get(name, value) != value)
    return next(differing, "")


def _silent(what: str, done: int, total: int) -> None:
    del what, done, total


def _measured(
    one: Run,
    *,
    data_dir: Path | None,
    lm: str | dspy.LM,
    with_curve: bool,
    together: int,
    bare: Mapping[Run, Mapping[str, Any]],
    report: Report = _silent,
) -> dict[str, Any]:
    """Return a run's result: of one that is made but for its curve, with that."""
    asked = lm_of(lm) if isinstance(lm, str) else lm
    bench = _Bench(tasks.find(one.task), data_dir, asked, report, with_curve)
    if one in bare:
        return {**bare[one], "curve": bench.curve(one)}
    found = bench.measure(one, kind_of(one.method))
    return {**found, "together": together} if together > 1 else found


def kind_of(name: str) -> Callable[..., Teleprompter] | None:
    """Return what makes a method of that name; None for `human`.

    Settings may stand behind the name, as in `ape:mode=labels,few_shot=8`, and `+mixture` behind those.

    Raises:
        ConfigError: If there is none.
    """
    if name == HUMAN:
        return None
    known, (told, _, more) = entries("teleprompters"), name.partition("+")
    base, _, settings = told.partition(":")
    if base not in known or more not in ("", "mixture"):
        raise ConfigError(
            f"No method {name!r}; there are {', '.join([HUMAN, *sorted(known)])}, and each with +mixture behind it."
        )
    given = dict(map(_setting, settings.split(","))) if settings else {}
    found = cast("type[Teleprompter]", known[base].load())
    if more:
        mixture = partial(MixtureOfExperts, method=found)
        return partial(mixture, settings=given) if given else mixture
    return partial(found, **given) if given else found


def _setting(text: str) -> tuple[str, Any]:
    """Return the name and the value of a setting.

    Example:
        >>> _setting("few_shot=8"), _setting("mode=labels")
        (('few_shot', 8), ('mode', 'labels'))
    """
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


class _Bench:
    """One task of the benchmark."""

    def __init__(
        self, task: Published, data_dir: Path | None, lm: dspy.LM, report: Report, with_curve: bool = True
    ) -> None:
        self.task, self.data_dir, self.report, self.with_curve = task, data_dir, report, with_curve
        self.lm = lm.copy(max_tokens=task.max_tokens)
        self.metric = task.scorer()
        self._drawn: dict[Run, Parts] = {}

    def measure(self, run: Run, kind: Callable[..., Teleprompter] | None) -> dict[str, Any]:
        """Compile with one method and seed, and score on the test rows."""
        parts, student = self._parts(run), self.task.student()
        known = {
            "task": run.task,
            "method": run.method,
            "seed": run.seed,
            "lm": run.model,
            "budget": run.calls,
            "metric": self.metric.name,
            "data": self.task.source(self.data_dir),
            "train_rows": len(parts.train),
            "confirm_rows": len(parts.val),
            "test_rows": len(parts.test),
            "device": _device(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        }
        before = self._scored(student, parts.test)
        if kind is None:
            text = self.task.human(self.data_dir) if self.task.human and self.data_dir else ""
            after = self._scored(self.task.student(text), parts.test)
            return {**known, **self._compared(before, after), "replaced": True, "calls": 0, "instructions": text}
        method = kind(
            metric=self.task.metric,
            lm=self.lm,
            budget=Budget(calls=run.calls),
            run_dir=run.folder,
            seed=run.seed,
            report=self.report,
        )
        began = time.monotonic()
        try:
            program = method.compile(student, trainset=parts.train, valset=parts.val)
        except Unaffordable as error:
            kept = self._compared(before, before)
            return {**known, **kept, "replaced": False, "refused": str(error), "calls": 0, "seconds": 0}
        except BudgetExhausted as error:
            kept, spent = self._compared(before, before), _spent(cast("Path", method.run_dir))
            took = round(time.monotonic() - began)
            return {**known, **kept, "replaced": False, "unconfirmed": str(error), **spent, "seconds": took}
        return {**known, **self._compiled(run, program, before)}

    def _parts(self, run: Run) -> Parts:
        if run not in self._drawn:
            drawn = self.task.rows(self.data_dir, run.seed)
            val, test = unseen(drawn.val, drawn.train, name="valset"), drawn.test[: run.test_rows]
            self._drawn[run] = drawn._replace(val=val, test=test)
        return self._drawn[run]

    def curve(self, run: Run) -> list[dict[str, Any]]:
        """Return the curve of a compile that has been made, from its run folder, scored on test rows."""
        before = self._scored(self.task.student(), self._parts(run).test)

        def score(held: Candidate) -> float:
            return compare(before, held_against(before, self._tested(run, held)), self.metric).after

        return anytime.scored_on_test(run.folder, score)

    def _tested(self, run: Run, held: Candidate) -> Sequence[Outcome]:
        return self._scored(apply(self.task.student(), held), self._parts(run).test)

    def _compiled(self, run: Run, program: dspy.Module, before: Sequence[Outcome]) -> dict[str, Any]:
        """Return what a compile has come to, and what its search, if there was one, held for best, confirmed or not."""
        evidence = getattr(program, "evidence")  # noqa: B009  not a field of DSPy's
        after, candidate = self._scored(program, self._parts(run).test), dict[str, Any]()
        if (held := anytime.held_last(run.folder)) is not None:
            shown = {"best_demos": count} if (count := sum(map(len, held.demos.values()))) else {}
            candidate = {
                **self._of_candidate(before, self._tested(run, held)),
                "best_candidate": dict(held.instructions),
                **shown,
            }
        elif evidence.replaced:
            candidate = self._of_candidate(before, after)
        return {
            **self._compared(before, after),
            "replaced": evidence.replaced,
            **candidate,
            "confirmed_gain": evidence.comparison.gain,
            "search_score": evidence.search_score,
            "calls": evidence.spent.calls,
            "tokens": evidence.spent.tokens,
            "seconds": round(evidence.seconds),
            "instructions": evidence.instructions,
            "curve": self.curve(run) if self.with_curve else [],
        }

    def _of_candidate(self, before: Sequence[Outcome], after: Sequence[Outcome]) -> dict[str, float]:
        """Return what the search's winner scores on the test rows, confirmed or not."""
        found = compare(before, held_against(before, after), self.metric)
        return {
            "candidate": found.after,
            "candidate_gain": found.gain,
            "candidate_low": found.low,
            "candidate_high": found.high,
        }

    def _compared(self, before: Sequence[Outcome], after: Sequence[Outcome]) -> dict[str, float]:
        """Return both scores on the test rows and the paired gain; of labels, macro F1 too.

        Rows that only the compiled program fails with count against it, as in the confirmation.
        """
        after = held_against(before, after)
        found = compare(before, after, self.metric)
        scores = {
            "seed_score": found.before,
            "compiled": found.after,
            "gain": found.gain,
            "low": found.low,
            "high": found.high,
        }
        if not self.task.has_labels:
            return scores
        f1 = wrap("macro_f1", self.task.output).aggregate
        return {**scores, "seed_f1": f1(list(before)), "compiled_f1": f1(list(after))}

    def _scored(self, program: dspy.Module, rows: Sequence[dspy.Example]) -> Sequence[Outcome]:
        """Score on the test rows, through a ledger of its own: no compile ever sees these answers."""
        place = cache_folder() / "runs" / "papers"
        place.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(place / _ledger_name(self.task.name, _device()))
        lm = Meter(ledger, Account(Budget())).wrap(self.lm)
        what = f"{self.task.name}: test rows"
        told = Counter(lambda done: self.report(what, done, len(rows)))
        scorer = Evaluator(lm, self.metric, self.task.output, batching_engine(self.lm) is not None, on_row=told)
        outcomes = scorer.run([Job(program, row) for row in rows])
        ledger.close()
        return outcomes


def _spent(run: Path) -> dict[str, int]:
    """Return what a compile has spent whose budget ended before its winner was confirmed, from its ledger."""
    with closing(Ledger(run / "ledger.sqlite")) as ledger:
        calls, tokens, _ = ledger.paid
    return {"calls": calls, "tokens": tokens}


def _device() -> str:
    """Return what a model in this process runs on: its results differ a little between kinds."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, {platform.machine()}" + (", bfloat16" if has_bfloat16() else "")


def _ledger_name(task: str, device: str) -> str:
    """Return the name of the ledger of a task's test rows: each kind of device, whose answers differ, has its own.

    Example:
        >>> [_ledger_name("trec", device) for device in ("cpu, x86_64", "cpu, x86_64, bfloat16", "NVIDIA H200")]
        ['trec-test.sqlite', 'trec-test-bfloat16.sqlite', 'trec-test-nvidia-h200.sqlite']
    """
    kind = ", ".join(device.split(", ")[2:]) if device.startswith("cpu, ") else device
    return "-".join([f"{task}-test", *re.findall("[a-z0-9]+", kind.lower())]) + ".sqlite"
