r"""The maximum of each task's own likelihood: the limit τ → ∞ where tasks are not Gaussian.

.. math:: \hat\theta_j = \arg\max_\theta \log p(D_j \mid \theta, \beta, \varphi), \qquad
          \operatorname{Cov} = H_j(\hat\theta_j)^{+}

A likelihood may have no maximum: with nothing but zeros, or zeros and ones apart along a column,
it grows for ever as θ_j moves along some direction v. Rows whose f moves along v, x·v ≠ 0, are then
explained perfectly in the limit and tell nothing of the rest (Geyer 2009, Electronic Journal of
Statistics 3). As where a design lacks rank, the estimate is the one of minimum norm from the rows
that are left, and the directions that these do not determine are marked as unidentified.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.base import Adaptation
from hierbayes.adaptation.curvature import curvatures_at, slopes
from hierbayes.adaptation.least_squares import RANK_TOLERANCE
from hierbayes.adaptation.newton import Mode, climb, trouble
from hierbayes.adaptation.posterior import FlatPrior
from hierbayes.likelihoods.base import sum_by_task
from hierbayes.likelihoods.generalised import GeneralisedLinear
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.tasks import Task, Tasks
from hierbayes.tasks.kept import kept


class Determined(NamedTuple):
    """What tasks alone determine: ``rows`` (N,) of bool that are not explained perfectly.

    ``root`` (J, d, d): directions of θ_j that these rows tell apart, in units of their own, and
    columns of zeros; ``blind`` (J, d, d): the projection on all others; ``rank`` (J,);
    ``endless`` (J,): tasks whose likelihood has no maximum.
    """

    rows: np.ndarray
    root: np.ndarray
    blind: np.ndarray
    rank: np.ndarray
    endless: np.ndarray


@kept
def determined(tasks: Tasks, likelihood: GeneralisedLinear) -> Determined:
    """The rows and directions that have a maximum."""
    up, down = likelihood.endless(tasks)
    perfect = perfectly_explained(tasks.predictors, tasks.task_of_row, tasks.num_tasks, up, down)
    x = np.where(perfect[:, None], 0.0, tasks.predictors)
    d = x.shape[1]
    grams = np.zeros((tasks.num_tasks, d, d))
    np.add.at(grams, tasks.task_of_row, x[:, :, None] * x[:, None, :])
    values, vectors = np.linalg.eigh(grams)
    # values are squares of singular values, right to rounding of the largest
    seen = values > max(RANK_TOLERANCE, 1e-13) * np.maximum(values[:, -1:], 1e-300)
    root = vectors * np.where(seen, 1.0 / np.sqrt(np.where(seen, values, 1.0)), 0.0)[:, None, :]
    blind = np.einsum("jki,ji,jli->jkl", vectors, (~seen).astype(float), vectors)
    ends = np.bincount(tasks.task_of_row, perfect, tasks.num_tasks) > 0
    return Determined(~perfect, root, blind, seen.sum(1), ends)


def perfectly_explained(
    x: np.ndarray, task_of_row: np.ndarray, num_tasks: int, up: np.ndarray, down: np.ndarray
) -> np.ndarray:
    """Rows (N,) of bool that some θ of their task explains ever better, without loss elsewhere.

    With v the direction: x·v ≥ 0 where f may go ``up``, ≤ 0 where it may go ``down``, 0 elsewhere.
    """
    perfect = np.zeros(len(x), bool)
    if not (up | down).any():
        return perfect
    if x.shape[1] == 1:
        for sign in (1.0, -1.0):
            moved = sign * x[:, 0]
            wrong = ((moved > 0) & ~up) | ((moved < 0) & ~down)
            fine = np.bincount(task_of_row, wrong, num_tasks) == 0
            perfect |= fine[task_of_row] & (moved != 0)
        return perfect
    starts = np.searchsorted(task_of_row, np.arange(num_tasks + 1))
    for low, high in itertools.pairwise(starts):
        some = slice(low, high)
        if (up[some] | down[some]).any():
            perfect[some] = _of_one(x[some], up[some], down[some])
    return perfect


def _of_one(x: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """:func:`perfectly_explained` of one task, by a linear programme.

    Σ t is maximised under 0 ≤ t ≤ 1 and t ≤ |x·v|: all rows that can move along some v then do.
    """
    from scipy import optimize

    ends, d = up | down, x.shape[1]
    fixed = x[~ends]
    if len(fixed) and np.linalg.matrix_rank(fixed) == d:
        return np.zeros(len(x), bool)
    size = np.maximum(np.abs(x).max(0), 1e-300)
    towards = np.where(up, 1.0, -1.0)[ends, None] * (x / size)[ends]
    count = len(towards)
    found: Any = optimize.linprog(
        np.concatenate([np.zeros(d), -np.ones(count)]),
        A_ub=np.hstack([-towards, np.eye(count)]), b_ub=np.zeros(count),
        A_eq=np.hstack([fixed / size, np.zeros((len(fixed), count))]) if len(fixed) else None,
        b_eq=np.zeros(len(fixed)) if len(fixed) else None,
        bounds=[(None, None)] * d + [(0.0, 1.0)] * count,
    )  # fmt: skip
    perfect = np.zeros(len(x), bool)
    perfect[ends] = found.x[d:] > 0.5
    return perfect


class Alone(NamedTuple):
    """What a compiled programme is given of the tasks."""

    rows: Task
    task_of_row: Any
    root: Any
    penalty: Any
    start: Any


def arranged(tasks: Tasks, likelihood: GeneralisedLinear) -> Alone:
    """The tasks as :func:`maxima` takes them, from least squares on each row's own best f."""
    known = determined(tasks, likelihood)
    d = tasks.predictors.shape[1]
    rows = replace(tasks.flat(), mask=known.rows)
    with float64():
        best = np.asarray(likelihood.best_location(tasks.outcome, tasks.slots), float)
    best = best - tasks.slots.get("offset", 0.0)
    pull = np.zeros((tasks.num_tasks, d))
    x = np.where(known.rows[:, None], tasks.predictors, 0.0)
    np.add.at(pull, tasks.task_of_row, x * best[:, None])
    start = np.einsum("jkl,jk->jl", known.root, pull)
    empty = (np.abs(known.root).max(1) == 0).astype(float)
    return Alone(rows, tasks.task_of_row, known.root, np.eye(d) * empty[:, None, :], start)


def maxima(model: HierarchicalModel, phi: dict[str, Any], given: Alone) -> Mode:
    """The maximum of every task's likelihood; zero along what it does not determine."""
    nowhere = jnp.zeros(given.start.shape)
    return climb(
        model, phi, given.rows, given.task_of_row, nowhere, given.root, given.penalty, given.start
    )


@functools.partial(jax.jit, static_argnums=0)
def _maxima(model: HierarchicalModel, phi: dict[str, Any], given: Alone) -> Any:
    found = maxima(model, phi, given)
    inverse = jnp.linalg.inv(jnp.where(found.definite[:, None, None], found.curvature, jnp.nan))
    covariance = jnp.einsum("jkl,jlm,jnm->jkn", given.root, inverse, given.root)
    return found.theta, covariance, found.converged, found.definite


def integrated(model: HierarchicalModel, phi: dict[str, Any], given: Alone) -> jax.Array:
    r"""Σ_j log p(D_j | θ̂_j, φ) − ½ log |H_j|: the evidence under a flat prior, by Laplace.

    Differentiable once in φ: one Newton step follows θ̂_j. For Gaussian rows its maximum in σ is
    the residual sum of squares over the degrees of freedom.
    """
    held = jax.lax.stop_gradient(maxima(model, jax.lax.stop_gradient(phi), given))
    rows, of_row = given.rows, given.task_of_row

    def in_z(thetas: Any, z: Any) -> Any:
        slope = jnp.einsum("jkl,jk->jl", given.root, slopes(model, phi, rows, of_row, thetas))
        return slope - jnp.einsum("jkl,jl->jk", given.penalty, z)

    slope = in_z(held.theta, held.z)
    z = held.z + jnp.linalg.solve(held.curvature, slope[..., None])[..., 0]
    thetas = jnp.einsum("jkl,jl->jk", given.root, z)
    bend = curvatures_at(model, phi, rows, of_row, thetas, "hessian")
    bend = jnp.einsum("jki,jkl,jlm->jim", given.root, bend, given.root) + given.penalty
    each = model.likelihood.log_likelihood_of_rows(thetas, phi, rows, of_row)
    fit = sum_by_task(each, of_row, len(z))
    sign, size = jnp.linalg.slogdet(bend)
    return jnp.where(sign > 0, fit - 0.5 * size, -jnp.inf).sum()


@dataclass(frozen=True)
class MaximumLikelihood(Adaptation):
    """A(D; φ) = the maximum of the task's own likelihood; of φ it takes ``beta`` and the family's.

    Of minimum norm and marked where there is none.
    """

    name = "maximum likelihood"
    has_prior: ClassVar[bool] = False

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> FlatPrior:
        """Estimates, their covariances and the unidentified directions, as least squares gives."""
        likelihood = model.likelihood
        assert isinstance(likelihood, GeneralisedLinear)
        with float64():
            given = arranged(tasks, likelihood)
            plain = model.without_encoder()
            theta, covariance, *went = (
                np.asarray(part) for part in _maxima(plain, dict(phi), given)
            )
        blind = determined(tasks, likelihood).blind
        none = np.zeros(theta.shape, bool)
        said = trouble(tasks.names, *went)
        return FlatPrior(theta, covariance, blind, none, remarks=said)
