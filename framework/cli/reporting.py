"""`report`: a run as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from preceptor.cli.view import out, plain
from preceptor.errors import ConfigError
from preceptor.report import REPORT, write


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(report)


def report(
    run: Annotated[Path, typer.Argument(help="A run folder, or the program saved in one.")],
    file: Annotated[Path | None, typer.Option("--out", help="A file, or a folder; by default the run's.")] = None,
) -> None:
    """Write a run's report: one page without scripts or requests, from what the run folder holds."""
    folder = run if (run / "run.json").is_file() or not (run.parent / "run.json").is_file() else run.parent
    path = file or folder / REPORT
    path = path / REPORT if path.is_dir() else path
    try:
        write(folder, path)
    except OSError as error:
        raise ConfigError(f"Can't write {path}: {error.strerror or error}. Choose another place with --out.") from error
    out().print(plain(str(path)), soft_wrap=True)
