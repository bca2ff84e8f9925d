"""The command line. Results go to stdout, progress and errors to stderr.

Exit codes: 0 done (a kept prompt included, and a search that its budget ended), 1 a score below `eval --fail-under`,
2 wrong usage or what was given can't be used, 3 stopped before there was a result and resumable, 4 too much of what was
asked failed, 5 a fault of preceptor's own, 130 interrupted. With `--json` the object on stdout has `error` and
`exit_code` where the code is 2 to 4, but for mistyped options and arguments.
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Annotated, Final

import typer

from preceptor.cli import batching, compiling, inspecting, reporting, routing, serving, tools
from preceptor.cli.unset import refuse_empty
from preceptor.cli.view import say, tell_fault, tell_own_fault
from preceptor.errors import PreceptorError

INTERRUPTED: Final = 130

app: Final = typer.Typer(
    help="Declared LLM tasks, compiled into programs that can be trusted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _told(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"preceptor {version('preceptor')}, dspy {version('dspy')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_told, is_eager=True, help="Print it.")] = False,
) -> None:
    """Take what stands before a command."""
    del version


compiling.add_to(app)
batching.add_to(app)
inspecting.add_to(app)
reporting.add_to(app)
routing.add_to(app)
serving.add_to(app)
tools.add_to(app)
refuse_empty(app)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    logging.getLogger("dspy").setLevel(logging.ERROR)
    try:
        app(arguments, standalone_mode=True)
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if code == INTERRUPTED:
            say(
                "Interrupted. What was answered is kept; the same command, or preceptor resume RUN, goes on from there."
            )
        return code
    except PreceptorError as error:
        return tell_fault(error, as_json="--json" in arguments)
    except Exception as error:  # noqa: BLE001  none of those that are raised on purpose
        return tell_own_fault(error)
    return 0
