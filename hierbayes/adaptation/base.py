"""What every adaptation returns."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from hierbayes.errors import NotApplicable
from hierbayes.model import HierarchicalModel
from hierbayes.phi import Part
from hierbayes.tasks import Task, Tasks

DRAWN_AT_ONCE = 30_000
"""Numbers that are drawn, turned and shifted together."""


@dataclass(frozen=True)
class Adapted:
    """What tasks conclude: θ_j and, where the adaptation knows it, how surely.

    ``mean`` (J, d); ``covariance`` (J, d, d) or None; ``unidentified`` (J, d, d) or None: the
    projection on the directions of θ_j that nothing determines; ``absorbed`` (J, d) of bool or
    None: coefficients that hold the effect of a shared column which is not identified;
    ``remarks``: what went wrong, in sentences that name the tasks; ``sample`` (S, J, d) or None:
    equally likely values of θ, in the place of a covariance; ``spread`` or None: a function of
    (rows, the task of each by position) that gives the variance of f at rows of these tasks, where
    a covariance would be too large to form; ``normals`` or None: a function of positions (M,) that
    gives means (S, M, d) and covariances (S, M, d, d) of equally likely normals of which the
    posterior is the mixture, where it is far from normal. ``cross`` (J, d, p) and ``of_shared``
    (p, p) or None: covariances of θ_j with β and of β, where ``covariance`` counts what is not
    known of φ.
    """

    mean: np.ndarray
    covariance: np.ndarray | None = None
    unidentified: np.ndarray | None = None
    absorbed: np.ndarray | None = None
    remarks: tuple[str, ...] = ()
    sample: np.ndarray | None = None
    spread: Callable[[Tasks, np.ndarray], np.ndarray] | None = None
    normals: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
    cross: np.ndarray | None = None
    of_shared: np.ndarray | None = None

    @property
    def identified(self) -> np.ndarray:
        """Which coefficients the task's own rows determine, (J, d) of bool."""
        known = np.ones(self.mean.shape, dtype=bool)
        if self.unidentified is not None:
            known &= np.diagonal(self.unidentified, axis1=1, axis2=2) < 1e-8
        if self.absorbed is not None:
            known &= ~self.absorbed.astype(bool)
        return known

    def draw(self, rng: np.random.Generator, num_draws: int) -> np.ndarray:
        """Normal draws (num_draws, J, d) around the mean."""
        if self.covariance is None:
            raise ValueError("a point estimate has no distribution to draw from")
        values, vectors = np.linalg.eigh(self.covariance)
        root = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
        draws = rng.standard_normal((num_draws, *self.mean.shape))
        step = max(1, DRAWN_AT_ONCE // max(1, self.mean.size))
        rows, means = np.ascontiguousarray(np.moveaxis(root, 0, -1)), self.mean.T
        for start in range(0, num_draws, step):  # in place, by pieces that fit the cache
            piece = draws[start : start + step]
            white = np.ascontiguousarray(np.moveaxis(piece, -1, 0))
            for k, row in enumerate(rows):
                piece[:, :, k] = means[k] + sum(a * z for a, z in zip(row, white, strict=True))
        return draws


class Adaptation(abc.ABC):
    """A(D; φ) for many tasks at once."""

    name: str

    @abc.abstractmethod
    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Adapted:
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

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Adapted:
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
