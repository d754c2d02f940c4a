"""What tasks look like from outside: one task to a likelihood, names to a person."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from hierbayes.tasks.frames import Missing

SLOTS = ("offset", "weight", "trials", "known_se")
"""Optional columns that a row may carry beside its predictors and outcome."""

FILL = {"offset": 0.0, "weight": 1.0, "trials": 1.0, "known_se": 1.0}
"""What a slot holds in rows that only fill up a bucket: values that any likelihood accepts."""


class Slots(dict):
    """Row columns by name, which are read and not written."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("the row columns of Tasks cannot be changed; use tasks.replace(weight=…)")

    __setitem__ = __delitem__ = __ior__ = _refuse  # type: ignore[assignment]
    update = pop = popitem = clear = setdefault = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return Slots, (dict(self),)


jax.tree_util.register_pytree_node(
    Slots,
    lambda slots: (tuple(slots.values()), tuple(slots)),
    lambda names, values: Slots(zip(names, values, strict=True)),
)


def unwritable(array: Any) -> Any:
    """A NumPy array that nobody can write to: itself where that is so already, else a copy."""
    if not isinstance(array, np.ndarray):
        return array
    base = array.base
    if array.flags.writeable or (isinstance(base, np.ndarray) and base.flags.writeable):
        array = array.copy()
        array.flags.writeable = False
    return array


class Encoder(Protocol):
    """Turns new rows into Tasks by the training data's transforms."""

    def encode(self, data: Any, missing: Missing = "raise") -> Any:
        """Tasks of ``data``, with the training columns."""
        ...


@dataclass(frozen=True, eq=False)
class Labels:
    """What the arrays of :class:`Tasks` mean: names of tasks, columns, and how they were read."""

    names: np.ndarray
    coef: tuple[str, ...]
    shared: tuple[str, ...] = ()
    task_predictors: tuple[str, ...] = ()
    task: str = "task"
    outcome: str = "y"
    encoder: Encoder | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", unwritable(self.names))

    @property
    def by_dim(self) -> dict[str, tuple[str, ...]]:
        """The names along each dimension of φ."""
        return {
            "coef": self.coef, "coef_bis": self.coef, "shared": self.shared,
            "task_predictor": self.task_predictors,
        }  # fmt: skip

    def position(self, name: Any) -> int | None:
        """Position of the task of this name, compared as text; None where there is none."""
        return self._number_of_text.get(str(name))

    @functools.cached_property
    def _number_of_text(self) -> dict[str, int]:
        return {str(name): i for i, name in enumerate(self.names.tolist())}

    @functools.cached_property
    def number(self) -> dict[Any, int]:
        """Position of each task by its name."""
        return {name: i for i, name in enumerate(self.names.tolist())}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["predictors", "shared", "task_predictors", "outcome", "slots", "mask"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Task:
    """One task as a likelihood sees it, or, with a leading axis, a bucket of tasks of like size.

    ``predictors`` (n, d) or (n, …), ``shared`` (n, p), ``task_predictors`` (q,), ``outcome`` (n,),
    ``slots`` name → (n,), ``mask`` (n,): False in rows that only fill up the bucket.
    """

    predictors: Any
    shared: Any
    task_predictors: Any
    outcome: Any
    slots: dict[str, Any]
    mask: Any


def taken(source: Task, places: np.ndarray, task_predictors: Any) -> Task:
    """What stands at ``places`` of the leading axis; where they are −1 an empty row or task."""
    real = places >= 0

    def at_places(values: Any, fill: float = 0.0) -> Any:
        found = np.full((*places.shape, *values.shape[1:]), fill, values.dtype)
        found[real] = values[places[real]]
        return found

    return Task(
        at_places(source.predictors),
        at_places(source.shared),
        task_predictors,
        None if source.outcome is None else at_places(source.outcome),
        {name: at_places(values, FILL[name]) for name, values in source.slots.items()},
        at_places(source.mask),
    )
