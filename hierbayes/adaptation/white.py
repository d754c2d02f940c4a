r"""One task of many coefficients, in coordinates where the implied posterior is white.

.. math::

    \theta = \varphi + R u, \quad R = D S^{1/2}, \quad \Sigma_K = R R^\top, \quad
    S = s_0 I + V \operatorname{diag}(s_i - s_0) V^\top

with B = D² the diagonal preconditioner and V the leading eigenvectors of D H D; other directions
have λ = 0 and s₀ = s(0). There the posterior under P has curvature I at φ, so that conjugate
gradients and L-BFGS need few products, and the penalty is ½ uᵀ (I + V diag(r − 1) Vᵀ) u.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from hierbayes.adaptation.curvature import Kind, products
from hierbayes.adaptation.mode import ACCEPTED
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Task, Tasks

NUM_PROBES = 64
"""Random signs of Hutchinson's estimate ‖A‖² ≈ mean ‖A z‖²; a relative error of about 0.1."""


@dataclass(frozen=True)
class OneTask:
    """The log likelihood of one task, in float64 only.

    Its rows are filled up to a power of two where they do not depend on one another.
    """

    model: HierarchicalModel
    kind: Kind
    phi: dict[str, Any]
    rows: Task

    @staticmethod
    def of(
        model: HierarchicalModel, kind: Kind, phi: dict[str, Any], tasks: Tasks, j: int
    ) -> OneTask:
        """The task at position j, which must have rows."""
        width = int(tasks.sizes[j])
        if not model.likelihood.mixes_rows(tasks.predictors):
            width = 1 << (width - 1).bit_length()
        rows = jax.tree.map(lambda values: values[0], tasks.block(np.array([j]), width))
        return OneTask(model, kind, phi, rows)

    def product(self, theta: np.ndarray, vector: np.ndarray) -> np.ndarray:
        """H(θ) v."""
        return np.asarray(_product(self.model, self.kind, self.phi, self.rows, theta, vector))

    def height(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """log p(D | θ) and its slope."""
        value, slope = _height(self.model, self.phi, self.rows, theta)
        return float(value), np.asarray(slope)

    def divergence(self, theta: np.ndarray, other: np.ndarray) -> float:
        """Mean over the rows of KL(p(y | θ) ‖ p(y | other))."""
        return float(_divergence(self.model, self.phi, self.rows, theta, other))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _product(
    model: HierarchicalModel, kind: Kind, phi: Any, rows: Task, theta: Any, vector: Any
) -> jax.Array:
    alone = jax.tree.map(lambda values: values[None], rows)
    return products(model, phi, alone, None, theta[None], vector[None], kind)[0]


@functools.partial(jax.jit, static_argnums=0)
def _height(model: HierarchicalModel, phi: Any, rows: Task, theta: Any) -> Any:
    return jax.value_and_grad(lambda t: model.likelihood.log_likelihood(t, phi, rows).sum())(theta)


@functools.partial(jax.jit, static_argnums=0)
def _divergence(model: HierarchicalModel, phi: Any, rows: Task, theta: Any, other: Any) -> Any:
    alone = jax.tree.map(lambda values: values[None], rows)
    by_row = model.likelihood.divergence_of_rows(theta[None], other[None], phi, alone, None)
    return by_row.sum() / rows.mask.sum()


@dataclass(frozen=True)
class White:
    """R and the penalty of one task: ``root`` D (d,), ``basis`` V (d, r), r_i, s_i (r,), s₀."""

    task: OneTask
    centre: np.ndarray
    root: np.ndarray
    basis: np.ndarray
    left: np.ndarray
    moved: np.ndarray
    rest: float

    def _bend(self, vector: np.ndarray, values: np.ndarray, rest: float) -> np.ndarray:
        return rest * vector + self.basis @ ((values - rest) * (self.basis.T @ vector))

    def theta(self, u: np.ndarray) -> np.ndarray:
        """φ + R u."""
        return self.centre + self.root * self._bend(u, np.sqrt(self.moved), np.sqrt(self.rest))

    def u(self, theta: np.ndarray) -> np.ndarray:
        """R⁻¹ (θ − φ)."""
        gap = (theta - self.centre) / self.root
        return self._bend(gap, 1 / np.sqrt(self.moved), 1 / np.sqrt(self.rest))

    def slope(self, slope: np.ndarray) -> np.ndarray:
        """Rᵀ ∇: a slope in θ as one in u."""
        return self._bend(self.root * slope, np.sqrt(self.moved), np.sqrt(self.rest))

    def penalty(self, u: np.ndarray) -> np.ndarray:
        """Rᵀ P R u."""
        return self._bend(u, self.left, 1.0)

    def loss(self, u: np.ndarray) -> tuple[float, np.ndarray]:
        """−log p(D | θ) + ½ (θ − φ)ᵀ P (θ − φ), and its slope in u."""
        value, slope = self.task.height(self.theta(u))
        pulled = self.penalty(u)
        return 0.5 * float(u @ pulled) - value, pulled - self.slope(slope)

    def measure(
        self, theta: np.ndarray, *, has_prior: bool = True
    ) -> tuple[float, float, float, float]:
        """(missed, linearisation, curvature_drift, predictive_kl); see Discrepancy.

        Without a prior there is no MAP estimate to miss: the first and the last are NaN.
        """
        u, d = self.u(theta), len(theta)

        def curvature(vector: np.ndarray) -> np.ndarray:
            turned = self.theta(vector) - self.centre
            return self.slope(self.task.product(theta, turned)) + self.penalty(vector)

        linear = self.slope(self.task.height(self.centre)[1])
        linearisation = float(np.linalg.norm(u - linear)) / np.sqrt(d)
        if not has_prior:
            return np.nan, linearisation, self._drift(theta), np.nan
        missed = 0.5 * conjugate_gradients(curvature, self.loss(u)[1])
        return missed, linearisation, self._drift(theta), self._divergence_of_map(u, theta)

    def _drift(self, theta: np.ndarray) -> float:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (NUM_PROBES, len(theta)))
        here = np.array([self.task.product(self.centre, z) for z in signs])
        there = np.array([self.task.product(theta, z) for z in signs])
        size = np.linalg.norm(here)
        return float(np.linalg.norm(there - here) / size) if size > 0 else 0.0

    def _divergence_of_map(self, u: np.ndarray, theta: np.ndarray) -> float:
        from scipy import optimize

        found = optimize.minimize(
            self.loss, u, jac=True, method="L-BFGS-B",
            options={"maxiter": 500, "maxcor": 30, "ftol": 1e-16, "gtol": 1e-9},
        )  # fmt: skip
        if not 0.5 * float(found.jac @ found.jac) < ACCEPTED:
            return np.nan
        return self.task.divergence(self.theta(found.x), theta)


MAX_PRODUCTS = 300


def conjugate_gradients(product: Any, target: np.ndarray) -> float:
    """bᵀ A⁻¹ b by conjugate gradients; inf where A is not positive definite, NaN if too slow.

    What is left of it is rᵀ A⁻¹ r, so that ‖r‖ of 1e-6 ‖b‖ makes it right to about 1e-12.
    """
    found, residual = np.zeros_like(target), target
    direction, square = residual, float(residual @ residual)
    enough = 1e-14 * square
    for _ in range(MAX_PRODUCTS):
        if square <= enough:
            return float(target @ found)
        turned = product(direction)
        bend = float(direction @ turned)
        if not bend > 0:
            return np.inf
        found = found + square / bend * direction
        residual = residual - square / bend * turned
        before, square = square, float(residual @ residual)
        direction = residual + square / before * direction
    return np.nan
