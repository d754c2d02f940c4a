r"""p(D_j | θ_j, φ): what one task's data say about its parameters.

.. math::

    \log p(D_j \mid \theta_j, \varphi) = \sum_i \log p(y_{ij} \mid f_{ij}, \varphi), \qquad
    f_{ij} = f(x_{ij}; \theta_j, \varphi)
"""

from hierbayes.likelihoods.base import Likelihood
from hierbayes.likelihoods.bernoulli import Bernoulli
from hierbayes.likelihoods.binomial import Binomial
from hierbayes.likelihoods.categorical import Categorical
from hierbayes.likelihoods.gamma import Gamma
from hierbayes.likelihoods.gaussian import Gaussian
from hierbayes.likelihoods.last_layer import LastLayer
from hierbayes.likelihoods.negative_binomial import NegativeBinomial
from hierbayes.likelihoods.network import Network
from hierbayes.likelihoods.poisson import Poisson
from hierbayes.likelihoods.student_t import StudentT

__all__ = [
    "Bernoulli", "Binomial", "Categorical", "Gamma", "Gaussian", "LastLayer", "Likelihood",
    "NegativeBinomial", "Network", "Poisson", "StudentT",
]  # fmt: skip
