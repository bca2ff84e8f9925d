"""`preceptor bench published`: APE on subj and TREC, compiled on 16-shot parts, reported on the test file.

Nothing is tuned on the test file. The seed instruction, the returned program and the best candidate
(confirmed or not) are scored on the same test rows; the interval is of the paired difference.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import dspy
import typer

from preceptor.cli.inputs import DEFAULT_LM, lm_of
from preceptor.cli.view import print_json, print_table, progress
from preceptor.data import load_rows
from preceptor.lm.budget import Account, Budget
from preceptor.lm.catalogue import cache_folder
from preceptor.lm.ledger import Ledger
from preceptor.lm.meter import Meter, batching_engine
from preceptor.lm.seam import predictors
from preceptor.modules import Classify
from preceptor.program import apply
from preceptor.scoring.evaluate import Counter, Evaluator, Job
from preceptor.scoring.metrics import wrap
from preceptor.scoring.statistics import compare
from preceptor.scoring.trial import Candidate, Outcome
from preceptor.task import Report
from preceptor.teleprompters import APE

TASKS: Final = {
    "subj": (("subjective", "objective"), "Decide whether the sentence is subjective or objective."),
    "trec": (
        ("description", "entity", "abbreviation", "human", "location", "number"),
        "Classify the question by the type of its answer.",
    ),
}
PARTS: Final = (13, 21, 42, 87, 100)
"""The published 16-shot draws; seed n uses the n-th."""


def main(arguments: list[str]) -> None:
    """Run the benchmark with command-line arguments."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    app(arguments, standalone_mode=False, prog_name="preceptor bench published")


def run(
    data_dir: Annotated[Path, typer.Option(help="Folder that holds lmbff_16shot.")],
    task: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(TASKS)}.")] = None,
    lm: Annotated[str, typer.Option("--lm")] = DEFAULT_LM,
    seeds: Annotated[int, typer.Option(help="Compiles per task, 5 at most.")] = 3,
    calls: Annotated[int, typer.Option(help="Budget of one compile.")] = 1500,
    mode: Annotated[str, typer.Option(help="Of APE: forward, reverse or labels.")] = "forward",
    candidates: Annotated[int, typer.Option(help="Of APE.")] = 50,
    test_rows: Annotated[int, typer.Option(help="First rows of the test file.")] = 500,
    out: Annotated[Path | None, typer.Option(help="Write the JSON object here too.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Compile and report; runs are kept in the cache, so that a stopped benchmark goes on."""
    rows: list[dict[str, Any]] = []
    with progress() as report:
        model = lm_of(lm)
        for name in task or list(TASKS):
            bench = _Bench(name, data_dir / "lmbff_16shot" / name, model, calls, mode, candidates, test_rows, report)
            rows += [bench.measure(seed) for seed in range(seeds)]
    result = {"lm": model.model, "calls": calls, "mode": mode, "candidates": candidates, "measured": rows}
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(result)
        return
    columns = ["task", "seed", "test_rows", "seed_score", "compiled", "gain", "low", "high", "replaced"]
    columns += ["candidate", "candidate_gain", "candidate_low", "candidate_high", "calls", "seconds"]
    print_table("Accuracy on the test file", columns, [[row[column] for column in columns] for row in rows])


class _Bench:
    """One task of the benchmark."""

    def __init__(
        self,
        name: str,
        folder: Path,
        lm: dspy.LM,
        calls: int,
        mode: str,
        candidates: int,
        test_rows: int,
        report: Report,
    ) -> None:
        labels, instructions = TASKS[name]
        self.name, self.folder, self.lm = name, folder, lm
        self.calls, self.mode, self.candidates, self.report = calls, mode, candidates, report
        self.labels = labels
        self.student = Classify(f"sentence -> kind: Literal[{', '.join(map(repr, labels))}]", instructions)
        self.test = self._rows(folder / "test.tsv")[:test_rows]
        self.metric = wrap("accuracy", "kind")

    def measure(self, seed: int) -> dict[str, Any]:
        """Compile with one seed and score on the test rows."""
        part = self.folder / f"16-{PARTS[seed]}"
        method = APE(
            metric="accuracy",
            lm=self.lm,
            budget=Budget(calls=self.calls),
            mode=self.mode,
            candidates=self.candidates,
            run_dir=cache_folder()
            / "runs"
            / f"published-{self.name}-{self.mode}-{self.candidates}-{self.calls}-{seed}",
            seed=seed,
            report=self.report,
        )
        train, dev = self._rows(part / "train.tsv"), self._rows(part / "dev.tsv")
        compiled = method.compile(self.student, trainset=train, valset=dev)
        evidence = getattr(compiled, "evidence")  # noqa: B009  not a field of DSPy's
        best = _best_candidate(Path(evidence.run))
        base = self._scored({"predict": dict(predictors(self.student))["predict"].signature.instructions})
        ours, candidate = self._scored(evidence.instructions), self._scored(best)
        gain = compare(base, ours, self.metric)
        unconfirmed = compare(base, candidate, self.metric)
        return {
            "task": self.name,
            "seed": seed,
            "test_rows": len(self.test),
            "seed_score": gain.before,
            "compiled": gain.after,
            "gain": gain.gain,
            "low": gain.low,
            "high": gain.high,
            "replaced": evidence.replaced,
            "candidate": unconfirmed.after,
            "candidate_gain": unconfirmed.gain,
            "candidate_low": unconfirmed.low,
            "candidate_high": unconfirmed.high,
            "dev_gain": evidence.comparison.gain,
            "calls": evidence.spent.calls,
            "seconds": round(evidence.seconds),
            "instructions": best,
        }

    def _rows(self, path: Path) -> list[dspy.Example]:
        return [
            dspy.Example(sentence=row["sentence"], kind=self.labels[int(row["label"])]).with_inputs("sentence")
            for row in load_rows(path)
        ]

    def _scored(self, instructions: dict[str, str]) -> Sequence[Outcome]:
        """Score on the test rows, through a ledger of its own: no compile ever sees these answers."""
        ledger = Ledger(cache_folder() / "runs" / f"published-{self.name}-test.sqlite")
        lm = Meter(ledger, Account(Budget())).wrap(self.lm)
        what = f"{self.name}: test rows"
        told = Counter(lambda done: self.report(what, done, len(self.test)))
        scorer = Evaluator(lm, self.metric, "kind", batching_engine(self.lm) is not None, on_row=told)
        program = apply(self.student, Candidate(instructions))
        outcomes = scorer.run([Job(program, row) for row in self.test])
        ledger.close()
        return outcomes


def _best_candidate(run: Path) -> dict[str, str]:
    """Return the instructions that won the search: of those that saw the most rows, the best."""
    totals: dict[str, list[float]] = {}
    with (run / "trials.jsonl").open(encoding="utf-8") as file:
        for line in file:
            trial = json.loads(line)
            totals.setdefault(json.dumps(trial["instructions"]), []).extend(score or 0.0 for score in trial["scores"])
    most = max(map(len, totals.values()))
    best = max((text for text in totals if len(totals[text]) == most), key=lambda text: sum(totals[text]))
    found: dict[str, str] = json.loads(best)
    return found
