"""The learned prior against the estimates of the tasks that it was learned from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hierbayes.adaptation import LeastSquares
from hierbayes.fit import Fit
from hierbayes.plots.labels import named
from hierbayes.plots.style import as_fits, axes_or_new, looks, pick_coef, pick_name
from hierbayes.priors import LearnedPrior, StudentT

LONE = {"color": "#0072B2"}
"""What a prior without a fit looks like."""


def learned_prior(
    fits: Fit | LearnedPrior | Mapping[str, Fit], *, coef: str | None = None, ax: Any = None
) -> Any:
    """p(θ_new | D) of one coefficient, over the tasks' own estimates.

    The marks below are the least-squares estimates of Gaussian tasks. A method without a shared
    prior (MAML) is a vertical line at φ; a prior without width (τ̂ = 0) too. A
    :class:`~hierbayes.priors.LearnedPrior`, read from a file for example, is drawn by itself.

    Parameters
    ----------
    fits : Fit, LearnedPrior, or mapping from label to Fit
    coef : str, optional
        The coefficient shown; the first by default.
    ax : matplotlib Axes, optional

    Returns
    -------
    matplotlib Axes
    """
    ax = axes_or_new(ax, (6.0, 3.8))
    if isinstance(fits, LearnedPrior):
        name = pick_name(fits.coef, coef)
        k = fits.coef.index(name)
        roots = fits.scale_trils[:, k]
        scales = np.abs(roots) if roots.ndim == 1 else np.linalg.norm(roots, axis=-1)
        centre = fits.weights @ fits.locations[:, k]
        spread = np.sqrt((fits.weights * (scales**2 + (fits.locations[:, k] - centre) ** 2)).sum())
        reach = 4 * spread if spread > 0 else max(abs(centre), 1.0)
        grid = np.linspace(centre - reach, centre + reach, 400)
        _draw(ax, grid, fits.locations[:, k], scales, fits.weights, LONE, fits.df)
    else:
        name = _of_fits(ax, as_fits(fits), coef)
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"θ, {named(name)}")
    ax.set_ylabel("prior density")
    ax.set_title(f"the learned prior of {named(name)}", loc="left")
    if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _of_fits(ax: Any, fits: dict[str, Fit], coef: str | None) -> str:
    """The priors of some fits over their tasks' own estimates; the coefficient's name."""
    first = next(iter(fits.values()))
    name, styles = pick_coef(fits, coef), looks(fits)
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
        if "mu" not in fit.phi:
            continue
        look = {"color": styles[label]["color"], "label": label}
        # the prior of an average task, where task predictors move its mean
        w = fit.tasks.task_predictors.mean(0)
        moved = fit.phi["gamma"][k] @ w if "gamma" in fit.phi else 0.0
        if "tau" not in fit.phi or fit.phi["tau"][k] == 0:
            _draw(
                ax,
                grid,
                np.atleast_1d(fit.phi["mu"][k] + moved),
                np.zeros(1),
                np.ones(1),
                look,
                None,
            )
            continue
        draws = fit.phi_draws
        mu = np.atleast_1d(fit.phi["mu"][k] if draws is None else draws["mu"][..., k].ravel())
        if "gamma" in fit.phi:
            mu = mu + (moved if draws is None else (draws["gamma"][..., k, :] @ w).ravel())
        tau = np.atleast_1d(fit.phi["tau"][k] if draws is None else draws["tau"][..., k].ravel())
        df = prior.df if isinstance(prior := fit.model.prior, StudentT) else None
        _draw(ax, grid, mu, tau, np.full(len(mu), 1 / len(mu)), look, df)
    inside = own[(own >= grid[0]) & (own <= grid[-1])]
    ax.plot(inside, np.zeros(len(inside)), "|", color="#777777", markersize=9, clip_on=False)
    ax.set_xlim(grid[0], grid[-1])
    return name


def _draw(
    ax: Any, grid: np.ndarray, locations: Any, scales: Any, weights: Any, look: dict[str, Any],
    df: float | None,
) -> None:  # fmt: skip
    """The density of a mixture of normals or Student-t, or a line where it has no width."""
    from scipy import stats

    if "label" in look:
        look = {**look, "label": named(look["label"])}
    if not scales.any() and np.ptp(locations) == 0:
        ax.axvline(locations[0], linestyle="--", linewidth=1.3, **look)
        return
    thin = slice(None, None, max(len(locations) // 4000, 1))
    # a component narrower than the grid's step would be a spike of one draw
    width = np.maximum(scales[thin], 2 * (grid[1] - grid[0]))
    share = weights[thin] / weights[thin].sum()
    bell: Any = stats.norm if df is None else stats.t(df)
    density = (bell.pdf((grid[:, None] - locations[thin]) / width) / width) @ share
    ax.plot(grid, density, linewidth=1.8, **look)
