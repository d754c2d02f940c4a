r"""What draws of a posterior say of the posterior without one unit of the data.

.. math::

    p(y_i \mid y_{-i}) = \frac{\sum_s w_s\, p(y_i \mid y_{-i}, \varphi_s)}{\sum_s w_s}, \qquad
    w_s \propto \frac{1}{p(y_i \mid y_{-i}, \varphi_s)}

with the largest weights smoothed by a generalised Pareto distribution, whose shape k̂ says whether
the average can be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

from hierbayes.fit.effective import ess, statistics


class LeftOut(NamedTuple):
    """log p(y_i | y_{−i}), k̂ and the Monte Carlo standard error of each unit; the k̂ allowed."""

    log_density: np.ndarray
    pareto_k: np.ndarray
    error: np.ndarray
    good_k: float


def leave_one_out(values: np.ndarray, efficiency: float) -> LeftOut:
    """From log p(y_i | y_{−i}, φ_s) of every draw and unit, (chain, draw, U)."""
    import xarray as xr

    dims = ("chain", "draw", "unit")
    size, num_units = values.shape[0] * values.shape[1], values.shape[2]
    # where the draws agree there is nothing to weigh, and ArviZ finds no tail
    lost = ~np.isfinite(values).all((0, 1))
    moving = (np.ptp(np.where(lost, 0.0, values), axis=(0, 1)) > 0) & ~lost
    log_density = np.where(lost, np.nan, values[0, 0])
    pareto_k = np.where(lost, np.nan, np.zeros(num_units))
    error = pareto_k.copy()
    good_k = float(min(1 - 1 / np.log10(size), 0.7)) if size > 1 else 0.7
    if not moving.any():
        return LeftOut(log_density, pareto_k, error, good_k)
    y = xr.DataArray(values[:, :, moving], dims=dims)
    # what arviz_stats.loo computes, without its warning: k̂ is judged by the caller
    found, shapes = statistics().psislw(y, r_eff=efficiency, dim=["chain", "draw"])
    log_weights = found.transpose(*dims).values
    log_density[moving] = logsumexp(values[:, :, moving] + log_weights, axis=(0, 1))
    pareto_k[moving] = shapes.values
    away = np.exp(values[:, :, moving] - log_density[moving]) - 1.0
    variance = (np.exp(2 * log_weights) * away**2).sum((0, 1)) / efficiency
    error[moving] = np.sqrt(variance)
    return LeftOut(log_density, pareto_k, error, good_k)


def relative_efficiency(draws: Mapping[str, np.ndarray]) -> float:
    """Effective draws of φ over draws, from (chain, draw, …) arrays; 1 of a single chain."""
    chains, size = next(iter(draws.values())).shape[:2]
    if chains == 1:
        return 1.0
    sizes = []
    for values in draws.values():
        flat = values.reshape(chains, size, -1)
        moving = flat[:, :, np.ptp(flat, axis=(0, 1)) > 0]  # a correlation matrix's diagonal stays
        sizes += ess(moving, "mean").tolist()
    return float(np.mean(sizes) / (chains * size)) if sizes else 1.0
