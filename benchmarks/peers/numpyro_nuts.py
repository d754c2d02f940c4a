"""NumPyro's NUTS as its guide uses it: non-centred, one device a chain, 64 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpyro

from benchmarks.peers.given import Belief, Given, alike


class Contestant:
    """A chain a device, one compiled program for all of warm-up and sampling.

    ``MCMC.run(…, chain_method="parallel")``, NumPyro's default, compiles anew in every call. Its
    documentation also maps a function that runs MCMC over devices, and that program is kept.
    """

    def __init__(self, given: Given, num_draws: int, num_chains: int, num_warmup: int) -> None:
        numpyro.set_host_device_count(num_chains)
        numpyro.enable_x64()
        import jax
        from numpyro.infer import MCMC, NUTS

        self.num_chains, program = num_chains, model(given)
        names = ["mu", "tau", "theta"]
        names += [] if given.corr is None else ["corr"]
        names += [] if given.shared is None else ["beta"]
        names += [] if given.sigma is None else ["sigma"]

        def one_chain(key: Any) -> dict[str, Any]:
            mcmc = MCMC(
                NUTS(program), num_warmup=num_warmup, num_samples=num_draws, num_chains=1,
                progress_bar=False,
            )  # fmt: skip
            mcmc.run(key)
            draws = mcmc.get_samples()
            return {name: draws[name] for name in names}

        self.chains = jax.pmap(one_chain)
        self.about = f"non-centred, {num_warmup:,} warm-up draws, pmap over chains, float64"

    def versions(self) -> dict[str, str]:
        """Of what is timed."""
        import jax

        return {"numpyro": numpyro.__version__, "jax": jax.__version__}

    def run(self, seed: int) -> dict[str, Any]:
        """Warm up and sample."""
        import jax

        draws = self.chains(jax.random.split(jax.random.key(seed), self.num_chains))
        return {name: np.asarray(value) for name, value in draws.items()}


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
        if given.shared is not None:
            beta = numpyro.sample("beta", density(given.beta))
            location = location + jnp.asarray(given.shared) @ beta
        if given.family == "bernoulli":
            numpyro.sample("y", dist.Bernoulli(logits=location), obs=y)
            return
        if given.sigma is None:
            sigma = jnp.asarray(given.known_se)
        else:
            sigma = numpyro.sample("sigma", density([given.sigma]))
        numpyro.sample("y", dist.Normal(location, sigma), obs=y)

    return program
