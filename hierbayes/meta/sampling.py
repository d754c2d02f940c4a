"""NumPyro's NUTS over a program, all chains in one vectorised run, in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from numpyro.infer import MCMC, NUTS

SAMPLE_STATS = {
    "diverging": "diverging",
    "accept_prob": "acceptance_rate",
    "num_steps": "n_steps",
    "energy": "energy",
    "potential_energy": "lp",
}
"""NumPyro's fields and their names in ArviZ's schema."""


def run_nuts(
    program: Callable[[], None],
    key: jax.Array,
    start: dict[str, jax.Array],
    *,
    dense: bool,
    num_draws: int,
    num_chains: int,
    num_warmup: int,
    target_accept: float,
    progress: bool | None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Draws (chain, draw, …) and sample statistics; ``start`` is unconstrained, one a chain."""
    kernel = NUTS(program, dense_mass=dense, target_accept_prob=target_accept)
    mcmc = MCMC(
        kernel, num_warmup=num_warmup, num_samples=num_draws, num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=sys.stderr.isatty() if progress is None else progress,
    )  # fmt: skip
    if num_chains == 1:
        start = {name: value[0] for name, value in start.items()}
    mcmc.run(key, init_params=start, extra_fields=tuple(SAMPLE_STATS))
    draws = {k: np.asarray(v) for k, v in mcmc.get_samples(group_by_chain=True).items()}
    fields = mcmc.get_extra_fields(group_by_chain=True)
    statistics = {SAMPLE_STATS[name]: np.asarray(fields[name]) for name in SAMPLE_STATS}
    statistics["lp"] = -statistics["lp"]
    return draws, statistics
