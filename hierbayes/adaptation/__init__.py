r"""A: what one task concludes, given the prior.

.. math:: A(D_j; \varphi) \to \theta_j

Its exact posterior (:mod:`~hierbayes.adaptation.exact`, under a Student-t prior
:mod:`~hierbayes.adaptation.scale_mixture`), the normal at its mode
(:mod:`~hierbayes.adaptation.laplace`), the mode alone (:mod:`~hierbayes.adaptation.proximal`),
K gradient steps from φ (:mod:`~hierbayes.adaptation.gradient`), or least squares and maximum
likelihood, where the prior says nothing (:mod:`~hierbayes.adaptation.least_squares`,
:mod:`~hierbayes.adaptation.unpooled`).
:mod:`~hierbayes.adaptation.equivalence` says under which Gaussian prior the K steps are a MAP
estimate.
"""

from hierbayes.adaptation.base import Adaptation, ByTask, Integrable, NotOffered, PointAdaptation
from hierbayes.adaptation.descent import Descent, Flow, implied_precision
from hierbayes.adaptation.equivalence import equivalent_prior
from hierbayes.adaptation.exact import Conjugate
from hierbayes.adaptation.gradient import GradientSteps
from hierbayes.adaptation.implied import Discrepancy, EquivalentPrior
from hierbayes.adaptation.implied_posterior import ImpliedPosterior
from hierbayes.adaptation.judgement import Status
from hierbayes.adaptation.laplace import Laplace
from hierbayes.adaptation.least_squares import LeastSquares
from hierbayes.adaptation.matching import EquivalentSteps, equivalent_steps
from hierbayes.adaptation.matrix_free import MatrixFreePrior
from hierbayes.adaptation.posterior import (
    Draws,
    FlatPrior,
    Mixture,
    Normal,
    Point,
    Posterior,
    WithShared,
)
from hierbayes.adaptation.proximal import Proximal
from hierbayes.adaptation.quadrature import Quadrature
from hierbayes.adaptation.scale_mixture import MixedScales
from hierbayes.adaptation.unpooled import MaximumLikelihood

__all__ = [
    "Adaptation",
    "ByTask",
    "Conjugate",
    "Descent",
    "Discrepancy",
    "Draws",
    "EquivalentPrior",
    "EquivalentSteps",
    "FlatPrior",
    "Flow",
    "GradientSteps",
    "ImpliedPosterior",
    "Integrable",
    "Laplace",
    "LeastSquares",
    "MatrixFreePrior",
    "MaximumLikelihood",
    "MixedScales",
    "Mixture",
    "Normal",
    "NotOffered",
    "Point",
    "PointAdaptation",
    "Posterior",
    "Proximal",
    "Quadrature",
    "Status",
    "WithShared",
    "equivalent_prior",
    "equivalent_steps",
    "implied_precision",
]
