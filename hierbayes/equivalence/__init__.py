r"""K gradient steps as a MAP estimate: the Gaussian prior that they imply, and the other way round.

.. math:: \theta_K = \arg\max_\theta \left[\log p(D \mid \theta)
          + \log N(\theta; \varphi, P^{-1})\right]
"""

from hierbayes.equivalence.implied import Discrepancy, EquivalentPrior
from hierbayes.equivalence.implied_posterior import ImpliedPosterior
from hierbayes.equivalence.matrix_free import MatrixFreePrior
from hierbayes.equivalence.prior import equivalent_prior
from hierbayes.equivalence.steps import EquivalentSteps, equivalent_steps
from hierbayes.equivalence.validity import Status

__all__ = [
    "Discrepancy",
    "EquivalentPrior",
    "EquivalentSteps",
    "ImpliedPosterior",
    "MatrixFreePrior",
    "Status",
    "equivalent_prior",
    "equivalent_steps",
]
