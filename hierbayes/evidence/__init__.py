r"""How well φ explains a task once θ_j is dealt with.

.. math::

    \text{integrated:}\quad \log \int p(D_j \mid \theta, \varphi)\, p(\theta \mid \varphi)\, d\theta
    \qquad
    \text{predictive:}\quad
    \log p(D_j^{\text{query}} \mid \hat\theta_j(D_j^{\text{support}}, \varphi))
"""

from hierbayes.evidence.integrated import Integrated
from hierbayes.evidence.predictive import Predictive

Exact = Integrated
"""Of Gaussian tasks the integral has a closed form."""

__all__ = ["Exact", "Integrated", "Predictive"]
