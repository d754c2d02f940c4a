r"""What tasks conclude: a distribution of every θ_j under φ, or a point that stands for one.

Whoever reads a posterior asks it for what f = xᵀθ_j may be, for draws, for moments, and nothing
about where it came from.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np

from hierbayes.priors.column_map import ColumnMap
from hierbayes.tasks import Tasks

DRAWN_AT_ONCE = 30_000
"""Numbers that are drawn, turned and shifted together."""

LARGEST_COVARIANCE = 10_000_000
"""Numbers up to which covariances of draws are formed."""

PROGRAM_DRAWS = 200
"""Draws of θ, where outcomes cannot be averaged over it in closed form."""

Thetas = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""θ (n, M, d) of some tasks for n draws of φ, given by their positions (n,)."""


class Linear(NamedTuple):
    """f of rows that are linear in θ, in each of S equally likely cases, (S, N).

    ``variance`` is that of f, None of a point; ``thetas`` draws what it is made of.
    """

    mean: np.ndarray
    variance: Any
    thetas: Thetas | None


@dataclass(frozen=True)
class Posterior(abc.ABC):
    """Of J tasks with d coefficients.

    ``mean`` (J, d); ``log_normaliser`` (J,): log p(D_j | φ), exact or approximate, where it is a
    distribution under one φ; ``remarks``: what went wrong, in sentences that name the tasks.
    """

    mean: np.ndarray
    log_normaliser: np.ndarray | None = field(default=None, kw_only=True)
    remarks: tuple[str, ...] = field(default=(), kw_only=True)
    has_prior: ClassVar[bool] = True
    """Whether something beside the task's own rows holds θ_j."""

    @property
    def covariance(self) -> np.ndarray | None:
        """Covariances (J, d, d), where there are some."""
        return None

    @property
    def draws(self) -> np.ndarray | None:
        """Equally likely values of θ (S, J, d), where that is what is known."""
        return None

    @property
    def identified(self) -> np.ndarray:
        """Which coefficients the task's rows, or the prior, determine, (J, d) of bool."""
        return np.ones(self.mean.shape, bool)

    @property
    def is_distribution(self) -> bool:
        """Whether it says how surely θ is known."""
        return True

    @property
    def sd(self) -> np.ndarray:
        """Standard deviations (J, d), NaN where they are not known."""
        if self.covariance is None:
            return np.full(self.mean.shape, np.nan)
        variance = np.diagonal(self.covariance, axis1=1, axis2=2)
        return np.where(self.identified, np.sqrt(np.maximum(variance, 0.0)), np.nan)

    @abc.abstractmethod
    def linear(self, x: np.ndarray, tasks: np.ndarray, of_row: np.ndarray) -> Linear:
        """f = xᵀθ of rows (N, d) of the ``tasks`` at these positions (M,), each of ``of_row``."""

    def unidentified(self, x: np.ndarray, of_row: np.ndarray) -> np.ndarray:
        """Which rows (N, d) of the tasks at positions (N,) lean on what nothing determines."""
        del of_row
        return np.zeros(len(x), bool)

    def values(self, rng: np.random.Generator | None = None) -> np.ndarray:
        """Values of θ (S, J, d) that stand for it where f is curved in θ, or is not known."""
        del rng
        return self.mean[None]

    def variance_at(self, rows: Tasks, tasks: np.ndarray) -> Any:
        """The variance of f (1, N) at rows of tasks at these positions, beside :meth:`values`.

        None of a point.
        """
        del rows, tasks

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Draws (size, J, d) around the mean."""
        raise ValueError("a point estimate has no distribution to draw from")

    @abc.abstractmethod
    def outward(self, at: ColumnMap, beta: Any) -> Posterior:
        """The same of θ in the user's columns; ``beta`` (S, p) are those of the map's, or None."""


@dataclass(frozen=True)
class Point(Posterior):
    """θ̂_j alone."""

    @property
    def is_distribution(self) -> bool:
        """It is none."""
        return False

    def linear(self, x: np.ndarray, tasks: np.ndarray, of_row: np.ndarray) -> Linear:
        """f at the point."""
        return Linear(_at(self.mean, x, tasks, of_row), None, None)

    def outward(self, at: ColumnMap, beta: Any) -> Point:
        """The point there."""
        return replace(self, mean=at.theta(self.mean, _mean(beta)))


@dataclass(frozen=True)
class Moments(Posterior):
    """What has covariances ``spread`` (J, d, d)."""

    spread: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """Covariances (J, d, d)."""
        return self.spread

    def linear(self, x: np.ndarray, tasks: np.ndarray, of_row: np.ndarray) -> Linear:
        """f is normal too."""
        own = self.spread[tasks]
        drawn = functools.partial(_normal_thetas, self.mean[tasks], own)
        return Linear(_at(self.mean, x, tasks, of_row), quadratic(x, own[of_row])[None], drawn)

    def values(self, rng: np.random.Generator | None = None) -> np.ndarray:
        """The mean, or draws where there is an ``rng``."""
        return self.mean[None] if rng is None else self.draw(rng, PROGRAM_DRAWS)

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Normal draws (size, J, d)."""
        return normal_draws(self.mean, self.spread, rng, size)

    def _moved(self, at: ColumnMap, beta: Any) -> tuple[np.ndarray, np.ndarray]:
        return at.theta(self.mean, _mean(beta)), at.covariance(self.spread)


@dataclass(frozen=True)
class Normal(Moments):
    """N(mean, covariance)."""

    def outward(self, at: ColumnMap, beta: Any) -> Normal:
        """The normal there."""
        mean, spread = self._moved(at, beta)
        return replace(self, mean=mean, spread=spread)


@dataclass(frozen=True)
class WithShared(Moments):
    """N(mean, covariance) that counts what is not known of φ, so that θ_j and β are correlated.

    ``cross`` (J, d, p) are their covariances, ``of_shared`` (p, p) β's own.
    """

    cross: np.ndarray
    of_shared: np.ndarray

    def outward(self, at: ColumnMap, beta: Any) -> Normal:
        """The normal there, where θ_j has a part of β."""
        mean, spread = self._moved(at, beta)
        mixed = at.of_theta @ self.cross @ at.from_shared.T
        own = at.from_shared @ self.of_shared @ at.from_shared.T
        more: Any = {"log_normaliser": self.log_normaliser, "remarks": self.remarks}
        return Normal(mean, spread + mixed + mixed.swapaxes(1, 2) + own, **more)


@dataclass(frozen=True)
class FlatPrior(Moments):
    """N(mean, covariance) where rows determine θ_j, nothing where they do not.

    ``blind`` (J, d, d): projections on the directions that nothing determines; ``absorbed`` (J, d)
    of bool: coefficients that hold the effect of a shared column which is not identified.
    """

    blind: np.ndarray
    absorbed: np.ndarray
    has_prior: ClassVar[bool] = False

    @property
    def identified(self) -> np.ndarray:
        """Which coefficients the task's own rows determine."""
        known = np.diagonal(self.blind, axis1=1, axis2=2) < 1e-8
        return known & ~self.absorbed.astype(bool)

    def unidentified(self, x: np.ndarray, of_row: np.ndarray) -> np.ndarray:
        """Which rows lean on a direction that nothing determines."""
        return quadratic(x, self.blind[of_row]) > 1e-8 * (x**2).sum(1)

    def outward(self, at: ColumnMap, beta: Any) -> FlatPrior:
        """Of minimum norm in the user's columns."""
        mean, spread = self._moved(at, beta)
        blind = _projected(self.blind, at)
        mean = mean - np.einsum("jkl,jl->jk", blind, mean)
        rest = np.eye(mean.shape[1]) - blind
        absorbed = (np.asarray(self.absorbed, float) @ (at.of_theta != 0).T) > 0
        return replace(self, mean=mean, spread=rest @ spread @ rest, blind=blind, absorbed=absorbed)


@dataclass(frozen=True)
class Mixture(Moments):
    """Equally likely normals, far from one normal: their moments, and they themselves.

    ``normals``: of positions (M,), their means (S, M, d) and covariances (S, M, d, d).
    ``together``: the S are those of as many draws of φ; else every task has its own.
    """

    normals: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    together: bool

    def linear(self, x: np.ndarray, tasks: np.ndarray, of_row: np.ndarray) -> Linear:
        """f is such a mixture too."""
        centres, spreads = self.normals(tasks)
        mean = np.einsum("sik,ik->si", centres[:, of_row], x)
        drawn = functools.partial(_mixed_thetas, centres, spreads, not self.together)
        return Linear(mean, quadratic(x[None], spreads[:, of_row]), drawn)

    def outward(self, at: ColumnMap, beta: Any) -> Mixture:
        """The mixture there."""
        mean, spread = self._moved(at, beta)
        normals = functools.partial(_normals_outward, self.normals, at, _mean(beta))
        return replace(self, mean=mean, spread=spread, normals=normals)


@dataclass(frozen=True)
class Draws(Posterior):
    """Equally likely values ``sample`` (S, J, d)."""

    sample: np.ndarray

    @classmethod
    def of(cls, sample: np.ndarray, remarks: tuple[str, ...] = ()) -> Draws:
        """With their mean."""
        return cls(sample.mean(0), sample, remarks=remarks)

    @property
    def draws(self) -> np.ndarray:
        """The values."""
        return self.sample

    @functools.cached_property
    def covariance(self) -> np.ndarray | None:
        """Theirs; None of one draw, and where it would be too large to form."""
        size, num_coef = len(self.sample), self.mean.shape[-1]
        if size == 1 or self.mean.size * num_coef > LARGEST_COVARIANCE:
            return None
        centred = self.sample - self.mean
        return np.einsum("sji,sjk->jik", centred, centred) / (size - 1)

    def linear(self, x: np.ndarray, tasks: np.ndarray, of_row: np.ndarray) -> Linear:
        """f under every draw."""
        at, found = tasks[of_row], np.zeros((len(self.sample), len(x)))
        for k in range(x.shape[1]):  # one coefficient at a time: S N numbers
            found += self.sample[:, at, k] * x[:, k]
        return Linear(found, 0.0, None)

    def values(self, rng: np.random.Generator | None = None) -> np.ndarray:
        """The values."""
        del rng
        return self.sample

    def variance_at(self, rows: Tasks, tasks: np.ndarray) -> Any:
        """The draws hold it."""
        del rows, tasks
        return 0.0

    def outward(self, at: ColumnMap, beta: Any) -> Draws:
        """Each draw there, with its own β."""
        return Draws.of(at.theta(self.sample, None if beta is None else beta[:, None]),
                        self.remarks)  # fmt: skip


@dataclass(frozen=True)
class Linearised(Posterior):
    """A normal around θ̂_j whose covariance is too large to form, seen where f is asked for.

    ``variance``: of (rows, the task of each by position), that of f at rows of these tasks.
    """

    variance: Callable[[Tasks, np.ndarray], np.ndarray]

    def linear(self, x: np.ndarray, tasks: np.ndarray, of_row: np.ndarray) -> Linear:
        """f at the mean."""
        return Linear(_at(self.mean, x, tasks, of_row), None, None)

    def variance_at(self, rows: Tasks, tasks: np.ndarray) -> np.ndarray:
        """The variance of the linearised f."""
        return self.variance(rows, tasks)[None]

    def outward(self, at: ColumnMap, beta: Any) -> Linearised:
        """Networks have no columns that are mapped."""
        del at, beta
        return self


def quadratic(x: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """xᵀ M x for each row."""
    return np.einsum("...i,...ij,...j->...", x, matrices, x, optimize=True)


def normal_draws(
    mean: np.ndarray, covariance: np.ndarray, rng: np.random.Generator, size: int
) -> np.ndarray:
    """Draws (size, J, d) of normals with these moments."""
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
    draws = rng.standard_normal((size, *mean.shape))
    step = max(1, DRAWN_AT_ONCE // max(1, mean.size))
    rows, means = np.ascontiguousarray(np.moveaxis(root, 0, -1)), mean.T
    for start in range(0, size, step):  # in place, by pieces that fit the cache
        piece = draws[start : start + step]
        white = np.ascontiguousarray(np.moveaxis(piece, -1, 0))
        for k, row in enumerate(rows):
            piece[:, :, k] = means[k] + sum(a * z for a, z in zip(row, white, strict=True))
    return draws


def _at(mean: np.ndarray, x: np.ndarray, tasks: np.ndarray, of_row: np.ndarray) -> np.ndarray:
    """xᵀ mean of every row (1, N)."""
    return np.einsum("ik,ik->i", mean[tasks[of_row]], x)[None]


def _mean(beta: Any) -> Any:
    return None if beta is None else np.asarray(beta).mean(0)


def _normal_thetas(
    mean: np.ndarray, covariance: np.ndarray, at: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """θ of every task from its normal posterior, whichever draw of φ."""
    return normal_draws(mean, covariance, rng, len(at))


def _mixed_thetas(
    centres: np.ndarray,
    spreads: np.ndarray,
    apart: bool,
    at: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """θ of every task from its mixture of normals: all of one φ, or each task by itself."""
    size, num_tasks, _ = centres.shape
    which = rng.integers(size, size=(len(at), num_tasks)) if apart else at[:, None]
    task = np.arange(num_tasks)
    values, vectors = np.linalg.eigh(spreads)
    roots = vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :]
    white = rng.standard_normal((len(at), num_tasks, centres.shape[2]))
    return centres[which, task] + np.einsum("njkl,njl->njk", roots[which, task], white)


def _normals_outward(of: Any, at: ColumnMap, beta: Any, positions: np.ndarray) -> Any:
    centres, spreads = of(positions)
    return at.theta(centres, beta), at.covariance(spreads)


def _projected(projections: np.ndarray, at: ColumnMap) -> np.ndarray:
    """Projections (J, d, d) on P times what each projects on."""
    found = np.zeros_like(projections)
    values, vectors = np.linalg.eigh(projections)
    rank = (values > 0.5).sum(1)
    for r in np.unique(rank[rank > 0]):
        which = rank == r
        basis, _ = np.linalg.qr(at.of_theta @ vectors[which][:, :, -r:])
        found[which] = basis @ np.swapaxes(basis, 1, 2)
    return found
