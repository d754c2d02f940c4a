"""NumPyro's NUTS over a program, all chains in one vectorised run, in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import jax
import numpy as np
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import constrain_fn, potential_energy

SAMPLE_STATS = {
    "diverging": "diverging",
    "accept_prob": "acceptance_rate",
    "num_steps": "n_steps",
    "energy": "energy",
    "potential_energy": "lp",
}
"""NumPyro's fields and their names in ArviZ's schema."""


class Settings(TypedDict):
    """How NUTS is run; ``dense``: with a full mass matrix."""

    dense: bool
    num_draws: int
    num_chains: int
    num_warmup: int
    target_accept: float
    progress: bool | None


def run_nuts(
    program: Callable[[], None],
    key: jax.Array,
    start: dict[str, jax.Array],
    **settings: Unpack[Settings],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Draws (chain, draw, …) and sample statistics; ``start`` is unconstrained, one a chain.

    NUTS gets the program's potential energy, compiled, rather than the program: NumPyro would run
    a program operation by operation to set itself up, which takes longer than the sampling.
    """
    potential = jax.jit(lambda z: potential_energy(program, (), {}, z))
    found, statistics = run_potential(potential, key, start, **settings)
    constrain = jax.jit(
        lambda zs: jax.lax.map(
            lambda z: constrain_fn(program, (), {}, z, return_deterministic=True), zs,
            batch_size=256,
        )
    )  # fmt: skip
    lead = (settings["num_chains"], settings["num_draws"])
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
    draws = {
        name: np.asarray(value).reshape(*lead, *value.shape[1:])
        for name, value in constrain(flat).items()
    }
    return draws, statistics


def run_potential(
    potential: Callable[[Any], jax.Array],
    key: jax.Array,
    start: Any,
    *,
    dense: bool,
    num_draws: int,
    num_chains: int,
    num_warmup: int,
    target_accept: float,
    progress: bool | None,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Draws (chain, draw, …) of a pytree with density exp(−potential), and sample statistics."""
    kernel = NUTS(potential_fn=potential, dense_mass=dense, target_accept_prob=target_accept)
    mcmc = MCMC(
        kernel, num_warmup=num_warmup, num_samples=num_draws, num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=sys.stderr.isatty() if progress is None else progress,
    )  # fmt: skip
    if num_chains == 1:
        start = jax.tree.map(lambda value: value[0], start)
    mcmc.run(key, init_params=start, extra_fields=tuple(SAMPLE_STATS))
    fields: dict[str, Any] = mcmc.get_extra_fields(group_by_chain=True)
    statistics = {SAMPLE_STATS[name]: np.asarray(fields[name]) for name in SAMPLE_STATS}
    statistics["lp"] = -statistics["lp"]
    return mcmc.get_samples(group_by_chain=True), statistics
