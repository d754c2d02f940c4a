r"""Meta-learning as what it is: learning the prior p(θ_j | φ) of many related tasks.

.. math::

    \log p(\varphi, \theta_{1..J}, D) = \log p(\varphi)
        + \sum_j \left[\log p(\theta_j \mid \varphi)
        + \log p(D_j \mid \theta_j, \varphi)\right]

One model definition; every way of learning its prior; one side-by-side comparison.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hierbayes import datasets, likelihoods, meta, plots, priors, simulation
    from hierbayes.calibration import check_calibration
    from hierbayes.comparison import Comparison, compare, equivalence_report
    from hierbayes.equivalence import equivalent_prior, equivalent_steps
    from hierbayes.errors import FitWarning, InputError
    from hierbayes.files import compilation_cache
    from hierbayes.fit import Fit, Prediction
    from hierbayes.formula import from_formula
    from hierbayes.meta import (
        complete_pooling,
        empirical_bayes,
        full_bayes,
        imaml,
        load,
        maml,
        no_pooling,
        reptile,
    )
    from hierbayes.model import HierarchicalModel
    from hierbayes.priors import HyperPrior
    from hierbayes.tasks import Episodes, Tasks

__version__ = "0.1.0"

_ROOM_OF = {
    "Comparison": "comparison",
    "Episodes": "tasks",
    "Fit": "fit",
    "FitWarning": "errors",
    "HierarchicalModel": "model",
    "HyperPrior": "priors",
    "InputError": "errors",
    "Prediction": "fit",
    "Tasks": "tasks",
    "check_calibration": "calibration",
    "compare": "comparison",
    "compilation_cache": "files",
    "complete_pooling": "meta",
    "empirical_bayes": "meta",
    "equivalence_report": "comparison",
    "equivalent_prior": "equivalence",
    "equivalent_steps": "equivalence",
    "from_formula": "formula",
    "full_bayes": "meta",
    "imaml": "meta",
    "load": "meta",
    "maml": "meta",
    "no_pooling": "meta",
    "reptile": "meta",
}
"""Where each name lives: rooms open when first entered, so that importing costs next to nothing."""

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
    "check_calibration",
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
    "simulation",
]


def __getattr__(name: str) -> Any:
    if name in _ROOM_OF:
        value = getattr(importlib.import_module(f"hierbayes.{_ROOM_OF[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"hierbayes.{name}"):
        return importlib.import_module(f"hierbayes.{name}")
    raise AttributeError(f"module 'hierbayes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
