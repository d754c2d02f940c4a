"""NumPyro's NUTS as its guide uses it: non-centred, one device a chain, 64 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpyro

from benchmarks.peers.given import Belief, Given, alike


class Contestant:
    """``chain_method="parallel"``, NumPyro's default, on as many host devices as chains."""

    def __init__(self, given: Given, num_draws: int, num_chains: int, num_warmup: int) -> None:
        numpyro.set_host_device_count(num_chains)
        numpyro.enable_x64()
        from numpyro.infer import MCMC, NUTS

        self.mcmc = MCMC(
            NUTS(model(given)), num_warmup=num_warmup, num_samples=num_draws,
            num_chains=num_chains, progress_bar=False,
        )  # fmt: skip
        self.names = ["mu", "tau", "theta"]
        self.names += [] if given.corr is None else ["corr"]
        self.names += [] if given.sigma is None else ["sigma"]
        self.about = f"non-centred, {num_warmup:,} warm-up draws, parallel chains, float64"

    def versions(self) -> dict[str, str]:
        """Of what is timed."""
        import jax

        return {"numpyro": numpyro.__version__, "jax": jax.__version__}

    def run(self, seed: int) -> dict[str, Any]:
        """Warm up and sample; the same MCMC object keeps its compiled program."""
        import jax

        self.mcmc.run(jax.random.key(seed))
        draws = self.mcmc.get_samples(group_by_chain=True)
        return {name: np.asarray(draws[name]) for name in self.names}


def density(beliefs: list[Belief]) -> numpyro.distributions.Distribution:
    """A vector of independent entries."""
    family, parameters = alike(beliefs)
    return getattr(numpyro.distributions, family)(**parameters).to_event(1)


def model(given: Given) -> Any:
    """The hierarchical model as a NumPyro program."""
    import jax.numpy as jnp

    dist = numpyro.distributions
    d, above = given.num_coef, np.triu_indices(given.num_coef, 1)
    x, y, task = jnp.asarray(given.predictors), jnp.asarray(given.outcome), given.task

    def program() -> None:
        mu = numpyro.sample("mu", density(given.mu))
        tau = numpyro.sample("tau", density(given.tau))
        with numpyro.plate("task", given.num_tasks):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(d), 1.0).to_event(1))
        if given.corr is None:
            moved = z * tau
        else:
            root = numpyro.sample("root", dist.LKJCholesky(d, given.corr))
            numpyro.deterministic("corr", (root @ root.T)[above])
            moved = z @ (tau[:, None] * root).T
        theta = numpyro.deterministic("theta", mu + moved)
        # the first predictor is one in every row
        location = theta[task, 0]
        for k in range(1, d):
            location = location + theta[task, k] * x[:, k]
        if given.sigma is None:
            sigma = jnp.asarray(given.known_se)
        else:
            sigma = numpyro.sample("sigma", density([given.sigma]))
        numpyro.sample("y", dist.Normal(location, sigma), obs=y)

    return program
