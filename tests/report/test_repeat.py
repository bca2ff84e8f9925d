from __future__ import annotations

import shlex

from preceptor.report.repeat import command


def test_options_are_called_as_they_are_typed_and_quoted_for_a_shell() -> None:
    asked = {
        "target": "text -> label: Literal['a', 'b']",
        "data": "my rows.csv",
        "validation": "v.csv",
        "lm": "openai/x",
        "api_base": None,
        "prices": ["openai/x=0.5/1.5", "openai/y=1/2"],
        "knobs": {"candidates": "20", "mode": "labels"},
        "seed": 0,
    }
    assert shlex.split(command(asked).replace("\\\n", "")) == [
        *("preceptor", "compile", "text -> label: Literal['a', 'b']"),
        *("--data", "my rows.csv", "--val", "v.csv", "--lm", "openai/x"),
        *("--price", "openai/x=0.5/1.5", "--price", "openai/y=1/2"),
        *("--set", "candidates=20", "--set", "mode=labels", "--seed", "0"),
    ]
