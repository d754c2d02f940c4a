"""A: what each task concludes, given φ."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.mode import trouble
from hierbayes.adaptation.posterior import Normal, Point, Posterior
from hierbayes.errors import NotApplicable, announce
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import arithmetic, float64
from hierbayes.phi import Part
from hierbayes.sharding import gathered
from hierbayes.tasks import Task, Tasks


class Adaptation(abc.ABC):
    """A(D; φ) for many tasks at once."""

    name: str
    has_prior: ClassVar[bool] = True
    """Whether it takes anything from other tasks."""

    @abc.abstractmethod
    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Posterior:
        """What each task of ``tasks`` concludes under φ."""

    def parts(self, phi: Mapping[str, Any]) -> list[Part]:
        """What the adaptation owns of a φ: its step sizes, where they are learned."""
        return [step_sizes(np.shape(phi["step_size"]))] if "step_size" in phi else []

    def draws(
        self, model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray], key: jax.Array
    ) -> np.ndarray:
        """Draws (S, J, d), one for each of the S values of φ; where A is a distribution."""
        del model, tasks, phis, key
        raise NotApplicable(f"{self.name}: a point estimate has no distribution to draw from")


def step_sizes(shape: tuple[int, ...]) -> Part:
    """η as a part of φ: one number, or one a coefficient."""
    return Part("step_size", ("coef",) * len(shape), shape, "hyperprior")


@dataclass(frozen=True)
class NotOffered(Adaptation):
    """No A for this model, and why; θ of the tasks that were sampled is known all the same."""

    reason: str
    name = "not offered"

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Posterior:
        """Refused."""
        raise NotApplicable(self.reason)

    def draws(
        self, model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray], key: jax.Array
    ) -> np.ndarray:
        """Refused."""
        raise NotApplicable(self.reason)


class TaskMoments(NamedTuple):
    """Means (J, d) and covariances (J, d, d) of θ_j with log p(D_j | φ) (J,).

    And how the search for them went: whether it ended, on a maximum, (J,) of bool.
    """

    mean: Any
    covariance: Any
    log_normaliser: Any
    converged: Any
    definite: Any

    @classmethod
    def exact(cls, mean: Any, covariance: Any, log_normaliser: Any) -> TaskMoments:
        """Of what needs no search."""
        fine = jnp.ones(len(mean), bool)
        return cls(mean, covariance, log_normaliser, fine, fine)


class Concluded(Protocol):
    """p(θ_j | D_j, φ) of every task at one φ, differentiable in φ; for use in compiled programs."""

    @property
    def log_normaliser(self) -> jax.Array:
        """log p(D_j | φ) (J,), exact or approximate, with all constants."""
        ...

    @property
    def start(self) -> Any:
        """Where a search at a φ nearby may begin; None where nothing is searched."""
        ...

    @property
    def converged(self) -> jax.Array:
        """Whether the search has ended on a mode, (J,) of bool."""
        ...

    def moments(self) -> TaskMoments:
        """Mean and covariance of every θ_j."""
        ...


Given = Callable[..., Concluded]
"""What is compiled of an adaptation: what tasks conclude from (model, φ, data)."""


class Integrable(Adaptation):
    """A(D; φ) = p(θ | D, φ), exact or approximate, with its normaliser p(D | φ)."""

    @abc.abstractmethod
    def lay_out(self, model: HierarchicalModel, tasks: Tasks) -> Any:
        """The tasks' data as :meth:`given` takes them, a pytree; use it in float64."""

    def begin(self, tasks: Tasks) -> Any:
        """Where the first search begins; None where nothing is searched."""
        del tasks

    @staticmethod
    @abc.abstractmethod
    def given(
        model: HierarchicalModel, phi: dict[str, Any], data: Any, start: Any = None
    ) -> Concluded:
        """What all tasks conclude under φ; ``start`` is that of a φ nearby.

        Settings that are numbers stand in ``data``, so that one program serves them all.
        """

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Posterior:
        """Posterior means and covariances; ``remarks`` name the tasks where no mode was reached."""
        plain = model.without_encoder()
        with float64():
            data = self.lay_out(plain, model.likelihood.design(tasks, phi))
            found = gathered(self._moments_at(plain, dict(phi), data), tasks.num_tasks)
        return self._posterior(model, tasks, dict(phi), found)

    def _moments_at(self, model: HierarchicalModel, phi: dict[str, Any], data: Any) -> TaskMoments:
        return moments_of(self.given, model, phi, data)

    def _posterior(
        self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any], found: TaskMoments
    ) -> Posterior:
        del model, phi
        remarks = trouble(tasks.names, found.converged, found.definite)
        evidence = found.log_normaliser
        return Normal(found.mean, found.covariance, log_normaliser=evidence, remarks=remarks)

    def moments(
        self, model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean (J, d) and covariance (J, d, d), averaged over the values of φ."""
        plain = model.without_encoder()
        with float64():
            data = self.lay_out(plain, tasks)
            found = gathered(_averaged(self.given, plain, dict(phis), data), tasks.num_tasks)
        announce(trouble(tasks.names, found.converged, found.definite))
        return found.mean, found.covariance


@functools.partial(jax.jit, static_argnums=(0, 1))
def moments_of(
    given: Given, model: HierarchicalModel, phi: dict[str, Any], data: Any
) -> TaskMoments:
    """What all tasks conclude at one φ."""
    return given(model, phi, data).moments()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _averaged(
    given: Given, model: HierarchicalModel, phis: dict[str, Any], data: Any
) -> TaskMoments:
    """Moments over the S values of φ, without keeping draws."""

    def add(sums: TaskMoments, phi: dict[str, Any]) -> tuple[TaskMoments, None]:
        found = given(model, phi, data).moments()
        second = found.covariance + found.mean[:, :, None] * found.mean[:, None]
        total = sums._replace(
            mean=sums.mean + found.mean, covariance=sums.covariance + second,
            converged=sums.converged & found.converged, definite=sums.definite & found.definite,
        )  # fmt: skip
        return total, None

    first = jax.tree.map(lambda value: value[0], phis)
    shapes = jax.eval_shape(lambda phi: given(model, phi, data).moments(), first)
    fine = jnp.ones(shapes.converged.shape, bool)
    mean, covariance, normaliser = (jnp.zeros(s.shape) for s in shapes[:3])
    zero = TaskMoments(mean, covariance, normaliser, fine, fine)
    sums, _ = jax.lax.scan(add, zero, phis)
    size = jax.tree.leaves(phis)[0].shape[0]
    mean = sums.mean / size
    spread = sums.covariance / size - mean[:, :, None] * mean[:, None]
    return sums._replace(mean=mean, covariance=spread)


class PointAdaptation(Adaptation):
    """A(D; φ) as a point that is differentiable in φ, so that φ can be learned through it."""

    @abc.abstractmethod
    def steps(
        self, model: HierarchicalModel, phi: dict[str, Any], rows: Task, task_of_row: Any
    ) -> Any:
        """θ̂_j of every task (J, …), from flat rows and the task of each."""

    def arrange(self, model: HierarchicalModel, tasks: Tasks) -> tuple[Task, Any]:
        """(rows, task of each row) as this adaptation wants them."""
        return model.likelihood.arrange(tasks)


class ByTask(PointAdaptation):
    """A(D; φ) as a point, written for one task; it is mapped over tasks of any sizes.

    A subclass is a frozen dataclass with a ``name`` and :meth:`of_task`. Rows where ``task.mask``
    is False only fill up: leave them out.
    """

    @abc.abstractmethod
    def of_task(self, model: HierarchicalModel, phi: dict[str, Any], task: Task) -> Any:
        """θ̂ (d,) of one task, in operations of JAX."""

    def steps(
        self, model: HierarchicalModel, phi: dict[str, Any], rows: Task, task_of_row: Any
    ) -> Any:
        """θ̂_j of every task (J, d), tasks side by side."""
        del task_of_row
        return jax.vmap(lambda task: self.of_task(model, phi, task))(rows)

    def arrange(self, model: HierarchicalModel, tasks: Tasks) -> tuple[Task, Any]:
        """Side by side, filled up to the longest task."""
        del model
        return tasks.block(np.arange(tasks.num_tasks), int(tasks.sizes.max(initial=1))), None

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Point:
        """θ̂_j of every task, a point."""
        plain, theta = model.without_encoder(), []
        with arithmetic(model.likelihood.precision):
            known = {name: jnp.asarray(value) for name, value in phi.items()}
            for positions, block in model.likelihood.blocks(tasks):
                found = np.asarray(_of_tasks(self, plain, known, block), np.float64)
                theta.append((positions, found[: len(positions)]))
        first = theta[0][1] if theta else np.zeros((0, len(phi["mu"])))
        means = np.zeros((tasks.num_tasks, *first.shape[1:]))
        for positions, found in theta:
            means[positions] = found
        return Point(means)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _of_tasks(adaptation: ByTask, model: HierarchicalModel, phi: dict[str, Any], rows: Task) -> Any:
    return adaptation.steps(model, phi, rows, None)
