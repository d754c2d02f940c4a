r"""All that Gaussian tasks say, in a triangle a task.

With rows scaled to unit noise (by 1/se or √weight), the QR factorisation of ``[X Z y]`` keeps

.. math:: \lVert y_j - X_j\theta - Z_j\beta \rVert^2 = \lVert R_j\,(-\theta, -\beta, 1) \rVert^2

for every (θ, β), so that a density costs O(J d³) whatever the number of rows, and nothing is lost
to cancellation, as it would be in XᵀX and Xᵀy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from hierbayes.numerics import matmul
from hierbayes.sharding import place
from hierbayes.tasks import Tasks
from hierbayes.tasks.container import kept

NUMBERS_AT_ONCE = 200_000
"""Numbers of the rows that are factorised together: these stay in the processor's cache."""

SMALL = 6
"""Columns up to which reflections over all tasks at once are quicker than LAPACK."""

FEW_TASKS = 30
"""Below, LAPACK is called for each."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["x", "z", "y", "num_rows", "log_scale", "task_predictors"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Statistics:
    """Sufficient statistics of Gaussian tasks, tasks on the last axis; m = d + p + 1.

    ``x`` (m, d, J), ``z`` (m, p, J), ``y`` (m, J): the columns of R_j; below row d ``x`` is zero.
    ``num_rows`` (J,); ``log_scale`` (J,): Σ_i log of the row scales; ``task_predictors`` (q, J).
    """

    x: Any
    z: Any
    y: Any
    num_rows: Any
    log_scale: Any
    task_predictors: Any

    @property
    def num_coef(self) -> int:
        """Number of varying coefficients d."""
        return self.x.shape[1]

    @property
    def num_tasks(self) -> int:
        """Number of tasks J."""
        return self.x.shape[2]

    def fixed_columns(self, free_mean: Sequence[bool], xp: Any = np) -> Any:
        """The columns F (m, P, J) of the fixed effects b = (μ_free, Γ row by row, β)."""
        x, w = xp.asarray(self.x), xp.asarray(self.task_predictors)
        moved = (x[:, :, None] * w[None, None]).reshape(x.shape[0], -1, x.shape[2])
        free = [i for i, is_free in enumerate(free_mean) if is_free]
        return xp.concatenate([x[:, np.array(free, int)], moved, xp.asarray(self.z)], axis=1)


def design_and_variance(x: Any, root: Any, noise: Any = 1.0) -> tuple[Any, Any]:
    """B = R L (n, d, …) and V = noise I + B Bᵀ (n, n, …), for R (n, d, …), L (d, d) or (d, d, …).

    The one place where V is formed; ``noise`` is a number, or (n,) one a row.
    """
    root = root.reshape(*root.shape, *(1,) * (x.ndim - root.ndim))
    design = matmul(x, root)
    identity = np.eye(len(x)).reshape(len(x), len(x), *(1,) * (x.ndim - 2))
    return design, matmul(design, design.swapaxes(0, 1)) + noise * identity


def row_scale(tasks: Tasks) -> np.ndarray:
    """1/sd of each row up to σ: 1/known_se where given, times the root of the weights."""
    scale = np.ones(tasks.num_rows)
    if "known_se" in tasks.slots:
        scale = scale / tasks.slots["known_se"]
    if "weight" in tasks.slots:
        scale = scale * np.sqrt(tasks.slots["weight"])
    return scale


@kept
def statistics(tasks: Tasks) -> Statistics:
    """Reduce every task to its triangle, in float64, bucket by bucket; once for these tasks."""
    d, p = tasks.predictors.shape[1], tasks.shared.shape[1]
    m, num_tasks = d + p + 1, tasks.num_tasks
    scale = row_scale(tasks)
    y = tasks.outcome - tasks.slots.get("offset", 0.0)
    rows = np.column_stack([tasks.predictors, tasks.shared, y])
    rows *= scale[:, None]
    triangles = np.zeros((m, m, num_tasks))
    for positions, stacked in _stacks(rows, tasks, m):
        triangles[..., positions] = _triangles(stacked)
    scaled = {"known_se", "weight"} & tasks.slots.keys()
    log_scale = np.bincount(tasks.task_of_row, np.log(scale), num_tasks) if scaled else 0.0
    log_scale = np.zeros(num_tasks) + log_scale
    made = Statistics(
        triangles[:, :d], triangles[:, d : d + p], triangles[:, -1],
        tasks.sizes.astype(float), log_scale, np.array(tasks.task_predictors.T, order="C"),
    )  # fmt: skip
    for array in jax.tree.leaves(made):
        array.flags.writeable = False
    return made


def placed_statistics(tasks: Tasks) -> Statistics:
    """:func:`statistics` on the devices that the tasks are spread over, filled up with zeros.

    A task of zeros has the evidence 0 and its prior as posterior, whatever φ.
    """
    return _filled(tasks) if tasks.sharding is None else place(statistics(tasks), tasks.sharding)


@kept
def _filled(tasks: Tasks) -> Statistics:
    return place(statistics(tasks), None)


def _stacks(rows: np.ndarray, tasks: Tasks, at_least: int):
    """Tasks of like size, filled up with zero rows, which leave R as it is; some at a time."""
    sizes = tasks.sizes
    width = np.maximum(2 ** np.ceil(np.log2(np.maximum(sizes, 1))), at_least).astype(int)
    for w in np.unique(width[sizes > 0]):
        every = np.flatnonzero((width == w) & (sizes > 0))
        at_once = max(1, NUMBERS_AT_ONCE // (int(w) * rows.shape[1]))
        for start in range(0, len(every), at_once):
            positions = every[start : start + at_once]
            first, n = tasks.starts[positions[0]], sizes[positions[0]]
            last = tasks.starts[positions[-1] + 1]
            if (
                n >= at_least
                and (sizes[positions] == n).all()
                and last - first == len(positions) * n
            ):
                yield positions, rows[first:last].reshape(len(positions), n, -1)
                continue
            column = np.arange(min(w, max(sizes[positions].max(), at_least)))
            mask = column < sizes[positions][:, None]
            index = np.where(mask, tasks.starts[positions][:, None] + column, 0)
            yield positions, np.where(mask[..., None], rows[index], 0.0)


def _triangles(stacked: np.ndarray) -> np.ndarray:
    """R of every matrix (J, n, m), as (m, m, J); n ≥ m.

    Householder's reflections over all tasks at once where m is small: a call of LAPACK a task
    costs more than its arithmetic.
    """
    num_tasks, _, m = stacked.shape
    if m > SMALL or num_tasks < FEW_TASKS:
        return np.moveaxis(np.asarray(np.linalg.qr(stacked, mode="r")), 0, -1)
    a = np.ascontiguousarray(np.moveaxis(stacked, 0, -1))  # (n, m, J)
    for k in range(m):
        head, below = a[k, k], a[k + 1 :, k]
        norm = np.sqrt(head**2 + np.einsum("nj,nj->j", below, below))
        alpha = np.where(head > 0, -norm, norm)
        first = head - alpha
        # 2 / vᵀv; the column is zero where this is
        double = first * alpha
        weight = np.divide(-1.0, double, out=np.zeros_like(norm), where=double != 0)
        for c in range(k + 1, m):
            along = weight * (first * a[k, c] + np.einsum("nj,nj->j", below, a[k + 1 :, c]))
            a[k, c] -= along * first
            a[k + 1 :, c] -= along * below
        a[k, k], a[k + 1 :, k] = alpha, 0.0
    return a[:m]
