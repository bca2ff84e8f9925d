"""The run folder: the ledger, what the run was given, its trials, its result and its program.

run.json        fingerprints of the inputs, and the command that resumes the run
ledger.sqlite   every answer
trials.jsonl    every candidate with its scores, written as they come
result.json     the object that `compile --json` prints
program/        the artifact
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from preceptor.errors import RunError
from preceptor.lm.ledger import Ledger
from preceptor.scoring.trial import Trial


def fingerprint(value: Any) -> str:
    """Return 16 hexadecimal digits that differ where the JSON of `value` differs."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Run:
    """An open run folder, this process's alone."""

    folder: Path
    ledger: Ledger

    def write_trials(self, trials: Sequence[Trial]) -> None:
        """Append trials, one JSON object a line."""
        with _writable(self.folder), (self.folder / "trials.jsonl").open("a", encoding="utf-8") as file:
            for trial in trials:
                line = {
                    "instructions": dict(trial.candidate.instructions),
                    "score": trial.score,
                    "rows": trial.rows,
                    "scores": [outcome.score for outcome in trial.outcomes],
                    "kinds": [outcome.kind for outcome in trial.outcomes],
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`, whole or not at all."""
        with _writable(self.folder):
            _write_whole(self.folder / "result.json", result)

    @property
    def program(self) -> Path:
        """Where the compiled program goes."""
        return self.folder / "program"


@contextmanager
def open_run(folder: Path, parts: Mapping[str, Any]) -> Generator[Run]:
    """Open a run folder, new or to be resumed.

    Args:
        folder: Made if absent.
        parts: What the run depends on, by name; their fingerprints are kept.

    Raises:
        RunError: If the folder can't be written, is in use, or belongs to other inputs; nothing is overwritten.
    """
    prints = {name: fingerprint(part) for name, part in parts.items()}
    with ExitStack() as opened:
        with _writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            opened.enter_context(FileLock(folder / ".lock", timeout=0))
            _claim(folder, prints)
        ledger = Ledger(folder / "ledger.sqlite")
        opened.callback(ledger.close)
        yield Run(folder, ledger)


@contextmanager
def _writable(folder: Path) -> Generator[None]:
    try:
        yield
    except Timeout as error:
        raise RunError(f"Another process is using the run folder {folder}.") from error
    except OSError as error:
        raise RunError(
            f"Can't write the run folder {folder}: {error.strerror or error}. Choose another one."
        ) from error


def _claim(folder: Path, prints: Mapping[str, str]) -> None:
    path = folder / "run.json"
    known = read_run(folder) if path.is_file() else {}
    before = cast("dict[str, str]", known.get("fingerprints", {}))
    changed = [name for name, value in prints.items() if name in before and before[name] != value]
    if changed:
        raise RunError(
            f"The run folder {folder} belongs to another {' and '.join(changed)}; nothing was overwritten. "
            "Choose another folder, or go back to the inputs it was made with."
        )
    if not before and any(folder.glob("*.json*")) and not path.is_file():
        raise RunError(f"{folder} holds other files and is no run folder; choose an empty or a new one.")
    (folder / "trials.jsonl").unlink(missing_ok=True)
    _write_whole(path, {**known, "fingerprints": dict(prints)})


def read_run(folder: Path) -> dict[str, Any]:
    """Return what `run.json` says.

    Raises:
        RunError: If the folder is no run folder.
    """
    try:
        return cast("dict[str, Any]", json.loads((folder / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} is no run folder: run.json is missing or unreadable.") from error


def remember_command(folder: Path, command: Mapping[str, Any]) -> None:
    """Keep what `preceptor resume` needs to start the run again; call it before the compile.

    Raises:
        RunError: If the folder can't be written, or holds a run of another command.
    """
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        known = read_run(folder) if (folder / "run.json").is_file() else {}
        _write_whole(folder / "run.json", {**known, "command": {**command, **known.get("command", {})}})


def _write_whole(path: Path, value: Mapping[str, Any]) -> None:
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True, ensure_ascii=False, default=str)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
