"""`route`: where a program of several experts sends an input."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from preceptor.cli.compiling import Json
from preceptor.cli.evaluating import Embedding, Student, load
from preceptor.cli.view import aside, out, plain, print_json, print_table
from preceptor.errors import ConfigError


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(route)


def route(
    program: Annotated[Path, typer.Argument(help="A saved program of several experts.")],
    text: Annotated[str | None, typer.Argument(help="The input, where the router looks at one field.")] = None,
    field: Annotated[list[str] | None, typer.Option("--field", help="One of several fields: subject=Invoice.")] = None,
    student: Student = None,
    embedder: Embedding = None,
    json: Json = False,
) -> None:
    """Say which region an input is in, who answers there, and how near every centroid is; no model is asked."""
    with aside():
        experts: Any = load(program, student, embedder)
    router = getattr(experts, "router", None)
    if router is None:
        raise ConfigError(f"{program} has one prompt for all inputs, and no router; compile with --mixture to get one.")
    found = router.route(_inputs(router.fields, text, field or []))
    rows = [[name, experts.expert_of(name), at, 1 - at] for name, at in zip(router.names, found.cosines, strict=True)]
    header = ["region", "expert", "cosine", "distance"]
    if json:
        told = {"region": found.region, "nearest": found.nearest, "expert": experts.expert_of(found.region)}
        centroids = [dict(zip(header, row, strict=True)) for row in rows]
        print_json({**told, "distance": found.distance, "radius": router.radius, "centroids": centroids})
        return
    who = f"{found.region or 'no region'}: {experts.expert_of(found.region)} answers"
    near = f"nearest {found.nearest}, at distance {found.distance:.3f}; beyond {router.radius:.3f} the default answers"
    out().print(plain(f"{who} ({near})\n"), soft_wrap=True)
    print_table("", header, rows)


def _inputs(fields: tuple[str, ...], text: str | None, given: list[str]) -> dict[str, str]:
    """Return the inputs by field.

    Raises:
        ConfigError: If they aren't those the router looks at.
    """
    pairs = [each.partition("=") for each in given]
    inputs = {name: value for name, equals, value in pairs if equals}
    if text is not None and len(fields) == 1:
        inputs = {fields[0]: text, **inputs}
    if set(inputs) != set(fields) or len(inputs) < len(pairs) or (text is not None and len(fields) > 1):
        named = " ".join(f"--field {name}=..." for name in fields)
        wanted = f'"{fields[0]}", as text' if len(fields) == 1 else f"{len(fields)} fields: {named}"
        raise ConfigError(f"The router looks at {wanted}.")
    return inputs
