"""The run folder: the ledger, what the run was given, its trials, its result and its program.

run.json        fingerprints of the inputs, those of the candidates that were confirmed, and the command that resumes it
ledger.sqlite   every answer
trials.jsonl    every candidate with its scores, written as they come
held.jsonl      what the search would have returned had it stopped, where the method tells
lineage.jsonl   where each candidate comes from, where the method tells
study.log       the same as an Optuna study; optuna-dashboard opens it
regions.json    of a mixture: where the rows and the regions lie, in two dimensions
confirmation.json   what the seed and the winner answered to each confirmation row
result.json     the object that `compile --json` prints
report.html     all of it, to be read
program/        the artifact
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from filelock import FileLock, Timeout

from preceptor.canonical import plain
from preceptor.errors import RunError
from preceptor.lineage import LINEAGE, Birth
from preceptor.lm.ledger import Ledger
from preceptor.scoring.metrics import Aggregate, mean
from preceptor.scoring.statistics import CONFIDENCE
from preceptor.scoring.trial import Outcome, Trial

if TYPE_CHECKING:
    from preceptor.study import Studies

logger = logging.getLogger(__name__)

CONFIRMATION: Final = "confirmation.json"
REGIONS: Final = "regions.json"
HELD: Final = "held.jsonl"

Spread = Callable[[Sequence[Outcome]], tuple[float, float]]
"""Makes a 95 % interval of outcomes."""

_HALVES: Final = "backslashreplace"
"""Half a character, as a cut-off answer may end in, is written as JSON's escape for it."""


_LOOKS: Final = "looks"
_ROWS: Final = "valset"
"""Of the fingerprints: the rows to confirm on."""

_KINDS: Final[Mapping[str, type[Any]]] = {"fingerprints": dict, "command": dict, _LOOKS: list}


def fingerprint(value: Any) -> str:
    """Return 16 hexadecimal digits that differ where the JSON of `value` differs."""
    text = json.dumps(value, sort_keys=True, default=plain, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors=_HALVES)).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Run:
    """An open run folder, this process's alone."""

    folder: Path
    ledger: Ledger
    studies: Studies

    def write_trials(
        self, trials: Sequence[Trial], aggregate: Aggregate = mean, calls: int = 0, spread: Spread | None = None
    ) -> None:
        """Append trials, one JSON object a line, and to the study.

        Args:
            trials: What was scored.
            aggregate: Makes a score of all rows a candidate has seen.
            calls: Of the run, so far.
            spread: Makes an interval of it.
        """
        path = self.folder / "trials.jsonl"
        with writable(self.folder), path.open("a", encoding="utf-8", errors=_HALVES) as file:
            known = self.studies.record(trials, aggregate, calls)
            for trial, seen in zip(trials, known, strict=True):
                line = {
                    "candidate": fingerprint(trial.candidate.key),
                    "instructions": dict(trial.candidate.instructions),
                    "score": trial.score,
                    "rows": trial.rows,
                    "scores": [outcome.score for outcome in trial.outcomes],
                    "kinds": [outcome.kind for outcome in trial.outcomes],
                    "demos": sum(map(len, trial.candidate.demos.values())),
                    "calls": calls,
                    "seen": len(seen),
                    "so_far": aggregate(seen),
                    "interval": spread(seen) if spread else None,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def write_held(self, trial: Trial, calls: int) -> None:
        """Append what the search would return if it stopped after so many calls, as one JSON object a line."""
        line = {
            "candidate": fingerprint(trial.candidate.key),
            "instructions": dict(trial.candidate.instructions),
            "score": trial.score,
            "calls": calls,
        }
        with writable(self.folder), (self.folder / HELD).open("a", encoding="utf-8", errors=_HALVES) as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def write_lineage(self, birth: Birth) -> None:
        """Append where a candidate comes from, as one JSON object a line."""
        with writable(self.folder), (self.folder / LINEAGE).open("a", encoding="utf-8", errors=_HALVES) as file:
            file.write(json.dumps(birth.as_dict(), ensure_ascii=False) + "\n")
        self.studies.born(birth)

    @contextmanager
    def part(self, name: str) -> Generator[Run]:
        """Open a folder in this one for a part of the compile, which may run beside others; the answers are shared."""
        with ExitStack() as opened:
            with writable(self.folder):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            studies = opened.enter_context(_records(self.folder / name))
            yield Run(self.folder / name, self.ledger, studies)

    def keep(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file of the run, whole or not at all."""
        with writable(self.folder):
            write_whole(self.folder / name, value, indent=None)

    def look(self, candidate: Any) -> int:
        """Return how many different candidates have been confirmed on this run's rows, this one included.

        One that was confirmed before, in this process or an earlier one, has the number it had then. Those of other
        runs are told in the log, as a warning, and not counted: the same compile comes out the same wherever it is.
        """
        known, name = read_run(self.folder), fingerprint(candidate)
        looks: list[str] = known.get(_LOOKS, [])
        if name not in looks:
            looks = [*looks, name]
            with writable(self.folder):
                write_whole(self.folder / "run.json", {**known, _LOOKS: looks})
            self._tell_others(known.get("fingerprints", {}).get(_ROWS), looks)
        return looks.index(name) + 1

    def _tell_others(self, rows: str | None, looks: Sequence[str]) -> None:
        """Log how many candidates runs in folders beside this one have confirmed on the same rows."""
        others = {
            folder.name: map(str, other[_LOOKS])
            for folder, other in _beside(self.folder)
            if rows and other.get("fingerprints", {}).get(_ROWS) == rows and other.get(_LOOKS)
        }
        count = len(set(looks).union(*others.values()))
        if others and count > 1:
            logger.warning(
                "Other runs have looked at these same rows: %s. "
                "Whoever ships the best of all %d candidates has to hold p to %.2g.",
                ", ".join(others),
                count,
                (1 - CONFIDENCE) / count,
            )

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`, whole or not at all."""
        with writable(self.folder):
            write_whole(self.folder / "result.json", result)
            self.studies.conclude(result)

    def result(self) -> dict[str, Any]:
        """Return what `result.json` says, {} if it isn't there or can't be read."""
        return self.kept("result.json")

    def kept(self, name: str) -> dict[str, Any]:
        """Return what a JSON file of the run says, {} if it isn't there or can't be read."""
        try:
            told: Any = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return told if isinstance(told, dict) else {}

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
        RunError: If the folder can't be written, is in use, belongs to other inputs, or lost its ledger; nothing
            is overwritten.
    """
    with ExitStack() as opened:
        ledger = opened.enter_context(open_ledger(folder, parts, is_run=True))
        yield Run(folder, ledger, opened.enter_context(_records(folder)))


def check_folder(folder: Path, parts: Mapping[str, Any]) -> None:
    """Raise if a run of these parts couldn't have the folder, as `open_run` would; nothing is changed in it.

    Args:
        folder: There or not.
        parts: What is known of what the run depends on, by name.

    Raises:
        RunError: If it belongs to other inputs, lost its ledger, or is no folder, or can't be made or written.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is no folder, so no run can be in it. Choose another one.")
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RunError(f"{folder} can't be written: {there} is {'read-only' if there.is_dir() else 'no folder'}.")
    _known(folder, {name: fingerprint(part) for name, part in parts.items()}, is_run=True)


@contextmanager
def open_ledger(folder: Path, parts: Mapping[str, Any], *, is_run: bool = False) -> Generator[Ledger]:
    """Open a folder's ledger, new or to be gone on with; nobody else may meanwhile.

    Args:
        folder: Made if absent.
        parts: What the answers depend on, by name; their fingerprints are kept.
        is_run: Keep the answers' keys in memory (see `Ledger`); and as long as nothing was answered, take other parts.

    Raises:
        RunError: As `open_run`.
    """
    prints = {name: fingerprint(part) for name, part in parts.items()}
    with ExitStack() as opened:
        opened.enter_context(locked(folder))
        with writable(folder):
            known = _known(folder, prints, is_run=is_run)
        ledger = Ledger(folder / "ledger.sqlite", is_alone=is_run)  # the folder is locked
        opened.callback(ledger.close)
        with writable(folder):  # once there is a ledger: from now on, a folder without one has lost it
            _refuse_lost_answers(folder, ledger)
            write_whole(folder / "run.json", {**known, "fingerprints": prints})
        yield ledger


@contextmanager
def _records(folder: Path) -> Generator[Studies]:
    """Start a folder's records anew, and write down the rest of them in the end."""
    from preceptor.study import Studies  # Optuna, which `import preceptor` doesn't wait for

    with writable(folder):
        for name in ("trials.jsonl", HELD, LINEAGE):
            (folder / name).unlink(missing_ok=True)
        studies = Studies(folder)
    try:
        yield studies
    finally:
        with writable(folder):
            studies.close()


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Make the folder if absent and keep other processes and threads out; they are let in when this process dies."""
    with ExitStack() as held:
        with writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(folder / ".lock", timeout=0))
        yield


@contextmanager
def writable(folder: Path) -> Generator[None]:
    """Turn what the system says of a folder that can't be written into a `RunError`."""
    try:
        yield
    except Timeout as error:
        raise RunError(
            f"Another process is using the run folder {folder}. Wait for it, or choose another folder."
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, RunError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RunError(f"Can't write the run folder {folder}: {reason}. Choose another one.") from error


def _known(folder: Path, prints: Mapping[str, str], *, is_run: bool) -> dict[str, Any]:
    """Return what `run.json` says, {} in a new folder.

    Raises:
        RunError: If the folder isn't this run's, or has lost its answers.
    """
    ledger = folder / "ledger.sqlite"
    if not (folder / "run.json").is_file():
        if any(folder.glob("*.json*")) and not ledger.is_file():
            raise RunError(f"{folder} holds other files and is no run folder; choose an empty or a new one.")
        return {}
    known = read_run(folder)
    before: Mapping[str, Any] = known.get("fingerprints", {})
    if before and not is_run:  # an earlier version's may lack a part, which was empty then
        before = {**dict.fromkeys(prints, fingerprint({})), **before}
    changed = [name for name, value in prints.items() if name in before and before[name] != value]
    if changed and (not is_run or is_begun(folder)):
        raise RunError(
            f"The run folder {folder} belongs to another {' and '.join(changed)}; nothing was overwritten. "
            "Choose another folder, or go back to the inputs it was made with."
        )
    if before and not (ledger.is_file() and ledger.stat().st_size):
        raise RunError(
            f"{ledger}, which held every answer of this run, is {'empty' if ledger.is_file() else 'missing'}. "
            f"Put it back, or delete {folder} to start anew."
        )
    return known


def is_begun(folder: Path) -> bool:
    """Return True if something was answered in this folder: else nothing is lost where its inputs are changed."""
    return _has_results(folder) or answers_in(folder) > 0


def answers_in(folder: Path) -> int:
    """Return how many answers the folder's ledger has, 0 if there is none.

    Raises:
        RunError: If it can't be opened.
    """
    path = folder / "ledger.sqlite"
    if not path.is_file() or not path.stat().st_size:
        return 0
    with closing(Ledger(path)) as ledger:
        return len(ledger)


def _has_results(folder: Path) -> bool:
    trials = folder / "trials.jsonl"
    return (trials.is_file() and trials.stat().st_size > 0) or (folder / "result.json").is_file()


def _refuse_lost_answers(folder: Path, ledger: Ledger) -> None:
    """Raise if trials were scored but no answer is there: the ledger's own log, a second file, was left behind."""
    if _has_results(folder) and not len(ledger):
        raise RunError(
            f"{ledger.path} has no answers, but {folder} has trials that were scored by some. Put back the ledger "
            f"and, if there was one, {ledger.path.name}-wal next to it; or delete {folder} to start anew."
        )


def _beside(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the other run folders in the one that a run is in, with what their `run.json` says."""
    place = folder.resolve()
    others = {path.parent.resolve() for path in folder.absolute().parent.glob("*/run.json")} - {place}
    for other in sorted(others):  # a link to one of them is no other
        with suppress(RunError):
            yield other, read_run(other)


def read_run(folder: Path) -> dict[str, Any]:
    """Return what `run.json` says.

    Raises:
        RunError: If the folder is no run folder.
    """
    try:
        known: Any = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{folder} is no run folder: run.json is missing or unreadable.") from error
    if not isinstance(known, dict) or not all(isinstance(known.get(at, kind()), kind) for at, kind in _KINDS.items()):
        raise RunError(
            f"{folder / 'run.json'} is damaged. Delete it and compile into the folder again: its ledger is used."
        )
    return known


def write_whole(path: Path, value: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Write a JSON file, whole or not at all."""
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w", encoding="utf-8", errors=_HALVES) as file:
        json.dump(value, file, indent=indent, sort_keys=True, ensure_ascii=False, default=plain)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
