"""`eval`, `show`, `diff` and `verify`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import dspy
import typer

from preceptor import program as artifact
from preceptor.cli.compiling import Json
from preceptor.cli.inputs import DEFAULT_LM, lm_of, metric_of, program_of, rows_of
from preceptor.cli.view import out, print_diff, print_json, print_table, print_verdict, progress, say
from preceptor.errors import ArtifactError
from preceptor.lm.meter import batching_engine
from preceptor.lm.seam import predictors
from preceptor.scoring.evaluate import Counter as RowCounter
from preceptor.scoring.evaluate import Evaluator, Job, refuse_failures
from preceptor.scoring.metrics import Metric, wrap
from preceptor.scoring.statistics import interval
from preceptor.scoring.trial import Outcome

Program = Annotated[Path, typer.Argument(help="A saved program.")]
Student = Annotated[str | None, typer.Option(help="FILE.py:NAME of the class, for a program of your own class.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("eval")(eval_)
    app.command()(show)
    app.command("diff")(diff)
    app.command()(verify)


def eval_(
    target: Annotated[str, typer.Argument(help="A saved program, FILE.py:NAME, or a signature.")],
    data: Annotated[str, typer.Option(help="Labelled rows.")],
    lm: Annotated[str | None, typer.Option("--lm", help="By default the model the program was compiled for.")] = None,
    api_base: Annotated[str | None, typer.Option(help="Address of an OpenAI-compatible server.")] = None,
    instructions: Annotated[str | None, typer.Option(help="The prompt, for a signature.")] = None,
    metric: Annotated[str | None, typer.Option(help="A built-in metric, or FILE.py:NAME.")] = None,
    student: Student = None,
    threads: Annotated[int, typer.Option(help="Calls in flight.")] = 8,
    part: Annotated[str, typer.Option(help="Of a folder or a hub id: train, validation, test.")] = "test",
    json: Json = False,
) -> None:
    """Score a program on labelled rows: the score, its interval, and what was mistaken for what."""
    saved = artifact.read(Path(target)) if Path(target).is_dir() else None
    program = _load(Path(target), student) if saved else program_of(target, instructions)
    rows = rows_of(program, data, part=part)
    model = lm_of(lm or (str(saved.program["lm"]) if saved else DEFAULT_LM), api_base)
    label = str(next(iter(reversed(rows[0].labels().keys()))))
    measure = wrap(metric_of(metric, program), label)
    outcomes = _scored(program, rows, model, measure, label, threads)
    result = _evaluated(outcomes, measure)
    print_json(result) if json else _print_evaluation(result)


def _scored(
    program: dspy.Module, rows: Sequence[dspy.Example], lm: dspy.LM, metric: Metric, label: str, threads: int
) -> list[Outcome]:
    import tempfile

    from preceptor.lm.budget import Account, Budget
    from preceptor.lm.ledger import Ledger
    from preceptor.lm.meter import Meter

    together = batching_engine(lm) is not None
    with progress() as report, tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        metered = Meter(ledger, Account(Budget()), threads=threads).wrap(lm)
        told = RowCounter(lambda done: report("scoring", done, len(rows)))
        outcomes = Evaluator(metered, metric, label, together, threads, on_row=told).run(
            [Job(program, row) for row in rows]
        )
        ledger.close()
    refuse_failures(outcomes, resume="the same command")
    return outcomes


def _evaluated(outcomes: Sequence[Outcome], metric: Metric) -> dict[str, Any]:
    kinds = Counter(outcome.kind for outcome in outcomes)
    pairs = Counter((outcome.gold, outcome.answer or f"({outcome.kind})") for outcome in outcomes)
    return {
        "metric": metric.name,
        "score": metric.aggregate(outcomes),
        "ci": list(interval(outcomes, metric)),
        "rows": len(outcomes),
        "unparsable": kinds["unparsable"],
        "failed": kinds["failed"],
        "confusion": [
            {"label": gold, "answer": answer, "rows": count} for (gold, answer), count in sorted(pairs.items())
        ],
    }


def _print_evaluation(result: dict[str, Any]) -> None:
    low, high = result["ci"]
    console = out()
    console.print(
        f"{result['metric']} {result['score']:.3f}, 95 % interval {low:.3f} to {high:.3f}, {result['rows']} rows"
    )
    console.print(f"unparsable answers: {result['unparsable']}, failed calls: {result['failed']}\n")
    labels = sorted({cell["label"] for cell in result["confusion"]})
    answers = sorted({cell["answer"] for cell in result["confusion"]})
    if len(answers) > 20:
        return
    counts = {(cell["label"], cell["answer"]): cell["rows"] for cell in result["confusion"]}
    rows = [[label, *(counts.get((label, answer), 0) for answer in answers)] for label in labels]
    print_table("Rows by label (down) and answer (across)", ["", *answers], rows)


def show(program: Program, json: Json = False) -> None:
    """Print a saved program: what it does, its instructions and its evidence."""
    saved = artifact.read(program)
    if json:
        print_json({"program": saved.program, "evidence": saved.evidence})
        return
    console = out()
    console.print(f"{saved.program['module']} on {saved.program['lm']}")
    for name, predictor in saved.program["predictors"].items():
        sides = [
            ", ".join(f"{field}: {info['type']}" for field, info in predictor[side].items())
            for side in ("inputs", "outputs")
        ]
        console.print(f"\n{name}: {' -> '.join(sides)}", markup=False)
        console.print(f"{predictor['instructions']}\n", markup=False)
        if predictor["demos"]:
            console.print(f"with {len(predictor['demos'])} demonstrations\n")
    if "verdict" in saved.evidence:
        print_verdict(saved.evidence)


def diff(before: Program, after: Program, json: Json = False) -> None:
    """Show how the instructions of two saved programs differ."""
    text = artifact.diff(artifact.read(before).instructions, artifact.read(after).instructions)
    if json:
        print_json({"equal": not text, "diff": text})
    else:
        print_diff(text or "The instructions are equal.")


def verify(
    program: Program,
    lm: Annotated[str | None, typer.Option("--lm", help="By default the model the program was compiled for.")] = None,
    api_base: Annotated[str | None, typer.Option(help="Address of an OpenAI-compatible server.")] = None,
    student: Student = None,
    json: Json = False,
) -> None:
    """Check a saved program: its hashes, then its recorded answers."""
    saved = artifact.read(program)
    loaded = _load(program, student)
    say("  hashes hold")
    probes: list[dict[str, Any]] = saved.evidence.get("probes", [])
    model = lm_of(lm or str(saved.program["lm"]), api_base)
    label = list(predictors(loaded)[-1][1].signature.output_fields)[-1]
    with dspy.context(lm=model):
        answers = [str(getattr(loaded(**probe["inputs"]), label)) for probe in probes]
    changed = [
        {"inputs": probe["inputs"], "recorded": probe["answer"], "now": answer}
        for probe, answer in zip(probes, answers, strict=True)
        if probe["answer"] != answer
    ]
    if json:
        print_json({"hashes": True, "probes": len(probes), "changed": changed})
    else:
        out().print(f"{program} is whole; {len(probes) - len(changed)} of {len(probes)} recorded answers came again.")
    if changed:
        raise ArtifactError(f"{len(changed)} recorded answers changed; the first was {changed[0]}.")


def _load(path: Path, student: str | None) -> dspy.Module:
    return artifact.load(path, student=program_of(student, None) if student else None)
