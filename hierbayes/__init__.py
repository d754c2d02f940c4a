r"""Meta-learning as what it is: learning the prior p(θ_j | φ) of many related tasks.

.. math::

    \log p(\varphi, \theta_{1..J}, D) = \log p(\varphi)
        + \sum_j \left[\log p(\theta_j \mid \varphi)
        + \log p(D_j \mid \theta_j, \varphi)\right]

One model definition; every way of learning its prior; one side-by-side comparison.
"""

from hierbayes import datasets, likelihoods, meta, plots, priors
from hierbayes.adaptation import equivalent_prior, equivalent_steps
from hierbayes.compare import Comparison, compare, equivalence_report
from hierbayes.errors import FitWarning, InputError
from hierbayes.files import compilation_cache
from hierbayes.fit import Fit, Prediction, load
from hierbayes.formula import from_formula
from hierbayes.meta import (
    complete_pooling,
    empirical_bayes,
    full_bayes,
    imaml,
    maml,
    no_pooling,
    reptile,
)
from hierbayes.model import HierarchicalModel
from hierbayes.priors import HyperPrior
from hierbayes.tasks import Episodes, Tasks

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "Episodes",
    "Fit",
    "FitWarning",
    "HierarchicalModel",
    "HyperPrior",
    "InputError",
    "Prediction",
    "Tasks",
    "compare",
    "compilation_cache",
    "complete_pooling",
    "datasets",
    "empirical_bayes",
    "equivalence_report",
    "equivalent_prior",
    "equivalent_steps",
    "from_formula",
    "full_bayes",
    "imaml",
    "likelihoods",
    "load",
    "maml",
    "meta",
    "no_pooling",
    "plots",
    "priors",
    "reptile",
]
