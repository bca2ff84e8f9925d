"""What a compile was asked on the command line: kept in its run folder, and carried out again from anywhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

from preceptor import run as runs
from preceptor.cli.inputs import DEFAULT_LM, LOCAL, local_id
from preceptor.errors import ConfigError
from preceptor.lm.catalogue import CATALOGUE
from preceptor.lm.dispatch import Patience
from preceptor.lm.embedding import MODELS

DEFAULT: Final = Patience()

EMBEDDER: Final = "embedder"
"""The setting that may be a folder."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What a compile was asked; kept in the run folder, for `resume`."""

    target: str
    data: str
    validation: str | None = None
    rows: int | None = None
    columns: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    instructions: str | None = None
    method: str = "ape"
    mixture: int | None = None
    lm: str = DEFAULT_LM
    api_base: str | None = None
    max_tokens: int | None = None
    proposer: str | None = None
    proposer_api_base: str | None = None
    metric: str | None = None
    budget: str | None = None
    seed: int = 0
    threads: int = 8
    workers: str | None = None
    timeout: float = DEFAULT.timeout
    retries: int = DEFAULT.retries
    prices: list[str] = dataclasses.field(default_factory=list[str])
    knobs: dict[str, str] = dataclasses.field(default_factory=dict[str, str])


def remembered_in(run: Path) -> Command:
    """Return the command that a run was started by.

    Raises:
        ConfigError: If it wasn't started by one, or by one of another version.
    """
    known: dict[str, Any] | None = runs.read_run(run).get("command")
    if not known:
        raise ConfigError(f"{run} was not started from the command line; call compile again with run_dir={str(run)!r}.")
    known = {"proposer_api_base": known.get("api_base"), **known}  # it used to have the address of --lm
    try:
        return Command(**known)
    except TypeError as error:
        raise ConfigError(
            f"{run} was started by another version of preceptor: {error}. Compile again with --run {run}."
        ) from error


def from_anywhere(command: Command) -> Command:
    """Return the command with its files' whole paths: a run may be resumed from another folder."""
    return dataclasses.replace(
        command,
        target=_whole(command.target),
        data=_whole(command.data),
        validation=command.validation and _whole(command.validation),
        metric=_whole(command.metric) if command.metric and ".py:" in command.metric else command.metric,
        knobs={
            name: _whole(value) if name == EMBEDDER and value not in MODELS else value
            for name, value in command.knobs.items()
        },
    )


def model_from_anywhere(name: str) -> str:
    """Return a model's name with the whole path of its folder, if it is one in a folder: as the program has it, too."""
    folder = local_id(name)
    if not name.startswith(LOCAL) or folder in CATALOGUE or not (Path(folder) / "config.json").is_file():
        return name
    return f"{LOCAL}{Path(folder).absolute()}{name.removeprefix(LOCAL).removeprefix(folder)}"


def _whole(text: str) -> str:
    if "->" in text:  # a signature
        return text
    file, colon, name = text.rpartition(":") if ".py:" in text else (text, "", "")
    return f"{Path(file).absolute()}{colon}{name}" if Path(file).exists() else text
