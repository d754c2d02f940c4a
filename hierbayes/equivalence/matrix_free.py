r"""The equivalent prior of tasks with many coefficients, without any d × d matrix.

.. math::

    P = D^{-1} \left[ \tfrac{1}{s_0} I + V \operatorname{diag}(p_i - \tfrac1{s_0}) V^\top \right]
        D^{-1}, \qquad \Sigma_K = D \left[ s_0 I + V \operatorname{diag}(s_i - s_0) V^\top
        \right] D

with λ_i, V the leading eigenpairs of D H D (B = D², a diagonal preconditioner), found by Lanczos
iterations from products H v. The other directions have λ = 0 and s₀ = s(0), Kη for equal steps: n
rows with one outcome each leave a generalised Gauss–Newton matrix no more than n others.

One task of many coefficients, in coordinates where the implied posterior is white.

.. math::

    \theta = \varphi + R u, \quad R = D S^{1/2}, \quad \Sigma_K = R R^\top, \quad
    S = s_0 I + V \operatorname{diag}(s_i - s_0) V^\top

with B = D² the diagonal preconditioner and V the leading eigenvectors of D H D; other directions
have λ = 0 and s₀ = s(0). There the posterior under P has curvature I at φ, so that conjugate
gradients and L-BFGS need few products, and the penalty is ½ uᵀ (I + V diag(r − 1) Vᵀ) u.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from hierbayes import inputs
from hierbayes.adaptation.curvature import Kind, products
from hierbayes.adaptation.descent import Descent, Flow
from hierbayes.adaptation.mode import ACCEPTED
from hierbayes.equivalence.discrepancy import judge_validity, taken
from hierbayes.equivalence.implied import Discrepancy, ImpliedPrior
from hierbayes.equivalence.validity import FLAT, Status, judge, says_nothing
from hierbayes.errors import InputError, NotApplicable, announce, listing
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import as_rng, float64, to_numpy
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


LARGE = 256
"""Coefficients above which no d × d matrix is formed."""

MOST = 200
"""Directions kept at most, unless ``rank`` says otherwise."""

NEGLIGIBLE = 1e-6
"""s₀ |λ| below which leaving a direction out changes nothing that matters."""


@dataclass(frozen=True, eq=False)
class MatrixFreePrior(ImpliedPrior):
    r"""Gradient steps from φ as a Gaussian prior, P = Σ p_i ṽ_i ṽ_iᵀ + 1/s₀ on what is left out.

    As :class:`EquivalentPrior`, with the r leading directions of each task and with products in
    the place of matrices. A task with fewer than r directions is filled up with zeros.

    Attributes
    ----------
    curvature, filter, shrinkage, strength : array (J, r)
        λ_i, r_i, 1 − r_i, p_i of the kept directions, by ascending λ.
    directions : array (J, d, r)
        v_i, in columns.
    left_out : float
        s₀: the posterior variance of all other directions, 1/s₀ being the prior's precision.
    location, posterior_mean, status, messages, validity, table
        As in :class:`EquivalentPrior`; ``validity.curvature_drift`` is an estimate from products
        with 64 vectors of random signs, the same in every call.
    """

    root: np.ndarray = field(repr=False)

    def precision_times(self, vectors: Any) -> np.ndarray:
        """P v (J, d) of ``vectors`` (J, d), or (d,) for all tasks; 0 in pinned directions."""
        values = np.where(self.pinned, 0.0, self._weights)
        return self._times(vectors, values, 1 / self._rest if self._rest else 0.0, 1 / self.root)

    def covariance_times(self, vectors: Any) -> np.ndarray:
        """P⁻¹ v (J, d), NaN for tasks without a prior or with a flat one."""
        lost = (np.abs(self.filter) <= FLAT).any(-1) | (self.status == Status.NO_PRIOR)
        strength = np.where(np.asarray(lost)[..., None], np.nan, self._weights)
        return self._times(vectors, 1 / strength, self._rest, self.root)

    def posterior_covariance_times(self, vectors: Any) -> np.ndarray:
        """Σ_K v (J, d)."""
        return self._times(vectors, self.moved, self._rest, self.root)

    def draws(self, num_draws: int = 1000, seed: int | jax.Array = 0) -> np.ndarray:
        """Draws (num_draws, J, d) from the implied posterior N(θ_K, Σ_K)."""
        num_draws = inputs.count("num_draws", num_draws)
        white = as_rng(seed).standard_normal((num_draws, *self.location.shape))
        spread = self._bend(white, np.sqrt(self.moved), np.sqrt(self._rest))
        return self.posterior_mean + self.root * spread

    @property
    def precision(self) -> np.ndarray:
        """Refused: see :meth:`precision_times`."""
        raise NotApplicable(_NO_MATRIX.format("precision"))

    @property
    def covariance(self) -> np.ndarray:
        """Refused: see :meth:`covariance_times`."""
        raise NotApplicable(_NO_MATRIX.format("covariance"))

    @property
    def posterior_covariance(self) -> np.ndarray:
        """Refused: see :meth:`posterior_covariance_times`."""
        raise NotApplicable(_NO_MATRIX.format("posterior_covariance"))

    @property
    def _rest(self) -> float:
        assert self.left_out is not None
        return self.left_out

    def _times(self, vectors: Any, values: Any, rest: float, root: np.ndarray) -> np.ndarray:
        vectors = np.broadcast_to(np.asarray(vectors, dtype=float), self.location.shape)
        return root * self._bend(root * vectors, values, rest)

    def _bend(self, vectors: np.ndarray, values: Any, rest: float) -> np.ndarray:
        basis = self.directions / self.root[:, None]
        along = (values - rest) * np.einsum("...ki,...k->...i", basis, vectors)
        return rest * vectors + np.einsum("...ki,...i->...k", basis, along)


_NO_MATRIX = (
    "{0} would be a matrix of all coefficients, which is not formed where there are many or rank "
    "is given; multiply by it: {0}_times(v)"
)

_LEFT_OUT_PINNED = (
    "the directions that are left out are pinned to phi, in every task: their precision "
    "is infinite, and stands as 0 in `precision_times`"
)


def matrix_free_prior(
    model: HierarchicalModel,
    tasks: Tasks,
    phi: dict[str, Any],
    method: Descent | Flow,
    root: np.ndarray,
    kind: Kind,
    null: str,
    rank: int | None,
) -> MatrixFreePrior:
    """What :func:`equivalent_prior` returns where d > 256 or ``rank`` is given."""
    bare, rows = model.without_encoder(), model.likelihood.arrange(tasks)
    gaussian = model.likelihood.gaussian_in_theta
    with float64():
        location = np.asarray(model.prior.location(phi, np.asarray(tasks.task_predictors)))
        pairs = _pairs(bare, kind, phi, tasks, location, root, rank)
        values, basis = _side_by_side(pairs)
        left, moved = to_numpy(method.responses(values))
        rest = float(method.responses(np.zeros(1))[1][0])
    status, messages = judge(tasks, method, values, left, moved, refuse=gaussian)
    cut = _cut(tasks, pairs, kind, rest, messages)
    theta = taken(bare, phi, rows, location, method, root, tasks)
    validity = Discrepancy.none(tasks.num_tasks)

    def white(j: int) -> White:
        task = OneTask.of(bare, kind, phi, tasks, j)
        return White(task, location[j], root, basis[j], left[j], moved[j], rest)

    if not gaussian or cut.any():
        validity = _measured(white, theta, status, tasks, messages)
    pinned = np.zeros(values.shape, dtype=bool)
    if null == "pinned":
        pinned = says_nothing(values)
        moved, rest = np.where(pinned, 0.0, moved), 0.0
        messages.append(_LEFT_OUT_PINNED)
    directions = root[:, None] * basis
    dual = directions if (root == 1).all() else basis / root[:, None]
    return MatrixFreePrior(
        tasks, method, location, theta, values, directions, dual, left, moved, pinned, status,
        announce(messages), validity, rest, root,
    )  # fmt: skip


def _measured(
    white: Callable[[int], White],
    theta: np.ndarray,
    status: np.ndarray,
    tasks: Tasks,
    messages: list[str],
) -> Discrepancy:
    """How far each task's θ is from its MAP estimate; say where that is not known, or too far."""
    measured = np.zeros((tasks.num_tasks, 4))
    with float64():
        for j in np.flatnonzero(tasks.sizes):
            has_prior = status[j] != Status.NO_PRIOR
            measured[j] = white(int(j)).measure(theta[j], has_prior=has_prior)
    slow = np.isnan(measured[:, 0]) & (status != Status.NO_PRIOR)
    if slow.any():
        messages.append(
            f"validity.missed is not known in {slow.sum()} of {tasks.num_tasks} task(s) "
            f"({listing(tasks.names[slow].tolist(), 3)}): conjugate gradients did not converge"
        )
    return judge_validity(Discrepancy(*measured.T), status, tasks, messages)


def _pairs(
    model: HierarchicalModel,
    kind: Kind,
    phi: dict[str, Any],
    tasks: Tasks,
    location: np.ndarray,
    root: np.ndarray,
    rank: int | None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The leading eigenpairs of every task, none of one without rows."""
    return [
        _leading(OneTask.of(model, kind, phi, tasks, j), location[j], root, tasks, j, rank)
        if n else (np.zeros(0), np.zeros((location.shape[1], 0)))
        for j, n in enumerate(tasks.sizes)
    ]  # fmt: skip


def _leading(
    task: OneTask, centre: np.ndarray, root: np.ndarray, tasks: Tasks, j: int, rank: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The eigenpairs of D H D of largest |λ|, by ascending λ."""
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    d = len(centre)
    count = min(MOST if rank is None else rank, d - 1)
    if task.kind == "ggn":
        count = min(count, int(tasks.sizes[j]))

    def product(vector: np.ndarray) -> np.ndarray:
        return root * task.product(centre, root * vector.ravel())

    start = np.random.default_rng(0).standard_normal(d)
    if not np.abs(product(start)).max() > 0:
        return np.zeros(0), np.zeros((d, 0))
    operator = LinearOperator((d, d), matvec=product, dtype=float)  # type: ignore[call-arg]
    try:
        values, vectors = eigsh(operator, count, which="LM", v0=start)
    except ArpackError as error:
        raise InputError(
            f"the leading directions of task {listing([tasks.names[j]])} were not found "
            f"({error}); pass a smaller rank"
        ) from error
    order = np.argsort(values)
    return values[order], vectors[:, order]


def _side_by_side(
    pairs: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """λ (J, r) and V (J, d, r), with zeros where a task has fewer directions than others."""
    r, d = max(1, *(len(values) for values, _ in pairs)), len(pairs[0][1])
    values, basis = np.zeros((len(pairs), r)), np.zeros((len(pairs), d, r))
    for j, (found, vectors) in enumerate(pairs):
        values[j, : len(found)], basis[j, :, : len(found)] = found, vectors
    order = np.argsort(values, axis=1, kind="stable")
    return (
        np.take_along_axis(values, order, 1),
        np.take_along_axis(basis, order[:, None, :], 2),
    )


def _cut(
    tasks: Tasks,
    pairs: list[tuple[np.ndarray, np.ndarray]],
    kind: Kind,
    rest: float,
    messages: list[str],
) -> np.ndarray:
    """(J,): where directions are left out whose curvature may matter; say so."""
    kept = np.array([len(values) for values, _ in pairs])
    weakest = np.array([np.abs(values).min(initial=np.inf) for values, _ in pairs])
    complete = (kept == 0) | ((tasks.sizes <= kept) & (kind == "ggn"))
    cut = ~complete & (rest * weakest >= NEGLIGIBLE)
    if cut.any():
        worst = int(np.argmax(np.where(cut, weakest, -np.inf)))
        messages.append(
            f"{cut.sum()} of {len(cut)} task(s) ({listing(tasks.names[cut].tolist(), 3)}) bend in "
            f"more directions than the {kept[worst]} that are kept: the weakest kept has Kη|λ| = "
            f"{rest * weakest[worst]:.2g}, and the others are taken as 0; pass a larger rank"
        )
    return cut
