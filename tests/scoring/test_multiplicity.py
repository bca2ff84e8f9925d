"""Several tests at once: Holm's correction, and which of them can find anything at all."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from preceptor.scoring.metrics import wrap
from preceptor.scoring.multiplicity import confirmable, holm
from preceptor.scoring.statistics import compare
from preceptor.scoring.trial import Outcome

P_VALUES = st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=8)


@given(P_VALUES)
def test_holms_p_values_lie_between_the_raw_ones_and_bonferronis_in_the_same_order(p_values: dict[str, float]) -> None:
    adjusted = holm(p_values)

    assert set(adjusted) == set(p_values)
    for name, p_value in p_values.items():
        assert p_value <= adjusted[name] <= min(1.0, len(p_values) * p_value)
    ranked = sorted(p_values, key=lambda name: p_values[name])
    assert [adjusted[name] for name in ranked] == sorted(adjusted.values())


def test_of_four_tests_that_find_nothing_one_in_twenty_families_claims_something() -> None:
    rng, families = random.Random(1), 4000
    claimed = sum(min(holm({name: rng.random() for name in "abcd"}).values()) < 0.05 for _ in range(families))
    assert 0.035 < claimed / families < 0.065


@given(st.lists(st.integers(0, 20), max_size=6))
def test_what_is_confirmable_passes_holm_if_every_row_gets_better_and_one_more_wouldnt(sizes: list[int]) -> None:
    rows = {str(at): size for at, size in enumerate(sizes)}
    metric = wrap("accuracy", "label")
    best = {
        name: compare([Outcome("scored", 0.0)] * size, [Outcome("scored", 1.0)] * size, metric).p_value
        for name, size in rows.items()
        if size
    }

    able = confirmable(rows)

    assert all(p_value < 0.05 for p_value in holm({name: best[name] for name in able}).values())
    for more in sorted(set(best) - set(able), key=lambda name: -rows[name])[:1]:
        assert best[more] >= 0.05 / (len(able) + 1)
