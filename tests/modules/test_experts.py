"""The program of several experts: who answers, and what the prediction says of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import dspy
import numpy as np
import pytest

from preceptor.errors import ConfigError
from preceptor.lm.embedding import Embedder
from preceptor.modules import Classify, Experts
from preceptor.regions import Router
from preceptor.testing import asked, simulated, system

SIGNATURE = "text -> label: Literal['yes', 'no']"


def embed(texts: Sequence[str]) -> list[list[float]]:
    """Fruit in one direction, tools in another, socks between but nearer to the tools, and a question in none."""
    places = {"fruit": [1.0, 0.0], "tool": [0.0, 1.0], "sock": [3.0, 4.0], "?": [0.0, 0.0]}
    return [places.get(text.split()[-1], [1.0, 1.0]) for text in texts]


def router(fields: tuple[str, ...] = ("text",)) -> Router:
    centroids = np.eye(2, dtype=np.float32)
    probe = np.array([0.5**0.5, 0.5**0.5], dtype=np.float32)
    return Router(Embedder("topics", embed), fields, ("region 1", "region 2"), centroids, 0.1, probe)


def experts() -> Experts:
    return Experts(Classify(SIGNATURE, "Default."), {"region 2": Classify(SIGNATURE, "For tools.")}, router())


@pytest.mark.parametrize(
    ("text", "instructions", "expert", "region", "nearest"),
    [
        ("a fruit", "Default.", "default", "region 1", "region 1"),
        ("a tool", "For tools.", "region 2", "region 2", "region 2"),
        ("a sock", "Default.", "default", "", "region 2"),
        ("?", "Default.", "default", "", "region 1"),
    ],
    ids=["no expert of its own", "its expert", "beyond the radius", "without a direction"],
)
def test_each_input_is_answered_by_the_expert_of_its_region(
    text: str, instructions: str, expert: str, region: str, nearest: str
) -> None:
    lm, program = simulated(lambda request: "yes"), experts()
    distance = pytest.approx({"a sock": 0.2, "?": 1.0}.get(text, 0.0))

    for how in ("at once", "later"):
        with dspy.context(lm=lm):
            made: Any = program(text=text) if how == "at once" else asyncio.run(program.acall(text=text))
        assert made.label == "yes"
        assert made.route == {"expert": expert, "region": region, "nearest": nearest, "distance": distance}
    assert [instructions in system(request) for request in asked(lm)] == [True, True]


def test_a_copy_has_predictors_of_its_own_and_the_same_router() -> None:
    program = experts()
    copied: Any = program.deepcopy()

    assert [name for name, _ in copied.named_predictors()] == ["default.predict", "experts['region 2'].predict"]
    assert copied.experts["region 2"].predict is not program.experts["region 2"].predict
    assert copied.router is program.router


def test_what_is_no_prediction_is_passed_on_as_it_is() -> None:
    class Plain(dspy.Module):
        def forward(self, text: str) -> Any:
            return {"text": text}

    program: Any = Experts(Plain(), {}, router())
    with dspy.context(lm=simulated(lambda request: "yes")):
        assert program(text="a tool") == {"text": "a tool"}


def test_an_expert_of_an_unknown_region_and_a_field_named_route_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^No region 'region 9' for its expert; there are region 1, region 2\.$"):
        Experts(Classify(SIGNATURE), {"region 9": Classify(SIGNATURE)}, router())
    with pytest.raises(ConfigError, match=r"^Experts answer with a field 'route' that says who answered"):
        Experts(dspy.Predict("text -> route"), {}, router())
