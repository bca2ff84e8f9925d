"""`demo`, `compile` and `resume`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import dspy
import typer

from preceptor import demo as demo_task
from preceptor import run as runs
from preceptor.canonical import lasting, without_addresses
from preceptor.checks import label_field, warn
from preceptor.cli import inputs
from preceptor.cli.command import DEFAULT, EMBEDDER, Command, from_anywhere, model_from_anywhere, remembered_in
from preceptor.cli.inputs import DEFAULT_LM, budget_of, entries, lm_of, lm_on, metric_of, program_of, workers_of
from preceptor.cli.pairs import pair
from preceptor.cli.planning import check_model, check_own, check_proposer, embedders, plan, tell_plan
from preceptor.cli.view import aside, print_json, print_verdict, progress, say
from preceptor.data import HUB_ID
from preceptor.errors import ConfigError
from preceptor.evidence import Evidence
from preceptor.given import checked, parts_of
from preceptor.lm.catalogue import cache_folder
from preceptor.lm.dispatch import Patience
from preceptor.lm.seam import adapter_state, own_models, predictors, state_of
from preceptor.report import REPORT
from preceptor.resuming import remembered
from preceptor.scoring.metrics import BUILT_IN, Metric
from preceptor.splits import drawn
from preceptor.teleprompter import Teleprompter

DEMO_BUDGET: Final = "calls=1000"
DEMO_KNOBS: Final = {"candidates": "12", "subsamples": "3", "demos": "6", "mode": "labels", "few_shot": "12"}

METRICS: Final = (
    ", ".join("f1:LABEL" if name == "f1" else name for name in BUILT_IN)
    + ", or FILE.py:NAME; by default accuracy of labels, else exact_match."
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Seed = Annotated[int, typer.Option(help="Equal seeds give equal programs.")]
Bound = Annotated[str | None, typer.Option("--budget", help="E.g. calls=2000,tokens=1M,dollars=5,minutes=30.")]
Workers = Annotated[str | None, typer.Option(help="ray, or ray:<number>: a local model in so many processes.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Of an answer; by default 512, of models that reason 16000.", show_default=False),
]
Timeout = Annotated[float, typer.Option(help="Seconds one answer may take.")]
Retries = Annotated[int, typer.Option(help="Further attempts where a call fails in a way that may pass.")]
Price = Annotated[
    list[str] | None, typer.Option(help="MODEL=INPUT/OUTPUT, dollars per million tokens; for --budget dollars=.")
]
Lm = Annotated[str, typer.Option("--lm", help="local/<id>, or any name DSPy knows. Keys come from the environment.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(demo)
    app.command("compile")(compile_)
    app.command()(resume)


def demo(
    lm: Lm = DEFAULT_LM,
    run: Annotated[Path | None, typer.Option(help="Run folder; the same one again resumes.")] = None,
    seed: Seed = 0,
    budget: Bound = DEMO_BUDGET,
    json: Json = False,
) -> None:
    """Compile the demo task (support tickets, six queues) with APE on a model in this process."""
    folder = run or cache_folder() / "runs" / f"demo-{lm.replace('/', '-')}-{seed}"
    if run is None and (folder / "result.json").is_file():
        say(f"  a finished run of this demo is replayed from {folder}; delete it to start anew")
    command = Command(
        target=demo_task.SIGNATURE,
        instructions=demo_task.INSTRUCTIONS,
        data=str(demo_task.FOLDER),
        validation=str(demo_task.FOLDER),
        lm=lm,
        budget=budget,
        seed=seed,
        knobs=DEMO_KNOBS,
    )
    _show(_run(command, folder), json)


def compile_(
    target: Annotated[str, typer.Argument(help="FILE.py:NAME, or a signature: \"text -> label: Literal['a','b']\".")],
    data: Annotated[str, typer.Option(help=f"CSV, TSV, JSONL, Parquet, a folder with train.*, or {HUB_ID}.")],
    val: Annotated[str | None, typer.Option(help="Rows to confirm on; by default half of --data.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Most rows of a file, drawn at random; else all.")] = None,
    column: inputs.Columns = None,
    instructions: Annotated[str | None, typer.Option(help="The prompt as it is now, for a signature.")] = None,
    method: Annotated[str, typer.Option(help="See: preceptor methods.")] = "ape",
    mixture: Annotated[
        int | None, typer.Option(min=0, help="Regions that may get a prompt of their own; 0 chooses their number.")
    ] = None,
    regions: Annotated[
        int | None, typer.Option(min=0, help="Of constitutional_experts; 0 chooses their number. By default 1.")
    ] = None,
    lm: Lm = DEFAULT_LM,
    api_base: Annotated[str | None, typer.Option(help="Address of an OpenAI-compatible server.")] = None,
    max_tokens: MaxTokens = None,
    proposer: Annotated[str | None, typer.Option(help="Model that writes instructions; by default --lm.")] = None,
    proposer_api_base: Annotated[
        str | None, typer.Option(help="Address of the proposer's server; that of --api-base isn't taken.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help=METRICS)] = None,
    budget: Bound = None,
    run: Annotated[Path | None, typer.Option(help="Run folder; by default one of the cache.")] = None,
    seed: Seed = 0,
    threads: Annotated[int, typer.Option(help="Calls in flight.")] = 8,
    workers: Workers = None,
    timeout: Timeout = DEFAULT.timeout,
    retries: Retries = DEFAULT.retries,
    price: Price = None,
    knob: Annotated[list[str] | None, typer.Option("--set", help="A setting of the method: candidates=20.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and tell the calls; no model is asked.")] = False,
    json: Json = False,
) -> None:
    """Improve a program's instructions on labelled rows, and confirm the gain on rows kept back."""
    command = Command(
        target=target,
        data=data,
        validation=val,
        rows=rows,
        columns=inputs.columns_of(column),
        instructions=instructions,
        method=method,
        mixture=mixture,
        lm=model_from_anywhere(lm),
        api_base=api_base,
        max_tokens=max_tokens,
        proposer=model_from_anywhere(proposer) if proposer else None,
        proposer_api_base=proposer_api_base,
        metric=metric,
        budget=budget,
        seed=seed,
        threads=threads,
        workers=workers,
        timeout=timeout,
        retries=retries,
        prices=price or [],
        knobs=_asked(dict(pair("--set", text) for text in knob or ()), regions, mixture),
    )
    _tell(command, run, json) if dry_run else _show(_run(command, run), json)


def resume(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    budget: Bound = None,
    api_base: Annotated[
        str | None, typer.Option(help="Address of the server, if it moved or holds a password: none is kept.")
    ] = None,
    proposer_api_base: Annotated[str | None, typer.Option(help="The same of the proposer's server.")] = None,
    threads: Annotated[int | None, typer.Option(help="Calls in flight.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds one answer may take.")] = None,
    retries: Annotated[
        int | None, typer.Option(help="Further attempts where a call fails in a way that may pass.")
    ] = None,
    price: Price = None,
    json: Json = False,
) -> None:
    """Go on with a run that was stopped; answers it has are not asked for again."""
    asked: dict[str, Any] = {"budget": budget, "threads": threads, "timeout": timeout, "retries": retries}
    asked |= {"api_base": api_base, "proposer_api_base": proposer_api_base, "prices": price or None}
    given = {name: value for name, value in asked.items() if value is not None}
    _show(_run(dataclasses.replace(remembered_in(run), **given), run), json)


@dataclasses.dataclass(frozen=True, slots=True)
class _Given:
    """What a command names, checked; no model yet."""

    program: dspy.Module
    method: Any
    train: list[dspy.Example]
    confirm: list[dspy.Example]
    folder: Path
    output: str
    metric: Metric


def _given(command: Command, folder: Path | None) -> _Given:
    program = program_of(command.target, command.instructions)
    train = _some(command, program, command.data)
    confirm = _some(command, program, command.validation, part="validation") if command.validation else None
    method = _method_of(command, program)
    method, train, confirm, output, metric = checked(method, program, train, confirm)
    place = folder or _place(command, method, train, confirm, program)
    runs.check_folder(place, parts_of(method, program, train, confirm, metric))
    return _Given(program, method, train, confirm, place, output, metric)


def _tell(command: Command, folder: Path | None, as_json: bool) -> None:
    """Print what the command would take."""
    with aside():
        given = _given(command, folder)
    warn(given.metric, given.program, given.train, given.confirm, given.output)
    planned = plan(given.method, given.program, given.train, given.confirm)
    check_model(command.lm, command.api_base, command.max_tokens, given.method.budget)
    if command.proposer:
        check_model(command.proposer, command.proposer_api_base, None, given.method.budget)
    check_own(given.program, given.method.budget)
    check_proposer(given.method, command.proposer or command.lm)
    if command.workers is not None:
        workers_of(command.workers, command.lm)
    models = [command.lm, command.proposer or command.lm, *embedders(given.method)]
    tell_plan(planned, given.folder, models, as_json=as_json)


@aside()
def _run(command: Command, folder: Path | None) -> Evidence:
    """Compile as the command says; every input is checked before the model is loaded."""
    given = _given(command, folder)
    with remembered(given.folder, dataclasses.asdict(from_anywhere(command))):
        lm = lm_on(command.workers, command.lm, command.api_base, command.max_tokens)
        proposer = lm_of(command.proposer, command.proposer_api_base) if command.proposer else None
        with progress() as report:
            ready = dataclasses.replace(given.method, lm=lm, proposer=proposer, run_dir=given.folder, report=report)
            evidence: Evidence = ready.compile(given.program, trainset=given.train, valset=given.confirm).evidence
            return evidence


def _some(command: Command, program: dspy.Module, source: str, part: str = "train") -> list[dspy.Example]:
    """Return a file's rows, or as many of them as the command takes."""
    found = inputs.rows_of(program, source, part=part, columns=command.columns)
    return drawn(found, label_field(program, found[0]), command.rows, seed=command.seed)


def _method_of(command: Command, program: dspy.Module) -> Any:
    """Return the method that a command names, with its settings and without its models."""
    kind, knobs = _configured(command)
    models = [command.lm, command.proposer, *(own.model for _, own in own_models(program))]
    return kind(
        metric=metric_of(command.metric, program),
        budget=budget_of(command.budget, command.prices, models),
        seed=command.seed,
        threads=command.threads,
        patience=Patience(timeout=command.timeout, retries=command.retries),
        **knobs,
    )


def _place(
    command: Command,
    method: Any,
    train: Sequence[dspy.Example],
    confirm: Sequence[dspy.Example],
    program: dspy.Module,
) -> Path:
    """Return a run folder of the cache that is named after all that the answers depend on."""
    settings = ("target", "method", "mixture", "metric", "seed", "lm", "max_tokens", "proposer")
    known = {
        name: method.knobs.get(name, value) if name == EMBEDDER else value
        for name, value in command.knobs.items()
        if name != "few_shot"
    }
    shown = {"few_shot": method.demonstration_rows} if method.demonstration_rows else {}
    signatures = [[name, without_addresses(str(part.signature))] for name, part in predictors(program)]
    parts = {
        **{name: value for name, value in dataclasses.asdict(command).items() if name in settings},
        "knobs": known | shown,
        "student": [*signatures, *adapter_state()],
        **({"models": models} if (models := [[name, *state_of(own)] for name, own in own_models(program)]) else {}),
        "rows": [[row.toDict() for row in rows] for rows in (train, confirm)],
    }
    return cache_folder() / "runs" / runs.fingerprint(lasting(parts))


def _asked(knobs: dict[str, str], regions: int | None, mixture: int | None) -> dict[str, str]:
    told = {"--mixture": mixture, "--regions": regions, "--set regions": knobs.get("regions")}
    given = [name for name, number in told.items() if number is not None]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} both give a number of regions; give one of them.")
    return knobs if regions is None else {**knobs, "regions": str(regions)}


def _method(name: str) -> Any:
    methods = entries("teleprompters")
    if name not in methods:
        raise ConfigError(f"No method {name!r}; installed are {', '.join(methods)}.")
    return methods[name].load()


def _configured(command: Command) -> tuple[Any, dict[str, Any]]:
    """Return the method, or the mixture of it, with its settings."""
    kind, given = _method(command.method), command.knobs
    if command.mixture is None:
        return kind, _knobs(kind, given)
    mixture = _method("mixture")
    own = {name: value for name, value in given.items() if name in _settable(mixture)}
    settings = _knobs(kind, {name: value for name, value in given.items() if name not in own})
    return mixture, {"regions": command.mixture, **_knobs(mixture, own), "method": kind, "settings": settings}


def _settable(kind: Any) -> dict[str, Any]:
    """Return the types of a method's settings that can be written as text, its own first."""
    try:
        hints = get_type_hints(kind)
    except NameError:  # of a third party's, with types imported for checkers only
        hints = get_type_hints(Teleprompter)
    kinds = {
        field.name: _written(field.default, hints.get(field.name))
        for field in sorted(dataclasses.fields(kind), key=lambda each: each.name == "few_shot")
        if field.name not in _CONTRACT
    }
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _written(default: Any, hint: Any) -> type | None:
    """Return the type that a setting's text is read as, None if it can't be written: of what may be given or not, its.

    Example:
        >>> _written(0.5, float), _written(None, int | None), _written(None, Literal["a", "b"] | None)
        (<class 'float'>, <class 'int'>, <class 'str'>)
        >>> _written(None, dspy.LM | None)
    """
    if isinstance(default, (str, int, float)):
        return type(default)
    given = [str if get_origin(one) is Literal else one for one in get_args(hint)] if default is None else []
    return next((kind for kind in (str, int) if kind in given), None)


def _knobs(kind: Any, given: dict[str, str]) -> dict[str, Any]:
    """Return a method's settings as its fields' types."""
    own = _settable(kind)
    unknown = [name for name in given if name not in own]
    if unknown:
        raise ConfigError(f"{kind.__name__} has no setting {unknown[0]!r}; it has {', '.join(own)}.")
    return {name: _parsed(f"{kind.__name__}: --set {name}={value}", own[name], value) for name, value in given.items()}


def _parsed(told: str, kind: type, text: str) -> Any:
    """Return a setting as its field's type."""
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{told} must be true or false.")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(f"{told} must be {'a whole number' if kind is int else 'a number'}.") from error


_CONTRACT: Final = {"metric", "lm", "proposer", "budget", "run_dir", "threads", "patience", "seed", "report"}


def _show(evidence: Evidence, as_json: bool) -> None:
    result = evidence.as_dict()
    say(f"  to be read in a browser: {Path(evidence.run) / REPORT}")
    print_json(result) if as_json else print_verdict(result)
