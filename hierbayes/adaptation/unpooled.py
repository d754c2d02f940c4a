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
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.base import Adaptation, TaskMoments
from hierbayes.adaptation.laplace import AtMode
from hierbayes.adaptation.least_squares import RANK_TOLERANCE
from hierbayes.adaptation.mode import LogJoint, damped_newton, trouble
from hierbayes.adaptation.posterior import FlatPrior
from hierbayes.likelihoods.generalised import GeneralisedLinear
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.rows import Rows, Whole, rows_of
from hierbayes.sharding import filled_up, gathered, rung
from hierbayes.tasks import Tasks
from hierbayes.tasks.container import kept


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


class Unpooled(NamedTuple):
    """What a compiled programme is given of the tasks: the rows that have a maximum, and L, Q.

    L = ``root`` (d, d, J) holds the directions that rows tell apart, Q = ``penalty`` (d, d, J)
    keeps those at zero that they do not.
    """

    rows: Rows | Whole
    root: Any
    penalty: Any
    start: Any

    @classmethod
    def of(cls, tasks: Tasks, likelihood: GeneralisedLinear) -> Unpooled:
        """The tasks, with the search starting at least squares on each row's own best f."""
        known = determined(tasks, likelihood)
        d = tasks.predictors.shape[1]
        with float64():
            best = likelihood.best_of_rows(tasks.outcome, tasks.slots)
        best = best - tasks.slots.get("offset", 0.0)
        root = filled_up(known.root, rung(tasks.num_tasks), 0)
        pull = np.zeros((len(root), d))
        x = np.where(known.rows[:, None], tasks.predictors, 0.0)
        np.add.at(pull, tasks.task_of_row, x * best[:, None])
        start = np.einsum("jkl,jk->lj", root, pull)
        empty = (np.abs(root).max(1) == 0).astype(float)
        penalty = np.eye(d)[:, :, None] * empty.T[None]
        rows = rows_of(tasks.keep_rows(known.rows), likelihood)
        return cls(rows, np.moveaxis(root, 0, -1), penalty, start)

    def at(self, model: HierarchicalModel, phi: dict[str, Any]) -> AtMode:
        """The normal at the maximum of every task's likelihood under φ, differentiable in it."""

        def tasks(phi: dict[str, Any]) -> LogJoint:
            rows, nowhere = self.rows.under(model.likelihood, phi), jnp.zeros(self.start.shape)
            return LogJoint(model.likelihood, rows, phi, nowhere, self.root, self.penalty)

        held = tasks(jax.lax.stop_gradient(phi))
        near = jax.lax.stop_gradient(damped_newton(held, jnp.asarray(self.start)))
        return AtMode(tasks(phi), near)


@functools.partial(jax.jit, static_argnums=0)
def _maxima(model: HierarchicalModel, phi: dict[str, Any], given: Unpooled) -> TaskMoments:
    return given.at(model, phi).moments()


def integrated(model: HierarchicalModel, phi: dict[str, Any], given: Unpooled) -> jax.Array:
    r"""Σ_j log p(D_j | θ̂_j, φ) − ½ log |H_j|: the evidence under a flat prior, by Laplace.

    For Gaussian rows its maximum in σ is the residual sum of squares over the degrees of freedom.
    """
    each = given.at(model, phi).log_normaliser
    return jnp.where(jnp.isnan(each), -jnp.inf, each).sum()


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
            given = Unpooled.of(tasks, likelihood)
            found = gathered(_maxima(model.without_encoder(), dict(phi), given), tasks.num_tasks)
        blind = determined(tasks, likelihood).blind
        none = np.zeros(found.mean.shape, bool)
        said = trouble(tasks.names, found.converged, found.definite)
        return FlatPrior(found.mean, found.covariance, blind, none, remarks=said)
