"""Regions: inputs of similar meaning, and the router that sends an input to the nearest.

Inputs are embedded as unit vectors and clustered by spherical k-means (Dhillon and Modha 2001), which FAISS
runs. The nearest centroid by cosine answers; beyond a radius an input belongs to no region.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import numpy as np

from preceptor.errors import ArtifactError, ConfigError
from preceptor.lm.embedding import Embedder, Vectors
from preceptor.scoring.texts import as_text

MOST_REGIONS: Final = 8
"""Regions tried where the number isn't given."""

RESTARTS: Final = 10
ROUNDS: Final = 25
"""Of k-means, each; FAISS's own default of rounds."""

_SAMPLE: Final = 256
"""Rows a region that k-means runs on at most; FAISS's own default."""

_CHOICE: Final = 64
"""Rows a region among which a run chooses where to begin, others in each run."""

OUTSIDE: Final = 0.01
"""Share of new inputs, like those the regions were made of, that may lie beyond the radius."""

PROBE: Final = "The quick brown fox jumps over the lazy dog."
"""Embedded when a router is made: an embedder that embeds it elsewhere isn't the one it was made with."""

_SAME: Final = 0.999
"""Cosine of two embeddings of `PROBE`, from which on they count as the same."""

_BLOCK: Final = 65_536
"""Rows at a time."""

NOWHERE: Final = ""
"""The region of an input that lies farther than the radius from every centroid, or has no direction."""

NO_REGION: Final = -1
"""The member number of a row that has no direction."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where an input belongs.

    Attributes:
        region: Name of the region, "" if the input lies beyond the radius, or its embedding has no direction.
        nearest: Name of the nearest centroid's region.
        distance: 1 - cosine to that centroid, in [0, 2].
        cosines: Cosine to every centroid, in the regions' order.
    """

    region: str
    nearest: str
    distance: float
    cosines: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """Sends inputs to the nearest centroid.

    Attributes:
        embedder: Embeds what is routed.
        fields: The inputs that are looked at, in the order they are rendered.
        names: Of the regions.
        centroids: Of length 1, shape (regions, dimensions).
        radius: Largest distance (1 - cosine) at which a region answers, in [0, 2].
        probe: The embedding of `PROBE`, shape (dimensions,).
    """

    embedder: Embedder
    fields: tuple[str, ...]
    names: tuple[str, ...]
    centroids: Vectors
    radius: float
    probe: Vectors

    def __deepcopy__(self, memo: dict[int, Any]) -> Router:
        return self

    def route(self, inputs: Mapping[str, Any]) -> Route:
        """Return where an input belongs; embeds one text, unless it was one of the last few hundred.

        Raises:
            ArtifactError: If the embedder isn't the one the centroids were made with.
        """
        return self.routes(_embedded(self, rendered(inputs, self.fields)))[0]

    def routes(self, vectors: Vectors) -> list[Route]:
        """Return where embedded inputs belong, shape (inputs, dimensions); one of length 0 belongs nowhere."""
        cosines = vectors @ self.centroids.T
        nearest = cosines.argmax(axis=1)
        points = np.any(vectors, axis=1).tolist()
        return [self._route(row, int(at), points=has) for row, at, has in zip(cosines, nearest, points, strict=True)]

    def _route(self, cosines: Vectors, at: int, *, points: bool) -> Route:
        distance, name = 1 - float(cosines[at]), self.names[at]
        known = tuple(float(cosine) for cosine in cosines)
        return Route(name if points and distance <= self.radius else NOWHERE, name, distance, known)

    def refuse_another_embedder(self) -> None:
        """Raise unless the embedder embeds `PROBE` as it did when the centroids were made.

        Raises:
            ArtifactError: If it doesn't.
        """
        made = self.embedder([PROBE])[0]
        if made.shape != self.probe.shape:
            raise ArtifactError(
                f"The embedder {self.embedder.name} makes {len(made)} dimensions, the regions were made in "
                f"{len(self.probe)}. Pass the embedder they were made with."
            )
        if float(made @ self.probe) < _SAME:
            raise ArtifactError(
                f"The embedder {self.embedder.name} isn't the one the regions were made with: it embeds a text at "
                f"cosine {float(made @ self.probe):.3f} from where it was. Pass the one they were made with."
            )


@functools.lru_cache(maxsize=256)
def _embedded(router: Router, text: str) -> Vectors:
    _checked(router)
    return router.embedder([text])


@functools.lru_cache(maxsize=16)
def _checked(router: Router) -> None:
    router.refuse_another_embedder()


def rendered(inputs: Mapping[str, Any], fields: Sequence[str]) -> str:
    r"""Return an input as the text that is embedded: the value of a single field, else `name: value` lines.

    Fields that are missing or None are left out. A record is JSON, be it an object or what a file holds of it.

    Example:
        >>> rendered({"text": "Where is it?"}, ["text"])
        'Where is it?'
        >>> rendered({"body": "Twice.", "subject": "Paid", "hint": None}, ["subject", "body", "hint"])
        'subject: Paid\nbody: Twice.'
    """
    given = [(name, inputs[name]) for name in fields if inputs.get(name) is not None]
    texts = [(name, as_text(value)) for name, value in given]
    return "\n".join(text if len(fields) == 1 else f"{name}: {text}" for name, text in texts)


@dataclass(frozen=True, slots=True, eq=False)
class Regions:
    """A clustering of rows.

    Attributes:
        centroids: Of length 1, shape (regions, dimensions), the region of most rows that count first.
        radius: See `Router`.
        members: Each row's region, shape (rows,); `NO_REGION` for one of length 0.
        separation: Mean simplified silhouette in [-1, 1]; 0 with one region.
    """

    centroids: Vectors
    radius: float
    members: Any
    separation: float

    @property
    def names(self) -> tuple[str, ...]:
        """`region 1`, `region 2` and so on."""
        return tuple(f"region {number}" for number in range(1, len(self.centroids) + 1))

    def router(self, embedder: Embedder, fields: Sequence[str]) -> Router:
        """Return the router to these regions; embeds one text.

        Raises:
            ConfigError: If the embedder finds no direction for it.
        """
        probe = embedder([PROBE])[0]
        if not probe.any():
            raise ConfigError(
                f"The embedder {embedder.name} returned a vector of length 0 for {PROBE!r}, by which it is told "
                "from others. Let it return some direction for a text of which it knows nothing."
            )
        return Router(embedder, tuple(fields), self.names, self.centroids, self.radius, probe)


@dataclass(frozen=True, slots=True, eq=False)
class Plane:
    """The two directions in which vectors spread the most, for a picture of them.

    Attributes:
        middle: The vectors' mean, shape (dimensions,).
        axes: Of length 1, shape (2, dimensions); zeros where there is no second direction.
        explained: Share of the vectors' variance that lies in the plane, in [0, 1].
    """

    middle: Vectors
    axes: Vectors
    explained: float

    @classmethod
    def of(cls, vectors: Vectors) -> Plane:
        """Return the plane of the first two principal components, by an eigendecomposition of the covariance.

        Of each axis, the largest component in absolute value is positive.
        """
        middle = vectors.mean(axis=0)
        centred = vectors - middle
        variances, directions = np.linalg.eigh(centred.T @ centred)
        axes = directions.T[::-1][:2]
        axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
        flat = np.zeros((2, vectors.shape[1]), dtype=np.float32)
        flat[: len(axes)] = axes
        total = float(variances.sum())
        return cls(middle, flat, float(variances[-2:].sum()) / total if total > 0 else 1.0)

    def places(self, vectors: Vectors) -> list[list[float]]:
        """Return each vector's coordinates in the plane, to four decimals, shape (vectors, 2)."""
        return [[round(float(x), 4), round(float(y), 4)] for x, y in (vectors - self.middle) @ self.axes.T]


def divided(
    vectors: Vectors, regions: int, *, least_rows: int, seed: int, texts: Sequence[str] | None = None
) -> Regions:
    """Return the rows in as many regions as given, or as they fall into.

    Of equal texts one counts: repeated, a row would draw a centroid to itself and the radius in. Where the number isn't
    given (0), from 2 to `MOST_REGIONS` are tried, and that of the greatest separation is taken whose every region has
    `least_rows` rows that count; none has, and all rows are one region.

    Args:
        vectors: Of length 1, or of length 0, which are in no region; shape (rows, dimensions).
        regions: Their number, 0 to choose it. A region may then have fewer than `least_rows` rows; one that would have
            none is left out.
        least_rows: Fewest rows of a region, at least 1.
        seed: Equal seeds give equal regions, at any number of threads.
        texts: What was embedded; by default no two rows are equal.

    Raises:
        ConfigError: If there are more regions than distinct rows, or all rows have length 0.
    """
    rows = _counted(vectors, texts)
    if not len(rows):
        raise ConfigError("No input has an embedding that says anything: the vectors' length is 0. Check the embedder.")
    found = _divided(vectors if len(rows) == len(vectors) else vectors[rows], regions, least_rows, seed)
    if len(rows) == len(vectors):
        return found
    members = np.where(vectors.any(axis=1), _members(vectors, found.centroids), NO_REGION)
    return replace(found, members=members)


def _counted(vectors: Vectors, texts: Sequence[str] | None) -> Any:
    """Return the rows that have a direction, of equal texts the first."""
    rows = np.flatnonzero(vectors.any(axis=1))
    if texts is None:
        return rows
    first: dict[str, int] = {}
    for row in rows.tolist():
        first.setdefault(texts[row], row)
    return np.array(list(first.values()), dtype=np.intp)


def _divided(vectors: Vectors, regions: int, least_rows: int, seed: int) -> Regions:
    distinct = _distinct(vectors, regions or MOST_REGIONS)
    if regions > distinct:
        raise ConfigError(f"{regions} regions need as many distinct inputs; there are {distinct}. Ask for fewer.")
    if regions:
        return _clustered(vectors, regions, seed)
    most = min(MOST_REGIONS, distinct, len(vectors) // least_rows)
    tried = [_clustered(vectors, count, seed) for count in range(2, most + 1)]
    large = [found for found in tried if np.bincount(found.members, minlength=len(found.centroids)).min() >= least_rows]
    return max(large, key=lambda found: found.separation, default=_clustered(vectors, 1, seed))


def _distinct(vectors: Vectors, most: int) -> int:
    """Return how many different rows there are, or `most` if there are as many or more."""
    seen: set[bytes] = set()
    for row in vectors:
        seen.add((row + 0.0).tobytes())  # -0.0 is 0.0
        if len(seen) == most:
            break
    return len(seen)


def _blocks(rows: int) -> list[slice]:
    """Return slices that cover so many rows: what is computed of each is small beside the vectors themselves."""
    return [slice(start, start + _BLOCK) for start in range(0, rows, _BLOCK)]


def _members(vectors: Vectors, centroids: Vectors) -> Any:
    return np.concatenate([(vectors[block] @ centroids.T).argmax(axis=1) for block in _blocks(len(vectors))])


def _clustered(vectors: Vectors, regions: int, seed: int) -> Regions:
    centroids = _kmeans(vectors, regions, seed)
    members = _members(vectors, centroids)
    sizes = np.bincount(members, minlength=regions)
    order = sorted(np.flatnonzero(sizes).tolist(), key=lambda at: (-int(sizes[at]), at))
    numbers = np.zeros(regions, dtype=np.intp)
    numbers[order] = np.arange(len(order))
    centroids, members = centroids[order], numbers[members]
    return Regions(centroids, _radius(vectors, centroids, members), members, _separation(vectors, centroids, members))


def _kmeans(vectors: Vectors, regions: int, seed: int) -> Vectors:
    """Return centroids of length 1: the best of `RESTARTS` runs, of one thread, for another process may be forked."""
    import faiss

    rng = np.random.default_rng(seed)
    rows = np.ascontiguousarray(_some(vectors, _SAMPLE * regions, rng), dtype=np.float32)
    threads, runs = faiss.omp_get_max_threads(), dict[float, Any]()
    faiss.omp_set_num_threads(1)
    try:
        for _ in range(RESTARTS if regions > 1 else 1):
            means: Any = faiss.Kmeans(
                rows.shape[1],
                regions,
                niter=ROUNDS,
                spherical=True,
                seed=seed,
                min_points_per_centroid=1,
                max_points_per_centroid=_SAMPLE,
            )
            means.train(rows, init_centroids=_apart(_some(rows, _CHOICE * regions, rng), regions, rng))
            runs[float(means.obj[-1])] = means.centroids
    finally:
        faiss.omp_set_num_threads(threads)
    centroids = np.asarray(runs[max(runs)], dtype=np.float32)
    return cast("Vectors", centroids / np.linalg.norm(centroids, axis=1, keepdims=True))


def _some(vectors: Vectors, most: int, rng: np.random.Generator) -> Vectors:
    """Return so many rows, drawn without replacement, or all if there are no more."""
    return vectors if len(vectors) <= most else vectors[np.sort(rng.choice(len(vectors), most, replace=False))]


def _apart(vectors: Vectors, count: int, rng: np.random.Generator) -> Vectors:
    """Return rows that lie apart: greedy k-means++ (Arthur and Vassilvitskii 2007) on 1 - cosine.

    Each next row is drawn by its distance to those taken, a few times, and the one kept that brings all rows nearest.
    """
    taken = [int(rng.integers(len(vectors)))]
    nearest = np.maximum(1 - vectors @ vectors[taken[0]], 0)
    draws = 2 + int(np.log(count))
    for _ in range(count - 1):
        upto = np.cumsum(nearest, dtype=np.float64)
        drawn = np.searchsorted(upto, upto[-1] * rng.random(draws), side="right")
        drawn = np.minimum(drawn, len(vectors) - 1)
        distances = np.minimum(nearest, np.maximum(1 - vectors[drawn] @ vectors.T, 0))
        kept = int(distances.sum(axis=1, dtype=np.float64).argmin())
        taken.append(int(drawn[kept]))
        nearest = distances[kept]
    return vectors[taken]


def _radius(vectors: Vectors, centroids: Vectors, members: Any) -> float:
    """Return the distance beyond which about one in a hundred new inputs lies: a conformal quantile.

    Of each row's distances to the nearest centroid, its own being that of its region's *other* rows: a row pulls its
    centroid towards itself, which a new input can't do. With fewer than 99 rows it is the largest distance.
    """
    sums = np.stack([vectors[members == at].sum(axis=0) for at in range(len(centroids))])
    nearest = [_nearest(vectors[block], centroids, members[block], sums) for block in _blocks(len(vectors))]
    distances = np.sort(np.concatenate(nearest))
    rank = min(len(vectors), int(np.ceil((len(vectors) + 1) * (1 - OUTSIDE))))
    return float(np.clip(distances[rank - 1], 0, 2))


def _nearest(vectors: Vectors, centroids: Vectors, members: Any, sums: Vectors) -> Vectors:
    """Return each row's distance to the nearest centroid, its own being that of its region's other rows."""
    others = sums[members] - vectors
    lengths = np.linalg.norm(others, axis=1)
    cosines = vectors @ centroids.T
    cosines[np.arange(len(vectors)), members] = (vectors * others).sum(axis=1) / np.maximum(lengths, 1e-6)
    return cast("Vectors", 1 - cosines.max(axis=1))


def _separation(vectors: Vectors, centroids: Vectors, members: Any) -> float:
    """Return the mean simplified silhouette (Hruschka et al. 2004): 1 far from all other centroids, 0 between two."""
    if len(centroids) == 1:
        return 0.0
    blocks = _blocks(len(vectors))
    return float(np.concatenate([_silhouettes(vectors[block], centroids, members[block]) for block in blocks]).mean())


def _silhouettes(vectors: Vectors, centroids: Vectors, members: Any) -> Vectors:
    distances = np.maximum(1 - vectors @ centroids.T, 0)
    rows = np.arange(len(vectors))
    own = distances[rows, members]
    distances[rows, members] = np.inf
    other = distances.min(axis=1)
    return cast("Vectors", (other - own) / np.maximum(np.maximum(own, other), 1e-12))
