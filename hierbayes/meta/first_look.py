r"""Where to begin the search for Λ: the profiled evidence, looked at over all sizes of Λ at once.

The evidence of tasks that differ much in precision has several maxima in τ, each at the scale of
some of them, and one may lie at zero. Newton's steps find the nearest; which is the highest, values
alone tell, and of Gaussian tasks these cost next to nothing: on a geometric grid from far below the
most precise task's standard error to far above the least precise one's, and at zero, first for all
coefficients together, then for one after another, and for their correlations. The grid is in units
of the tasks, so that no unit of a predictor matters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from hierbayes.evidence.many import ManyProblems
from hierbayes.evidence.profile import ProfileProblem
from hierbayes.numerics import to_numpy

Blocks = tuple[tuple[int, ...], ...]

RATIO, MOST_SIZES = 2.5, 48
"""Of the grid's neighbours, unless there would be more of them than this."""

BELOW, ABOVE = 0.03, 300.0
"""Of the smallest and the largest standard error of a task, where the grid begins and ends."""

CORRELATIONS = (-0.8, 0.0, 0.8)

SWEEPS, MOST_PAIRS = 1, 15
"""Rounds over the coefficients, one after another, and pairs of them that are looked at."""

NUMBERS = 100_000
"""Numbers of an array up to which all tasks are looked at; of more a sample is, dealt evenly."""

LEAST_TASKS = 200


class Look(NamedTuple):
    """The best Λ seen (d, d, B), and minus the evidence there and at Λ = 0, (B,).

    ``unit`` (d,): the size that the best has, or of a row of zeros that of a task's standard error.
    """

    root: np.ndarray
    loss: np.ndarray
    at_zero: np.ndarray
    unit: np.ndarray


def sample_of(problem: ProfileProblem) -> tuple[ManyProblems, bool]:
    """The tasks to look at, on the host, and whether they are all of them."""
    d, num_tasks = problem.x.shape[0], problem.x.shape[2]
    width = d * (d + problem.fixed.shape[1] + 1) * len(CORRELATIONS) * 5
    spacing = max(1, num_tasks // max(LEAST_TASKS, NUMBERS // width))
    part = jax.tree.map(lambda a: a[..., ::spacing] if spacing > 1 else a,
                        replace(problem, whitener=None))  # fmt: skip
    part = to_numpy(replace(part, y=part.y[..., None], whitener=problem.whitener))
    return ManyProblems.of(part), spacing == 1


def look(many: ManyProblems, blocks: Blocks, start: np.ndarray | None = None) -> Look:
    """The best of a grid of Λ for every data set; ``start`` (d, d), where one is known already."""
    (sizes, unit), num = _sizes(many.x), many.num_sets
    shape = _shape(many.x, blocks)
    turned = replace(many, x=np.einsum("iej,ec->icj", many.x, shape))
    zero = np.zeros((len(unit), len(unit), num))
    at_zero = _losses(many, [zero])[0]
    seen = _Seen(zero, at_zero)
    if start is None:
        seen = _laddered(turned, seen)
    else:
        root = np.repeat(np.linalg.solve(shape, start)[:, :, None], num, axis=2)
        seen = _better(turned, seen, [root])[0]
    if len(unit) > 1:
        seen = _swept(turned, blocks, seen)
    seen = seen._replace(root=np.einsum("ab,bcs->acs", shape, seen.root))
    if max(map(len, blocks)) > 1:  # the τ themselves, of which some may be zero
        seen = _swept(many, blocks, seen)
    size = np.linalg.norm(seen.root, axis=1).mean(-1)
    least = 0.5 * np.array([own[0] for own in sizes])
    return Look(seen.root, seen.loss, at_zero, np.where(size > least, size, unit))


class _Seen(NamedTuple):
    root: np.ndarray
    loss: np.ndarray


def _better(
    many: ManyProblems, seen: _Seen, candidates: list[np.ndarray]
) -> tuple[_Seen, np.ndarray]:
    """The best candidates, where they are better, and their places; −1 where none is."""
    found, sets = _losses(many, candidates), np.arange(many.num_sets)
    best = np.argmin(found, axis=0)
    better = found[best, sets] < seen.loss
    chosen = np.moveaxis(np.stack(candidates)[best, :, :, sets], 0, -1)
    root = np.where(better, chosen, seen.root)
    return _Seen(root, np.where(better, found[best, sets], seen.loss)), np.where(better, best, -1)


def _laddered(many: ManyProblems, seen: _Seen) -> _Seen:
    """All coefficients together, and on beyond the grid where its end is the best."""
    sizes, _ = _sizes(many.x)
    steps = max(map(len, sizes))
    ladder = [np.array([s[k * (len(s) - 1) // max(steps - 1, 1)] for s in sizes])
              for k in range(steps)]  # fmt: skip
    while np.isfinite(ladder[-1]).all():
        rungs = [np.repeat(np.diag(r)[:, :, None], many.num_sets, axis=2) for r in ladder]
        seen, at = _better(many, seen, rungs)
        if not (at == len(ladder) - 1).any():
            break
        ladder = [ladder[-1] * RATIO**k for k in (1, 2, 3)]
    return seen


def _swept(many: ManyProblems, blocks: Blocks, seen: _Seen) -> _Seen:
    """One coefficient after another, and their correlations."""
    sizes, _ = _sizes(many.x)
    pairs = [(b[i], b[k]) for b in blocks for i in range(len(b)) for k in range(i)]
    for _ in range(SWEEPS):
        before = seen.loss
        for i, own in enumerate(sizes):
            seen, _ = _better(many, seen, _of_one(seen.root, i, own))
        for i, k in pairs if len(pairs) <= MOST_PAIRS else []:
            seen, _ = _better(many, seen, _correlated(seen.root, i, k))
        if not (seen.loss < before - 1e-3).any():
            break
    return seen


def _shape(x: np.ndarray, blocks: Blocks) -> np.ndarray:
    """A lower root L of what all tasks together leave uncertain, block by block, (d, d).

    Seen from Λ = L M no place of the predictors' origin matters, which within a block of
    correlated coefficients makes large τ and correlations of what is small and uncorrelated.
    """
    shape = np.eye(x.shape[1])
    if max(map(len, blocks)) == 1:
        return shape
    size = np.sqrt((x**2).sum((0, 2)))
    size = np.where(size > 0, size, 1.0)
    gram = np.einsum("iaj,ibj->ab", x, x) / np.outer(size, size)
    for b in blocks:
        part = gram[np.ix_(b, b)] + 1e-12 * np.eye(len(b))
        upper = np.linalg.cholesky(part[::-1, ::-1])[::-1, ::-1]
        shape[np.ix_(b, b)] = np.linalg.inv(upper).T / size[list(b), None] * size[list(b)].min()
    return shape


def _losses(many: ManyProblems, candidates: list[np.ndarray]) -> np.ndarray:
    """Of every candidate and data set; of one data set all at once."""
    if many.num_sets == 1:
        return many.losses(np.concatenate(candidates, axis=2))[:, None]
    return np.stack([many.losses(root) for root in candidates])


def _sizes(x: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Sizes of Λ's rows that are looked at, and the middling one, from (d, d, J) triangles."""
    with np.errstate(divide="ignore"):
        errors = 1.0 / np.sqrt((x**2).sum(0))
    found, unit = [], []
    for own in errors:
        seen = own[np.isfinite(own)]
        seen = seen if len(seen) else np.ones(1)
        low, high = BELOW * seen.min(), ABOVE * seen.max()
        count = min(MOST_SIZES, 1 + int(np.ceil(np.log(high / low) / np.log(RATIO))))
        found.append(np.geomspace(low, high, count))
        unit.append(float(np.median(seen)))
    return found, np.array(unit)


def _of_one(root: np.ndarray, which: int, sizes: np.ndarray) -> list[np.ndarray]:
    """Λ with one row at every size and at zero, its correlations as they are."""
    size = np.linalg.norm(root[which], axis=0)
    alone = np.zeros_like(root[which])
    alone[which] = 1.0
    towards = np.where(size > 0, root[which] / np.where(size > 0, size, 1.0), alone)
    candidates = []
    for s in (0.0, *sizes):
        moved = root.copy()
        moved[which] = s * towards
        candidates.append(moved)
    return candidates


def _correlated(root: np.ndarray, which: int, other: int) -> list[np.ndarray]:
    """Λ with one row turned towards the direction that another adds, and from it."""
    size = np.linalg.norm(root[which], axis=0)
    candidates = []
    for c in CORRELATIONS:
        moved = root.copy()
        moved[which] = 0.0
        moved[which, other] = c * size
        moved[which, which] = np.sqrt(1 - c**2) * size
        candidates.append(moved)
    return candidates
