"""The instruction-coupled process, against arithmetic by hand and against a search that can be won."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from scipy import integrate, special, stats

from preceptor.study import quiet_study
from preceptor.teleprompters import coupled
from preceptor.teleprompters.coupled import SCORES, CoupledSampler, Surrogate, matern, similarity

LINE: dict[str, BaseDistribution] = {"x": FloatDistribution(-1, 1)}
SQUARE: dict[str, BaseDistribution] = {"x": FloatDistribution(-1, 1), "y": FloatDistribution(0, 10)}


def study(sampler: BaseSampler | None = None) -> optuna.Study:
    return quiet_study("search", InMemoryStorage(), sampler or CoupledSampler(seed=1))


def told(search: optuna.Study, box: dict[str, BaseDistribution], size: int, score: Any) -> list[dict[str, float]]:
    """Ask for a batch, then tell its scores; return the points."""
    asked = [search.ask(box) for _ in range(size)]
    for trial in asked:
        rows = score(**trial.params)
        trial.set_user_attr(SCORES, rows)
        search.tell(trial, float(np.mean(rows)))
    return [dict(trial.params) for trial in asked]


def surrogate(
    points: list[float], rows: list[list[float]], observed: int | None = None, *, explores: bool = True
) -> Surrogate:
    values = [float(np.mean(row)) for row in rows][:observed]
    return Surrogate.fit(np.array(points)[:, None], np.array(rows), np.array(values), explores=explores)


def test_the_kernel_is_one_at_a_point_itself_and_falls_with_distance() -> None:
    [[here, there]] = matern(np.array([[0.0, 0.0]]), np.array([[0.0, 0.0], [0.6, 0.8]]), length=1.0)
    assert here == 1.0
    assert there == pytest.approx((1 + 5**0.5 + 5 / 3) * np.exp(-(5**0.5)))


@settings(deadline=None)
@given(some.lists(some.lists(some.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=8))
def test_similarity_is_a_kernel(rows: list[list[float]]) -> None:
    alike = similarity(np.array(rows))
    assert np.linalg.eigvalsh(alike).min() > -1e-9
    assert np.allclose(alike, alike.T)
    assert np.allclose(np.diag(alike), 1)


def test_under_the_papers_kernel_visited_points_are_as_alike_as_their_scores() -> None:
    rows = [[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
    points = np.array([[-0.9], [0.1], [0.8]])
    latent = matern(points, points, 0.4)
    weights = latent @ np.linalg.inv(latent)  # l' L^-1, at the visited points themselves
    assert np.allclose(weights @ similarity(np.array(rows)) @ weights.T, similarity(np.array(rows)))


def test_predictions_are_those_of_an_exact_process() -> None:
    found = surrogate([-0.8, 0.0, 0.7], [[0, 0, 0, 1], [1, 0, 1, 0], [1, 1, 1, 1]])
    at = np.array([[0.3], [-0.5]])
    near = matern(at, found.points, found.length)
    weights = near @ np.linalg.inv(matern(found.points, found.points, found.length) + found.nugget * np.eye(3))
    unknown = found.variance * (1 - np.array([w @ n for w, n in zip(weights, near, strict=True)]))
    variance = np.array([w @ found.covariance @ w for w in weights]) + unknown

    means, deviations = found.predict(at)

    assert means == pytest.approx(weights @ found.means)
    assert deviations == pytest.approx(np.sqrt(variance))


def test_of_what_is_far_from_every_point_the_papers_kernel_is_certain_and_ours_is_not() -> None:
    rows: list[list[float]] = [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]
    points = np.array([[-1.0], [-0.8], [-0.6]])
    for explores, is_sure in ((True, False), (False, True)):
        fitted = surrogate([-1.0, -0.8, -0.6], rows, explores=explores)
        found = replace(fitted, length=0.1, inverse=coupled._inverse(points, 0.1, 0.0))
        [deviation] = found.predict(np.array([[1.0]]))[1]
        assert bool(deviation < 1e-3) == is_sure


def test_the_improvement_is_the_integral_it_stands_for() -> None:
    found = surrogate([-0.8, 0.0, 0.7], [[0, 0, 0, 1], [1, 0, 1, 0], [1, 1, 1, 0]])
    at = np.array([[0.4], [0.95]])
    means, deviations = found.predict(at)
    best = float(found.means.max())
    expected = [
        integrate.quad(lambda t, m=m, d=d: (m + d * t - best) * stats.norm.pdf(t), (best - m) / d, np.inf)[0]
        for m, d in zip(means, deviations, strict=True)
    ]
    assert np.exp(found.improvement(at)) == pytest.approx(expected, rel=1e-4)
    assert expected[1] > 0.01


def test_a_visited_point_is_as_sure_as_its_instruction_and_a_far_one_has_the_prior_variance() -> None:
    points = np.array([[-1.0], [-0.9]])
    found = Surrogate(
        points=points,
        length=0.05,
        nugget=0.0,
        inverse=coupled._inverse(points, 0.05, 0.0),
        means=np.array([-1.0, 1.0]),
        covariance=np.diag([0.25, 0.0]),
        variance=4.0,
        observed=2,
    )
    means, deviations = found.predict(np.array([[-1.0], [-0.9], [1.0]]))

    assert means == pytest.approx([-1, 1, 0], abs=1e-6)
    assert deviations == pytest.approx([0.5, 0, 2], abs=1e-4)


def test_the_covariance_of_instructions_has_the_likeliest_scale() -> None:
    rows = np.array([[0, 0, 0, 1], [1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]], dtype=float)
    values = rows.mean(axis=1)
    targets, alike = (values - values.mean()) / values.std(), similarity(rows)
    found: list[tuple[float, float, float]] = []
    for noise in coupled._NOISES:
        kernel = alike + noise * np.eye(4)
        scale = float(targets @ np.linalg.solve(kernel, targets)) / 4
        found.append((stats.multivariate_normal(cov=scale * kernel).logpdf(targets), float(noise), scale))
    _, noise, scale = max(found)
    assert abs(scale - 1) > 0.1

    fitted = Surrogate.fit(np.array([[-0.8], [0.0], [0.4], [0.7]]), rows, values, explores=True)

    rest = alike - alike @ np.linalg.solve(alike + noise * np.eye(4), alike)
    assert fitted.covariance == pytest.approx(scale * rest)


@pytest.mark.parametrize("ahead", [-7.0, -12.0, -30.0])
def test_the_improvement_far_below_the_best_is_that_of_the_normal_tail(ahead: float) -> None:
    sure = surrogate([-0.8, 0.7], [[0, 0], [1, 1]])
    at = np.array([[-0.8]])
    mean = float(sure.predict(at)[0][0])
    deviation = (float(sure.means[1]) - mean) / -ahead
    weights = (matern(at, sure.points, sure.length) @ sure.inverse)[0]
    own = np.diag([deviation**2 / float(weights @ weights)] * 2)
    found = replace(sure, covariance=own, variance=0.0)
    assert found.predict(at)[1] == pytest.approx([deviation])

    mills = np.sqrt(np.pi / 2) * special.erfcx(-ahead / np.sqrt(2))  # (1 - cdf) / pdf
    expected = stats.norm.logpdf(ahead) + np.log1p(ahead * mills) + np.log(deviation)
    assert found.improvement(at) == pytest.approx([expected], abs=3.5 / ahead**2)


def test_the_improvement_stays_finite_where_it_is_next_to_nothing() -> None:
    found = surrogate([-0.8, 0.7], [[0, 0], [1, 1]])
    hopeless = Surrogate(
        found.points, found.length, found.nugget, found.inverse, np.array([0.0, 1e3]), 0 * found.covariance, 1e-6, 2
    )
    gains = hopeless.improvement(np.linspace(-1, 0, 5)[:, None])
    assert np.isfinite(gains).all()


def test_a_repeat_lends_its_place_but_is_no_observation() -> None:
    rows = [[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    found = surrogate([-0.5, 0.9, 0.5], rows, observed=2)
    alone = surrogate([-0.5, 0.9], rows[:2])
    assert found.means[2] == pytest.approx(found.means[0])
    assert found.means[:2] == pytest.approx(alone.means)  # no surer for having been seen twice
    assert found.covariance[2, 2] == pytest.approx(found.covariance[0, 0])
    assert len(found.best_first) == 2


def test_believing_a_point_leaves_the_mean_and_takes_the_variance() -> None:
    found = surrogate([-0.8, 0.1, 0.9], [[0, 0, 0, 1], [1, 0, 1, 0], [0, 1, 1, 1]])
    at = np.array([[0.5]])
    before, after = found.predict(at), found.believing(at).predict(at)
    assert after[0] == pytest.approx(before[0], abs=0.2)
    assert after[1] < before[1]
    assert found.believing(np.empty((0, 1))) is found


@pytest.mark.parametrize("score", [0.0, 0.35])
def test_where_all_scores_are_equal_a_batch_spreads_and_keeps_away_from_what_was_visited(score: float) -> None:
    rng = np.random.default_rng(0)
    visited = rng.uniform(-1, 1, (25, 10))
    found = Surrogate.fit(visited, np.full((25, 20), score), np.full(25, score), explores=True)
    fresh, other = rng.uniform(-1, 1, (2, 1, 10))

    assert found.variance == 1.0
    assert found.length == pytest.approx(0.5 * 10**0.5)
    assert found.improvement(visited).max() < found.improvement(fresh)[0] - 1
    believed = found.believing(fresh)
    assert believed.improvement(fresh)[0] < believed.improvement(other)[0] - 1


def test_until_two_trials_are_complete_points_are_uniform_in_the_box() -> None:
    search = study()
    points = told(search, SQUARE, 200, lambda x, y: [0.0])
    xs, ys = (np.array([point[name] for point in points]) for name in ("x", "y"))
    assert (xs.min() < -0.95, xs.max() > 0.95, abs(xs.mean()) < 0.15) == (True, True, True)
    assert (ys.min() < 0.3, ys.max() > 9.7, abs(ys.mean() - 5) < 0.8) == (True, True, True)


def test_points_depend_on_the_seed_and_the_trials_alone() -> None:
    searches = [study(CoupledSampler(seed=seed)) for seed in (3, 3, 4)]
    runs = [[told(one, SQUARE, 4, lambda x, y: [float(x > 0), float(y > 5)]) for _ in range(2)] for one in searches]
    assert runs[0] == runs[1] != runs[2]

    resumed = study(CoupledSampler(seed=3))
    for old in searches[0].trials[:4]:
        resumed.add_trial(old)
    assert told(resumed, SQUARE, 4, lambda x, y: [0.0, 0.0]) == runs[0][1]


def test_points_stay_in_the_box_and_no_two_of_a_batch_are_the_same() -> None:
    search = study()
    told(search, SQUARE, 6, lambda x, y: [float(x > 0.2), float(y > 7), 1.0])
    batch = told(search, SQUARE, 5, lambda x, y: [0.0, 0.0, 0.0])
    assert all(-1 <= point["x"] <= 1 and 0 <= point["y"] <= 10 for point in batch)
    assert len({(point["x"], point["y"]) for point in batch}) == 5


def test_it_climbs_a_hill_that_uniform_points_only_brush() -> None:
    bars = np.linspace(0.1, 0.95, 20)
    corner = {f"z{at}": 0.8 for at in range(8)}

    def rows(**point: float) -> list[float]:
        apart = np.mean([(point[name] - corner[name]) ** 2 for name in corner])
        return [float(np.exp(-2 * apart) > bar) for bar in bars]

    best: dict[str, float] = {}
    for name, sampler in {"coupled": CoupledSampler(seed=0), "random": optuna.samplers.RandomSampler(seed=0)}.items():
        search = study(sampler)
        for _ in range(4):
            told(search, {one: FloatDistribution(-1, 1) for one in corner}, 8, rows)
        best[name] = search.best_value
    assert best["coupled"] > best["random"] + 0.1


def test_a_trial_that_failed_with_scores_is_a_repeat_and_one_without_is_out() -> None:
    search = study()
    told(search, LINE, 3, lambda x: [float(x > 0), 1.0])
    repeat, refused = search.ask(LINE), search.ask(LINE)
    repeat.set_user_attr(SCORES, [1.0, 1.0])
    for trial in (repeat, refused):
        search.tell(trial, state=TrialState.FAIL)
    sampler: Any = search.sampler
    search.ask(LINE)
    _, found = sampler._fitted
    assert (len(found.points), found.observed) == (4, 3)


def test_a_batch_climbs_from_the_best_points_in_turn_whatever_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[float] = []
    climbed = coupled._climbed

    def noted(one: Surrogate, at: Any, rng: np.random.Generator) -> Any:
        starts.append(float(at[0]))
        return climbed(one, at, rng)

    monkeypatch.setattr(coupled, "_climbed", noted)
    search = study()
    told(search, LINE, 3, lambda x: [float(x > -0.5), float(x > 0), float(x > 0.5)])
    search.tell(search.ask(LINE), state=TrialState.FAIL)
    starts.clear()
    search.ask(LINE)
    search.ask(LINE)
    sampler: Any = search.sampler
    assert starts == [float(point[0]) for point in sampler._fitted[1].best_first[:2]]


def test_what_is_no_float_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^CoupledSampler searches floats; 'n' is IntDistribution\.$"):
        study().ask({"n": IntDistribution(0, 3)})


@settings(max_examples=30, deadline=None)
@given(some.integers(2, 12), some.integers(0, 5), some.integers(0, 10_000))
def test_whatever_was_seen_predictions_are_numbers(size: int, repeats: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.uniform(-1, 1, (size, 3))
    points = np.vstack([points, points[:repeats]])  # the same point again
    rows = rng.integers(0, 2, (len(points), 4)).astype(float)
    found = Surrogate.fit(points, rows, rows[:size].mean(1), explores=True)
    means, deviations = found.believing(points[:1]).predict(rng.uniform(-1, 1, (5, 3)))
    assert np.isfinite(means).all()
    assert (deviations > 0).all()


def test_the_settings_of_the_climb_are_the_published_codes() -> None:
    assert (coupled._POPULATION, coupled._GENERATIONS, coupled._STEP) == (50, 10, 0.8)
