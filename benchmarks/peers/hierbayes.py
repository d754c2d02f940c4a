"""hierbayes itself, in a process like the others'."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import numpyro.distributions as dist
import pandas as pd

import hierbayes as hb
from benchmarks.peers.given import Belief, Given


def density(belief: Belief) -> dist.Distribution:
    """NumPyro's distribution of a belief in words."""
    return getattr(dist, belief["family"])(**{k: v for k, v in belief.items() if k != "family"})


def model_and_tasks(given: Given) -> tuple[hb.HierarchicalModel, hb.Tasks]:
    """By formula, from a DataFrame."""
    names = ["Intercept", *(f"x{k}" for k in range(1, given.num_coef))]
    hyperprior = hb.HyperPrior(
        mu={c: density(b) for c, b in zip(names, given.mu, strict=True)},
        tau={c: density(b) for c, b in zip(names, given.tau, strict=True)},
        corr=given.corr,
        sigma=None if given.sigma is None else density(given.sigma),
        beta={f"z{k}": density(b) for k, b in enumerate(given.beta)},
    )
    data = pd.DataFrame(given.columns())
    known_se = None if given.known_se is None else "se"
    return hb.from_formula(
        given.formula, data, hyperprior=hyperprior, known_se=known_se, family=given.family
    )


class Contestant:
    """``hb.full_bayes`` as it comes, θ drawn."""

    about = "full_bayes, from Tasks"

    def __init__(self, given: Given, **settings: Any) -> None:
        self.model, self.tasks = model_and_tasks(given)
        self.settings = {"progress": False, **settings}

    def versions(self) -> dict[str, str]:
        """Of what is timed."""
        return {"hierbayes": hb.__version__, "python": platform.python_version()}

    def run(self, seed: int) -> dict[str, Any]:
        """One fit, with everything that the call hands back."""
        fit = hb.full_bayes(self.model, self.tasks, seed=seed, **self.settings)
        assert fit.phi_draws is not None
        draws = {name: np.asarray(value) for name, value in fit.phi_draws.items()}
        if fit.theta_draws is not None:
            draws["theta"] = np.asarray(fit.theta_draws)
        if "corr" in draws:
            above = np.triu_indices(len(self.tasks.coef), 1)
            draws["corr"] = draws["corr"][..., above[0], above[1]]
        return draws
