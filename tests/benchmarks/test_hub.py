"""Published tasks read by `datasets`, in a process of its own, from a hub on the loopback interface.

The rows are made up; repositories, revisions, files, columns and label numbers are as the hub has them.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from preceptor.benchmarks import tasks
from preceptor.benchmarks.tasks import liar, openai_moderation
from preceptor.errors import ConfigError
from preceptor.testing.hub import card, lines, parquet, serving

Found = Mapping[str, Any]
"""Task and seed -> its parts, or what was wrong."""

READ = """
import json, sys
from preceptor.benchmarks import tasks
from preceptor.errors import DataError
found = {}
for asked in sys.argv[1:]:
    name, seed = asked.split()
    try:
        found[asked] = [[row.toDict() for row in part] for part in tasks.find(name).rows(None, int(seed))]
    except DataError as error:
        found[asked] = str(error)
print(json.dumps(found))
"""

COARSE = ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]
LIAR = ["false", "half-true", "mostly-true", "true", "barely-true", "pants-fire"]


def corpus(labels: int, of_each: int, column: str = "label", start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"row {start + n}", column: n % labels} for n in range(labels * of_each)]


def half_known(part: str, labels: int, column: str = "label") -> list[dict[str, Any]]:
    """Return the rows of a corpus of which all test rows are train rows once more."""
    return corpus(labels, 480 // labels, column) if part == "train" else corpus(labels, 240 // labels, column, 240)


def statements() -> list[dict[str, Any]]:
    rest = {"job_title": "", "state_info": None, "party_affiliation": "none", "context": "a speech"}
    return [{"label": n % 6, "statement": f"Claim {n}.", **rest} for n in range(1300)]


def samples() -> list[dict[str, Any]]:
    flags: dict[str, Any] = dict.fromkeys(openai_moderation.FLAGS, 0)
    return [{"prompt": f"text {n}", **flags, "V": n % 2} for n in range(400)]


def sums(start: int) -> list[dict[str, Any]]:
    return [{"question": f"{n} + 1?", "answer": f"Add.\n#### 1,{n:03}"} for n in range(start, start + 100)]


def files() -> dict[str, dict[str, bytes]]:
    """Return what each task's repository holds."""
    comments = [{"text": f"said {n}", "label": n % 2} for n in range(400)]
    parts = ("train", "test")
    return {
        "subj": {
            "README.md": b"",
            "train.jsonl": lines(corpus(2, 40)),
            "test.jsonl": lines(corpus(2, 120, start=1000)),
        },
        "sst-2": {f"{part}.jsonl": lines(half_known(part, 2)) for part in (*parts, "dev")},
        "agnews": {
            f"data/{part}-00000-of-00001.parquet": parquet(
                half_known(part, 4), label=["World", "Sports", "Business", "Sci/Tech"]
            )
            for part in parts
        },
        "trec": {
            f"default/{part}/0000.parquet": parquet(half_known(part, 6, "coarse_label"), coarse_label=COARSE)
            for part in parts
        },
        "ethos": {
            "binary/train/0000.parquet": parquet(comments, label=["no_hate_speech", "hate_speech"]),
            "multilabel/train/0000.parquet": parquet([{"text": "other", "violence": 1}]),
        },
        "liar": {f"default/{part}/0000.parquet": parquet(statements(), label=LIAR) for part in (*parts, "validation")},
        "openai_moderation": {"samples-1680.jsonl.gz": gzip.compress(lines(samples()))},
        "gsm8k": {
            "README.md": card({name: parts for name in ("main", "socratic")}),
            **{f"main/{part}-00000-of-00001.parquet": parquet(sums(100 * (part == "test"))) for part in parts},
            **{
                f"socratic/{part}-00000-of-00001.parquet": parquet([{"question": "?", "answer": "0"}]) for part in parts
            },
        },
    }


def read(place: Path, asked: Sequence[str], revision: str = "") -> Found:
    """Return tasks' parts, read where a hub holds their data sets at the declared revisions, or at another one."""
    held = {}
    for name, each in files().items():
        declared = tasks.find(name).hub
        assert declared is not None
        held[declared.id, revision or declared.revision] = each
    with serving(held) as address:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(place)}
        done = subprocess.run(
            [sys.executable, "-c", READ, *asked],
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return read(tmp_path_factory.mktemp("hub"), ["subj 1", *(f"{name} 0" for name in files())])


def test_a_corpus_is_drawn_by_seed_into_sixteen_rows_a_label_and_a_fixed_test(found: Found) -> None:
    one, two = found["subj 0"], found["subj 1"]
    assert [len(part) for part in one] == [32, 32, 200]
    assert one[0] != two[0]
    assert one[2] == two[2]
    assert sum(row["kind"] == "subjective" for row in one[0]) == 16
    drawn = [row["sentence"] for part in one for row in part]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(
    ("task", "kinds"),
    [
        ("subj", ["objective", "subjective"]),
        ("sst-2", ["negative", "positive"]),
        ("agnews", ["world", "sports", "business", "technology"]),
        ("trec", ["abbreviation", "entity", "description", "human", "location", "number"]),
    ],
)
def test_labels_are_numbered_as_the_hub_has_them(found: Found, task: str, kinds: Sequence[str]) -> None:
    parts = found[f"{task} 0"]
    assert [len(part) for part in parts] == [16 * len(kinds), 16 * len(kinds), 200]
    train, val, test = ({row["sentence"] for row in part} for part in parts)
    assert not (train | val) & test
    assert all(row["kind"] == kinds[int(row["sentence"].split()[1]) % len(kinds)] for part in parts for row in part)


def test_one_configuration_of_several_is_read(found: Found) -> None:
    assert [len(part) for part in found["ethos 0"]] == [64, 64, 200]
    for row in (row for part in found["ethos 0"] for row in part):
        assert row["hate"] == ("no", "yes")[int(row["comment"].split()[1]) % 2]
    train, val, test = found["gsm8k 0"]
    assert [len(train), len(val), len(test)] == [48, 48, 100]
    assert all(row["answer"] == f"1{int(row['question'].split()[0]):03}" for row in test)


def test_the_statements_protegi_kept_get_its_text_and_label(found: Found) -> None:
    train, _, _ = found["liar 0"]
    for row in train:
        number = int(row["statement"].splitlines()[0].split()[-1].strip("."))
        assert row["statement"] == f"Statement: Claim {number}.\nJob title: \nState: \nParty: none\nContext: a speech"
        assert {0: "yes", 3: "no"}[number % 6] == row["lie"]


def test_samples_are_flagged_as_in_the_upstreams_file(found: Found) -> None:
    assert [len(part) for part in found["openai_moderation 0"]] == [64, 64, 200]
    for row in (row for part in found["openai_moderation 0"] for row in part):
        assert row["flagged"] == ("no", "yes")[int(row["text"].split()[1]) % 2]


def test_another_revision_than_the_declared_one_is_not_taken(tmp_path: Path) -> None:
    said = read(tmp_path, ["subj 0"], revision="0" * 40)["subj 0"]
    assert "'SetFit/subj' can't be had from the hub" in said


def test_every_task_but_our_own_and_the_induction_ones_says_where_it_is_on_the_hub() -> None:
    known = tasks.known().values()
    assert {task.name for task in known if task.hub is None and task.human is None} == {"tickets"}
    assert {task.name for task in known if task.hub and not re.fullmatch("[0-9a-f]{40}", task.hub.revision)} == {
        "ethos",
        "liar",
        "openai_moderation",
    }
    assert tasks.find("subj").source(None) == "SetFit/subj@f3c1162e678417f664d76b21864fdb87b0615fcf"
    assert tasks.find("subj").source(Path("data")) == "upstream"
    assert liar.KEPT == {0: 1, 3: 0}


def test_an_induction_task_is_told_to_need_its_files() -> None:
    with pytest.raises(ConfigError, match=r"^The task antonyms is read .* pass --data-dir"):
        tasks.find("antonyms").rows(None, 0)
