r"""What every likelihood of the package answers.

Rows of one task that say the same about θ, as one row.

.. math:: \sum_{i \in \text{alike}} \log p(y_i \mid f, \varphi)
          = w \log p(\bar y \mid f, \varphi) + c
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from hierbayes.errors import InputError
from hierbayes.phi import Part
from hierbayes.tasks import Task, Tasks


class Aggregated(NamedTuple):
    """``tasks`` with alike rows as one, the ``weight`` (N,) of each, and what is left out (J,)."""

    tasks: Tasks
    weight: np.ndarray
    constant: np.ndarray


class Groups(NamedTuple):
    """``of_row`` (N,): the group of each row; ``first`` (G,): a row of each group, task by task."""

    of_row: np.ndarray
    first: np.ndarray

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sums (G,) of row values (N,)."""
        return np.bincount(self.of_row, values, len(self.first))


def groups(tasks: Tasks, columns: Sequence[np.ndarray]) -> Groups:
    """Rows of one task that agree in all of these columns (N,)."""
    code, count = tasks.task_of_row.astype(np.int64), tasks.num_tasks
    for column in columns:
        values, place = np.unique(column, return_inverse=True)
        if len(values) == 1:
            continue
        # numbered afresh, so that the product of counts stays small
        _, code = np.unique(code * len(values) + place, return_inverse=True)
        count = int(code.max(initial=0)) + 1
    _, first, of_row = np.unique(code, return_index=True, return_inverse=True)
    order = np.lexsort((first, tasks.task_of_row[first]))
    rank = np.empty(len(order), int)
    rank[order] = np.arange(len(order))
    del count
    return Groups(rank[of_row], first[order])


def columns_of(tasks: Tasks, *slots: str) -> list[np.ndarray]:
    """What f depends on, one array (N,) each, and these slots."""
    columns = [*tasks.predictors.T, *tasks.shared.T]
    return columns + [tasks.slots[name] for name in slots if name in tasks.slots]


def merged(tasks: Tasks, found: Groups, outcome: np.ndarray, **slots: np.ndarray) -> Tasks:
    """One row a group, with a new outcome (G,) and new slots."""
    first = found.first
    sizes = np.bincount(tasks.task_of_row[first], minlength=tasks.num_tasks)
    kept = {name: values[first] for name, values in tasks.slots.items() if name != "weight"}
    return replace(
        tasks, predictors=tasks.predictors[first], shared=tasks.shared[first], outcome=outcome,
        slots=kept | slots, starts=np.concatenate([[0], np.cumsum(sizes)]), rows=tasks.rows[first],
        sharding=None,
    )  # fmt: skip


def copies_as_weights(tasks: Tasks) -> Aggregated:
    """Rows that agree in everything, as one row with their weights' sum: right in any family."""
    weight = tasks.slots.get("weight", np.ones(tasks.num_rows))
    others = [name for name in tasks.slots if name != "weight"]
    found = groups(tasks, [*columns_of(tasks, *others), tasks.outcome])
    together = merged(tasks, found, tasks.outcome[found.first])
    return Aggregated(together, found.sum(weight), np.zeros(tasks.num_tasks))


class Likelihood(abc.ABC):
    """p(y | f, φ) with f = f(x; θ), row by row.

    A subclass gives the family of the outcomes around f; f itself is the linear predictor unless
    :meth:`location` says otherwise. One task is written, the package maps over tasks.
    """

    gaussian_in_theta: bool = False
    """True where log p(D_j | θ, φ) is quadratic in θ: the evidence is then exact."""

    discrete: bool = False
    """True where outcomes are counts or categories: central intervals then say little."""

    linear: bool = True
    """True where f is linear in θ with the tasks' own columns as coefficients."""

    has_location: bool = True
    """True where outcomes depend on θ through f alone; else there is a density and no f."""

    condenses: bool = False
    """True where :meth:`kernel` is y f − e^f: rows with the same x are one row once β is known."""

    binary: bool = False
    """True where :meth:`kernel` is y f − log(1 + e^f), y being 0 or 1."""

    log_link: bool = False
    """True where f is the log of a mean, and an offset the log of an exposure."""

    log_concave: bool = False
    """True where log p(y | f) is concave in f: every task has one mode where f is linear in θ."""

    precision: str = "float64"
    """What the training of φ computes in."""

    @property
    def concave_in_theta(self) -> bool:
        """Whether log p(D | θ) is concave in θ, so that Newton's steps need no damping."""
        return self.linear and self.log_concave

    def __init_subclass__(cls, **arguments: Any) -> None:
        """An f of a subclass's own is taken for curved, unless the subclass says that it is not.

        So is a family of its own for one with several modes.
        """
        super().__init_subclass__(**arguments)
        if "family" in vars(cls) and "log_concave" not in vars(cls):
            cls.log_concave = False
        if {"location", "locations"} & set(vars(cls)):
            for promise in ("linear", "gaussian_in_theta"):
                if promise not in vars(cls):
                    setattr(cls, promise, False)

    @abc.abstractmethod
    def family(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> dist.Distribution:
        """The distribution of the outcomes (n,) given what θ says of each row, f (n,)."""

    @abc.abstractmethod
    def predictive(
        self, location: Any, variance: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> Any:
        """The outcomes' distribution where f is normal with these moments, as a SciPy one."""

    @abc.abstractmethod
    def curvature_bound(self, phi: dict[str, Any], slots: dict[str, Any]) -> Any:
        """The largest −∂² log p(y | f) / ∂f² that a row can have, (n,) or one number."""

    @abc.abstractmethod
    def units(self, tasks: Tasks) -> tuple[float, float]:
        """Where f lies and how far it spreads, on f's own scale: the units of default priors."""

    @abc.abstractmethod
    def check(self, tasks: Tasks) -> None:
        """Refuse tasks that this likelihood cannot describe."""

    def divergence(
        self, location: Any, other: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> jax.Array:
        """KL(p(y | f) ‖ p(y | f′)) of each row (n,), for f = ``location`` and f′ = ``other``."""
        here, there = self.family(location, phi, slots), self.family(other, phi, slots)
        return jnp.asarray(dist.kl_divergence(here, there))

    def divergence_of_rows(
        self, thetas: Any, others: Any, phi: dict[str, Any], rows: Task, task_of_row: Any
    ) -> jax.Array:
        """KL(p(y | θ_j) ‖ p(y | θ′_j)) of each row under its own task's θ, as :meth:`locations`."""
        here, there = (self.locations(t, phi, rows, task_of_row) for t in (thetas, others))
        return jnp.where(rows.mask, self.divergence(here, there, phi, rows.slots), 0.0)

    def bound(self, stated: Sequence[str]) -> Likelihood:
        """The likelihood once the hyperprior has ``stated`` priors of these own parameters."""
        del stated
        return self

    def parameters(self) -> tuple[str, ...]:
        """Names of the likelihood's own parameters in φ."""
        return ()

    def parts(self, shared: Sequence[str]) -> list[Part]:
        """What of φ the likelihood owns: β of the columns that tasks share, and its parameters."""
        beta = [Part("beta", ("shared",), (len(shared),))] if shared else []
        return beta + [Part(name, (), (), "hyperprior") for name in self.parameters()]

    def kernel(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any], outcome: Any
    ) -> Any:
        """What of log p(y | f, φ) depends on f, row by row; f may have any shape.

        The rest is :meth:`base`, but for constants that :meth:`add_up` has counted already.
        """
        return self.family(location, phi, slots).log_prob(outcome)

    def base(self, phi: dict[str, Any], slots: dict[str, Any], outcome: Any) -> Any:
        """log p(y | f, φ) less :meth:`kernel` and constants, row by row; None where nothing is."""
        del phi, slots, outcome

    def to_second_order(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any], outcome: Any
    ) -> tuple[Any, Any, Any]:
        """:meth:`kernel`, its slope and its curvature in f."""
        ones = jnp.ones_like(location)

        def value(f: jax.Array) -> jax.Array:
            return jnp.asarray(self.kernel(f, phi, slots, outcome))

        def slope(f: jax.Array) -> tuple[jax.Array, jax.Array]:
            found, moved = jax.jvp(value, (f,), (ones,))
            return moved, found

        first, second, found = jax.jvp(slope, (location,), (ones,), has_aux=True)
        return found, first, second

    def default_priors(self, spread: float) -> dict[str, dist.Distribution]:
        """Hyperpriors on :meth:`parameters` where the user states none; ``spread`` is f's unit."""
        return {"sigma": dist.HalfNormal(spread)}

    def add_up(self, tasks: Tasks) -> Aggregated:
        """The tasks with alike rows as one, for f that is linear in θ."""
        return copies_as_weights(tasks)

    def plug_in(self, phi: dict[str, Any]) -> dict[str, Any]:
        """φ for scoring rows at a point θ: with ``sigma_query`` and the like in their places."""
        return phi | {n.removesuffix("_query"): phi[n] for n in phi if n.endswith("_query")}

    def location(self, theta: Any, phi: dict[str, Any], task: Task) -> Any:
        """What θ says of each row: f (n,) for one θ (d,), or for each row's own θ (n, d)."""
        location = (task.predictors * theta).sum(-1) + task.slots.get("offset", 0.0)
        return location + task.shared @ phi["beta"] if "beta" in phi else location

    def distribution(self, theta: Any, phi: dict[str, Any], task: Task) -> dist.Distribution:
        """The distribution of the outcomes (n,), under one θ (d,) or each row's own θ (n, d)."""
        return self.family(self.location(theta, phi, task), phi, task.slots)

    def log_likelihood(self, theta: Any, phi: dict[str, Any], task: Task) -> jax.Array:
        """log p(y_i | x_i, θ, φ) of each row (n,), zero in rows that fill up a bucket."""
        rows = self.distribution(theta, phi, task).log_prob(task.outcome)
        return jnp.where(task.mask, rows, 0.0)

    def tree(self, theta: Any) -> Any:
        """θ as the user's own functions take it; a vector (d,) unless it is a network's weights."""
        return theta

    def vector(self, theta: Any) -> Any:
        """θ as a vector (d,), from what :meth:`tree` gives."""
        return theta

    # ------------------------------------------------------- many tasks at once

    def arrange(self, tasks: Tasks) -> tuple[Task, Any]:
        """(rows, task of each row) as this likelihood wants many tasks.

        Flat, so that no row is padded. A likelihood for which a θ for each row is too much has the
        tasks side by side on a leading axis instead, and None for the second. Spread over devices
        by :func:`hierbayes.tasks.on_devices`, flat rows lie in one line a device.
        """
        return tasks.flat(), tasks.task_of_row

    def aggregate(self, tasks: Tasks) -> list[tuple[Any, tuple[Task, Any]]]:
        """(positions of tasks, their rows arranged), in groups that need little filling up."""
        return [(np.arange(tasks.num_tasks), self.arrange(tasks))]

    def blocks(self, tasks: Tasks) -> list[tuple[np.ndarray, Task]]:
        """(positions of tasks, these side by side on a leading axis), for what sees tasks so."""
        return tasks.blocks()

    def mixes_rows(self, x: Any) -> bool:
        """Whether f of a row like ``x`` depends on the task's other rows: none may fill up then."""
        del x
        return False

    def named(self, tasks: Tasks) -> Tasks:
        """The tasks with θ's coefficients named; they are the columns of X where f is linear."""
        return tasks

    def design(self, tasks: Tasks, phi: dict[str, Any]) -> Tasks:
        """The tasks as a linear model sees them under φ: their columns multiply θ."""
        del phi
        return tasks

    def locations(self, thetas: Any, phi: dict[str, Any], rows: Task, task_of_row: Any) -> Any:
        """f of each row under its own task's θ, (N,), or (J, n) for tasks on a leading axis."""
        if task_of_row is None:
            return jax.vmap(lambda t, task: self.location(t, phi, task))(thetas, rows)
        return self.location(own_theta(thetas, task_of_row), phi, rows)

    def log_likelihood_of_rows(
        self, thetas: Any, phi: dict[str, Any], rows: Task, task_of_row: Any
    ) -> jax.Array:
        """log p(y_i | x_i, θ_j(i), φ) of each row under its own task's θ, as :meth:`locations`.

        ``thetas`` (J, …) is a pytree with tasks on the leading axis; the slope in ``thetas`` is
        each task's own.
        """
        if task_of_row is None:
            return jax.vmap(lambda t, task: self.log_likelihood(t, phi, task))(thetas, rows)
        return self.log_likelihood(own_theta(thetas, task_of_row), phi, rows)

    def _refuse_slots(self, tasks: Tasks, slots: tuple[str, ...]) -> None:
        """Refuse columns that this likelihood would ignore, and predictors that are no matrix."""
        for slot in slots:
            if slot in tasks.slots:
                raise InputError(
                    f"the tasks carry `{slot}`, which the {type(self).__name__} likelihood would "
                    "ignore; make the tasks without it"
                )
        if np.ndim(tasks.predictors) != 2:
            raise InputError(
                f"the {type(self).__name__} likelihood takes X of shape (n, d), found rows of "
                f"shape {tasks.predictors.shape[1:]}"
            )


def own_theta(thetas: Any, task_of_row: Any) -> Any:
    """Each row's own θ (N, …), of those of all tasks (J, …).

    Where rows lie in one line a device (K, n), the tasks of a device stand together too.
    """
    if np.ndim(task_of_row) == 1:
        return jax.tree.map(lambda theta: theta[task_of_row], thetas)

    def by_device(theta: Any) -> Any:
        held = theta.reshape(len(task_of_row), -1, *theta.shape[1:])
        return jax.vmap(lambda of_device, of_row: of_device[of_row])(held, task_of_row)

    return jax.tree.map(by_device, thetas)


def sum_by_task(values: Any, task_of_row: Any, num_tasks: int) -> jax.Array:
    """Sums over each task's rows (J,), rows lying as :meth:`Likelihood.arrange` has them."""
    if task_of_row is None:
        return values.sum(-1)
    if np.ndim(task_of_row) == 1:
        return jax.ops.segment_sum(values, task_of_row, num_tasks)
    held = num_tasks // len(task_of_row)
    sums = jax.vmap(lambda v, of_row: jax.ops.segment_sum(v, of_row, held))(values, task_of_row)
    return sums.reshape(num_tasks, *sums.shape[2:])
