"""InstructZero's Bayesian optimizer as an Optuna sampler: a Gaussian process that knows how instructions behave.

Paper:   Chen et al., "InstructZero: Efficient Instruction Optimization for Black-Box Large Language Models",
         arXiv:2306.03082, the instruction-coupled kernel and expected improvement
Notes:   seeds/instructzero.md
Departs: two instructions are alike as far as they are right and wrong on the same rows (the paper compares their
         predictions); what the latent kernel can't tell from the points visited keeps its prior variance (under
         the paper's kernel it is certain of points it knows nothing of, and never explores); a point that repeats
         an instruction lends it its place but is no second observation; points still out count as seen with the
         score predicted, so that a batch spreads.

An exact process of its own, because the coupled kernel is a function of the points visited and of their scores:
scikit-learn's regressor and BoTorch's models take kernels of two points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import optuna
from cmaes import CMA
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState
from scipy import stats
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import cdist

Array = npt.NDArray[np.float64]

SCORES: Final = "scores"
"""User attribute of a trial: its score on each row, the same rows in every trial, each in [0, 1]."""

_POPULATION: Final = 50
_GENERATIONS: Final = 10
_STEP: Final = 0.8
"""Of CMA-ES, as in the published code; the box is [-1, 1] in every dimension."""

_NOISES: Final = np.geomspace(1e-4, 10, 11)
_LENGTHS: Final = np.geomspace(0.05, 5, 13)
"""Length scales tried, in units of the square root of the number of dimensions."""

_TIED: Final = 1e-9
"""Scores no further apart are equal: sums of the same rows needn't be."""


class CoupledSampler(BaseSampler):
    """Proposes points by expected improvement under the instruction-coupled kernel.

    Trials carry their scores row by row in the user attribute `scores`; without it, their value stands in. A
    trial that failed but carries scores repeats the instruction of another one. Points are uniform until two
    trials are complete. What it proposes depends on the seed and on the study's trials alone.

    Args:
        seed: Equal seeds give equal points.
        explores: Keep the latent kernel's own variance where no visited point is near; False is the paper's kernel.
    """

    def __init__(self, *, seed: int = 0, explores: bool = True) -> None:
        self._seed = seed
        self._explores = explores
        self._space = IntersectionSearchSpace()
        self._fitted: tuple[Any, Surrogate] | None = None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the dimensions that are chosen together: the numbers all complete trials have."""
        del trial
        found = self._space.calculate(study)
        return {name: one for name, one in found.items() if isinstance(one, FloatDistribution) and not one.single()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the point of most expected improvement, climbed to from one of the best points visited."""
        box = cast("dict[str, FloatDistribution]", search_space)
        others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        complete = [other for other in others if other.state == TrialState.COMPLETE]
        if not box or len(complete) < 2:
            return {}
        surrogate = self._surrogate(study, box, complete, others)
        pending = [other for other in others if _is_out(other) and box.keys() <= other.params.keys()]
        together = sum(other.state == TrialState.RUNNING for other in pending)  # the others of this batch
        best = surrogate.best_first[together % len(surrogate.best_first)]
        point = _climbed(surrogate.believing(_points(pending, box)), best, self._rng(trial, ""))
        return {
            name: (one.low + one.high) / 2 + float(x) * (one.high - one.low) / 2
            for x, (name, one) in zip(point, box.items(), strict=True)
        }

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a uniform draw.

        Raises:
            ValueError: If the parameter is no float.
        """
        del study
        internal = self._rng(trial, param_name).uniform()
        if isinstance(param_distribution, FloatDistribution):
            return param_distribution.low + internal * (param_distribution.high - param_distribution.low)
        raise ValueError(f"CoupledSampler searches floats; {param_name!r} is {type(param_distribution).__name__}.")

    def _rng(self, trial: FrozenTrial, name: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, trial.number, *name.encode()])

    def _surrogate(
        self,
        study: optuna.Study,
        box: Mapping[str, FloatDistribution],
        complete: Sequence[FrozenTrial],
        others: Sequence[FrozenTrial],
    ) -> Surrogate:
        repeats = [other for other in others if other.state == TrialState.FAIL and SCORES in other.user_attrs]
        key = (study.study_name, *(other.number for other in (*complete, *repeats)))
        if self._fitted is None or self._fitted[0] != key:
            visited = [*complete, *repeats]
            rows = np.array([other.user_attrs.get(SCORES, [other.value]) for other in visited], dtype=float)
            values = np.array([other.value for other in complete], dtype=float)
            self._fitted = key, Surrogate.fit(_points(visited, box), rows, values, explores=self._explores)
        return self._fitted[1]


@dataclass(frozen=True, slots=True)
class Surrogate:
    """What is believed of every point: a Gaussian process over the latent box, in standardized scores.

    Attributes:
        points: Visited, shape (visited, dimensions), in [-1, 1].
        length: Length scale of the latent kernel.
        nugget: How far scores jump between neighbouring points, as a share of the latent kernel's variance.
        inverse: Of the latent kernel with its nugget, L^-1 in the paper; shape (visited, visited).
        means: Of the instructions visited, shape (visited,).
        covariance: Of the same, shape (visited, visited).
        variance: The latent kernel's own; 0 under the paper's kernel.
        observed: How many of the points visited, the first ones, were scored.
    """

    points: Array
    length: float
    nugget: float
    inverse: Array
    means: Array
    covariance: Array
    variance: float
    observed: int

    @classmethod
    def fit(cls, points: Array, rows: Array, values: Array, *, explores: bool) -> Surrogate:
        """Return the process given what was seen; where all scores are equal, one of variance 1 and the middle length.

        Args:
            points: Visited, shape (visited, dimensions); the first ones are those of `values`.
            rows: Scores of their instructions, shape (visited, rows).
            values: Score of each instruction, once each, shape (observed,).
            explores: See `CoupledSampler`.
        """
        observed, is_tied = len(values), bool(np.ptp(values) < _TIED)
        targets = np.zeros(observed) if is_tied else (values - values.mean()) / values.std()
        alike = similarity(rows)
        _, noise, scale = _likeliest(alike[:observed, :observed], targets)
        seen = alike[:, :observed]
        factor = cho_factor(alike[:observed, :observed] + noise * np.eye(observed))
        lengths = (_LENGTHS[len(_LENGTHS) // 2 :][:1] if is_tied else _LENGTHS) * np.sqrt(points.shape[1])
        fits = [(*_likeliest(matern(points[:observed], points[:observed], at), targets), at) for at in lengths]
        _, nugget, variance, length = max(fits)
        return cls(
            points=points,
            length=float(length),
            nugget=nugget,
            inverse=_inverse(points, float(length), nugget),
            means=seen @ cho_solve(factor, targets),
            covariance=scale * (alike - seen @ cho_solve(factor, seen.T)),
            variance=variance if explores else 0.0,
            observed=observed,
        )

    @property
    def best_first(self) -> Array:
        """The scored points, best first."""
        order = np.argsort(-self.means[: self.observed], kind="stable")
        return self.points[order]

    def believing(self, points: Array) -> Surrogate:
        """Return the process as if `points` were seen with the scores predicted."""
        if not len(points):
            return self
        size = len(self.points) + len(points)
        covariance = np.zeros((size, size))
        covariance[: len(self.points), : len(self.points)] = self.covariance
        means = np.concatenate([self.means, self.predict(points)[0]])
        both = np.vstack([self.points, points])
        inverse = _inverse(both, self.length, self.nugget)
        return replace(self, points=both, inverse=inverse, means=means, covariance=covariance)

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Return mean and standard deviation at `points`, both of shape (points,), standardized."""
        near = matern(points, self.points, self.length)
        weights = near @ self.inverse  # l' L^-1 of the paper
        coupled = ((weights @ self.covariance) * weights).sum(1)
        unknown = self.variance * (1 - (weights * near).sum(1))
        return weights @ self.means, np.sqrt(np.clip(coupled + unknown, 1e-12, None))

    def improvement(self, points: Array) -> Array:
        """Return the logarithm of the expected improvement on the best instruction visited."""
        means, deviations = self.predict(points)
        ahead = (means - self.means[: self.observed].max()) / deviations
        expected = stats.norm.pdf(ahead) + ahead * stats.norm.cdf(ahead)
        far = stats.norm.logpdf(ahead) - 2 * np.log(np.maximum(-ahead, 1.0))  # its limit, where it underflows
        return cast("Array", np.where(ahead > -6, np.log(np.clip(expected, 1e-300, None)), far) + np.log(deviations))


def similarity(rows: Array) -> Array:
    """Return how alike the scores of each pair are, 1 less their mean difference; a kernel, in [0, 1].

    Args:
        rows: Scores in [0, 1], shape (instructions, rows).

    Example:
        >>> similarity(np.array([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])).tolist()
        [[1.0, 0.75, 0.0], [0.75, 1.0, 0.25], [0.0, 0.25, 1.0]]
    """
    alike: Array = 1 - cdist(rows, rows, "cityblock") / rows.shape[1]
    return alike


def matern(one: Array, other: Array, length: float) -> Array:
    """Return the Matern 5/2 kernel of two sets of points, shape (one, other)."""
    apart = np.sqrt(5) * cast("Array", cdist(one, other)) / length
    kernel: Array = (1 + apart + apart**2 / 3) * np.exp(-apart)
    return kernel


def _inverse(points: Array, length: float, nugget: float) -> Array:
    factor = cho_factor(matern(points, points, length) + nugget * np.eye(len(points)))
    return cast("Array", cho_solve(factor, np.eye(len(points))))


def _likeliest(kernel: Array, targets: Array) -> tuple[float, float, float]:
    """Return log marginal likelihood, noise and scale where `scale * (kernel + noise)` explains the targets best.

    Targets that are all 0 tell no scale: it is 1.
    """
    spectrum, basis = np.linalg.eigh(kernel)
    projected, size = (basis.T @ targets) ** 2, len(targets)
    found: list[tuple[float, float, float]] = []
    for noise in _NOISES:
        own = np.clip(spectrum, 0, None) + noise
        scale = float((projected / own).mean()) or 1.0
        found.append((float(-0.5 * (size * np.log(scale) + np.log(own).sum())), float(noise), scale))
    return max(found)


def _climbed(surrogate: Surrogate, start: Array, rng: np.random.Generator) -> Array:
    """Return the best point CMA-ES comes by, from `start`."""
    box = np.tile([-1.0, 1.0], (len(start), 1))
    climber = CMA(
        start, _STEP, bounds=box, population_size=_POPULATION, seed=int(rng.integers(2**31)), n_max_resampling=1
    )
    found: list[tuple[float, Array]] = []
    for _ in range(_GENERATIONS):
        points = np.array([climber.ask() for _ in range(_POPULATION)])
        gains = surrogate.improvement(points)
        climber.tell([(point, float(-gain)) for point, gain in zip(points, gains, strict=True)])
        found.append((float(gains.max()), points[int(gains.argmax())]))
    return max(found, key=lambda one: one[0])[1]


def _is_out(trial: FrozenTrial) -> bool:
    """Return True if a point is taken but its score isn't known: it is being scored, or couldn't be."""
    return trial.state == TrialState.RUNNING or (trial.state == TrialState.FAIL and SCORES not in trial.user_attrs)


def _points(trials: Sequence[FrozenTrial], box: Mapping[str, FloatDistribution]) -> Array:
    """Return trials as points of the box [-1, 1], shape (trials, dimensions)."""
    place = [
        [2 * (trial.params[name] - one.low) / (one.high - one.low) - 1 for name, one in box.items()] for trial in trials
    ]
    return np.array(place, dtype=float).reshape(len(trials), len(box))
