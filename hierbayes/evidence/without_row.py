r"""One row of a Gaussian task given the task's other rows, θ_j integrated out exactly.

.. math::

    \log p(y_i \mid D_j \setminus i, \varphi) = -\tfrac12\left[\log 2\pi s_i^2 - \log(1 - h_i)
        + \frac{e_i^2}{s_i^2\,(1 - h_i)}\right]

with e_i the row's residual at the posterior mean of θ_j, its own row counted, and h_i = x_iᵀ C_j
x_i / s_i² the share that it has in its own fitted value: taking a row out of a normal posterior is
an update of rank one, C + C x xᵀ C / (s² − xᵀ C x), and leaves the residual e / (1 − h) with
variance s² / (1 − h). No posterior is computed twice. Digits are lost where a row is all that its
task has and next to exact, one for each factor of ten in τ²/σ².
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.exact import collapse
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.priors import Prior
from hierbayes.statistics import Statistics, row_scale, statistics
from hierbayes.tasks import Tasks

NUMBERS_AT_ONCE = 4_000_000
"""Draws × rows that are worked on together (32 MB)."""

DRAWS_AT_ONCE = 16


class ScaledRows(NamedTuple):
    """Rows in units of their noise, on the last axis.

    ``x`` (d, W), ``z`` (p, W), ``y`` and ``log_scale`` (W,); ``task`` (W,): where a row's task
    stands among those of the statistics.
    """

    x: Any
    z: Any
    y: Any
    log_scale: Any
    task: Any


def log_density_without_row(
    stats: Statistics, rows: ScaledRows, prior: Prior, phi: dict[str, Any]
) -> jax.Array:
    """log p(y_i | D_j without i, φ) of every row, (W,)."""
    mean, root = collapse(stats, prior, phi).mean_and_root()
    noise_variance = phi["sigma"] ** 2 if "sigma" in phi else 1.0
    residual = rows.y - (rows.x * mean[:, rows.task]).sum(0)
    if "beta" in phi:
        residual = residual - phi["beta"] @ rows.z
    along = (root[:, :, rows.task] * rows.x[:, None]).sum(0)
    left = 1.0 - (along**2).sum(0) / noise_variance
    log_variance = jnp.log(2 * jnp.pi * noise_variance) - jnp.log(left)
    return rows.log_scale - 0.5 * (log_variance + residual**2 / (noise_variance * left))


@functools.partial(jax.jit, static_argnums=2)
def _over_draws(stats: Statistics, rows: ScaledRows, prior: Prior, phis: dict[str, Any]) -> Any:
    def one(phi: dict[str, Any]) -> Any:
        return log_density_without_row(stats, rows, prior, phi)

    return jax.lax.map(one, phis, batch_size=DRAWS_AT_ONCE)


def without_each_row(
    model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray], most: int | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """log p(y_i | D_j without i, φ_s), (S, W), a slice of the rows at a time.

    ``tasks`` as the likelihood's design has them; ``most`` rows together, by default as many as
    :data:`NUMBERS_AT_ONCE` allows. Every slice is a call of the same compiled program.
    """
    num_draws, num_rows = len(next(iter(phis.values()))), tasks.num_rows
    width = most or max(1, NUMBERS_AT_ONCE // num_draws)
    width = min(width, num_rows)
    stats, of_row = statistics(tasks), tasks.task_of_row
    # the last slice goes back to end with the last row: one shape, so one compilation
    starts = [min(start, num_rows - width) for start in range(0, num_rows, width)]
    breadth = max(of_row[start + width - 1] - of_row[start] + 1 for start in starts)
    scale = row_scale(tasks)
    y = (tasks.outcome - tasks.slots.get("offset", 0.0)) * scale
    done = 0
    for start in starts:
        here = slice(start, start + width)
        first = min(int(of_row[start]), tasks.num_tasks - breadth)
        some = jax.tree.map(lambda a, first=first: a[..., first : first + breadth], stats)
        rows = ScaledRows(
            tasks.predictors[here].T * scale[here], tasks.shared[here].T * scale[here], y[here],
            np.log(scale[here]), of_row[here] - first,
        )  # fmt: skip
        with float64():
            values = np.asarray(_over_draws(some, rows, model.prior, phis))
        yield slice(done, start + width), values[:, done - start :]
        done = start + width
