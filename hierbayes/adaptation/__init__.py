r"""A: what one task concludes, given the prior.

.. math:: A(D_j; \varphi) \to \theta_j

Its exact posterior (:mod:`~hierbayes.adaptation.exact`, under a Student-t prior
:mod:`~hierbayes.adaptation.scale_mixture`), the normal at its mode
(:mod:`~hierbayes.adaptation.laplace`), the mode alone (:mod:`~hierbayes.adaptation.proximal`),
K gradient steps from φ (:mod:`~hierbayes.adaptation.gradient`), or least squares and maximum
likelihood, where the prior says nothing (:mod:`~hierbayes.adaptation.least_squares`,
:mod:`~hierbayes.adaptation.unpooled`).
:mod:`~hierbayes.equivalence` says under which Gaussian prior the K steps are a MAP estimate.
"""

from hierbayes.adaptation.base import Adaptation, ByTask, Integrable, NotOffered, PointAdaptation
from hierbayes.adaptation.descent import Descent, Flow, implied_precision
from hierbayes.adaptation.exact import Conjugate
from hierbayes.adaptation.gradient import GradientSteps
from hierbayes.adaptation.laplace import Laplace
from hierbayes.adaptation.least_squares import LeastSquares
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
from hierbayes.adaptation.scale_mixture import ScaleMixture
from hierbayes.adaptation.unpooled import MaximumLikelihood

__all__ = [
    "Adaptation",
    "ByTask",
    "Conjugate",
    "Descent",
    "Draws",
    "FlatPrior",
    "Flow",
    "GradientSteps",
    "Integrable",
    "Laplace",
    "LeastSquares",
    "MaximumLikelihood",
    "Mixture",
    "Normal",
    "NotOffered",
    "Point",
    "PointAdaptation",
    "Posterior",
    "Proximal",
    "Quadrature",
    "ScaleMixture",
    "WithShared",
    "implied_precision",
]
