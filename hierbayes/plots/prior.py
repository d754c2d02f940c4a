"""The learned prior against the estimates of the tasks that it was learned from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hierbayes.adaptation import LeastSquares
from hierbayes.fit import Fit
from hierbayes.plots.style import as_fits, axes_or_new, looks, pick_coef
from hierbayes.priors import StudentT


def learned_prior(fits: Fit | Mapping[str, Fit], *, coef: str | None = None, ax: Any = None) -> Any:
    """p(θ_new | D) of one coefficient, over the tasks' own estimates.

    The marks below are the least-squares estimates of Gaussian tasks. A method without a shared
    prior (MAML) is a vertical line at φ; a prior without width (τ̂ = 0) too.

    Parameters
    ----------
    fits : Fit or mapping from label to Fit
    coef : str, optional
        The coefficient shown; the first by default.
    ax : matplotlib Axes, optional

    Returns
    -------
    matplotlib Axes
    """
    from scipy import stats

    fits = as_fits(fits)
    name, styles = pick_coef(fits, coef), looks(fits)
    ax = axes_or_new(ax, (6.0, 3.8))
    first = next(iter(fits.values()))
    k = first.tasks.coef.index(name)
    own = np.zeros(0)
    if first.model.likelihood.gaussian_in_theta:
        within = next((f.phi for f in fits.values() if "sigma" in f.phi), first.phi)
        alone = LeastSquares()(first.model, first.tasks, dict(within))
        own = alone.mean[alone.identified[:, k], k]
    spread = [f.theta.values[:, k] for f in fits.values() if "mu" in f.phi]
    low, high = np.quantile(own, [0.02, 0.98]) if own.size else (-1.0, 1.0)
    low, high = min([low, *(s.min() for s in spread)]), max([high, *(s.max() for s in spread)])
    pad = 0.25 * max(high - low, 1e-9)
    grid = np.linspace(low - pad, high + pad, 400)
    for label, fit in fits.items():
        colour = styles[label]["color"]
        if "mu" not in fit.phi:
            continue
        # the prior of an average task, where task predictors move its mean
        w = fit.tasks.task_predictors.mean(0)
        moved = fit.phi["gamma"][k] @ w if "gamma" in fit.phi else 0.0
        if "tau" not in fit.phi or fit.phi["tau"][k] == 0:
            ax.axvline(
                fit.phi["mu"][k] + moved, color=colour, linestyle="--", linewidth=1.3, label=label
            )
            continue
        draws = fit.phi_draws
        mu = np.atleast_1d(fit.phi["mu"][k] if draws is None else draws["mu"][..., k].ravel())
        if "gamma" in fit.phi:
            mu = mu + (moved if draws is None else (draws["gamma"][..., k, :] @ w).ravel())
        tau = np.atleast_1d(fit.phi["tau"][k] if draws is None else draws["tau"][..., k].ravel())
        thin = slice(None, None, max(len(mu) // 4000, 1))
        # a draw with τ below the grid's step would be a spike of one draw
        width = np.maximum(tau[thin], 2 * (grid[1] - grid[0]))
        prior = fit.model.prior
        bell: Any = stats.t(prior.df) if isinstance(prior, StudentT) else stats.norm
        density = (bell.pdf((grid[:, None] - mu[thin]) / width) / width).mean(1)
        ax.plot(grid, density, color=colour, linewidth=1.8, label=label)
    inside = own[(own >= grid[0]) & (own <= grid[-1])]
    ax.plot(inside, np.zeros(len(inside)), "|", color="#777777", markersize=9, clip_on=False)
    ax.set_xlim(grid[0], grid[-1])
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"θ, {name}")
    ax.set_ylabel("prior density")
    ax.set_title(f"the learned prior of {name}", loc="left")
    if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
