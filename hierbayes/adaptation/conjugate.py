r"""The exact posterior of Gaussian tasks.

.. math::

    \theta_j \mid D_j, \varphi \sim N\!\left(m_j + L B_j^\top V_j^{-1} a_j,\;
        L (I + B_j^\top B_j / \sigma^2)^{-1} L^\top\right)

with Σ = L Lᵀ, prior mean m_j, B_j = R_j L, V_j = σ² I + B_j B_jᵀ and a_j the part of the residual
at the prior mean that θ can move (see :mod:`hierbayes.statistics`). L may be singular: in a
direction with τ = 0 the posterior is a point.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.base import Adaptation
from hierbayes.adaptation.posterior import Normal
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import (
    as_rng,
    cholesky,
    cholesky_without_threads,
    float64,
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
from hierbayes.statistics import Statistics, placed_statistics
from hierbayes.tasks import Tasks

NUMBERS_AT_ONCE = 100_000
"""Draws × tasks that are worked on together: more than this leaves the processor's cache."""

THREADS = 2
"""In which normal numbers are drawn; the numbers do not depend on it."""

TASKS_AT_ONCE = 1024
"""Tasks in a chunk of :func:`_posterior_by_chunks`."""


class Collapse(NamedTuple):
    """What evidence and posterior both need; tasks on the last axis.

    ``location`` m (d, J); ``root`` L (d, d); ``design`` B (d, d, J); ``factor`` of V (d, d, J);
    ``moved`` a (d, J): the residual that θ can reduce; ``left`` b (p + 1, J): what is left.
    """

    location: jax.Array
    root: jax.Array
    design: jax.Array
    factor: jax.Array
    moved: jax.Array
    left: jax.Array
    noise_variance: Any


def collapse(
    stats: Statistics, prior: Prior, phi: dict[str, Any], factorise: Any = cholesky
) -> Collapse:
    """Bring a Gaussian task and a Gaussian prior together."""
    d = stats.num_coef
    noise_variance = phi["sigma"] ** 2 if "sigma" in phi else 1.0
    location = prior.location(phi, stats.task_predictors.T).T
    root = prior.scale_tril(phi)
    residual = stats.y
    if "beta" in phi:
        residual = residual - jnp.einsum("mpj,p->mj", stats.z, phi["beta"])
    x = stats.x[:d]
    design = matmul(x, root[:, :, None])
    spread = matmul(design, jnp.swapaxes(design, 0, 1))
    variance = spread + noise_variance * jnp.eye(d)[:, :, None]
    return Collapse(
        location, root, design, factorise(variance), residual[:d] - matvec(x, location),
        residual[d:], noise_variance,
    )  # fmt: skip


def posterior(stats: Statistics, prior: Prior, phi: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Means (d, J) and root covariances C (d, d, J), with C Cᵀ the covariance."""
    c = collapse(stats, prior, phi, cholesky_without_threads)
    solved = solve_upper(c.factor, solve_lower(c.factor, c.moved))
    transposed = jnp.swapaxes(c.design, 0, 1)
    mean = c.location + matvec(c.root[:, :, None], matvec(transposed, solved))
    d = stats.num_coef
    precision = matmul(transposed, c.design) / c.noise_variance + jnp.eye(d)[:, :, None]
    # (I + BᵀB/σ²)⁻¹ = F⁻ᵀF⁻¹ with F lower, so L F⁻ᵀ is a root of the covariance
    factor = cholesky_without_threads(precision)
    units = jnp.broadcast_to(jnp.eye(d)[:, :, None], factor.shape)
    return mean, matmul(c.root[:, :, None], solve_upper(factor, units))


@functools.partial(jax.jit, static_argnums=1)
def _posterior(stats: Statistics, prior: Prior, phi: dict[str, Any]) -> Any:
    mean, root = posterior(stats, prior, phi)
    return mean.T, jnp.einsum("ikj,lkj->jil", root, root)


@functools.partial(jax.jit, static_argnums=1)
def _posterior_by_chunks(stats: Statistics, prior: Prior, phi: dict[str, Any]) -> Any:
    """The same a thousand tasks at a time, so that what lies between stays in the cache."""
    num_tasks = stats.num_tasks

    def chunk(start: Any) -> Any:
        def part(a: Any) -> Any:
            return jax.lax.dynamic_slice_in_dim(a, start, TASKS_AT_ONCE, a.ndim - 1)

        return _posterior(jax.tree.map(part, stats), prior, phi)

    # the last chunk goes back to end with the last task: some tasks are done twice, to the same end
    starts = jnp.minimum(jnp.arange(0, num_tasks, TASKS_AT_ONCE), num_tasks - TASKS_AT_ONCE)
    mean, covariance = jax.lax.map(chunk, starts)

    def together(a: Any) -> Any:
        whole = (len(starts) - 1) * TASKS_AT_ONCE
        body = a[:-1].reshape(whole, *a.shape[2:])
        return jnp.concatenate([body, a[-1][whole - num_tasks :]])

    return together(mean), together(covariance)


@functools.partial(jax.jit, static_argnums=1)
def _draws(stats: Statistics, prior: Prior, phis: dict[str, Any], white: jax.Array) -> jax.Array:
    """One exact draw of every θ_j for each φ of ``phis``, from ``white``, both (S, d, J).

    From precisions: shorter than :func:`posterior`, and what it loses to it in a direction without
    data is nothing beside the draw's own spread there.
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


@functools.partial(jax.jit, static_argnums=1)
def _moments(stats: Statistics, prior: Prior, phis: dict[str, Any]) -> Any:
    """Mean and covariance of every θ_j over the S values of φ, without keeping draws."""

    def at(phi: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        mean, root = posterior(stats, prior, phi)
        return mean.T, jnp.einsum("ikj,lkj->jil", root, root)

    return averaged_moments(at, phis, stats.num_tasks, stats.num_coef)


def averaged_moments(
    at: Callable[[dict[str, Any]], tuple[jax.Array, jax.Array]],
    phis: dict[str, Any],
    num_tasks: int,
    num_coef: int,
) -> tuple[jax.Array, jax.Array]:
    """Mean (J, d) and covariance (J, d, d) of the mixture over φ of what ``at(phi)`` gives."""

    def add(sums: Any, phi: dict[str, Any]) -> tuple[Any, None]:
        mean, spread = at(phi)
        return (sums[0] + mean, sums[1] + spread + mean[:, :, None] * mean[:, None]), None

    size = jax.tree.leaves(phis)[0].shape[0]
    zero = (jnp.zeros((num_tasks, num_coef)), jnp.zeros((num_tasks, num_coef, num_coef)))
    (first, second), _ = jax.lax.scan(add, zero, phis)
    mean = first / size
    return mean, second / size - mean[:, :, None] * mean[:, None]


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
class Conjugate(Adaptation):
    """A(D; φ) = p(θ | D, φ), exact for Gaussian tasks under a Gaussian prior."""

    name = "exact posterior"

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Normal:
        """Posterior means and covariances."""
        linear = model.likelihood.design(tasks, phi)
        with float64():
            stats = placed_statistics(linear)
            on_host = isinstance(stats.x, np.ndarray)
            many = on_host and stats.num_tasks >= 4 * TASKS_AT_ONCE
            function = _posterior_by_chunks if many else _posterior
            found = function(stats, model.prior, dict(phi))
            mean, covariance = gathered(found, tasks.num_tasks)
        return Normal(mean, covariance)

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

    def moments(
        self, model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean (J, d) and covariance (J, d, d), averaged over the values of φ."""
        with float64():
            found = _moments(placed_statistics(tasks), model.prior, dict(phis))
            return gathered(found, tasks.num_tasks)
