"""What a compile would take, `compile --dry-run`; and whether the models can be asked at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dspy

from preceptor.affordable import affordable, confirming, power
from preceptor.cli.inputs import LOCAL, lm_of, local_id
from preceptor.cli.view import counted, out, plain, print_json
from preceptor.lm.budget import Budget
from preceptor.lm.catalogue import CATALOGUE, refuse_unknown
from preceptor.lm.credentials import check_key
from preceptor.lm.meter import check
from preceptor.lm.seam import every_predictor, own_models, predictors
from preceptor.lm.soft import takes_none
from preceptor.scoring.statistics import smallest_gain
from preceptor.splits import different
from preceptor.teleprompter import Teleprompter


def plan(
    method: Teleprompter, program: dspy.Module, train: Sequence[dspy.Example], confirm: Sequence[dspy.Example]
) -> dict[str, Any]:
    """Return what a compile of checked rows is expected to take, in calls.

    Raises:
        Unaffordable: If the budget has too few.
    """
    signatures = {name: predictor.signature for name, predictor in predictors(program)}
    search = affordable(method, signatures, len(train), len(confirm))
    kept, count = confirming(method, len(confirm), len(signatures)), different(confirm)
    return {
        "calls": search.expected + kept,
        "search_calls": search.expected,
        "confirm_calls": kept,
        "least_calls": search.least + kept,
        "train_rows": len(train),
        "shown_rows": method.demonstration_rows,
        "confirm_rows": len(confirm),
        "different_rows": count,
        "smallest_gain": smallest_gain(count),
        "confirmed_programs": method.confirmed,
    }


def tell_plan(planned: Mapping[str, Any], folder: Path, models: Sequence[str], *, as_json: bool) -> None:
    """Print a plan, where the run would be, and which models of the catalogue would be fetched first."""
    missing = [name for name in dict.fromkeys(models) if _is_missing(name)]
    if as_json:
        print_json({**planned, "run": str(folder), "to_fetch": missing})
        return
    shown = f" ({planned['shown_rows']} shown as demonstrations)" if planned["shown_rows"] else ""
    told = [
        f"About {planned['calls']} calls, {planned['least_calls']} at least; none was made.",
        f"  {counted(planned['train_rows'], 'row')} to search on{shown}, about {planned['search_calls']} calls",
        f"  {counted(planned['confirm_rows'], 'row')} to confirm on, {planned['confirm_calls']} calls at most",
        f"  {power(planned['different_rows'], planned['confirmed_programs'])}",
        *(f"  {name} isn't here yet: {_megabytes(name)} MB are fetched first" for name in missing),
        f"Run      {folder}",
    ]
    for line in told:
        out().print(plain(line), soft_wrap=True)


def check_model(name: str, api_base: str | None, max_tokens: int | None, budget: Budget) -> None:
    """Raise if a hosted model can't be asked within a budget, or there can be no such model for this process.

    Raises:
        ConfigError: If its key or its price isn't known, or it can't be with these settings.
        ModelError: If a local model is neither in the catalogue nor a folder, nor a name of the hub's.
    """
    if name.startswith(LOCAL):
        refuse_unknown(local_id(name))
    else:
        lm = lm_of(name, api_base, max_tokens)
        check(lm, budget)
        check_key(lm)


def check_own(program: dspy.Module, budget: Budget) -> None:
    """Raise if a predictor's own model can't be asked within a budget; as `check_model`."""
    for _, predictor in every_predictor(program):
        if predictor.lm is not None:
            check(predictor.lm, budget)
            check_key(predictor.lm)


def check_proposer(method: Teleprompter, name: str) -> None:
    """Raise if a method's proposer reads soft tokens, and no model of this name can.

    Raises:
        ConfigError: Naming one that can.
    """
    if method.is_soft and not name.startswith(LOCAL):
        raise takes_none(name)


def check_keys(program: dspy.Module, lm: dspy.LM) -> None:
    """Raise if the model that a program is asked by, or one of its predictors' own, needs a key and none is set.

    Raises:
        ConfigError: Naming the variables; nothing was sent.
    """
    for one in (lm, *(own for _, own in own_models(program))):
        check_key(one)


def embedders(method: Teleprompter) -> list[str]:
    """Return the name of the embedder that a method of several regions asks, if it is not the user's own object."""
    return [method.routed_by] if isinstance(method.routed_by, str) else []


def _is_missing(name: str) -> bool:
    known = CATALOGUE.get(local_id(name))
    return known is not None and not known.is_here


def _megabytes(name: str) -> int:
    return round(CATALOGUE[local_id(name)].size / 1e6)
