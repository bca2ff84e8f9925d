"""How a proposed instruction is read; what is shown for it, the tests of APE and of InstructZero tell."""

from __future__ import annotations

import pytest

from preceptor.teleprompters.induction import clean


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ('The instruction was: "Name the capital."\n\nInput: France\nOutput: Paris', "Name the capital."),
        ('The instruction was "Name the capital."', "Name the capital."),
        ("Instruction: Name the capital.", "Name the capital."),
        ("Output:\nName the capital.", "Name the capital."),
        ("“Name the capital.”", "Name the capital."),
        ("```\nName the capital.\n```", "Name the capital."),
        ("Output the capital of the country.", "Output the capital of the country."),
        ('Output "yes" or "no".', 'Output "yes" or "no".'),
        ("Answer 'yes' or 'no'", "Answer 'yes' or 'no'"),
        ("'yes' if it is, else 'no'", "'yes' if it is, else 'no'"),
        ("Name it.\nIn one word.", "Name it.\nIn one word."),
        ("", ""),
        ('""', ""),
        ("\n\nInput: France", ""),
    ],
)
def test_proposals_are_cleaned_of_what_is_no_instruction(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned
