"""What a method has learned, which all that reads a fit is given.

Arrays that are made when they are first read.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np

from hierbayes.adaptation import Adaptation, Posterior
from hierbayes.fit.adapted import AdaptedTasks
from hierbayes.fit.method import Method
from hierbayes.model import HierarchicalModel
from hierbayes.priors.column_map import ColumnMap
from hierbayes.tasks import Tasks


class WhenRead:
    """A field of an array, or of a function that makes it, which is called when first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.place = f"_{name}"

    def __get__(self, fit: Any, owner: type | None = None) -> Any:
        if fit is None:
            return None  # the field's default
        value = fit.__dict__.get(self.place)
        if callable(value):
            value = fit.__dict__[self.place] = value()
        return value

    def __set__(self, fit: Any, value: np.ndarray | Callable[[], np.ndarray] | None) -> None:
        fit.__dict__[self.place] = value


@dataclass(frozen=True)
class Learned(abc.ABC):
    """φ, the tasks that it was learned from, and how tasks are adapted under it.

    Its attributes are those of :class:`~hierbayes.Fit`, which is one with methods.
    """

    method: Method
    model: HierarchicalModel
    tasks: Tasks
    phi: Mapping[str, np.ndarray]
    adaptation: Adaptation
    training: Posterior | None = None
    phi_draws: dict[str, np.ndarray] | None = None
    theta_draws: WhenRead = WhenRead()
    sample_stats: dict[str, np.ndarray] = field(default_factory=dict)
    standard_errors: dict[str, np.ndarray] = field(default_factory=dict)
    evidence: float | None = None
    no_evidence: str = "this method does not compute the evidence"
    log_posterior: float | None = None
    warnings: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)
    phi_bootstrap: dict[str, np.ndarray] | None = None
    learned: Tasks | None = None
    inner: Self | None = None
    at: ColumnMap | None = None

    @property
    @abc.abstractmethod
    def adapted(self) -> AdaptedTasks:
        """The tasks under the learned prior."""

    @property
    def inside(self) -> Self:
        """The fit in the columns that it was computed in, by which all is computed later."""
        return self if self.inner is None else self.inner

    def seen_inside(self, tasks: Tasks) -> Tasks:
        """Tasks in these columns."""
        return tasks if self.at is None else self.at.tasks(tasks)

    @property
    def learned_from(self) -> Tasks:
        """The tasks that φ has learned from: the fit's own, unless it was carried :meth:`on`."""
        return self.tasks if self.learned is None else self.learned

    @property
    def log_evidence(self) -> float:
        """Summed log evidence; see the method for its definition."""
        if self.evidence is None:
            raise AttributeError(f"{self.method} has no log_evidence: {self.no_evidence}")
        return self.evidence


AFit = TypeVar("AFit", bound=Learned)
"""The kind of fit that is given, and given back."""
