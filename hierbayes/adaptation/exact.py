r"""The exact posterior of Gaussian tasks, and its normaliser, the evidence.

.. math::

    \theta_j \mid D_j, \varphi &\sim N\!\left(m_j + L B_j^\top V_j^{-1} a_j,\;
        L (I + B_j^\top B_j / \sigma^2)^{-1} L^\top\right) \\
    \log p(D_j \mid \varphi) &= -\tfrac12\left[ n_j \log 2\pi + (n_j - d)\log\sigma^2
        + \log|V_j| + a_j^\top V_j^{-1} a_j + \lVert b_j\rVert^2/\sigma^2 \right]
        + \sum_i \log s_{ij}

with Σ = L Lᵀ, prior mean m_j, B_j = R_j L, V_j = σ² I + B_j B_jᵀ of size d × d, a_j and b_j the two
parts of the residual at the prior mean, of which θ can move the first (see
:mod:`hierbayes.statistics`), and s the scale of each row. The cost does not depend on the number of
rows, and nothing cancels: every term is a sum of squares. L may be singular: in a direction with
τ = 0 the posterior is a point.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.base import Integrable, TaskMoments, moments_of
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import (
    as_rng,
    cholesky,
    cholesky_without_threads,
    float64,
    log_diagonal_sum,
    matmul,
    matvec,
    normal_draw,
    one_behind,
    solve_lower,
    solve_upper,
    total,
)  # fmt: skip
from hierbayes.priors import Prior
from hierbayes.sharding import gathered, num_shares, place
from hierbayes.statistics import Statistics, design_and_variance, placed_statistics
from hierbayes.tasks import Tasks

NUMBERS_AT_ONCE = 100_000
"""Draws × tasks that are worked on together: more than this leaves the processor's cache."""

THREADS = 2
"""In which normal numbers are drawn; the numbers do not depend on it."""

TASKS_AT_ONCE = 1024
"""Tasks in a chunk of :func:`_moments_by_chunks`."""


class Collapse(NamedTuple):
    """A Gaussian task and a Gaussian prior, brought together; tasks on the last axis.

    ``location`` m (d, J); ``root`` L (d, d); ``design`` B (d, d, J); ``variance`` V (d, d, J);
    ``moved`` a (d, J): the residual that θ can reduce; ``left`` b (p + 1, J): what is left.
    """

    location: jax.Array
    root: jax.Array
    design: jax.Array
    variance: jax.Array
    moved: jax.Array
    left: jax.Array
    noise_variance: Any
    num_rows: Any
    log_scale: Any

    @property
    def log_normaliser(self) -> jax.Array:
        """log p(D_j | φ) (J,), with all constants."""
        factor, d = cholesky(self.variance), len(self.moved)
        squares = (solve_lower(factor, self.moved) ** 2).sum(0)
        squares = squares + (self.left**2).sum(0) / self.noise_variance
        log_det = 2 * log_diagonal_sum(factor)
        log_det = log_det + (self.num_rows - d) * jnp.log(self.noise_variance)
        return -0.5 * (self.num_rows * jnp.log(2 * jnp.pi) + log_det + squares) + self.log_scale

    @property
    def start(self) -> None:
        """Nothing is searched."""

    @property
    def converged(self) -> jax.Array:
        """Nothing is searched."""
        return jnp.ones(self.moved.shape[1], bool)

    def mean_and_root(self) -> tuple[jax.Array, jax.Array]:
        """Means (d, J) and root covariances C (d, d, J), with C Cᵀ the covariance."""
        factor, d = cholesky_without_threads(self.variance), len(self.moved)
        solved = solve_upper(factor, solve_lower(factor, self.moved))
        transposed = jnp.swapaxes(self.design, 0, 1)
        mean = self.location + matvec(self.root[:, :, None], matvec(transposed, solved))
        precision = matmul(transposed, self.design) / self.noise_variance
        precision = precision + jnp.eye(d)[:, :, None]
        # (I + BᵀB/σ²)⁻¹ = F⁻ᵀF⁻¹ with F lower, so L F⁻ᵀ is a root of the covariance
        factor = cholesky_without_threads(precision)
        units = jnp.broadcast_to(jnp.eye(d)[:, :, None], factor.shape)
        return mean, matmul(self.root[:, :, None], solve_upper(factor, units))

    def moments(self) -> TaskMoments:
        """Mean and covariance of every θ_j."""
        mean, root = self.mean_and_root()
        covariance = jnp.einsum("ikj,lkj->jil", root, root)
        return TaskMoments.exact(mean.T, covariance, self.log_normaliser)


def collapse(stats: Statistics, prior: Prior, phi: dict[str, Any]) -> Collapse:
    """Bring Gaussian tasks and a Gaussian prior, or the scales of one, together."""
    d = stats.num_coef
    noise_variance = phi["sigma"] ** 2 if "sigma" in phi else jnp.ones(())
    location, root = prior.location(phi, stats.task_predictors.T).T, prior.scale_tril(phi)
    residual = stats.y
    if "beta" in phi:
        residual = residual - jnp.einsum("mpj,p->mj", stats.z, phi["beta"])
    x = stats.x[:d]
    design, variance = design_and_variance(x, root, noise_variance)
    return Collapse(
        location, root, design, variance, residual[:d] - matvec(x, location), residual[d:],
        noise_variance, stats.num_rows, stats.log_scale,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=1)
def _moments_by_chunks(stats: Statistics, prior: Prior, phi: dict[str, Any]) -> TaskMoments:
    """Moments a thousand tasks at a time, so that what lies between stays in the cache."""
    num_tasks = stats.num_tasks

    def chunk(start: Any) -> TaskMoments:
        def part(a: Any) -> Any:
            return jax.lax.dynamic_slice_in_dim(a, start, TASKS_AT_ONCE, a.ndim - 1)

        return collapse(jax.tree.map(part, stats), prior, phi).moments()

    # the last chunk goes back to end with the last task: some tasks are done twice, to the same end
    starts = jnp.minimum(jnp.arange(0, num_tasks, TASKS_AT_ONCE), num_tasks - TASKS_AT_ONCE)

    def together(a: Any) -> Any:
        whole = (len(starts) - 1) * TASKS_AT_ONCE
        body = a[:-1].reshape(whole, *a.shape[2:])
        return jnp.concatenate([body, a[-1][whole - num_tasks :]])

    return jax.tree.map(together, jax.lax.map(chunk, starts))


@functools.partial(jax.jit, static_argnums=1)
def _draws(stats: Statistics, prior: Prior, phis: dict[str, Any], white: jax.Array) -> jax.Array:
    """One exact draw of every θ_j for each φ of ``phis``, from ``white``, both (S, d, J).

    From precisions: shorter than :meth:`Collapse.mean_and_root`, and what it loses to it in a
    direction without data is nothing beside the draw's own spread there.
    """
    d = stats.num_coef

    def one(phi: dict[str, Any], z: jax.Array) -> jax.Array:
        location = prior.location(phi, stats.task_predictors.T).T
        root, sigma = prior.scale_tril(phi), phi.get("sigma", 1.0)
        residual = stats.y[:d]
        if "beta" in phi:
            residual = residual - jnp.einsum("mpj,p->mj", stats.z[:d], phi["beta"])
        x = stats.x[:d]
        transposed = jnp.swapaxes(matmul(x, root[:, :, None] / sigma), 0, 1)
        pull = matvec(transposed, (residual - matvec(x, location)) / sigma)
        precision = matmul(transposed, jnp.swapaxes(transposed, 0, 1)) + jnp.eye(d)[:, :, None]
        moved = normal_draw(precision, pull, z)
        return location + total(root[:, k, None] * moved[k] for k in range(d))

    return jax.vmap(one)(phis, white)


def _normals(rng: np.random.Generator, shape: tuple[int, ...], count: int) -> Iterator[np.ndarray]:
    """``count`` arrays of normal numbers, drawn ahead in threads of their own.

    NumPy's normals take a quarter of the time of JAX's, and are still most of a draw; of its
    generators SFC64 is the quickest.
    """
    seeds: Any = rng.bit_generator.seed_seq
    streams = [np.random.Generator(np.random.SFC64(seed)) for seed in seeds.spawn(count)]
    with ThreadPoolExecutor(THREADS) as pool:
        ahead = deque[Future[np.ndarray]]()
        for stream in streams:
            ahead.append(pool.submit(stream.standard_normal, shape))
            if len(ahead) > THREADS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@dataclass(frozen=True)
class Conjugate(Integrable):
    """A(D; φ) = p(θ | D, φ), exact for Gaussian tasks under a Gaussian prior."""

    name = "exact posterior"

    def lay_out(self, model: HierarchicalModel, tasks: Tasks) -> Statistics:
        """Sufficient statistics, where the tasks lie."""
        del model
        return placed_statistics(tasks)

    @staticmethod
    def given(
        model: HierarchicalModel, phi: dict[str, Any], data: Statistics, start: Any = None
    ) -> Collapse:
        """The posterior of every task."""
        del start
        return collapse(data, model.prior, phi)

    def _moments_at(
        self, model: HierarchicalModel, phi: dict[str, Any], data: Statistics
    ) -> TaskMoments:
        if isinstance(data.x, np.ndarray) and data.num_tasks >= 4 * TASKS_AT_ONCE:
            return _moments_by_chunks(data, model.prior, phi)
        return moments_of(self.given, model, phi, data)

    def draws(
        self, model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray], key: jax.Array
    ) -> np.ndarray:
        """Exact draws (S, J, d), one for each of the S values of φ."""
        num_tasks, d = tasks.num_tasks, tasks.predictors.shape[1]
        size = len(next(iter(phis.values())))
        together = num_tasks if tasks.sharding is None else num_tasks // num_shares(tasks.sharding)
        most = min(size, max(1, NUMBERS_AT_ONCE // max(together, 1)))
        # the last part goes back to end with the last draw: one shape, so one compilation
        starts = [min(start, size - most) for start in range(0, size, most)]
        theta = np.empty((size, d, num_tasks))
        with float64():
            stats = placed_statistics(tasks)

            def part(start: int, white: np.ndarray) -> tuple[int, Any]:
                some = {name: value[start : start + most] for name, value in phis.items()}
                # drawn for the tasks alone: the same key gives the same on any number of devices
                return start, _draws(stats, model.prior, some, place(white, tasks.sharding))

            normals = _normals(as_rng(key), (most, d, num_tasks), len(starts))
            for start, found in one_behind(map(part, starts, normals)):
                theta[start : start + most] = gathered(found, num_tasks, axis=2)
        return np.swapaxes(theta, 1, 2)
