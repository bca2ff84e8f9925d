from __future__ import annotations

from preceptor.scoring.trial import Candidate


def test_equal_candidates_have_equal_keys_whatever_the_order_of_their_predictors() -> None:
    first = Candidate({"a": "One.", "b": "Two."}, {"a": ({"x": 1, "y": 2},)})
    second = Candidate({"b": "Two.", "a": "One."}, {"a": ({"y": 2, "x": 1},)})

    assert first.key == second.key


def test_demonstrations_are_part_of_the_key() -> None:
    plain, shown = Candidate({"p": "Sort."}), Candidate({"p": "Sort."}, {"p": ({"text": "hi", "label": "a"},)})

    assert plain.key == '{"demos": {}, "instructions": {"p": "Sort."}}'
    assert shown.key == '{"demos": {"p": [{"label": "a", "text": "hi"}]}, "instructions": {"p": "Sort."}}'


def test_replacing_one_instruction_leaves_the_original_and_the_demonstrations_alone() -> None:
    demos = {"a": ({"text": "hi"},)}
    before = Candidate({"a": "One.", "b": "Two."}, demos)

    after = before.with_instruction("b", "Three.")

    assert dict(after.instructions) == {"a": "One.", "b": "Three."}
    assert dict(after.demos) == demos
    assert dict(before.instructions) == {"a": "One.", "b": "Two."}
