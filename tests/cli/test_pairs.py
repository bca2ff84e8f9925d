"""Options given as name=value."""

from __future__ import annotations

import pytest

from preceptor.cli.pairs import pair, pairs
from preceptor.errors import ConfigError


def test_a_value_may_hold_equals_signs_and_a_price_s_model_too() -> None:
    assert pair("--set", "stop==a=b") == ("stop", "=a=b")
    assert pair("--price", "org/a=b=0.15,0.6") == ("org/a=b", "0.15,0.6")


def test_names_are_read_as_often_as_given() -> None:
    assert pairs("--column", ["text=Message Body", "label=kind"]) == {"text": "Message Body", "label": "kind"}
    assert pairs("--column", None) == {}


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["steps"], r"^--column 'steps' is not name=value\.$"),
        (["a=1", "b=2", "a=3"], r"^--column gives a twice, as 1 and as 3; give it once\.$"),
    ],
)
def test_what_is_no_pair_or_is_given_twice_is_refused(texts: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        pairs("--column", texts)
