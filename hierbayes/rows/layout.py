"""Rows of tasks added up where they are alike, and laid out in blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from hierbayes.likelihoods import Likelihood
from hierbayes.likelihoods.base import columns_of, groups, merged
from hierbayes.rows.binary import MOST_ROWS, BinaryRows
from hierbayes.rows.blocks import Rows
from hierbayes.rows.whole import Whole
from hierbayes.sharding import filled_up, rung
from hierbayes.tasks import Tasks
from hierbayes.tasks.container import kept
from hierbayes.tasks.layout import on_devices

WORTH_WHILE = 0.7
"""Share of the rows that patterns may be, for condensing to pay."""

SMALL = 40_000
"""Blocks × tasks up to which a product with ones and zeros is quicker than a scattered sum."""

SCATTER = 6.0
"""Cost of adding a block to its task, in rows."""

LEAST_OF_ONE_X = 4
"""Rows of one x and task, on average, for blocks of one x to pay."""

COPIES = 4
"""Rows that are copies of one another, on average, for adding them up to pay more."""


LARGE_COUNTS = 1e4
"""From which on a density is worked out as what it falls short of its maximum, which takes longer:
below, y f − e^f is right to 1e-11."""


def rows_of(tasks: Tasks, likelihood: Likelihood) -> Rows | Whole:
    """The tasks' rows: alike ones added up where f is linear in θ, as arranged elsewhere."""
    if likelihood.linear:
        return added_up(tasks, likelihood)
    return Whole.of(*on_devices(likelihood.arrange(tasks), tasks.shard(None)))


@kept
def added_up(tasks: Tasks, likelihood: Likelihood) -> Rows:
    """The tasks' rows, alike ones added up."""
    if likelihood.binary and (blocks := _of_one_x(tasks)) is not None:
        return blocks
    added = likelihood.add_up(tasks)
    places = _places(added.tasks)
    laid = _laid_out(added.tasks, added.weight, added.constant, places)
    if not likelihood.condenses:
        return laid
    laid = _by_shortfall(laid)
    found = groups(added.tasks, [*added.tasks.predictors.T])
    if len(found.first) > WORTH_WHILE * added.tasks.num_rows:
        return laid
    counts = found.sum(added.weight * added.tasks.outcome)
    together = merged(added.tasks, found, counts)
    stand = _places(together)
    patterns = _laid_out(together, np.ones(together.num_rows), added.constant, stand)
    patterns = _by_shortfall(patterns)
    one_each = laid.block_of is None and len(found.first) == tasks.num_tasks
    where = None
    if not one_each:
        where = np.zeros(laid.outcome.shape, int)
        own = np.ravel_multi_index((stand.within, stand.block), patterns.outcome.shape)
        where[places.within, places.block] = own[found.of_row]
    return replace(laid, patterns=patterns, pattern_of=where)


def _by_shortfall(rows: Rows) -> Rows:
    """Rows of counts with their logarithms, where the counts are so large that digits are lost."""
    if not rows.outcome.max(initial=0.0) > LARGE_COUNTS:
        return rows
    logs = np.log(np.where(rows.outcome > 0, rows.outcome, 1.0))
    return replace(rows, slots=rows.slots | {"log_count": logs})


def _of_one_x(tasks: Tasks) -> BinaryRows | None:
    """Binary rows in blocks of one x each; None where that does not pay."""
    if tasks.num_rows == 0 or (tasks.slots.get("weight", np.ones(1)) != 1).any():
        return None
    found = groups(tasks, [*tasks.predictors.T])
    if tasks.num_rows < LEAST_OF_ONE_X * len(found.first):
        return None
    if COPIES * len(groups(tasks, columns_of(tasks, "offset")).first) < tasks.num_rows:
        return None
    order = np.argsort(found.of_row, kind="stable")
    sizes = np.bincount(found.of_row, minlength=len(found.first))
    height = min(_height(sizes), MOST_ROWS)
    within, block, shape, group_of = _in_blocks(sizes, height)
    back = np.empty(tasks.num_rows, int)
    back[order] = np.arange(tasks.num_rows)
    places = Places(within[back], block[back], shape, tasks.task_of_row[found.first][group_of])
    rows = _laid_out(tasks, np.ones(tasks.num_rows), np.zeros(tasks.num_tasks), places)
    kept_as = {name: getattr(rows, name) for name in rows.__dataclass_fields__}
    x = tasks.predictors[found.first][group_of].T[:, None]
    return BinaryRows(**kept_as | {"x": x})


class Places(NamedTuple):
    """Where each row stands: ``within`` its ``block``; ``shape`` of all blocks; task of a block."""

    within: np.ndarray
    block: np.ndarray
    shape: tuple[int, int]
    block_of: np.ndarray


def _in_blocks(sizes: np.ndarray, height: int) -> Places:
    """Rows that stand group by group, in blocks of one group each, the last blocks empty."""
    count = np.maximum(1, -(-sizes // height))
    first = np.concatenate([[0], np.cumsum(count)])
    start = np.concatenate([[0], np.cumsum(sizes)])
    group = np.repeat(np.arange(len(sizes)), sizes)
    within = np.arange(start[-1]) - start[group]
    block_of = np.repeat(np.arange(len(sizes)), count)
    num_blocks = rung(len(block_of))
    return Places(
        within % height, first[group] + within // height, (height, num_blocks),
        filled_up(block_of, num_blocks, fill=len(sizes) - 1),
    )  # fmt: skip


def _places(tasks: Tasks) -> Places:
    sizes = filled_up(tasks.sizes, rung(tasks.num_tasks))
    return _in_blocks(sizes, _height(sizes))


def _laid_out(tasks: Tasks, weight: np.ndarray, constant: np.ndarray, places: Places) -> Rows:
    """Rows in blocks."""
    within, block, shape, block_of = places

    def laid_out(values: Any, fill: float) -> np.ndarray:
        values = np.asarray(values, float)
        out = np.full((*values.shape[1:], *shape), fill)
        out[..., within, block] = np.moveaxis(values, 0, -1)
        return out

    # what fills a block up has an outcome that exists, and weight zero at f = 0
    counted = weight > 0

    def first(values: np.ndarray) -> float:
        return float(values[0]) if len(values) else 1.0

    slots = {name: laid_out(v, first(v)) for name, v in tasks.slots.items()}
    if "offset" in slots:
        slots["offset"] = laid_out(np.where(counted, tasks.slots["offset"], 0.0), 0.0)
    num_tasks = rung(tasks.num_tasks)
    one_each = np.array_equal(block_of, np.arange(num_tasks))
    small = not one_each and shape[1] * num_tasks <= SMALL
    return Rows(
        laid_out(tasks.predictors * counted[:, None], 0.0),
        laid_out(tasks.shared * counted[:, None], 0.0),
        laid_out(tasks.outcome, first(tasks.outcome)),
        slots,
        laid_out(weight, 0.0),
        None if one_each else block_of,
        1.0 * (block_of == np.arange(num_tasks)[:, None]) if small else None,
        filled_up(tasks.task_predictors, num_tasks, 0), filled_up(constant, num_tasks), num_tasks,
    )  # fmt: skip


def _height(sizes: np.ndarray) -> int:
    """Rows of a block, for the least work."""
    largest = int(sizes.max(initial=1))
    largest = rung(largest + largest % 2 * (largest > 1))  # of nine rows and of ten alike
    best, least = largest, np.inf
    for height in sorted({2**k for k in range(12) if 2**k < largest} | {max(largest, 1)}):
        count = rung(int(np.maximum(1, -(-sizes // height)).sum()))
        work = height * count + SCATTER * count * (count > len(sizes))
        if work < least:
            best, least = height, work
    return best
