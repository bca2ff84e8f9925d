from __future__ import annotations

import pytest

from preceptor.teleprompters.amendments import principle


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("<START>Red goes left.<END>", "Red goes left."),
        ("Sure!\n<START>\nRed goes\nleft.\n</START>", "Red goes left."),
        ("Red goes left.", "Red goes left."),
        ('"Red goes left."', "Red goes left."),
        ("<START>1. Red goes left.<END>", "Red goes left."),
        ("<START>- Principle: Red goes left.<END>", "Red goes left."),
        ("**New principle:** Red goes left.", "Red goes left."),
        ("<START>1. Red goes left.\n2. Blue goes right.<END>", "Red goes left."),
        ("- Red goes left.\n- Blue goes right.", "Red goes left."),
        ("3 items go left.", "3 items go left."),
        ("<START>Red goes left.<END><START>Blue goes right.<END>", "Red goes left."),
        ("Red goes left. Blue goes right, always and everywhere.", "Red goes left."),
        ("Red goes left, as long as nobody says otherwise.", ""),
        ("红色向左。 蓝色向右。", "红色向左。"),  # each character is a word, with its full stop one of them
        ("红色的东西都要向左边走。", ""),
        ("<START><END>", ""),
        ("", ""),
        (" \n", ""),
    ],
)
def test_a_principle_is_read_as_one_line_of_at_most_six_words(said: str, text: str) -> None:
    assert principle(said, 6) == text
