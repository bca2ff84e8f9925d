from __future__ import annotations

from preceptor.lineage import Descendant
from preceptor.report.candidates import MOST, MOST_IN_LINEAGE, MOST_OF_A_REGION, lineage, table
from preceptor.report.folder import Scored, Search


def scored(key: str, seen: int, score: float) -> Scored:
    return Scored(key, key, {"predict": key}, 0, 1, seen, score, (score - 0.1, score + 0.1))


def born(key: str, parent: str) -> Descendant:
    return Descendant(key, parent, "predict", "edit" if parent else "seed", "", {"predict": key}, 1, 0.5, is_kept=False)


def search(scores: list[Scored], births: list[Descendant], name: str = "") -> Search:
    return Search(name, scores, {one.key: one for one in births})


FAMILY = search(
    [
        scored("seed", 10, 0.5),
        scored("a", 10, 0.9),
        scored("b", 10, 0.7),
        scored("b", 20, 0.6),
        scored("seed", 20, 0.55),
    ],
    [born("seed", ""), born("a", "seed"), born("b", "a"), born("unscored", "seed")],
)


def test_those_on_the_most_rows_come_first_and_of_them_the_best() -> None:
    found = table(FAMILY, {"seed": "yours", "b": "compiled"})
    assert found is not None
    assert [(one.number, one.scored.key, one.scored.score, one.role) for one in found.best] == [
        (2, "b", 0.6, "compiled"),
        (0, "seed", 0.55, "yours"),
        (1, "a", 0.9, ""),
    ]
    assert (found.others, round(found.low, 2), round(found.high, 2)) == (0, 0.45, 1.0)
    assert [found.at(value) for value in (0.45, 0.725, 1.0)] == [0.0, 50.0, 100.0]


def test_the_table_of_a_region_is_shorter_and_says_how_many_are_left_out() -> None:
    many = [scored(str(number), 10, 0.5) for number in range(30)]
    whole, region = table(search(many, []), {}), table(search(many, [], "region 1"), {})
    assert whole is not None
    assert region is not None
    assert (len(whole.best), whole.others) == (MOST, 30 - MOST)
    assert (len(region.best), region.others) == (MOST_OF_A_REGION, 30 - MOST_OF_A_REGION)


def test_a_search_that_scored_nothing_has_no_table() -> None:
    assert table(search([], []), {}) is None


def test_each_candidate_stands_below_what_it_was_made_of() -> None:
    found = lineage(FAMILY, {"b": "compiled"})
    assert [(one.depth, one.number, one.parent, one.told.key, one.role) for one in found] == [
        (0, 0, None, "seed", ""),
        (1, 1, 0, "a", ""),
        (2, 2, 1, "b", "compiled"),
        (1, 3, 0, "unscored", ""),
    ]
    assert [one.scored.score if one.scored else None for one in found] == [0.55, 0.9, 0.6, None]


def test_of_a_large_family_the_best_and_their_ancestors_are_shown() -> None:
    chain = [born("seed", ""), *(born(f"c{n}", f"c{n - 1}" if n else "seed") for n in range(5))]
    wide = [born(f"w{n}", "seed") for n in range(MOST_IN_LINEAGE + 10)]
    scores = [scored("c4", 20, 0.9), *(scored(f"w{n}", 10, 1 - n / 100) for n in range(len(wide)))]
    found = lineage(search(scores, chain + wide), {})
    keys = [one.told.key for one in found]
    assert keys[:6] == ["seed", "c0", "c1", "c2", "c3", "c4"]
    assert keys[6:] == [f"w{n}" for n in range(MOST_IN_LINEAGE - 1)]
    assert [one.hidden for one in found[:2]] == [11, 0]


def test_a_family_that_goes_in_a_circle_ends() -> None:
    assert lineage(search([scored("a", 1, 0.5)], [born("a", "b"), born("b", "a")]), {}) == []


def test_without_parents_there_is_no_lineage() -> None:
    assert lineage(search([scored("seed", 1, 0.5)], [born("seed", "")]), {}) == []
