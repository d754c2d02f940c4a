r"""φ̂ of many data sets that share one design: for the bootstrap, and for coverage.

Of Gaussian tasks a data set is known by the y of its statistics, and that is

.. math:: y_j = R_j\theta_j + Z_j\beta + \sigma\varepsilon_j, \qquad
          \varepsilon \sim N(0, I),\quad \varepsilon_{\text{last}} \sim \chi_{n_j - d - p}

without any rows being drawn. All data sets are searched together, by Newton steps on Λ of
:mod:`hierbayes.evidence.many`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hierbayes.evidence.many import ManyProblems
from hierbayes.evidence.profile import profile_problem
from hierbayes.meta.first_look import look
from hierbayes.meta.marginal import positions, relative_units
from hierbayes.meta.optimum import SINGULAR
from hierbayes.priors.hyperprior import Shape
from hierbayes.statistics import Statistics, row_scale, statistics
from hierbayes.tasks import Tasks

NUMBERS_AT_ONCE = 100_000
"""Numbers of one array that is worked on at once: more leave the processor's cache."""

MOST_STEPS = 100

AWAY = 0.3
"""Length of the first step off a saddle, in units of a row's noise."""


@dataclass(frozen=True)
class ManyEstimates:
    """φ̂ of B data sets, by name with a leading axis over them, and θ's posteriors at each.

    ``log_evidence`` (B,); ``converged`` (B,) of bool; ``mean`` and ``sd`` (B, J, d).
    """

    phi: dict[str, np.ndarray]
    log_evidence: np.ndarray
    converged: np.ndarray
    mean: np.ndarray
    sd: np.ndarray


def simulated(
    tasks: Tasks,
    phi: Mapping[str, np.ndarray],
    num_sets: int,
    rng: np.random.Generator,
) -> tuple[Statistics, np.ndarray]:
    """Statistics of data sets drawn under φ, their ``y`` (m, J, B), and the θ (B, J, d) in them."""
    phis = {n: np.broadcast_to(v, (num_sets, *np.shape(v))) for n, v in phi.items()}
    return simulated_at(tasks, phis, rng)


def simulated_at(
    tasks: Tasks,
    phis: Mapping[str, np.ndarray],
    rng: np.random.Generator,
) -> tuple[Statistics, np.ndarray]:
    """:func:`simulated`, each data set under a φ of its own: ``phis`` by name, (B, …)."""
    stats, num_sets = statistics(tasks), len(phis["mu"])
    m, d, num_tasks = stats.x.shape
    p = stats.z.shape[1]
    white = rng.standard_normal((num_sets, num_tasks, d))
    theta = prior_means(phis, stats.task_predictors)
    theta = theta + white @ np.swapaxes(prior_roots(phis), 1, 2)
    # a task of n rows leaves noise in n rows of its triangle, the rest of it in the last
    present = np.arange(m - 1)[:, None] < stats.num_rows
    noise = rng.standard_normal((m, num_tasks, num_sets))
    noise[:-1] *= present[:, :, None]
    left = np.maximum(stats.num_rows - d - p, 0)
    if left.any():
        noise[-1] = np.sqrt(rng.chisquare(np.maximum(left, 1), (num_sets, num_tasks)).T)
    noise[-1] *= (left > 0)[:, None]
    y = noise * np.asarray(phis.get("sigma", 1.0))
    y += np.einsum("mdj,bjd->mjb", stats.x, theta)
    if p:
        y += np.einsum("mpj,bp->mjb", stats.z, phis["beta"])
    return replace(stats, y=y), theta


def prior_means(phis: Mapping[str, np.ndarray], task_predictors: np.ndarray) -> np.ndarray:
    """μ + Γ w_j of every data set and task, (B, J, d), from (q, J) task predictors."""
    means = np.repeat(phis["mu"][:, None], task_predictors.shape[1], axis=1)
    if "gamma" in phis:
        means = means + np.einsum("bdq,qj->bjd", phis["gamma"], task_predictors)
    return means


def prior_roots(phis: Mapping[str, np.ndarray]) -> np.ndarray:
    """Lower L with Σ = L Lᵀ of every φ, (…, d, d); Σ may be singular. Without JAX's compiling."""
    tau = np.asarray(phis["tau"])
    if "corr" not in phis:
        return np.eye(tau.shape[-1]) * tau[..., None, :]
    values, vectors = np.linalg.eigh(phis["corr"])
    half = np.swapaxes(vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :], -1, -2)
    upper = np.asarray(np.linalg.qr(half, mode="r"))
    sign = np.where(np.einsum("...ii->...i", upper) < 0, -1.0, 1.0)
    return tau[..., :, None] * np.swapaxes(sign[..., :, None] * upper, -1, -2)


def of_outcomes(tasks: Tasks, outcomes: np.ndarray) -> Statistics:
    """Statistics of data sets given as rows: ``outcomes`` (B, N), in the order of the tasks' rows.

    In the rotation of [X Z] alone the rest of y is a length.
    """
    stats, scale = statistics(tasks), row_scale(tasks)
    m, d, num_tasks = stats.x.shape
    rows = np.column_stack([tasks.predictors, tasks.shared]) * scale[:, None]
    y = ((np.asarray(outcomes, float) - tasks.slots.get("offset", 0.0)) * scale).T
    triangles = np.zeros((m, m - 1, num_tasks))
    rotated = np.zeros((m, num_tasks, y.shape[1]))
    for j in range(num_tasks):
        some = slice(tasks.starts[j], tasks.starts[j + 1])
        q, r = np.linalg.qr(rows[some])
        k = len(r)
        triangles[:k, :, j] = r
        rotated[:k, j] = q.T @ y[some]
        rotated[-1, j] = np.linalg.norm(y[some] - q @ rotated[:k, j], axis=0)
    return replace(stats, x=triangles[:, :d], z=triangles[:, d:], y=rotated)


def maximise_many(
    stats: Statistics,
    shape: Shape,
    *,
    reml: bool,
    starts: tuple[Any, ...] | None = None,
    tolerance: float = 1e-8,
    progress: str | None = None,
) -> ManyEstimates:
    """φ̂ of type-II maximum likelihood or REML of every data set.

    Parameters
    ----------
    stats : Statistics
        With ``y`` (m, J, B), from :func:`simulated` or :func:`of_outcomes`.
    shape : Shape
        Of the model: ``model.shape(tasks)``.
    reml : bool
    starts : tuple, optional
        Where Λ starts: multiples of the identity in units of a row's noise, or roots (d, d); the
        best of a grid, for each data set, where none are given.
    tolerance : float
        Relative length of the Newton step in Λ that ends the search.
    progress : str, optional
        Name of a progress bar.

    Returns
    -------
    ManyEstimates
        Of each data set what :func:`~hierbayes.meta.marginal.maximise_likelihood` finds.
    """
    from tqdm.auto import tqdm

    known_noise = "sigma" not in shape.parameters
    problem = profile_problem(stats, shape, reml=reml, known_noise=known_noise)
    many, unit = ManyProblems.of(problem), np.asarray(relative_units(stats))
    size = stats.num_tasks * len(unit) * (len(unit) + len(many.fixed[0]) + 1)
    at_once = max(1, NUMBERS_AT_ONCE // size)
    found = []
    bar = tqdm(total=many.num_sets, desc=progress, leave=False, delay=2.0,
               disable=progress is None or not sys.stderr.isatty())  # fmt: skip
    with bar, np.errstate(all="ignore"):
        for first in range(0, many.num_sets, at_once):
            part = many.take(slice(first, first + at_once))
            search = _Search(part, *positions(shape.blocks), unit, tolerance)
            found.append(_estimates(search, stats, shape, starts))
            bar.update(part.num_sets)
    phi = {n: np.concatenate([f.phi[n] for f in found]) for n in found[0].phi}
    rest = [np.concatenate([getattr(f, n) for f in found])
            for n in ("log_evidence", "converged", "mean", "sd")]  # fmt: skip
    return ManyEstimates(phi, *rest)


def _estimates(
    search: _Search, stats: Statistics, shape: Shape, starts: tuple[Any, ...] | None
) -> ManyEstimates:
    many, rows, columns = search.many, search.rows, search.columns
    begin = [look(many, shape.blocks).root] if starts is None else map(search.start, starts)
    runs = [search.run(search.entries(root)) for root in begin] + [search.zero()]
    losses = np.stack([loss for _, loss, _ in runs])
    best = np.nanargmin(np.where(np.isfinite(losses), losses, np.inf), axis=0)
    every = np.arange(many.num_sets)
    x = np.stack([x for x, _, _ in runs])[best, :, every].T
    converged = np.stack([done for _, _, done in runs])[best, every]
    root = search.snapped(x, losses[best, every], converged)
    profile = many.profiles(root, rows, columns)
    mean, sd = many.posteriors(root, profile.effects, profile.sigma)
    covariance = np.einsum("dcb,ecb->bde", root, root) * profile.sigma[:, None, None] ** 2
    phi = _phi(shape, many.fixed_effects(profile.effects).T, covariance, profile.sigma)
    location = prior_means(phi, stats.task_predictors)
    return ManyEstimates(
        phi, -profile.loss, converged & np.isfinite(profile.loss),
        location + mean.transpose(2, 1, 0), sd.transpose(2, 1, 0),
    )  # fmt: skip


@dataclass(frozen=True)
class _Search:
    """Damped Newton steps on Λ's entries in ``unit``s, of all data sets side by side.

    A column of Λ and its negative are the same, so that the bound at zero needs no guard: where
    τ̂ = 0, zero is an ordinary minimum.
    """

    many: ManyProblems
    rows: np.ndarray
    columns: np.ndarray
    unit: np.ndarray
    tolerance: float

    def start(self, start: Any) -> np.ndarray:
        root = start if np.ndim(start) == 2 else np.diag(float(start) * self.unit)
        return np.repeat(root[:, :, None], self.many.num_sets, axis=2)

    def entries(self, root: np.ndarray) -> np.ndarray:
        return (root / self.unit[:, None, None])[self.rows, self.columns]

    def root(self, x: np.ndarray) -> np.ndarray:
        root = np.zeros((len(self.unit), len(self.unit), x.shape[1]))
        root[self.rows, self.columns] = x * self.unit[self.rows][:, None]
        return root

    def _evaluated(self, many: ManyProblems, x: np.ndarray) -> tuple[np.ndarray, ...]:
        found, unit = many.profiles(self.root(x), self.rows, self.columns), self.unit[self.rows]
        loss = np.where(np.isfinite(found.loss), found.loss, np.inf)
        return (
            loss,
            found.slope * unit[:, None],
            found.hessian * unit[:, None, None] * unit[:, None],
        )

    def zero(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """No variance at all: the least where a search from afar ends in a worse minimum."""
        x = np.zeros((len(self.rows), self.many.num_sets))
        loss, _, hessian = self._evaluated(self.many, x)
        curved = np.linalg.eigvalsh(np.moveaxis(hessian, -1, 0))[:, 0] > 0
        return x, np.where(curved, loss, np.inf), curved

    def run(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(x, loss, converged) from a start (K, B); who has arrived is worked on no more."""
        done = np.zeros(x.shape[1], bool)
        ends, losses = x.copy(), np.full(x.shape[1], np.inf)
        active, many = np.arange(x.shape[1]), self.many
        loss, slope, hessian = self._evaluated(many, x)
        share = np.ones(x.shape[1])
        for _ in range(MOST_STEPS):
            step, decrement = _newton(x, slope, hessian)
            trial = x + share * step
            after, slope_after, hessian_after = self._evaluated(many, trial)
            # near the minimum rounding decides about the value: the slope still knows
            size = np.maximum(1.0, np.abs(loss))
            good = after <= np.where(decrement < 1e-11 * size, loss + 1e-10 * size, loss)
            length = np.abs(step).max(0) / np.maximum(0.1, np.abs(x).max(0))
            finished = (good & (length * share < self.tolerance)) | (share < 1e-9)
            x, loss = np.where(good, trial, x), np.where(good, after, loss)
            slope, hessian = (
                np.where(good, slope_after, slope),
                np.where(good, hessian_after, hessian),
            )
            share = np.where(good, np.minimum(1.0, 4 * share), 0.25 * share)
            ends[:, active], losses[active] = x, loss
            done[active[finished]] = True
            if finished.all():
                break
            if finished.mean() > 0.2:
                left = ~finished
                active, many = active[left], many.take(left)
                x, loss, share = x[:, left], loss[left], share[left]
                slope, hessian = slope[:, left], hessian[..., left]
        return ends, losses, done

    def snapped(self, x: np.ndarray, loss: np.ndarray, converged: np.ndarray) -> np.ndarray:
        """Λ with a positive diagonal; rows that are zero but for rounding are exactly zero.

        With a row at zero Λ has a valley without an end, along which steps become slow.
        """
        root = self.root(x)
        diagonal = np.einsum("iib->ib", root)
        root = root * np.where(diagonal < 0, -1.0, 1.0)[None]
        near = SINGULAR * np.where(converged, 1.0, 100.0)
        small = np.linalg.norm(root, axis=1) < near * self.unit[:, None]
        if not small.any():
            return root
        trial = np.where(small[:, None], 0.0, root)
        at_zero = self.many.profiles(trial, self.rows, self.columns).loss
        free = at_zero <= loss + 1e-7 * np.maximum(1.0, np.abs(loss))
        return np.where(free, trial, root)


def _newton(x: np.ndarray, slope: np.ndarray, hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Newton's step (K, B), uphill directions turned, no longer than Λ; and its decrement (B,).

    A column of Λ that is next to zero has next to no slope, though more variance would help:
    directions of negative curvature are followed at least :data:`AWAY`.
    """
    h = np.moveaxis(hessian, -1, 0)
    bad: Any = ~np.isfinite(h).all((1, 2))
    h = np.where(bad[:, None, None], np.eye(h.shape[-1]), h)
    values, vectors = np.linalg.eigh(h)
    saddle = values < -1e-8 * np.abs(values).max(-1, keepdims=True)
    values = np.abs(values)
    values = np.maximum(values, 1e-10 * values.max(-1, keepdims=True) + 1e-300)
    along = np.einsum("bki,kb->bi", vectors, np.where(bad, 0.0, slope)) / values
    along = np.where(saddle, np.copysign(np.maximum(np.abs(along), AWAY), along), along)
    step = -np.einsum("bki,bi->kb", vectors, along)
    most = np.maximum(1.0, np.abs(x).max(0))
    step *= np.minimum(1.0, most / np.maximum(np.abs(step).max(0), 1e-300))
    return step, -(step * slope).sum(0)


def _phi(
    shape: Shape, fixed: np.ndarray, covariance: np.ndarray, sigma: np.ndarray
) -> dict[str, np.ndarray]:
    """φ by name from b (B, P), Σ (B, d, d) and σ (B,)."""
    d, p, q = len(shape.coef), len(shape.shared), len(shape.task_predictors)
    free = np.flatnonzero(shape.free_mean)
    tau = np.sqrt(np.einsum("bii->bi", covariance))
    mu = np.zeros_like(tau)
    mu[:, free] = fixed[:, : len(free)]
    phi = {"mu": mu, "tau": tau}
    if q:
        phi["gamma"] = fixed[:, len(free) : len(free) + d * q].reshape(-1, d, q)
    if p:
        phi["beta"] = fixed[:, len(free) + d * q :]
    if shape.correlated:
        safe = np.where(tau > 0, tau, 1.0)
        corr = np.clip(covariance / (safe[:, :, None] * safe[:, None]), -1.0, 1.0)
        phi["corr"] = np.where(np.eye(d, dtype=bool), 1.0, corr)
    if "sigma" in shape.parameters:
        phi["sigma"] = sigma
    return phi
