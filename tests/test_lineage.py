from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preceptor.errors import RunError
from preceptor.lineage import Birth, Descendant, descendants, folder_of, key_of
from preceptor.scoring.trial import Candidate

SEED, EDIT, VARIATION = ({"predict": text} for text in ("Sort.", "Sort well.", "Sort with care."))


def write(place: Path, name: str, *objects: Any) -> None:
    (place / name).write_text("".join(json.dumps(one) + "\n" for one in objects), encoding="utf-8")


def trial(instructions: dict[str, str], rows: list[int], scores: list[float | None]) -> dict[str, Any]:
    return {"instructions": instructions, "rows": rows, "scores": scores}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    births = [
        Birth(Candidate(EDIT), Candidate(SEED), "predict", "gradient", "It is too short."),
        Birth(Candidate(VARIATION), Candidate(EDIT), "predict", "paraphrase"),
    ]
    write(tmp_path, "lineage.jsonl", *(birth.as_dict() for birth in births))
    trials = [trial(SEED, [3, 1], [0.0, 1.0]), trial(EDIT, [3, 1], [1.0, 1.0]), trial(EDIT, [1, 7], [1.0, None])]
    write(tmp_path, "trials.jsonl", *trials)
    write(tmp_path, "result.json", {"instructions": EDIT})
    return tmp_path


def test_a_birth_is_written_with_the_keys_of_both_and_what_led_to_it() -> None:
    line = Birth(Candidate(EDIT), Candidate(SEED), "predict", "gradient", "It is too short.").as_dict()
    assert line == {
        "key": key_of(EDIT),
        "parent": key_of(SEED),
        "predictor": "predict",
        "how": "gradient",
        "because": "It is too short.",
        "instructions": EDIT,
    }


def test_candidates_come_with_the_different_rows_they_saw_and_their_mean_score(run: Path) -> None:
    assert descendants(run) == [
        Descendant(key_of(SEED), "", "", "seed", "", SEED, 2, 0.5, is_kept=False),
        Descendant(key_of(EDIT), key_of(SEED), "predict", "gradient", "It is too short.", EDIT, 3, 1.0, is_kept=True),
        Descendant(key_of(VARIATION), key_of(EDIT), "predict", "paraphrase", "", VARIATION, 0, None, is_kept=False),
    ]


def test_a_run_without_a_result_has_kept_nothing(run: Path) -> None:
    (run / "result.json").unlink()
    assert not any(one.is_kept for one in descendants(run))


def test_a_last_line_that_a_kill_cut_off_is_left_out(run: Path) -> None:
    for name in ("lineage.jsonl", "trials.jsonl"):
        with (run / name).open("a", encoding="utf-8") as file:
            file.write('{"instructions": {"pred')
    assert len(descendants(run)) == 3


def test_the_run_folder_is_found_from_the_program_saved_in_it(run: Path) -> None:
    assert folder_of(run) == folder_of(run / "program") == run


def test_a_folder_without_lineage_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is no run folder with a lineage\.jsonl, nor a program saved in one\."):
        folder_of(tmp_path / "program")


@pytest.mark.parametrize("name", ["lineage.jsonl", "trials.jsonl"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{oops\n", r"is missing or damaged\. Compile into the folder again"),
        ("[1]\n", r"line 1, isn't what a run writes\."),
        ('{"instructions": "Sort."}\n', r"line 1, isn't what a run writes\."),
        ('{"instructions": {"predict": 3}}\n', r"line 1, isn't what a run writes\."),
        ('{"instructions": {"predict": "Sort."}, "because": 3}\n', r"line 1, isn't what a run writes\."),
        ('{"instructions": {"predict": "Sort."}, "rows": ["3"]}\n', r"line 1, isn't what a run writes\."),
        ('{"instructions": {"predict": "Sort."}, "rows": 3}\n', r"line 1, isn't what a run writes\."),
        (
            '{"instructions": {"predict": "Sort."}, "rows": [1], "scores": ["x"]}\n',
            r"line 1, isn't what a run writes\.",
        ),
    ],
)
def test_a_damaged_file_is_refused(run: Path, name: str, text: str, message: str) -> None:
    (run / name).write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=message):
        descendants(run)


@pytest.mark.parametrize("text", ["{oops", "[]", "{}", '{"instructions": 3}'])
def test_a_damaged_result_is_refused(run: Path, text: str) -> None:
    (run / "result.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=r"result\.json is damaged\."):
        descendants(run)


def test_a_missing_file_of_trials_is_named(run: Path) -> None:
    (run / "trials.jsonl").unlink()
    with pytest.raises(RunError, match=r"trials\.jsonl is missing or damaged\."):
        descendants(run)
