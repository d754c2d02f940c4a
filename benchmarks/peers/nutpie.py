"""nutpie on a PyMC model, compiled by numba: its default sampler, all cores."""

from __future__ import annotations

from typing import Any

import numpy as np
import nutpie
import pymc as pm

from benchmarks.peers.given import Belief, Given, alike

PARAMETERS = {
    "Normal": {"loc": "mu", "scale": "sigma"},
    "HalfNormal": {"scale": "sigma"},
    "HalfCauchy": {"scale": "beta"},
}


def density(beliefs: list[Belief]) -> tuple[Any, dict[str, Any]]:
    """PyMC's class and its arguments."""
    family, parameters = alike(beliefs)
    names = PARAMETERS[family]
    return getattr(pm, family), {names[k]: v for k, v in parameters.items()}


def model(given: Given, *, centred: bool) -> pm.Model:
    """The hierarchical model as PyMC's own guide writes it."""
    d, x = given.num_coef, given.predictors
    with pm.Model() as made:
        family, parameters = density(given.mu)
        mu = family("mu", **parameters, shape=d)
        family, parameters = density(given.tau)
        if given.corr is None:
            tau = family("tau", **parameters, shape=d)
        else:
            deviations = family.dist(**parameters, shape=d)
            root, corr, tau = pm.LKJCholeskyCov(
                "root", n=d, eta=given.corr, sd_dist=deviations, compute_corr=True,
                store_in_trace=False,
            )  # fmt: skip
            pm.Deterministic("tau", tau)
            pm.Deterministic("corr", corr[np.triu_indices(d, 1)])
        size = (given.num_tasks, d)
        if centred and given.corr is None:
            theta = pm.Normal("theta", mu, tau, shape=size)
        elif centred:
            theta = pm.MvNormal("theta", mu, chol=root, shape=size)
        else:
            z = pm.Normal("z", 0.0, 1.0, shape=size)
            moved = z * tau if given.corr is None else z @ root.T
            theta = pm.Deterministic("theta", mu + moved)
        # the first predictor is one in every row
        location = theta[given.task, 0]
        for k in range(1, d):
            location = location + theta[given.task, k] * x[:, k]
        if given.shared is not None:
            family, parameters = density(given.beta)
            beta = family("beta", **parameters, shape=given.num_shared)
            location = location + pm.math.dot(given.shared, beta)
        if given.family == "bernoulli":
            pm.Bernoulli("y", logit_p=location, observed=given.outcome)
            return made
        if given.sigma is None:
            sigma = given.known_se
        else:
            family, parameters = density([given.sigma])
            sigma = family("sigma", **{k: float(v[0]) for k, v in parameters.items()})
        pm.Normal("y", location, sigma, observed=given.outcome)
    return made


class Contestant:
    """nutpie's NUTS; ``num_warmup=None`` leaves the length of its tuning to nutpie."""

    def __init__(
        self,
        given: Given,
        num_draws: int,
        num_chains: int,
        num_warmup: int | None,
        centred: bool = False,
    ) -> None:
        self.compiled = nutpie.compile_pymc_model(model(given, centred=centred))
        self.settings = {"draws": num_draws, "chains": num_chains, "tune": num_warmup}
        tuning = "its own number of" if num_warmup is None else f"{num_warmup:,}"
        self.about = f"{'' if centred else 'non-'}centred, {tuning} tuning steps"
        self.names = ["mu", "tau", "theta"]
        self.names += [] if given.corr is None else ["corr"]
        self.names += [] if given.shared is None else ["beta"]
        self.names += [] if given.sigma is None else ["sigma"]

    def versions(self) -> dict[str, str]:
        """Of what is timed."""
        return {"nutpie": nutpie.__version__, "pymc": pm.__version__}

    def run(self, seed: int) -> dict[str, Any]:
        """Tune and sample."""
        trace = nutpie.sample(self.compiled, seed=seed, progress_bar=False, **self.settings)
        return {name: trace.posterior[name].values for name in self.names}
