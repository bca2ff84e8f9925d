"""What becomes of a benchmark's result: the options that all of them have, and the one way it is given."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from preceptor.cli.view import print_json

Out: TypeAlias = Annotated[Path | None, typer.Option(help="Write the JSON object here too.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def give(result: Mapping[str, Any], out: Path | None, *, as_json: bool, show: Callable[[Any], None]) -> None:
    """Write a result into a file, if there is to be one, and print it.

    Args:
        result: Of plain values.
        out: The file; replaced.
        as_json: Print it as JSON.
        show: Prints it for people.
    """
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_json(result) if as_json else show(result)
