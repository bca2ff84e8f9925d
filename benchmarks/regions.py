"""`preceptor bench regions`: what clustering many embeddings takes, beside two libraries, and what a route costs.

`clustering`: seconds, peak memory beyond the data (the library's own included), and fit of 384-dimensional vectors
in 64 regions. Each contender has a process of its own, which makes the vectors first, the same for all:
`ours`: `preceptor.regions.divided`, with its restarts, the radius and the separation; FAISS runs in one thread.
`faiss`: `faiss.Kmeans` as it comes (one run on 256 vectors a centroid), and all vectors assigned; all threads.
`faiss, all`: the same on all vectors.
`scikit-learn`: `MiniBatchKMeans` as it comes, and all vectors assigned; all threads.

`routing`: routes a second of vectors that are known already, all at once and one at a time, and the milliseconds
of a request, whose text is embedded first.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, cast

import numpy as np
import typer

from preceptor.benchmarks.result import Json, Out, give
from preceptor.cli.view import print_table, say
from preceptor.errors import ConfigError
from preceptor.lm.embedding import DEFAULT, Embedder, Vectors, embedder_of
from preceptor.regions import PROBE, Router, divided

DIMENSIONS: Final = 384
SPREAD: Final = 0.07
"""Standard deviation of a vector around its centre in each dimension, before it is scaled to length 1."""

_BLOCK: Final = 4_096
"""Vectors made at a time, few, so that making them isn't the peak of the memory."""

SEED: Final = 0

Clustering = Callable[[Vectors, int], Vectors]
"""Given vectors and the number of regions, returns the centroids after all vectors were assigned."""


def run(
    rows: Annotated[int, typer.Option(min=1, help="Vectors to be clustered.")] = 1_000_000,
    regions: Annotated[int, typer.Option(min=1)] = 64,
    contender: Annotated[list[str] | None, typer.Option(help="By default all.")] = None,
    routes: Annotated[int, typer.Option(min=1, help="Vectors to be routed.")] = 100_000,
    requests: Annotated[int, typer.Option(min=0, help="Texts to be embedded and routed, one at a time.")] = 200,
    embedder: Annotated[str, typer.Option(help="Of the requests.")] = DEFAULT,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure clustering beside FAISS and scikit-learn, and routing."""
    contenders = contender or list(CONTENDERS)
    for name in contenders:
        if name not in CONTENDERS:
            raise ConfigError(f"No contender {name!r}; there are {', '.join(CONTENDERS)}.")
    result: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "rows": rows, "regions": regions}
    result["clustering"] = [_alone(name, rows, regions) for name in contenders]
    result["routing"] = routing(regions, routes, requests, embedder_of(embedder) if requests else None)
    give(result, out, as_json=as_json, show=_print)


def vectors(rows: int, regions: int, seed: int) -> Vectors:
    """Return vectors of length 1 around as many random centres as regions, shape (rows, `DIMENSIONS`)."""
    rng = np.random.default_rng(seed)
    centres = _unit(rng.standard_normal((regions, DIMENSIONS), dtype=np.float32))
    made = np.empty((rows, DIMENSIONS), dtype=np.float32)
    for start in range(0, rows, _BLOCK):
        size = len(made[start : start + _BLOCK])
        noise = rng.standard_normal((size, DIMENSIONS), dtype=np.float32)
        noise *= SPREAD
        made[start : start + size] = _unit(centres[rng.integers(0, regions, size)] + noise)
    return made


def _unit(rows: Vectors) -> Vectors:
    return cast("Vectors", rows / np.linalg.norm(rows, axis=1, keepdims=True))


def _alone(contender: str, rows: int, regions: int) -> dict[str, Any]:
    """Cluster in a process of its own, whose memory is nobody else's."""
    command = [sys.executable, "-m", "preceptor.benchmarks.regions", contender, str(rows), str(regions)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{contender} failed: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    say(f"  {contender}: {found['seconds']:.1f} s, {found['megabytes']:.0f} MB beyond the data")
    return found


def clustered(contender: str, data: Vectors, regions: int) -> dict[str, Any]:
    """Cluster in this process; return what it took, and the fit.

    `inertia` is the mean squared distance to the nearest of the contender's own centroids, `distance` the mean
    of 1 - cosine to it.
    """
    before, started = _peak(), time.perf_counter()
    centroids = CONTENDERS[contender](data, regions)
    seconds, peak = time.perf_counter() - started, _peak()
    squared, distance = _fit(data, centroids)
    return {
        "contender": contender,
        "seconds": seconds,
        "megabytes": (peak - before) / 1e6,
        "data megabytes": data.nbytes / 1e6,
        "inertia": squared,
        "distance": distance,
    }


def _peak() -> int:
    """Return the most memory this process has held so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _fit(data: Vectors, centroids: Vectors) -> tuple[float, float]:
    squares, cosines, lengths = (centroids**2).sum(axis=1), 0.0, 0.0
    units = _unit(centroids)
    for start in range(0, len(data), _BLOCK):
        block = data[start : start + _BLOCK]
        lengths += float((1 + (squares - 2 * block @ centroids.T).min(axis=1)).sum())
        cosines += float((1 - (block @ units.T).max(axis=1)).sum())
    return lengths / len(data), cosines / len(data)


def _ours(data: Vectors, regions: int) -> Vectors:
    return divided(data, regions, least_rows=1, seed=SEED).centroids


def _faiss(data: Vectors, regions: int, **settings: Any) -> Vectors:
    import faiss

    means = faiss.Kmeans(DIMENSIONS, regions, seed=SEED + 1, **settings)
    means.train(data)
    means.index.search(data, 1)
    return np.asarray(means.centroids, dtype=np.float32)


def _faiss_all(data: Vectors, regions: int) -> Vectors:
    return _faiss(data, regions, max_points_per_centroid=len(data))


def _sklearn(data: Vectors, regions: int) -> Vectors:
    from sklearn.cluster import MiniBatchKMeans

    means = MiniBatchKMeans(regions, random_state=SEED).fit(data)
    return np.asarray(means.cluster_centers_, dtype=np.float32)


CONTENDERS: Final[dict[str, Clustering]] = {
    "ours": _ours,
    "faiss": _faiss,
    "faiss, all": _faiss_all,
    "scikit-learn": _sklearn,
}


def routing(regions: int, routes: int, requests: int, embedder: Embedder | None) -> dict[str, float]:
    """Return routes a second of known vectors and, with an embedder, the median milliseconds of a request's parts."""
    data = vectors(max(routes, 64 * regions), regions, SEED)
    router = divided(data[: 64 * regions], regions, least_rows=1, seed=SEED).router(_known(data), ["text"])
    data = data[:routes]
    single = data[: min(routes, 20_000)]
    found = {
        "regions": regions,
        "all at once routes/s": len(data) / _seconds(lambda: router.routes(data)),
        "one at a time routes/s": len(single) / _seconds(lambda: _one_by_one(router, single)),
    }
    return found if embedder is None else {**found, **_requests(regions, requests, embedder)}


def _known(data: Vectors) -> Embedder:
    return Embedder("known", lambda texts: data[: len(texts)])


def _one_by_one(router: Router, data: Vectors) -> None:
    for at in range(len(data)):
        router.routes(data[at : at + 1])


def _requests(regions: int, requests: int, embedder: Embedder) -> dict[str, float]:
    """Return the median milliseconds of embedding a text and of searching for its region."""
    texts = [f"Parcel {n} with the blue kettle came back broken on Monday; what do I do now?" for n in range(requests)]
    dimensions = embedder([PROBE]).shape[1]
    rng = np.random.default_rng(SEED)
    centroids = _unit(rng.standard_normal((regions, dimensions), dtype=np.float32))
    names = tuple(f"region {number}" for number in range(1, regions + 1))
    router = Router(embedder, ("text",), names, centroids, 1.0, embedder([PROBE])[0])
    embedding, searching = list[float](), list[float]()
    for text in texts:
        started = time.perf_counter()
        vector = embedder([text])
        middle = time.perf_counter()
        router.routes(vector)
        embedding.append(middle - started)
        searching.append(time.perf_counter() - middle)
    return {
        "requests": requests,
        "embedding ms": 1e3 * statistics.median(embedding),
        "search ms": 1e3 * statistics.median(searching),
    }


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _print(result: dict[str, Any]) -> None:
    say(f"{result['cores']} cores, load {result['load']:.1f}")
    table: Sequence[dict[str, Any]] = result["clustering"]
    title = f"Clustering {result['rows']:,} vectors of {DIMENSIONS} dimensions in {result['regions']} regions"
    if table:
        print_table(title, list(table[0]), [list(row.values()) for row in table])
    print_table("Routing", ["what", "is"], [[name, value] for name, value in result["routing"].items()])


if __name__ == "__main__":
    name, count, parts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.stdout.write(json.dumps(clustered(name, vectors(count, parts, SEED), parts)) + "\n")
