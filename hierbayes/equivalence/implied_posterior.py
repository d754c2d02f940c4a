"""K gradient steps read as a posterior: the normal that their equivalent prior implies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hierbayes.adaptation.base import Adaptation
from hierbayes.adaptation.posterior import Normal
from hierbayes.equivalence.implied import EquivalentPrior
from hierbayes.equivalence.prior import equivalent_prior
from hierbayes.errors import overhearing
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Tasks


@dataclass(frozen=True)
class ImpliedPosterior(Adaptation):
    r"""A(D; φ) = N(θ_K, Σ_K): K gradient steps as the posterior under their equivalent prior.

    Parameters
    ----------
    num_steps : int
        K.
    step_size : float
        η, in the units of ``loss``.
    loss : "sum" or "mean"
        Steps on the summed log likelihood of a task's rows, or on its mean.
    preconditioner : sequence, optional
        B in θ ← θ + ηB∇, as of steps that were taken in scaled columns.
    """

    num_steps: int
    step_size: float
    loss: Literal["sum", "mean"] = "sum"
    preconditioner: Any = None
    name = "implied posterior"

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Normal:
        """θ_K and Σ_K of every task; ``remarks`` name tasks without a Gaussian prior."""
        return self.read(self.prior(model, tasks, phi))

    def prior(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> EquivalentPrior:
        """The prior of each task under which the steps are a MAP estimate."""
        with overhearing():  # they travel in the messages
            return equivalent_prior(
                model, tasks, phi, self.num_steps, self.step_size, loss=self.loss,
                preconditioner=self.preconditioner,
            )  # fmt: skip

    @staticmethod
    def read(implied: EquivalentPrior) -> Normal:
        """Its posterior, with its messages as remarks."""
        return Normal(
            implied.posterior_mean, implied.posterior_covariance, remarks=implied.messages
        )
