"""Several tests at once: what may be claimed together without being wrong more often than once in twenty.

Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979.
"""

from __future__ import annotations

from collections.abc import Mapping

from preceptor.scoring.statistics import CONFIDENCE


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return Holm's adjusted p-values: those below 0.05 are claims of which all hold, 19 times in 20.

    Bonferroni's correction holds under any dependence, and so does this; it claims whatever Bonferroni's does,
    and more.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def confirmable(rows: Mapping[str, int]) -> list[str]:
    """Return the names that could all be claimed together, if all of their rows changed for the better.

    With n rows, no paired test has a p-value below 2 / 2^n. The names with the most rows are taken, as many
    as still reach Holm's first threshold.

    Example:
        >>> confirmable({"a": 9, "b": 7, "c": 6}), confirmable({"a": 5})  # 2 / 2^7 < 0.05 / 2, but 2 / 2^6 > 0.05 / 3
        (['a', 'b'], [])
    """
    order = sorted(rows, key=lambda name: (-rows[name], name))
    for count in range(len(order), 0, -1):
        if 2 * 0.5 ** rows[order[count - 1]] < (1 - CONFIDENCE) / count:
            return order[:count]
    return []
