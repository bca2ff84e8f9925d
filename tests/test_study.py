"""A run's candidates as an Optuna study."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from preceptor.errors import RunError
from preceptor.lineage import Birth
from preceptor.run import open_run
from preceptor.scoring.metrics import mean
from preceptor.scoring.trial import Candidate, Outcome, Trial
from preceptor.study import CANDIDATES, FILE, Studies
from preceptor.teleprompters import APE
from preceptor.testing import scripted, toy

SEED, OTHER = Candidate({"predict": "Sort."}), Candidate({"predict": "Guess."}, {"predict": ({"text": "a"},)})


def trial(candidate: Candidate, rows: list[int], scores: list[float]) -> Trial:
    return Trial(candidate, tuple(rows), tuple(Outcome("scored", score) for score in scores), sum(scores) / len(scores))


def read(folder: Path, name: str = CANDIDATES) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(folder / FILE))))


def states(folder: Path) -> list[str]:
    return [one.state.name for one in read(folder).trials]


def test_a_candidate_is_one_trial_with_its_score_after_each_round(tmp_path: Path) -> None:
    studies = Studies(tmp_path)
    studies.record([trial(SEED, [0, 1], [1, 0]), trial(OTHER, [0, 1], [0, 0])], mean, calls=4)
    [known] = studies.record([trial(SEED, [2, 3, 1], [1, 1, 0])], mean, calls=7)  # row 1 again: it counts once
    assert [outcome.score for outcome in known] == [1, 0, 1, 1]
    assert states(tmp_path) == ["RUNNING", "RUNNING"]
    studies.close()

    seed, other = read(tmp_path).trials
    assert (seed.value, seed.intermediate_values) == (0.75, {2: 0.5, 4: 0.75})
    assert seed.user_attrs == {"instructions: predict": "Sort.", "rows": 4, "score": 0.75, "calls": 7}
    assert (seed.params, other.params) == (
        {"characters: predict": 5},
        {"characters: predict": 6, "demonstrations: predict": 1},
    )
    assert states(tmp_path) == ["COMPLETE", "PRUNED"]
    assert read(tmp_path).best_trial.number == 0


def test_a_candidate_says_what_it_was_made_of(tmp_path: Path) -> None:
    studies = Studies(tmp_path)
    studies.record([trial(SEED, [0], [1])], mean, calls=1)
    grandchild = Candidate({"predict": "Guess well."})
    for birth in (
        Birth(OTHER, SEED, "predict", "gradient", "It is vague."),
        Birth(grandchild, OTHER, "predict", "join"),
    ):
        studies.born(birth)
    studies.record([trial(grandchild, [0], [0])], mean, calls=2)  # its parent is never scored
    studies.record([trial(OTHER, [0], [0])], mean, calls=3)

    seed, grand, other = (
        {name: one.user_attrs[name] for name in ("made by", "made of trial", "because") if name in one.user_attrs}
        for one in read(tmp_path).trials
    )
    assert seed == {}
    assert grand == {"made by": "join"}
    assert other == {"made by": "gradient", "made of trial": 0, "because": "It is vague."}


def test_a_note_has_what_an_attribute_has_no_room_for(tmp_path: Path) -> None:
    studies = Studies(tmp_path)
    long = Candidate({"first": "Line one.\nLine two.", "second": "word " * 900})
    studies.born(Birth(long, SEED, "first", "gradient", "It is vague."))
    studies.record([trial(SEED, [0], [1]), trial(long, [0], [1])], mean, calls=2)
    studies.conclude({"verdict": "Kept: no gain."})

    study = read(tmp_path)
    attributes = study._storage.get_study_system_attrs(study._study_id)

    def note(place: str) -> str:
        pieces = [name for name in attributes if name.startswith(f"dashboard:{place}note_str:")]
        assert all(0 < len(attributes[name]) <= 2045 for name in pieces)
        assert attributes[f"dashboard:{place}note_ver"] == 1
        return "".join(attributes[f"dashboard:{place}note_str:{at}"] for at in range(len(pieces)))

    assert note("0:") == "**predict**  \n  \nSort."
    first, second = note("1:").split("**second**")
    assert first == "**first**  \n  \nLine one.  \nLine two.  \n  \n"
    assert second == "  \n  \n" + "word " * 900 + "  \n  \n*gradient* of trial 0  \n  \n> It is vague."
    assert note("") == "Kept: no gain."


def test_scores_are_called_scores(tmp_path: Path) -> None:
    studies = Studies(tmp_path)
    studies.search("box", RandomSampler(seed=0))
    studies.close()
    assert [read(tmp_path, name).metric_names for name in (CANDIDATES, "box")] == [["score"], ["score"]]


def test_a_length_that_optuna_has_no_room_for_is_cut_to_what_it_has(tmp_path: Path) -> None:
    studies = Studies(tmp_path)
    texts = ("", "a" * 1_000_001)
    studies.record([trial(Candidate({"predict": text}), [0], [1]) for text in texts], mean, calls=2)
    assert [one.params for one in read(tmp_path).trials] == [
        {"characters: predict": 1},
        {"characters: predict": 1_000_000},
    ]


def test_a_run_opened_again_starts_its_study_anew(tmp_path: Path) -> None:
    for lock in (False, True):
        studies = Studies(tmp_path)
        studies.record([trial(SEED, [0], [1])], mean, calls=1)  # and is killed
        if lock:
            (tmp_path / f"{FILE}.lock").touch()  # while it wrote
    studies = Studies(tmp_path)
    studies.record([trial(OTHER, [0], [0])], mean, calls=1)
    studies.close()
    assert [one.user_attrs["instructions: predict"] for one in read(tmp_path).trials] == ["Guess."]


def test_a_search_of_numbers_is_a_study_beside_it_whose_open_trials_fail_at_the_end(tmp_path: Path) -> None:
    studies = Studies(tmp_path)
    search = studies.search("box", RandomSampler(seed=0))
    box: Any = {"z0": FloatDistribution(-1, 1)}
    first, _ = search.ask(box), search.ask(box)
    search.tell(first, 0.5)
    studies.close()

    assert [(one.state.name, one.value) for one in read(tmp_path, "box").trials] == [("COMPLETE", 0.5), ("FAIL", None)]
    assert read(tmp_path, "box").direction.name == "MAXIMIZE"


def test_a_run_says_in_its_study_what_it_came_to(tmp_path: Path) -> None:
    method = APE(
        metric="accuracy",
        lm=toy.Models(toy.answer, toy.right).lm,
        proposer=scripted([toy.RIGHT]),
        candidates=1,
        run_dir=tmp_path / "run",
        threads=1,
    )
    method.compile(toy.Sorter(), trainset=toy.rows(10), valset=toy.rows(24, 10))

    study = read(tmp_path / "run")
    assert [one.user_attrs["instructions: predict"] for one in study.trials] == [toy.SEED, toy.RIGHT]
    assert [one.value for one in study.trials] == [0.5, 1.0]
    assert study.trials[1].user_attrs["calls"] == 1 + 2 * 10
    made = {name: study.trials[1].user_attrs[name] for name in ("made by", "made of trial")}
    assert made == {"made by": "proposal", "made of trial": 0}
    assert (study.user_attrs["baseline"], study.user_attrs["compiled"], study.user_attrs["replaced"]) == (
        0.5,
        1.0,
        True,
    )


def test_a_file_that_cant_be_written_is_told_as_the_run_folders(tmp_path: Path) -> None:
    with open_run(tmp_path, {}) as run:
        (tmp_path / f"{FILE}").unlink(missing_ok=True)
        (tmp_path / FILE).mkdir()
        with pytest.raises(RunError, match=r"^Can't write the run folder .*Is a directory"):
            run.write_trials([trial(SEED, [0], [1])])
        (tmp_path / FILE).rmdir()


def test_optuna_says_nothing_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verbosity = optuna.logging.get_verbosity()
    Studies(tmp_path).close()
    assert capsys.readouterr().err == ""
    assert optuna.logging.get_verbosity() == verbosity


def test_importing_preceptor_and_its_methods_loads_no_optuna() -> None:
    command = "import sys, preceptor, preceptor.teleprompters; print('optuna' in sys.modules, 'cmaes' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]
