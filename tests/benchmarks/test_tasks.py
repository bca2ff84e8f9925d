"""Published tasks are read from their upstream's own layout; the files here are made up."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import dspy
import pytest

from preceptor.benchmarks import tasks
from preceptor.benchmarks.tasks import Published, ethos, gsm8k, induction, openai_moderation
from preceptor.benchmarks.tasks.published import drawn, parts
from preceptor.errors import ConfigError, DataError
from preceptor.lm.seam import predictors


def test_every_task_named_in_the_docs_is_known() -> None:
    known = tasks.known()
    assert {"tickets", "subj", "trec", "agnews", "sst-2", "ethos", "liar", "openai_moderation", "gsm8k"} < set(known)
    assert len(induction.METRICS) == 24
    assert set(induction.METRICS) < set(known)


@pytest.mark.parametrize("task", tasks.known().values(), ids=tasks.known())
def test_a_task_makes_a_program_with_its_seed_instruction_and_a_metric_of_its_output(task: Published) -> None:
    [(_, predictor)] = predictors(task.student())
    assert predictor.signature.instructions == task.instructions
    assert list(predictor.signature.output_fields) == [task.output]
    assert task.scorer().name
    assert task.licence
    assert task.citation
    [(_, other)] = predictors(task.student("Do better."))
    assert other.signature.instructions == "Do better."


def test_an_unknown_task_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"^No task 'sbj'; there are .*subj"):
        tasks.find("sbj")


def test_a_draw_of_sixteen_shots_is_read_by_its_seed_and_the_test_file_is_shuffled(tmp_path: Path) -> None:
    place = tmp_path / "lmbff_16shot" / "subj"
    (place / "16-21").mkdir(parents=True)
    for part in ("train", "dev"):
        (place / "16-21" / f"{part}.tsv").write_text(f"sentence\tlabel\n{part} one\t0\n{part} two\t1\n")
    (place / "test.tsv").write_text("sentence\tlabel\n" + "".join(f"row {n}\t{int(n > 250)}\n" for n in range(500)))

    found = tasks.find("subj").rows(tmp_path, 1)

    assert [(row.sentence, row.kind) for row in found.train] == [
        ("train one", "subjective"),
        ("train two", "objective"),
    ]
    assert [row.sentence for row in found.val] == ["dev one", "dev two"]
    assert len(found.test) == len({row.sentence for row in found.test}) == 200
    assert 70 < sum(row.kind == "subjective" for row in found.test) < 130
    with pytest.raises(DataError, match="5 draws: seeds 0 to 4, not 5"):
        tasks.find("subj").rows(tmp_path, 5)


def test_published_rows_to_validate_on_that_are_the_train_rows_again_give_way_to_fresh_ones(tmp_path: Path) -> None:
    place = tmp_path / "lmbff_16shot" / "subj"
    (place / "16-21").mkdir(parents=True)
    test = "".join(f"test {n}\t{n % 2}\n" for n in range(400))
    (place / "test.tsv").write_text(f"sentence\tlabel\n{test}")
    for part in ("train", "dev"):
        (place / "16-21" / f"{part}.tsv").write_text("sentence\tlabel\ntest 7\t1\nten\t0\n")

    train, val, tested = tasks.find("subj").rows(tmp_path, 1)
    texts = [{row.sentence for row in rows} for rows in (train, val, tested)]
    assert (len(train), Counter(row.kind for row in val)) == (2, Counter(subjective=16, objective=16))
    assert len(set.union(*texts)) == sum(map(len, texts)) - len(texts[0] & texts[2])
    assert tasks.find("subj").rows(tmp_path, 1).val == val


def test_ethos_keeps_the_comments_its_annotators_agreed_on(tmp_path: Path) -> None:
    (tmp_path / "ethos").mkdir()
    shares = ["0.0", "0.5", "0.7", "1.0"]
    lines = [f'"said; ""{n}"" {share}";{share}' for n in range(200) for share in shares]
    (tmp_path / "ethos" / "Ethos_Dataset_Binary.csv").write_text("comment;isHate\n" + "\n".join(lines) + "\n")

    train, val, test = ethos.TASK.rows(tmp_path, 0)

    rows = [*train, *val, *test]
    assert [len(train), len(val), len(test)] == [64, 64, 200]
    assert all(row.hate == ("no" if row.comment.endswith("0.0") else "yes") for row in rows)
    assert not any(row.comment.endswith("0.5") for row in rows)
    assert rows[0].comment.startswith('said; "')


def test_a_moderation_row_whose_missing_flags_leave_it_open_is_left_out(tmp_path: Path) -> None:
    flags: dict[str, int] = dict.fromkeys(openai_moderation.FLAGS, 0)
    kinds: list[dict[str, int]] = [flags, {**flags, "V": 1}, {"H": 1}, {"H": 0}]
    (tmp_path / "openai_moderation").mkdir()
    lines = [json.dumps({"prompt": f"text {n} {at}"} | kinds[at]) for n in range(200) for at in range(4)]
    (tmp_path / "openai_moderation" / "samples-1680.jsonl").write_text("\n".join(lines))

    found = openai_moderation.TASK.rows(tmp_path, 0)

    said = {row.text.split()[-1]: row.flagged for part in found for row in part}
    assert said == {"0": "no", "1": "yes", "2": "yes"}


def test_moderation_rows_are_shuffled_before_they_are_halved(tmp_path: Path) -> None:
    (tmp_path / "openai_moderation").mkdir()
    flags: dict[str, int] = dict.fromkeys(openai_moderation.FLAGS, 0)
    lines = [json.dumps({"prompt": f"text {n}"} | flags | {"V": int(n < 400)}) for n in range(800)]
    (tmp_path / "openai_moderation" / "samples-1680.jsonl").write_text("\n".join(lines))

    found = openai_moderation.TASK.rows(tmp_path, 0)

    for part in found:
        assert 0.3 < sum(row.flagged == "yes" for row in part) / len(part) < 0.7
    assert found.test == openai_moderation.TASK.rows(tmp_path, 1).test


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [("So 1,200 dollars.", True), ("$1200.00", True), ("1200 then 7", False), ("none", False), ("-1200", False)],
)
def test_the_last_number_of_an_answer_counts(answer: str, is_right: bool) -> None:
    assert gsm8k.last_number(dspy.Example(answer="1200"), SimpleNamespace(answer=answer)) is is_right


@pytest.mark.parametrize(
    ("row", "shown", "accepted"),
    [
        ({"input": "sane", "output": "insane"}, "sane", "insane"),
        ({"input": "pig", "output": "big", "other_rhymes": ["big", "dig"]}, "pig", ["big", "dig"]),
        ({"input": "x", "output": "y", "possible_translations": ["z"]}, "x", ["y", "z"]),
        ({"concept": "c", "items": ["a", "b"], "all_common_concepts": ["c", "d"]}, "a, b", ["c", "d"]),
    ],
)
def test_an_induction_row_is_read_with_every_accepted_answer(
    row: dict[str, object], shown: str, accepted: object
) -> None:
    assert induction._pair(row) == (shown, accepted)


def test_cause_and_effect_stand_in_either_order() -> None:
    rows = [induction._pair({"cause": f"cause {n}", "effect": "effect"}) for n in range(40)]
    first = sum(shown.startswith("Sentence 1: cause") for shown, _ in rows)
    assert 8 < first < 32
    assert [wanted for _, wanted in rows[:2]] == ["cause 0", "cause 1"]


def test_each_seed_draws_its_own_rows_and_all_are_tested_on_the_same() -> None:
    pool = [dspy.Example(text=str(n), label="ab"[n % 2]).with_inputs("text") for n in range(40)]
    test = [dspy.Example(text=f"test {n}", label="a").with_inputs("text") for n in range(9)]
    one, two = (parts(pool, test, (10, 6, 5), seed, "label") for seed in (0, 1))
    assert [row.text for row in one.train] != [row.text for row in two.train]
    assert [row.text for row in one.test] == [row.text for row in two.test]
    assert sum(row.label == "a" for row in one.train) == 5
    assert not {row.text for row in one.train} & {row.text for row in one.val}
    assert len(drawn(pool, 100)) == 40
    with pytest.raises(DataError, match="30 and 11 rows are asked for, there are 40"):
        parts(pool, test, (30, 11, 5), 0, "label")


def test_what_is_tested_on_is_neither_trained_nor_confirmed_on() -> None:
    pool = [dspy.Example(text=str(n), label="ab"[n % 2]).with_inputs("text") for n in range(40)]
    again = [dspy.Example(text=row.text, label="b").with_inputs("text") for row in pool[:9]]  # whatever the label
    train, val, test = parts(pool, again, (20, 15, 5), 0, "label")
    assert not {row.text for row in [*train, *val]} & {row.text for row in test}
    assert (len(train), len(val)) == (20, 15)
    with pytest.raises(DataError, match="20 and 16 rows are asked for, there are 35 that aren't tested on"):
        parts(pool, again, (20, 16, 5), 0, "label")


def test_a_persons_instruction_is_the_first_that_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "instruction_induction" / "annotations"
    folder.mkdir(parents=True)
    (folder / "antonyms.json").write_text(json.dumps({"annotations": ["Write the opposite.", "What is its opposite?"]}))
    human = tasks.find("antonyms").human
    assert human is not None
    assert human(tmp_path) == "Write the opposite."
    assert tasks.find("trec").human is None
