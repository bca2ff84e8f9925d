"""`eval`: one program's score, or two programs compared on the same rows."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import dspy
import typer

from preceptor import program as artifact
from preceptor.checks import check_metric, check_models, check_positive, label_field
from preceptor.cli.command import DEFAULT
from preceptor.cli.compiling import Bound, Json, MaxTokens, Price, Retries, Timeout
from preceptor.cli.inputs import (
    DEFAULT_LM,
    Columns,
    budget_of,
    check_columns,
    columns_of,
    fields_of,
    is_saved,
    lm_named,
    lm_of,
    metric_of,
    program_of,
)
from preceptor.cli.planning import check_keys
from preceptor.cli.scored import changed, comparison, evaluated, even, kinds_of, print_comparison, print_evaluation
from preceptor.cli.view import aside, print_json, progress, say
from preceptor.data import examples, load_rows
from preceptor.errors import BudgetExhausted, ConfigError, LMFailed, ModelError, RunError
from preceptor.lm.budget import Account, Budget, Cost
from preceptor.lm.catalogue import cache_folder
from preceptor.lm.dispatch import Patience
from preceptor.lm.embedding import Embedder, embedder_of, named_in_artifact
from preceptor.lm.ledger import Ledger
from preceptor.lm.meter import Meter, batching_engine
from preceptor.lm.seam import every_predictor, own_models, predictors
from preceptor.run import fingerprint, open_ledger
from preceptor.scoring.evaluate import Counter as RowCounter
from preceptor.scoring.evaluate import Evaluator, Job, refuse_failures
from preceptor.scoring.metrics import BUILT_IN, Metric, wrap
from preceptor.scoring.trial import Outcome
from preceptor.task import Report, with_models

Student = Annotated[str | None, typer.Option(help="FILE.py:NAME of the class, for a program of your own class.")]
Embedding = Annotated[
    str | None,
    typer.Option("--embedder", help="Hub id or folder of the embedder that experts were compiled with, if not ours."),
]

_KEPT: Final = "Every answer is kept; the same command"


@dataclass(frozen=True, slots=True)
class Entrant:
    """A program to be scored.

    Attributes:
        name: As the user wrote it.
        program: Ready to call.
        lm: The name of its model.
        rows: With its own inputs.
        label: The field its answers are compared by.
        evidence: Of its compile, {} if there is none.
    """

    name: str
    program: dspy.Module
    lm: str
    rows: Sequence[dspy.Example]
    label: str
    evidence: Mapping[str, Any] = field(default_factory=dict[str, Any])


def eval_(
    target: Annotated[str, typer.Argument(help="A saved program, FILE.py:NAME, or a signature.")],
    other: Annotated[str | None, typer.Argument(help="A second one, compared with the first row by row.")] = None,
    *,
    data: Annotated[str, typer.Option(help="Labelled rows.")],
    column: Columns = None,
    lm: Annotated[str | None, typer.Option("--lm", help="By default the model a program was compiled for.")] = None,
    api_base: Annotated[str | None, typer.Option(help="Address of an OpenAI-compatible server.")] = None,
    max_tokens: MaxTokens = None,
    instructions: Annotated[
        list[str] | None, typer.Option(help="The prompt of a signature; of two signatures, once for each.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="As of compile; by default that of the program's compile.")] = None,
    student: Student = None,
    embedder: Embedding = None,
    budget: Bound = None,
    threads: Annotated[int, typer.Option(min=1, help="Calls in flight.")] = 8,
    timeout: Timeout = DEFAULT.timeout,
    retries: Retries = DEFAULT.retries,
    price: Price = None,
    part: Annotated[str, typer.Option(help="Of a folder or a hub id: train, validation, test.")] = "test",
    fail_under: Annotated[
        float | None, typer.Option(min=0, max=1, help="End with exit code 1 if the (second) program scores less.")
    ] = None,
    changes: Annotated[int, typer.Option(min=0, help="Of two programs: rows to print that changed, each way.")] = 0,
    json: Json = False,
) -> None:
    """Score a program on labelled rows, with its interval; or tell which of two programs is better.

    Answers are kept in the cache: the same command again goes on where it was stopped, and asks nothing twice.
    """
    targets = [target] if other is None else [target, other]
    with aside():
        rows = load_rows(data, part=part, columns=columns_of(column))
        entrants = _entrants(targets, instructions or [], rows, data, lm, api_base, student, embedder)
        check_columns(columns_of(column), *(entrant.program for entrant in entrants))
        measure = wrap(metric_of(metric or _of_compile(entrants), entrants[0].program), entrants[0].label)
        asked = [name for each in entrants for name in (each.lm, *(own.model for _, own in own_models(each.program)))]
        bounds, patience = budget_of(budget, price or (), asked), Patience(timeout=timeout, retries=retries)
        for entrant in entrants:
            check_models(entrant.program)
            check_metric(measure, entrant.program, entrant.rows[0], data)
            check_positive(measure, entrant.rows, entrant.label)
        models = {entrant.lm: lm_of(entrant.lm, api_base, max_tokens) for entrant in entrants}
        with progress() as report, _metered(entrants, models, bounds) as (ledger, account):
            meter = Meter(ledger, account, threads=threads, patience=patience)
            scored = [_outcomes(entrant, meter, models[entrant.lm], measure, report) for entrant in entrants]
    calls = account.billed.calls
    results = [
        {"program": entrant.name, "lm": entrant.lm, **evaluated(outcomes, measure)}
        for entrant, outcomes in zip(entrants, scored, strict=True)
    ]
    if other is None:
        print_json(results[0]) if json else print_evaluation(results[0])
    else:
        verdict, kinds = even(scored[0], scored[1], measure), kinds_of(scored[0], scored[1])
        found = list(changed(entrants[0].rows, scored, kinds, changes))
        result = comparison(results, verdict, kinds) | {"examples": found, "billed_calls": calls}
        print_json(result) if json else print_comparison(result)
    score = measure.aggregate(scored[-1])
    if fail_under is not None and score < fail_under:
        say(f"{entrants[-1].name} scores {score:.3f}, which is below {fail_under:g}.")
        raise typer.Exit(1)


def _of_compile(entrants: Sequence[Entrant]) -> str | None:
    """Return the metric by which a program was compiled, None if none was, or by one of the user's own."""
    evidence = next((entrant.evidence for entrant in entrants if entrant.evidence.get("metric")), None)
    if evidence is None:
        return None
    known = str(evidence["metric"])
    if evidence.get("own_metric", known.partition(":")[0] not in BUILT_IN):
        say(f"  compiled by a metric of your own, {known}; to score by it, give --metric FILE.py:{known}")
        return None
    return known


def _entrants(
    targets: Sequence[str],
    instructions: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    data: str,
    lm: str | None,
    api_base: str | None,
    student: str | None,
    embedder: str | None,
) -> list[Entrant]:
    """Return the programs, each with its model and rows.

    Raises:
        ConfigError: If there are more instructions than signatures, the programs answer different fields, or the
            model of one was asked at an address that isn't given.
    """
    saved = {name: artifact.read(Path(name)) for name in targets if is_saved(name)}
    takers = [at for at, name in enumerate(targets) if "->" in name]
    takers = takers or [at for at, name in enumerate(targets) if name not in saved]
    if len(instructions) > len(takers):
        raise ConfigError(f"{len(instructions)} times --instructions for {len(takers)} signatures; give one for each.")
    prompts = dict(zip(takers, instructions, strict=False))
    known = next((str(each.program["lm"]) for each in saved.values()), DEFAULT_LM)
    found: list[Entrant] = []
    for at, name in enumerate(targets):
        program = load(Path(name), student, embedder) if name in saved else program_of(name, prompts.get(at))
        given = examples(rows, *fields_of(program, rows[0]), source=data)
        own = lm_named(saved[name], lm, api_base) if name in saved else known if lm is None else lm
        evidence = saved[name].evidence if name in saved else {}
        found.append(Entrant(name, program, own, given, label_field(program, given[0]), evidence))
    labels = list(dict.fromkeys(entrant.label for entrant in found))
    if len(labels) > 1:
        raise ConfigError(
            f"The first program answers {labels[0]!r} and the second {labels[1]!r}; both must be the same."
        )
    return found


def load(path: Path, student: str | None, embedder: str | None = None) -> dspy.Module:
    """Return a saved program.

    Args:
        path: Its folder.
        student: Names the user's own class, where it is one.
        embedder: Names the embedder, where the program needs one that the catalogue doesn't have.
    """
    return artifact.load(
        path,
        student=program_of(student, None) if student else None,
        embedder=_embedder_of(path, embedder) if embedder else None,
    )


def _embedder_of(path: Path, given: str) -> Embedder | None:
    """Return the embedder that was given, None if the program needs none, or one of the catalogue."""
    saved = artifact.read(path)
    known = "none"
    try:
        if saved.is_routed:
            known = named_in_artifact(str(saved.program["experts"]["embedder"])).name
    except ModelError:
        return embedder_of(given)
    say(f"  --embedder {given} isn't used for {path}: its embedder is {known}")
    return None


@contextmanager
def _metered(
    entrants: Sequence[Entrant], models: Mapping[str, dspy.LM], budget: Budget
) -> Generator[tuple[Ledger, Account]]:
    """Open the ledger of these programs, rows and models; equal calls of two programs are made once.

    What the model or the budget fails at is said to be gone on with.

    Raises:
        ConfigError: If a key is missing and there is no answer yet; an eval made again may need no call.
    """
    parts = {
        "programs": [_state(entrant) for entrant in entrants],
        "rows": [[row.toDict() for row in entrant.rows] for entrant in entrants],
        "models": [[models[entrant.lm].model, models[entrant.lm].kwargs.get("api_base")] for entrant in entrants],
    }
    folder = cache_folder() / "evals" / fingerprint(parts)
    if not folder.is_dir():  # which isn't made for nothing
        _check_keys(entrants, models)
    with _in_cache(), open_ledger(folder, parts) as ledger:
        if len(ledger):
            say(f"  {len(ledger)} answers are of an earlier eval, kept in {folder}; delete it to ask anew")
        else:
            _check_keys(entrants, models)
        try:
            yield ledger, Account(budget, Cost(*ledger.failures), paid=Cost(*ledger.paid))
        except BudgetExhausted as error:
            raise BudgetExhausted(f"{error} {_KEPT} with a larger budget goes on.") from error
        except LMFailed as error:
            raise LMFailed(f"{error} {_KEPT} goes on.") from error


def _check_keys(entrants: Sequence[Entrant], models: Mapping[str, dspy.LM]) -> None:
    for entrant in entrants:
        check_keys(entrant.program, models[entrant.lm])


@contextmanager
def _in_cache() -> Generator[None]:
    """Say of a folder that can't be had how to get another one: no option names it."""
    try:
        yield
    except RunError as error:
        raise RunError(f"{error} An eval's folder is one of the cache; PRECEPTOR_CACHE names another cache.") from error


def _state(entrant: Entrant) -> list[Any]:
    return [entrant.name, *([name, str(part.signature)] for name, part in predictors(entrant.program))]


def _outcomes(entrant: Entrant, meter: Meter, model: dspy.LM, metric: Metric, report: Report) -> list[Outcome]:
    for one in (model, *(predictor.lm for _, predictor in every_predictor(entrant.program) if predictor.lm)):
        meter.check(one)
    lm, program = meter.wrap(model), with_models(entrant.program, meter)
    told = RowCounter(lambda done: report(f"scoring {entrant.name}", done, len(entrant.rows)))
    together = batching_engine(lm) is not None
    evaluator = Evaluator(lm, metric, entrant.label, together, meter.threads, on_row=told)
    outcomes = evaluator.run([Job(program, row) for row in entrant.rows])
    refuse_failures(outcomes)
    return outcomes
