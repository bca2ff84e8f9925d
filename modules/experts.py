"""A program of several experts: a router sends each input to the expert of its region."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import dspy

from preceptor.errors import ConfigError
from preceptor.lm.seam import predictors
from preceptor.regions import Route, Router
from preceptor.routed import DEFAULT

ROUTE: Final = "route"
"""Field of the prediction that says who answered."""


class Experts(dspy.Module):
    """Answers each input by the expert of its region; as many calls a row as one expert makes.

    The prediction's field `route` holds who answered: `expert`, `region` ("" beyond the radius), `nearest`,
    the region of the nearest centroid, and `distance`, 1 - cosine to it. Costs one embedding an input, too.

    Args:
        default: Answers where no region has an expert of its own, and beyond the radius.
        experts: Region -> program with the same fields.
        router: Knows the regions.

    Raises:
        ConfigError: If an expert has no region, or as `refuse_unroutable`.
    """

    def __init__(self, default: dspy.Module, experts: Mapping[str, dspy.Module], router: Router) -> None:
        super().__init__()
        unknown = sorted(set(experts) - set(router.names))
        if unknown:
            raise ConfigError(f"No region {unknown[0]!r} for its expert; there are {', '.join(router.names)}.")
        refuse_unroutable(default)
        self.default = default
        self.experts = dict(experts)
        self.router = router

    def forward(self, **inputs: Any) -> Any:
        """Return the prediction of the expert whose region the inputs are in."""
        route = self.router.route(inputs)
        return self._signed(self._answering(route)(**inputs), route)

    async def aforward(self, **inputs: Any) -> Any:
        """Return the prediction of the expert whose region the inputs are in, without blocking the event loop."""
        route = await asyncio.to_thread(self.router.route, inputs)
        return self._signed(await self._answering(route).acall(**inputs), route)

    def expert_of(self, region: str) -> str:
        """Return the name of the expert that answers in a region: the region's own, or `default`."""
        return region if region in self.experts else DEFAULT

    def _answering(self, route: Route) -> dspy.Module:
        return self.experts.get(route.region, self.default)

    def _signed(self, prediction: Any, route: Route) -> Any:
        if isinstance(prediction, dspy.Prediction):
            told = {"region": route.region, "nearest": route.nearest, "distance": route.distance}
            prediction[ROUTE] = {"expert": self.expert_of(route.region), **told}
        return prediction


def refuse_unroutable(program: dspy.Module, label: str = "") -> None:
    """Raise if a program can't be an expert.

    Args:
        program: To be routed to.
        label: The field its answers are compared by, where it is known.

    Raises:
        ConfigError: If it has experts already, or answers a field `route` of its own.
    """
    if isinstance(program, Experts):
        raise ConfigError(
            "The program is a mixture of experts already, and has a router of its own. Compile one of its experts: "
            "`program.default`, or one of `program.experts`."
        )
    if label == ROUTE or any(ROUTE in predictor.signature.output_fields for _, predictor in predictors(program)):
        raise ConfigError(
            f"Experts answer with a field {ROUTE!r} that says who answered; the program has its own. "
            "Rename that output field, in the rows too."
        )
