r"""p(θ_j | φ), the prior that tasks share, and p(φ), what is believed of it beforehand.

.. math:: \theta_j \mid \varphi \sim N(\mu + \Gamma w_j,\; \Sigma), \qquad
          \Sigma = \operatorname{diag}(\tau)\, R\, \operatorname{diag}(\tau)

or Student-t around the same centre with Σ its scale matrix, where some tasks are unlike the rest.
"""

from hierbayes.priors.base import Prior
from hierbayes.priors.gaussian import Gaussian
from hierbayes.priors.hyperprior import HyperPrior
from hierbayes.priors.learned import LearnedPrior
from hierbayes.priors.student_t import StudentT

__all__ = ["Gaussian", "HyperPrior", "LearnedPrior", "Prior", "StudentT"]
