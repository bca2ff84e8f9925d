"""The demo task is what its README says it is."""

from __future__ import annotations

import re
from collections import Counter

from preceptor import demo
from preceptor.cli.inputs import program_of, rows_of

PARTS = {"train": 16, "validation": 25, "test": 39}
QUEUES = {"bell", "bench", "desk", "dock", "door", "vault"}


def test_every_part_loads_and_the_queues_are_balanced_but_for_the_noise() -> None:
    program = program_of(demo.SIGNATURE, demo.INSTRUCTIONS)
    for part, each in PARTS.items():
        rows = rows_of(program, str(demo.FOLDER), part=part)
        assert len(rows) == 6 * each
        counts = Counter(row.queue for row in rows)
        assert set(counts) == QUEUES
        assert all(abs(count - each) <= 6 for count in counts.values())


def test_no_ticket_occurs_twice_and_none_names_its_queue() -> None:
    program = program_of(demo.SIGNATURE, demo.INSTRUCTIONS)
    texts = [row.text for part in PARTS for row in rows_of(program, str(demo.FOLDER), part=part)]
    assert len(set(texts)) == len(texts) == 480
    assert [text for text in texts if QUEUES & set(re.findall(r"\w+", text.lower()))] == []


def test_the_readme_lists_the_noisy_tickets_of_all_parts() -> None:
    text = (demo.FOLDER / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"t\d{3} (?:bell|bench|desk|dock|door|vault)", text)
    assert len(listed) == len(set(listed)) == 19
