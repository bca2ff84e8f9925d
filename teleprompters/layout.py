"""Where the rows of a compile lie: embedded once, the train rows in regions, the confirmation rows routed to them."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import dspy
import numpy as np

from preceptor.checks import taken_inputs
from preceptor.life import Compile
from preceptor.lm.embedding import Embedder, Report, Vectors
from preceptor.regions import NO_REGION, NOWHERE, PROBE, Plane, Regions, Router, divided, rendered
from preceptor.run import REGIONS, fingerprint
from preceptor.splits import half
from preceptor.task import Task

logger = logging.getLogger(__name__)

FILE: Final = "embeddings-{}.npy"
"""In the run folder, named after the texts and the embedder."""

_SAME: Final = 1e-4
"""How far apart the numbers of two embeddings of `PROBE` may be, by one model: on another processor, say."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The regions of a compile.

    Attributes:
        router: The one that the program will have.
        separation: Mean simplified silhouette of the train rows.
        train: Region -> its train rows; of no region are those whose embedding has no direction.
        confirm: Region, or "" -> its confirmation rows, as the router sends them.
        gates: The confirmation rows that choose experts; the others measure the mixture.
    """

    router: Router
    separation: float
    train: Mapping[str, Sequence[int]]
    confirm: Mapping[str, Sequence[int]]
    gates: frozenset[int]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the regions."""
        return self.router.names

    def gate(self, region: str) -> list[int]:
        """Return the region's confirmation rows that choose its expert."""
        return [row for row in self.confirm[region] if row in self.gates]

    def claim(self, region: str) -> list[int]:
        """Return the region's confirmation rows that measure the mixture."""
        return [row for row in self.confirm[region] if row not in self.gates]

    @property
    def places(self) -> list[str]:
        """The region of each confirmation row, "" beyond the radius."""
        found = {row: region for region, rows in self.confirm.items() for row in rows}
        return [found[row] for row in range(len(found))]


def laid_out(compiling: Compile, task: Task, embedder: Embedder, regions: int, *, least_rows: int, seed: int) -> Layout:
    """Embed all rows, divide the train rows into regions, and route the confirmation rows.

    Of a row is embedded what the program takes: an input that is served has no more.

    Of each region's confirmation rows, a random half, stratified by label, chooses the experts. Of those of no region,
    and where no expert is tested, half are left out too: in the claim each region weighs what it weighs among all rows.
    """
    train, confirm = compiling.train, compiling.confirm
    fields = taken_inputs(compiling.student, train[0])
    texts = [rendered(dict(row.inputs().items()), fields) for row in (*train, *confirm)]
    vectors = kept(task.run.folder, embedder, texts, task.report)
    count = len(train)
    found = divided(vectors[:count], regions, least_rows=least_rows, seed=seed, texts=texts[:count])
    router = found.router(embedder, fields)
    routes = [route.region for route in router.routes(vectors[len(train) :])]
    places = {
        region: [row for row, place in enumerate(routes) if place == region] for region in (*router.names, NOWHERE)
    }
    members = {
        name: [row for row, at in enumerate(found.members) if at == number] for number, name in enumerate(router.names)
    }
    task.run.keep(REGIONS, _map(vectors, len(train), found, router, routes))
    gates = [row for region, rows in places.items() for row in _half(confirm, rows, task.output, f"{seed} {region}")]
    return Layout(router, found.separation, members, places, frozenset(gates))


def _map(vectors: Vectors, train: int, found: Regions, router: Router, routes: Sequence[str]) -> dict[str, Any]:
    """Return where the rows and the regions lie in the plane in which the train rows spread the most."""
    plane = Plane.of(vectors[:train])
    means = [vectors[:train][found.members == at].mean(axis=0) for at in range(len(router.names))]
    return {
        "regions": list(router.names),
        "centroids": plane.places(np.array(means)),
        "train": plane.places(vectors[:train]),
        "members": [NOWHERE if at == NO_REGION else router.names[at] for at in found.members],
        "confirm": plane.places(vectors[train:]),
        "routes": list(routes),
        "explained": round(plane.explained, 4),
        "embedder": router.embedder.name,
        "radius": router.radius,
        "separation": found.separation,
    }


def _half(confirm: Sequence[dspy.Example], rows: Sequence[int], output: str, seed: str) -> list[int]:
    """Return the larger half of the rows, stratified by label; rows of equal inputs stay together."""
    return [rows[at] for at in half([confirm[row] for row in rows], output, random.Random(seed))]


def kept(folder: Path, embedder: Embedder, texts: Sequence[str], report: Report) -> Vectors:
    """Return the texts' embeddings, shape (texts, dimensions); a resumed run finds the same bits in the folder.

    The file ends in the embedding of `PROBE`. An embedder of that name that embeds it elsewhere isn't the one that
    made the file: all texts are embedded anew, as they are if the file is damaged.
    """
    path = folder / FILE.format(fingerprint([embedder.name, PROBE, list(texts)]))
    probe = embedder([PROBE])
    if path.is_file():
        known = _read(path)
        if known is None or known.ndim != 2 or len(known) != len(texts) + 1:
            logger.warning("%s is damaged; embedding all texts anew", path)
        elif known.shape[1] == probe.shape[1] and np.allclose(known[-1], probe[0], rtol=0, atol=_SAME):
            return known[:-1]
        else:
            logger.warning("%s embeds otherwise than when %s was written; embedding all texts anew", embedder, path)
    vectors = embedder(texts, report)
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        np.save(file, np.concatenate([vectors, probe]), allow_pickle=False)
    fresh.replace(path)
    return vectors


def _read(path: Path) -> Vectors | None:
    """Return the array in a file; None if it was cut off or overwritten, as by a crash of the machine."""
    try:
        found: Vectors = np.load(path, allow_pickle=False)
    except (EOFError, ValueError):
        return None
    return found
