"""The run as Optuna studies, which `optuna-dashboard RUN/study.log` opens, while it runs and afterwards.

The study `candidates` has a trial for every candidate, whatever the method; a method that searches a box of
numbers keeps its own study beside it (`Studies.search`). The file is Optuna's journal, one JSON object a line,
made anew each time the run is opened: a resumed run scores its candidates again, from the ledger.

Optuna plots parameters, and a text is none: those of a candidate are how long its instructions are and how many
demonstrations they have. The texts themselves, and what each was made of, are user attributes, and a note: the
dashboard shows an attribute on one line, however long, but breaks the lines of a note.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from preceptor.lineage import Birth
from preceptor.scoring.metrics import Aggregate
from preceptor.scoring.trial import Candidate, Outcome, Trial

FILE: Final = "study.log"
CANDIDATES: Final = "candidates"

_NAMES: Final = "study:metric_names"
"""Optuna's own attribute for what `Study.set_metric_names` sets, which warns that it is experimental."""

_NOTE: Final = 2045
"""Characters of a note in one attribute, as optuna-dashboard splits it."""

_PARENT: Final = "made of trial"

_LENGTHS: Final = IntDistribution(1, 1_000_000, log=True)
_DEMONSTRATIONS: Final = IntDistribution(0, 1000)

_ANNOUNCING: Final = threading.Lock()
"""Held while Optuna's verbosity, which all threads share, is another."""


class _Journal(BaseJournalBackend):
    """Optuna's log, kept in memory and added to the file once a round: each addition waits for the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = JournalFileOpenLock(str(path))
        self._logs: list[dict[str, Any]] = []
        self._flushed = 0
        for old in (path, path.with_name(f"{path.name}.lock")):
            old.unlink(missing_ok=True)

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._logs += logs

    def flush(self) -> None:
        """Write what is new."""
        fresh, self._flushed = self._logs[self._flushed :], len(self._logs)
        if fresh:
            JournalFileBackend(str(self._path), self._lock).append_logs(fresh)


@dataclass(slots=True)
class _Seen:
    """What is known of one candidate."""

    trial: int
    outcomes: dict[int, Outcome] = field(default_factory=dict[int, Outcome])
    score: float = 0.0


class Studies:
    """The studies of an open run.

    Args:
        folder: The run folder, this process's alone; an earlier file in it is replaced.

    Raises:
        OSError: If the file can't be written; so do all methods.
    """

    def __init__(self, folder: Path) -> None:
        self._journal = _Journal(folder / FILE)
        self._storage = JournalStorage(self._journal)
        self._study = quiet_study(CANDIDATES, self._storage, RandomSampler())
        self._seen: dict[str, _Seen] = {}
        self._births: dict[str, Birth] = {}

    def born(self, birth: Birth) -> None:
        """Keep what is told of a candidate's origin until it is scored."""
        self._births[birth.candidate.key] = birth

    def record(self, trials: Sequence[Trial], aggregate: Aggregate, calls: int) -> list[list[Outcome]]:
        """Write down scores; return each trial's candidate's outcomes on all rows it has seen by then.

        A candidate that is scored on further rows stays one Optuna trial.

        Each addition is an intermediate value: the score so far, at the number of rows it is of.

        Args:
            trials: What was scored.
            aggregate: Makes a score of all rows seen.
            calls: Of the run, so far.
        """
        known: list[list[Outcome]] = []
        for trial in trials:
            seen = self._seen.get(trial.candidate.key) or self._begun(trial)
            seen.outcomes |= dict(zip(trial.rows, trial.outcomes, strict=True))
            known.append(list(seen.outcomes.values()))
            seen.score = aggregate(known[-1])
            self._storage.set_trial_intermediate_value(seen.trial, len(seen.outcomes), seen.score)
            for name, value in {"rows": len(seen.outcomes), "score": seen.score, "calls": calls}.items():
                self._storage.set_trial_user_attr(seen.trial, name, value)
        self._journal.flush()
        return known

    def search(self, name: str, sampler: BaseSampler) -> optuna.Study:
        """Return a new study of numbers, to be maximized by asking and telling."""
        return quiet_study(name, self._storage, sampler)

    def conclude(self, result: Mapping[str, Any]) -> None:
        """Write down what the run came to: each number, text or list of them."""
        for name, value in result.items():
            if isinstance(value, (str, int, float, bool, list)):
                self._study.set_user_attr(name, value)
        set_note(self._study, str(result.get("verdict", "")))
        self._journal.flush()

    def close(self) -> None:
        """End all trials: candidates that saw the most rows are complete, those dropped earlier pruned."""
        most = max((len(seen.outcomes) for seen in self._seen.values()), default=0)
        for seen in self._seen.values():
            state = TrialState.COMPLETE if len(seen.outcomes) == most else TrialState.PRUNED
            self._storage.set_trial_state_values(seen.trial, state, [seen.score])
        for study in self._storage.get_all_studies():
            for trial in self._storage.get_all_trials(study._study_id, states=(TrialState.RUNNING,)):
                self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        self._journal.flush()

    def _begun(self, trial: Trial) -> _Seen:
        key = trial.candidate.key
        template = _template(trial.candidate, self._origin(self._births.get(key)))
        seen = self._seen[key] = _Seen(self._storage.create_new_trial(self._study._study_id, template))
        set_note(self._study, _told(trial.candidate.instructions, template.user_attrs), seen.trial)
        return seen

    def _origin(self, birth: Birth | None) -> dict[str, Any]:
        if birth is None:
            return {}
        parent = self._seen.get(birth.parent.key)
        number = {} if parent is None else {_PARENT: self._storage.get_trial(parent.trial).number}
        because = {"because": birth.because} if birth.because else {}
        return {"made by": birth.how, **number, **because}


def quiet_study(name: str, storage: BaseStorage, sampler: BaseSampler) -> optuna.Study:
    """Return a new study, to be maximized; Optuna would announce it on stderr."""
    with _ANNOUNCING:
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))
        try:
            storage.set_study_system_attr(storage.create_new_study([StudyDirection.MAXIMIZE], name), _NAMES, ["score"])
        finally:
            optuna.logging.set_verbosity(verbosity)
    return optuna.Study(name, storage, sampler)


def set_note(study: optuna.Study, text: str, trial: int | None = None) -> None:
    """Set the note of a study or of its trial with that id, as optuna-dashboard's `save_note` does, in Markdown.

    Lines are kept, by the two spaces at the end that Markdown wants.
    """
    text, place = text.replace("\n", "  \n"), "" if trial is None else f"{trial}:"
    attributes: dict[str, Any] = {f"note_str:{at // _NOTE}": text[at : at + _NOTE] for at in range(0, len(text), _NOTE)}
    for name, value in {**attributes, "note_ver": 1}.items():
        study._storage.set_study_system_attr(study._study_id, f"dashboard:{place}{name}", value)


def _template(candidate: Candidate, origin: Mapping[str, Any]) -> FrozenTrial:
    lengths = {f"characters: {name}": len(text) for name, text in candidate.instructions.items()}
    demos = {f"demonstrations: {name}": len(several) for name, several in candidate.demos.items()}
    distributions = dict.fromkeys(lengths, _LENGTHS) | dict.fromkeys(demos, _DEMONSTRATIONS)
    return create_trial(
        state=TrialState.RUNNING,
        params={
            name: min(max(value, distributions[name].low), distributions[name].high)
            for name, value in {**lengths, **demos}.items()
        },
        distributions={**distributions},
        user_attrs={**{f"instructions: {name}": text for name, text in candidate.instructions.items()}, **origin},
    )


def _told(instructions: Mapping[str, str], origin: Mapping[str, Any]) -> str:
    parts = [f"**{name}**\n\n{text}" for name, text in instructions.items()]
    if "made by" in origin:
        parts.append(f"*{origin['made by']}*" + (f" of trial {origin[_PARENT]}" if _PARENT in origin else ""))
    if "because" in origin:
        parts.append(f"> {origin['because']}")
    return "\n\n".join(parts)
