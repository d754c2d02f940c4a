"""Where a model's columns lie: what methods centre and scale, and how far they may.

The means and standard deviations are those of the tasks that the model was first resolved on, and
stay: for refits, new tasks, loaded fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from hierbayes.priors.column_map import Column, ColumnMap
from hierbayes.priors.hyperprior import HyperPrior, Shape
from hierbayes.tasks import Tasks
from hierbayes.tasks.container import kept

Reads = Literal["rows", "prior", "hyperpriors"]
"""What a method reads beside the rows: nothing, p(θ | φ), or p(φ) too. The less it reads the more
columns may be centred without another model."""

CONSTANT = 1e-12
"""Standard deviation beside the mean up to which a column varies by rounding alone."""

FAR = 10.0
"""Standard deviations from zero beyond which a mean that stays is worth a word."""


PARTS = ("varying", "shared", "task_predictors")


@dataclass(frozen=True)
class Columns:
    """Where the columns of a model lie, and what of its hyperpriors the user has stated.

    ``intercept``: the varying column that is constant, with its value; ``shared_intercept`` the
    shared one. ``stated``: names of the hyperprior's parts that are the user's own.
    """

    varying: tuple[Column, ...] = ()
    shared: tuple[Column, ...] = ()
    task_predictors: tuple[Column, ...] = ()
    intercept: tuple[int, float] | None = None
    shared_intercept: tuple[int, float] | None = None
    stated: tuple[str, ...] = ()

    @classmethod
    def of(cls, tasks: Tasks, hyperprior: HyperPrior) -> Columns:
        """The columns of these tasks."""
        stated = ("mu", "tau", "corr", "beta", "gamma")
        return replace(
            _measured(tasks),
            stated=tuple(n for n in stated if getattr(hyperprior, n) is not None),
        )

    def map(
        self, shape: Shape, reads: Reads, scaled: tuple[Any, Any, Any] | bool = True
    ) -> ColumnMap:
        """The map for a method that reads so much.

        ``scaled`` says which columns may have other units: varying ones, shared ones, task
        predictors.
        """
        sizes = len(shape.coef), len(shape.shared), len(shape.task_predictors)
        if not (self.varying or self.shared or self.task_predictors):
            return ColumnMap.none(*sizes)
        stated = self.stated if reads == "hyperpriors" else ()
        free, base = np.array(shape.free_mean), self.intercept
        base = base if base is not None and free[base[0]] else None
        shared_base = self.shared_intercept if base is None else None
        together: set[int] = set()
        if base is not None and not {"mu", "tau", "corr", "gamma"} & {*stated}:
            blocks = [range(sizes[0])] if reads == "rows" else shape.blocks
            together = {k for b in blocks if base[0] in b for k in b} - {base[0]}
        both = (base is not None or shared_base is not None) and "mu" not in stated
        levels = bool(free.all()) and "mu" not in stated
        if isinstance(scaled, bool):
            scaled = (np.full(sizes[0], scaled), np.full(sizes[1], scaled),
                      np.full(sizes[2], scaled))  # fmt: skip
        return ColumnMap(
            _chosen(self.varying, [k in together for k in range(sizes[0])], scaled[0]),
            _chosen(self.shared, [both] * sizes[1], scaled[1]),
            _chosen(self.task_predictors, [levels] * sizes[2], scaled[2]),
            base, shared_base,
        )  # fmt: skip

    def far(self, at: ColumnMap, shape: Shape) -> list[str]:
        """Columns far from zero that the map does not centre, where there is an intercept."""
        if self.intercept is None and self.shared_intercept is None:
            return []
        pairs = [*zip(shape.coef, self.varying, at.varying, strict=False)]
        pairs += [*zip(shape.shared, self.shared, at.shared, strict=False)]
        return [
            name for name, known, used in pairs
            if abs(known.mean) > FAR * known.sd and known.mean and not used.mean
        ]  # fmt: skip


def to_plain(columns: Columns | ColumnMap) -> dict[str, Any]:
    """Columns or a map of them as lists, strings and numbers."""
    return {
        name: [list(c) for c in value] if name in PARTS else value
        for name, value in ((n, getattr(columns, n)) for n in columns.__dataclass_fields__)
    }


def from_plain(kind: type, plain: Mapping[str, Any]) -> Any:
    """The inverse of :func:`to_plain`, of ``Columns`` or ``ColumnMap``."""
    settings: dict[str, Any] = {n: tuple(Column(*c) for c in plain[n]) for n in PARTS}
    for name in ("intercept", "shared_intercept"):
        at = plain[name]
        settings[name] = None if at is None else (int(at[0]), float(at[1]))
    if "stated" in plain:
        settings["stated"] = tuple(plain["stated"])
    return kind(**settings)


def _chosen(columns: tuple[Column, ...], centred: list[bool], scaled: Any) -> tuple[Column, ...]:
    return tuple(
        Column(c.mean if m else 0.0, c.rest if m else 0.0, c.sd if s else 1.0)
        for c, m, s in zip(columns, centred, scaled, strict=True)
    )


@kept
def _measured(tasks: Tasks) -> Columns:
    varying, intercept = _read(tasks.predictors)
    shared, shared_intercept = _read(tasks.shared)
    return Columns(varying, shared, _read(tasks.task_predictors)[0], intercept, shared_intercept)


def _read(values: Any) -> tuple[tuple[Column, ...], tuple[int, float] | None]:
    """The columns of a matrix, and the first that is constant, with its value."""
    found, intercept = [], None
    for k, column in enumerate(np.ascontiguousarray(np.asarray(values, np.float64).T)):
        if not len(column) or not np.isfinite(column).all():
            found.append(Column())
            continue
        size = np.abs(column).max() or 1.0  # a power of two, so that squares stay finite
        size = 2.0 ** np.floor(np.log2(size))
        mean = (column / size).mean() * size
        moved = column - mean
        rest = (moved / size).mean() * size
        sd = np.sqrt((((moved - rest) / size) ** 2).mean()) * size
        if sd > CONSTANT * abs(mean):
            found.append(Column(float(mean), float(rest), float(sd)))
            continue
        found.append(Column())
        if intercept is None and np.ptp(column) == 0 and column[0]:
            found[-1] = Column(0.0, 0.0, float(abs(column[0])))
            intercept = k, float(column[0])
    return tuple(found), intercept
