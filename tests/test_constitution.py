from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.constitution import Change, Constitution, Edit, Principle
from preceptor.errors import ConfigError

TWO = Constitution("Sort.", (Principle(3, "Red is yes."), Principle(5, "Blue is no.")))
LINES = st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1).filter(
    lambda text: bool(text.strip())
)


def test_principles_are_numbered_below_the_users_words() -> None:
    assert TWO.text == "Sort.\n\nPrinciples:\n1. Red is yes.\n2. Blue is no."
    assert Constitution("Sort.").text == "Sort."
    assert Constitution("", TWO.principles[:1]).text == "Principles:\n1. Red is yes."


def test_a_rendered_constitution_is_read_again_and_numbered_anew() -> None:
    assert Constitution.parsed(TWO.text) == Constitution(
        "Sort.", (Principle(1, "Red is yes."), Principle(2, "Blue is no."))
    )
    assert Constitution.parsed("Principles:\n1. Red.").principles == (Principle(1, "Red."),)


@pytest.mark.parametrize(
    "instruction",
    [
        "",
        "Sort.",
        "Sort.\n\nPrinciples:\n",
        "Sort.\n\nPrinciples:\n1. ",
        "Sort.\n\nPrinciples:\n2. Red.",
        "Sort.\n\nPrinciples:\n1. Red.\n3. Blue.",
        "Sort.\n\nPrinciples:\n1. Red.\nBe kind.",
        "Sort.\n\nPrinciples:\n1. Red.\n",
        "Sort.\nPrinciples:\n1. Red.",
        "\n\nPrinciples:\n1. Red.",
    ],
)
def test_what_is_no_list_of_principles_is_preamble(instruction: str) -> None:
    assert Constitution.parsed(instruction) == Constitution(instruction)


@given(st.text(), st.lists(LINES, max_size=4))
def test_reading_loses_nothing(preamble: str, texts: list[str]) -> None:
    rendered = Constitution(preamble, tuple(Principle(at, text) for at, text in enumerate(texts, 1))).text
    found = Constitution.parsed(rendered)
    assert found.text == rendered
    assert [one.text for one in found.principles][len(found.principles) - len(texts) :] == texts


def test_an_addition_comes_last_and_remembers_why() -> None:
    added = TWO.edited(Edit("add", text="Green is no."), 9, "It says nothing of green.")
    assert added.principles == (
        *TWO.principles,
        Principle(9, "Green is no.", (Change("add", "It says nothing of green."),)),
    )
    assert added.preamble == "Sort."
    assert (TWO.newest, added.newest, Constitution("Sort.").newest) == (5, 9, 0)


def test_a_revision_keeps_place_identity_and_history() -> None:
    once = TWO.edited(Edit("revise", (3,), "Red is no."), because="Red was wrong.")
    twice = once.edited(Edit("revise", (3,), "Red is blue."), because="Still.")
    history = (Change("revise", "Red was wrong."), Change("revise", "Still."))
    assert twice.principles == (Principle(3, "Red is blue.", history), TWO.principles[1])


def test_a_removal_takes_one_principle_out() -> None:
    assert TWO.edited(Edit("remove", (3,))).principles == TWO.principles[1:]
    assert TWO.edited(Edit("remove", (3,))).edited(Edit("remove", (5,))) == Constitution("Sort.")


def test_a_merger_stands_in_the_place_of_the_first_with_both_histories() -> None:
    three = TWO.edited(Edit("add", text="Green is no."), 9, "green")
    merged = three.edited(Edit("merge", (5, 9), "Blue and green are no."), because="alike")
    assert merged.principles == (
        TWO.principles[0],
        Principle(5, "Blue and green are no.", (Change("add", "green"), Change("merge", "alike"))),
    )


def test_what_comes_from_the_users_own_words_is_known_through_revisions_and_mergers() -> None:
    four = TWO.edited(Edit("add", text="Green is no."), 9).edited(Edit("add", text="Grey is no."), 10)
    assert [one.is_users for one in four.principles] == [True, True, False, False]
    revised = four.edited(Edit("revise", (3,), "Red is no.")).edited(Edit("revise", (9,), "Green is yes."))
    assert [one.is_users for one in revised.principles] == [True, True, False, False]
    own = revised.edited(Edit("merge", (5, 9), "Blue is no, green yes."))
    assert own.principle(5).is_users
    assert own.edited(Edit("merge", (10, 5), "All are no.")).principle(10).is_users
    assert not revised.edited(Edit("merge", (9, 10), "Green is yes, grey no.")).principle(9).is_users
    assert [row["history"] for row in own.as_rows("predict")] == [
        "the user's own, revise",
        "the user's own, add, revise, merge",
        "add",
    ]


@pytest.mark.parametrize(
    "edit",
    [
        Edit("add", text="Green is no."),
        Edit("revise", (3,), "Red is no."),
        Edit("remove", (3,)),
        Edit("merge", (3, 5), "Red is yes, blue no."),
    ],
)
def test_what_principles_are_worth_is_not_known_after_an_edit(edit: Edit) -> None:
    edited = TWO.measured({3: 0.2, 5: 0.1}, 50).edited(edit, 9)
    assert {(one.worth, one.rows) for one in edited.principles} == {(None, 0)}


def test_what_can_be_done_depends_on_what_is_there() -> None:
    assert Constitution("Sort.").edits(1) == [Edit("add")]
    assert TWO.edits(3) == [
        Edit("add"),
        Edit("revise", (3,)),
        Edit("revise", (5,)),
        Edit("remove", (3,)),
        Edit("remove", (5,)),
        Edit("merge", (3, 5)),
    ]
    assert TWO.edits(2) == TWO.edits(3)[1:]


def test_the_two_that_share_most_words_may_be_merged() -> None:
    """Red and blue share 1 word of 5, red and green 2 of 4, blue and green 1 of 5."""
    three = TWO.edited(Edit("add", text="Green is YES."), 9)
    assert three.edits(9)[-1] == Edit("merge", (3, 9))


def test_an_edit_of_what_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^The constitution has no principle 4; it has 3, 5\.$"):
        TWO.edited(Edit("remove", (4,)))
    with pytest.raises(ConfigError, match=r"^The constitution has no principle 1; it has none\.$"):
        Constitution("Sort.").principle(1)


@pytest.mark.parametrize("text", ["", " ", "Red.\nBlue."])
def test_a_principle_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^A principle is one line of text, got '"):
        TWO.edited(Edit("revise", (3,), text))


def test_what_principles_are_worth_is_told_in_a_table() -> None:
    added = TWO.edited(Edit("add", text="Green is no."), 9, "It says nothing of green.").measured({9: 0.25}, 8)
    user, _, own = added.as_rows("predict")
    assert user == {
        "predictor": "predict",
        "identity": 3,
        "principle": "Red is yes.",
        "worth": None,
        "rows": 0,
        "history": "the user's own",
        "because": "",
    }
    assert (own["worth"], own["rows"], own["history"], own["because"]) == (0.25, 8, "add", "It says nothing of green.")
