"""A: what each task concludes, given φ."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np

from hierbayes.adaptation.posterior import Posterior
from hierbayes.errors import NotApplicable
from hierbayes.model import HierarchicalModel
from hierbayes.phi import Part
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
    return Part("step_size", ("coef",) * len(shape), shape, "belief")


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
