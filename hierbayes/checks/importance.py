r"""What draws of a posterior say of the posterior without one unit of the data.

.. math::

    p(y_i \mid y_{-i}) = \frac{\sum_s w_s\, p(y_i \mid y_{-i}, \varphi_s)}{\sum_s w_s}, \qquad
    w_s \propto \frac{1}{p(y_i \mid y_{-i}, \varphi_s)}

with the largest weights smoothed by a generalised Pareto distribution, whose shape k̂ says whether
the average can be trusted.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class LeftOut(NamedTuple):
    """log p(y_i | y_{−i}), k̂ and the Monte Carlo standard error of each unit; the k̂ allowed."""

    log_density: np.ndarray
    pareto_k: np.ndarray
    error: np.ndarray
    good_k: float


def leave_one_out(values: np.ndarray, efficiency: float) -> LeftOut:
    """From log p(y_i | y_{−i}, φ_s) of every draw and unit, (chain, draw, U)."""
    import arviz_stats
    import xarray as xr

    dims = ("chain", "draw", "unit")
    size, num_units = values.shape[0] * values.shape[1], values.shape[2]
    # where the draws agree there is nothing to weigh, and ArviZ finds no tail
    lost = ~np.isfinite(values).all((0, 1))
    moving = (np.ptp(np.where(lost, 0.0, values), axis=(0, 1)) > 0) & ~lost
    log_density = np.where(lost, np.nan, values[0, 0])
    pareto_k = np.where(lost, np.nan, np.zeros(num_units))
    error = pareto_k.copy()
    if not moving.any():
        return LeftOut(log_density, pareto_k, error, float(min(1 - 1 / np.log10(size), 0.7)))
    y = xr.DataArray(values[:, :, moving], dims=dims)
    tree = xr.DataTree.from_dict({"log_likelihood": xr.Dataset({"y": y})})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # k̂ is returned and judged by the caller
        found: Any = arviz_stats.loo(tree, pointwise=True, reff=efficiency)
    log_density[moving], pareto_k[moving] = found.elpd_i.values, found.pareto_k.values
    log_weights = found.log_weights.transpose(*dims).values
    away = np.exp(values[:, :, moving] - log_density[moving]) - 1.0
    variance = (np.exp(2 * log_weights) * away**2).sum((0, 1)) / efficiency
    error[moving] = np.sqrt(variance)
    return LeftOut(log_density, pareto_k, error, float(found.good_k))


def relative_efficiency(draws: Mapping[str, np.ndarray]) -> float:
    """Effective draws of φ over draws, from (chain, draw, …) arrays; 1 of a single chain."""
    import arviz_stats

    chains, size = next(iter(draws.values())).shape[:2]
    if chains == 1:
        return 1.0
    sizes = []
    for values in draws.values():
        flat = values.reshape(chains, size, -1)
        moving = flat[:, :, np.ptp(flat, axis=(0, 1)) > 0]  # a correlation matrix's diagonal stays
        sizes += [
            float(arviz_stats.ess(column, method="mean")) for column in moving.T.swapaxes(1, 2)
        ]
    return float(np.mean(sizes) / (chains * size)) if sizes else 1.0
