"""Regions: clusters that are there are found, and inputs go to the nearest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor import regions
from preceptor.errors import ArtifactError, ConfigError
from preceptor.lm.embedding import Embedder
from preceptor.regions import NO_REGION, Plane, Regions, Router, divided, rendered


def bunches(sizes: Sequence[int], *, spread: float = 0.1, dimensions: int = 16, seed: int = 0) -> Any:
    """Unit vectors around as many axes as there are sizes."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(np.eye(dimensions)[: len(sizes)], sizes, axis=0)
    vectors = centres + spread * rng.normal(size=centres.shape) / np.sqrt(dimensions)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def angle(degrees: float) -> list[float]:
    return [float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees)))]


def on_a_circle(texts: Sequence[str]) -> list[list[float]]:
    """Texts are degrees; all others lie at 45."""
    return [angle(float(text) if text.lstrip("-").isdigit() else 45.0) for text in texts]


def router(radius: float = 0.1, embed: Any = on_a_circle) -> Router:
    centroids = np.array([angle(0), angle(90)], dtype=np.float32)
    made = Embedder("circle", embed)
    probe = np.array(angle(45), dtype=np.float32)
    return Router(made, ("text",), ("region 1", "region 2"), centroids, radius, probe)


@pytest.mark.parametrize("sizes", [[40, 30], [50, 30, 20], [40, 30, 20, 15, 12]], ids=len)
def test_bunches_are_found_and_counted_without_being_told(sizes: list[int]) -> None:
    found = divided(bunches(sizes), 0, least_rows=10, seed=3)

    assert found.members.tolist() == [at for at, size in enumerate(sizes) for _ in range(size)]
    assert found.names == tuple(f"region {number}" for number in range(1, len(sizes) + 1))
    assert found.separation > 0.9


def test_a_number_of_regions_is_taken_as_given() -> None:
    found = divided(bunches([40, 30]), 4, least_rows=10, seed=0)
    assert len(found.centroids) == 4
    assert sorted(np.bincount(found.members), reverse=True) == np.bincount(found.members).tolist()


def test_regions_smaller_than_the_least_are_not_chosen() -> None:
    vectors = bunches([40, 30, 5])
    assert len(divided(vectors, 0, least_rows=5, seed=0).centroids) == 3
    assert len(divided(vectors, 0, least_rows=6, seed=0).centroids) == 2
    alone = divided(vectors, 0, least_rows=40, seed=0)
    assert (len(alone.centroids), alone.members.max(), alone.separation) == (1, 0, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_many_regions_that_are_close_fit_as_well_as_the_centres_the_rows_were_made_around(seed: int) -> None:
    vectors = bunches([100] * 32, spread=1.37, dimensions=128, seed=seed)
    found = divided(vectors, 32, least_rows=1, seed=seed)

    to_their_own = vectors[np.arange(3200), np.repeat(np.arange(32), 100)]  # the centres are the first 32 axes
    assert (vectors @ found.centroids.T).max(axis=1).mean() > to_their_own.mean()


def test_more_regions_than_distinct_inputs_are_refused() -> None:
    vectors = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    assert len(divided(vectors, 3, least_rows=1, seed=0).centroids) == 3
    with pytest.raises(ConfigError, match=r"^4 regions need as many distinct inputs; there are 3\. Ask for fewer\.$"):
        divided(vectors, 4, least_rows=1, seed=0)


def test_equal_seeds_give_equal_regions_and_the_threads_of_faiss_are_given_back() -> None:
    import faiss

    before = faiss.omp_get_max_threads()
    first, second = (divided(bunches([20, 20], spread=3.0), 4, least_rows=2, seed=7) for _ in range(2))
    assert first.centroids.tobytes() == second.centroids.tobytes()
    assert faiss.omp_get_max_threads() == before


@given(st.lists(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3), min_size=4, max_size=30))
def test_centroids_have_length_one_and_every_row_is_in_the_nearest_region(rows: list[list[float]]) -> None:
    vectors = np.array(rows, dtype=np.float32) + np.array([2, 0, 0], dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    regions = min(2, len(np.unique(vectors, axis=0)))

    found = divided(vectors, regions, least_rows=1, seed=0)

    assert np.allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-5)
    assert found.members.tolist() == (vectors @ found.centroids.T).argmax(axis=1).tolist()
    assert 0 <= found.radius <= 2


def test_the_radius_is_measured_to_the_centroid_of_the_other_rows() -> None:
    # Three rows at 0, 20 and 60 degrees. The third is 50 from the middle of the other two, the first 40, the second 10.
    vectors = np.array([angle(0), angle(20), angle(60)], dtype=np.float32)
    assert divided(vectors, 1, least_rows=1, seed=0).radius == pytest.approx(1 - np.cos(np.radians(50)), abs=1e-6)


@pytest.mark.parametrize(("count", "beyond"), [(99, 0), (100, 0), (198, 0), (199, 1), (299, 2)])
def test_the_radius_is_the_conformal_quantile_of_the_rows_distances(count: int, beyond: int) -> None:
    vectors = bunches([count], spread=0.5)
    found = divided(vectors, 1, least_rows=1, seed=0)
    rests = vectors.sum(axis=0) - vectors
    distances = np.sort(1 - (vectors * rests).sum(axis=1) / np.linalg.norm(rests, axis=1))

    assert found.radius == pytest.approx(distances[count - 1 - beyond], abs=1e-6)
    assert distances[-1] - distances[-2] > 1e-4


def test_one_new_input_in_a_hundred_lies_outside() -> None:
    def around(count: int, seed: int) -> Any:
        return bunches([count, count], spread=1.0, dimensions=8, seed=seed)

    outside = 0
    for seed in range(20):
        found: Regions = divided(around(200, seed), 2, least_rows=10, seed=0)
        made = found.router(Embedder("any", lambda texts: [[1.0] * 8 for _ in texts]), ["text"])
        outside += [route.region for route in made.routes(around(100, 1000 + seed))].count("")

    assert 0.005 < outside / 4000 < 0.02


@pytest.mark.parametrize("regions", [0, 4])
def test_of_equal_texts_one_counts(regions: int) -> None:
    vectors = bunches([12, 11, 10, 9], spread=1.0, dimensions=64)
    whole = divided(vectors, regions, least_rows=9, seed=0)
    rng = np.random.default_rng(0)
    order = np.concatenate([np.arange(42), rng.permutation(np.repeat(np.arange(42), np.arange(42) % 7))])

    found = divided(vectors[order], regions, least_rows=9, seed=0, texts=[str(row) for row in order])

    assert len(found.centroids) == 4
    assert found.centroids.tobytes() == whole.centroids.tobytes()
    assert (found.radius, found.separation) == (whole.radius, whole.separation)
    assert found.members.tolist() == whole.members[order].tolist()


def test_rows_that_repeat_make_no_region_large_enough() -> None:
    vectors, texts = np.repeat(bunches([40, 30, 5]), 4, axis=0), [str(row // 4) for row in range(300)]
    assert len(divided(vectors, 0, least_rows=6, seed=0, texts=texts).centroids) == 2


def test_few_new_inputs_lie_outside_where_rows_repeat() -> None:
    def around(count: int, seed: int) -> Any:
        return bunches([count] * 4, spread=1.0, dimensions=64, seed=seed)

    outside = 0
    for seed in range(20):
        texts = [str(row // 5) for row in range(200)]
        found = divided(np.repeat(around(10, seed), 5, axis=0), 4, least_rows=1, seed=0, texts=texts)
        made = found.router(Embedder("any", lambda texts: [[1.0] * 64 for _ in texts]), ["text"])
        outside += [route.region for route in made.routes(around(100, 1000 + seed))].count("")

    assert outside / 8000 < 0.035, "of 40 distinct rows, one new input in 41 lies beyond the farthest"


@pytest.mark.parametrize("count", [2, 4, 8])
def test_no_region_is_empty_where_one_row_repeats_thousands_of_times(count: int) -> None:
    for seed in range(3):
        rows = bunches([2] * 4, spread=1.0, seed=seed)
        vectors = np.concatenate([np.repeat(rows[:1], 5000, axis=0), rows[1:]])
        texts = [str(max(0, row - 4999)) for row in range(5007)]
        assert len(divided(vectors, count, least_rows=1, seed=seed, texts=texts).centroids) == count

        found = divided(vectors, count, least_rows=1, seed=seed)  # other texts with the same embedding
        assert np.bincount(found.members, minlength=len(found.centroids)).min() > 0


def test_regions_that_no_arithmetic_tells_apart_are_one() -> None:
    vectors = np.array([[1.0, 0.0], [1.0, 1e-20], [0.0, 1.0]], dtype=np.float32)
    found = divided(vectors, 3, least_rows=1, seed=0)
    assert np.bincount(found.members).tolist() == [2, 1]
    assert found.members.tolist() == [0, 0, 1]
    assert len(found.centroids) == len(found.names) == 2


def test_rows_without_a_direction_are_in_no_region_and_change_none() -> None:
    vectors = bunches([12, 10])
    gaps = np.insert(vectors, [0, 5, 5, 22], 0.0, axis=0)
    whole, found = (divided(each, 2, least_rows=1, seed=0) for each in (vectors, gaps))
    assert found.members.tolist() == np.insert(whole.members, [0, 5, 5, 22], NO_REGION).tolist()
    assert (found.centroids.tobytes(), found.radius) == (whole.centroids.tobytes(), whole.radius)

    with pytest.raises(ConfigError, match=r"^No input has an embedding that says anything"):
        divided(np.zeros((3, 2), dtype=np.float32), 0, least_rows=1, seed=0)


def test_an_input_without_a_direction_goes_nowhere_however_large_the_radius() -> None:
    route = router(radius=2.0, embed=lambda texts: on_a_circle(texts) if texts[0] else [[0.0, 0.0]]).route({"text": ""})
    assert (route.region, route.distance, route.cosines) == ("", 1.0, (0.0, 0.0))


def test_an_embedder_that_has_no_direction_for_the_probe_is_refused() -> None:
    found = divided(bunches([12, 10]), 2, least_rows=1, seed=0)
    with pytest.raises(
        ConfigError, match=r"^The embedder blind returned a vector of length 0 for 'The quick brown fox"
    ):
        found.router(Embedder("blind", lambda texts: [[0.0] * 16 for _ in texts]), ["text"])


@pytest.mark.parametrize(
    ("degrees", "region", "nearest"),
    [(0, "region 1", "region 1"), (20, "region 1", "region 1"), (30, "", "region 1"), (80, "region 2", "region 2")],
)
def test_an_input_goes_to_the_nearest_centroid_or_beyond_the_radius_to_none(
    degrees: int, region: str, nearest: str
) -> None:
    route = router(radius=0.1).route({"text": str(degrees)})

    assert (route.region, route.nearest) == (region, nearest)
    assert route.cosines == pytest.approx((np.cos(np.radians(degrees)), np.sin(np.radians(degrees))), abs=1e-6)
    assert route.distance == pytest.approx(1 - max(route.cosines))


def test_an_input_is_embedded_once_while_it_is_remembered() -> None:
    asked: list[str] = []

    def embed(texts: Sequence[str]) -> Any:
        asked.extend(texts)
        return on_a_circle(texts)

    made = router(embed=embed)
    assert made.route({"text": "10"}) == made.route({"text": "10"})
    assert asked.count("10") == 1


@pytest.mark.parametrize(
    ("embed", "message"),
    [
        (lambda texts: [angle(60) for _ in texts], r"isn't the one the regions were made with: .* cosine 0\.966 from"),
        (lambda texts: [[1.0, 0, 0] for _ in texts], r"makes 3 dimensions, the regions were made in 2"),
    ],
    ids=["elsewhere", "other dimensions"],
)
def test_another_embedder_than_the_regions_were_made_with_is_refused(embed: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        router(embed=embed).route({"text": "10"})


def test_fields_are_rendered_in_the_routers_order_and_missing_ones_left_out() -> None:
    assert rendered({"text": None}, ["text"]) == ""
    assert rendered({}, ["text"]) == ""
    assert rendered({"b": 2, "a": "x", "c": None, "d": "no"}, ["a", "b", "c"]) == "a: x\nb: 2"


class Ticket(pydantic.BaseModel):
    subject: str
    tags: list[str] = []
    urgent: bool | None = None


def test_a_record_is_rendered_alike_as_an_object_and_as_a_file_holds_it() -> None:
    ticket = Ticket(subject="Zahlung für März", tags=["late"])
    text = '{"subject": "Zahlung für März", "tags": ["late"], "urgent": null}'
    for value in (ticket, ticket.model_dump(), json.loads(ticket.model_dump_json())):
        assert rendered({"ticket": value}, ["ticket"]) == text
        assert rendered({"all": [value], "n": 2}, ["n", "all"]) == f"n: 2\nall: [{text}]"


def test_the_plane_is_that_in_which_vectors_spread_the_most() -> None:
    vectors = np.array([[3, 0, 1], [-3, 0, 1], [0, 1, 1], [0, -1, 1]], dtype=np.float32)
    plane = Plane.of(vectors)
    assert plane.places(vectors) == [[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]
    assert plane.explained == pytest.approx(1.0)
    tilted = np.vstack([vectors, [[0, 0, 4], [0, 0, -2]]]).astype(np.float32)  # squares from the mean: 18, 2 and 18
    assert Plane.of(tilted).explained == pytest.approx(36 / 38)


@pytest.mark.parametrize("vectors", [[[1.0], [-1.0]], [[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0]]])
def test_where_there_is_no_second_direction_or_none_the_plane_has_zeros(vectors: list[list[float]]) -> None:
    array = np.array(vectors, dtype=np.float32)
    plane = Plane.of(array)
    assert plane.axes.shape == (2, array.shape[1])
    assert [second for _, second in plane.places(array)] == [0.0] * len(array)
    assert plane.explained == 1.0


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = bunches([40, 30, 20], spread=1.0)
    whole = divided(vectors, 3, least_rows=1, seed=1)
    monkeypatch.setattr(regions, "_BLOCK", 7)
    parts = divided(vectors, 3, least_rows=1, seed=1)
    assert parts.members.tolist() == whole.members.tolist()
    assert parts.radius == pytest.approx(whole.radius, abs=1e-6)
    assert parts.separation == pytest.approx(whole.separation, abs=1e-6)


def test_zero_has_no_sign_when_inputs_are_told_apart() -> None:
    vectors = np.array([[1.0, 0.0], [1.0, -0.0], [0.0, 1.0]], dtype=np.float32)
    with pytest.raises(ConfigError, match=r"^3 regions need as many distinct inputs; there are 2\. Ask for fewer\.$"):
        divided(vectors, 3, least_rows=1, seed=0)
