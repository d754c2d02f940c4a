r"""Where the tasks come from that φ is learned from: all at once, or batch by batch.

.. math:: \max_\varphi \sum_j \text{evidence}_j(\varphi)
          \qquad\text{or}\qquad \max_\varphi \; \mathbb E_j\, \text{evidence}_j(\varphi)

A method is written once. Its source says in which columns it computes, what sets the units of its
inner steps and how long these are where nothing is said, how φ follows from what is learned, and
how that is maximised; and it makes the fit.
"""

from __future__ import annotations

import abc
from typing import Any, Literal, NamedTuple

from hierbayes.adaptation import Adaptation
from hierbayes.adaptation.base import PointAdaptation
from hierbayes.fit import Fit
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Tasks


class Extra(NamedTuple):
    """A positive number of φ, or one a coefficient, that is learned beside μ, Γ and β.

    ``start``: where its search begins; ``each``: whether there is one a coefficient; ``top``: where
    it ends, if it does; ``unit``: what its logarithm is measured in.
    """

    name: str
    start: Any
    each: bool = False
    top: float | None = None
    unit: float = 1.0


class Found(NamedTuple):
    """φ as an outer loop has learned it, what is to be said of that, and what a fit tells."""

    phi: dict[str, Any]
    warnings: list[str]
    info: dict[str, Any]
    more: Any = None


class Source(abc.ABC):
    """Tasks that φ is learned from, as a method sees them."""

    loss: Literal["sum", "mean"]
    """What inner steps climb where nothing is said: "sum" or "mean"."""

    whole: bool
    """Whether they are there all at once."""

    @property
    @abc.abstractmethod
    def model(self) -> HierarchicalModel:
        """The model as the method computes with it."""

    @property
    @abc.abstractmethod
    def tasks(self) -> Tasks:
        """The tasks that a fit shows."""

    @abc.abstractmethod
    def noise(self, sigma: float | None) -> dict[str, Any]:
        """φ's part that is given: what sets the units of the inner loop."""

    @abc.abstractmethod
    def step_size(self, asked: Any, noise: dict[str, Any], loss: str) -> float:
        """η, that asked for or the source's own; refused where steps would diverge."""

    @abc.abstractmethod
    def maximise(
        self, adaptation: PointAdaptation, given: dict[str, Any], described: dict[str, Any],
        extras: tuple[Extra, ...] = (),
    ) -> Found:  # fmt: skip
        """φ where adapted tasks predict their query rows best; ``given`` is what is not learned."""

    @abc.abstractmethod
    def fit(self, adaptation: Adaptation, found: Found, described: dict[str, Any]) -> Fit:
        """The fit; ``described`` are the method's settings."""
