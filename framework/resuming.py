"""The command that a run was started by, kept in its folder: what `preceptor resume` needs."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from preceptor.errors import ConfigError, ModelError, RunError
from preceptor.lm.redaction import without_credentials
from preceptor.run import answers_in, is_begun, locked, read_run, writable, write_whole

_ADDRESSES: Final = ("api_base", "proposer_api_base")
_RENEWED: Final = {*_ADDRESSES, "budget", "prices", "threads", "timeout", "retries", "workers"}
"""Of a command: what doesn't change the path that a run takes."""


@contextmanager
def remembered(folder: Path, command: Mapping[str, Any]) -> Generator[None]:
    """Remember a command while it is carried out, and from then on, unless it is refused before anything is answered.

    Raises:
        RunError: If the folder can't be written, or is in use.
    """
    before = remember_command(folder, command)
    known = answers_in(folder)
    try:
        yield
    except (ConfigError, ModelError):
        with suppress(RunError):  # that the folder can't be written says less than what is raised
            if answers_in(folder) == known:
                remember_command(folder, before)
        raise


def remember_command(folder: Path, command: Mapping[str, Any]) -> Mapping[str, Any]:
    """Keep what `preceptor resume` needs to start the run again, but no password; call it before the compile.

    Until there is an answer, the command replaces the one that is there, and none leaves none. After that only what may
    differ from one process of a run to the next is taken from it, such as the budget.

    Returns:
        What was kept before.

    Raises:
        RunError: If the folder can't be written, or is in use.
    """
    command = {
        name: without_credentials(str(value)) if name in _ADDRESSES and value else value
        for name, value in command.items()
    }
    with locked(folder), writable(folder):
        known = read_run(folder) if (folder / "run.json").is_file() else {}
        before: Mapping[str, Any] = known.pop("command", {})
        if command and before and known.get("fingerprints") and is_begun(folder):
            renewed = {name: value for name, value in command.items() if name in _RENEWED}
            command = {**command, **before, **renewed}
        write_whole(folder / "run.json", {**known, "command": command} if command else known)
    return before
