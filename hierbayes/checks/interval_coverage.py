r"""How often intervals of empirical Bayes cover θ_j in data sets of one design.

.. math:: P\left(\theta_j \in C_j(D)\right), \qquad \theta_j \sim p(\theta \mid \varphi),\quad
          D_j \sim p(D_j \mid \theta_j, \varphi)

on average over tasks and data sets: empirical Bayes coverage.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy import special, stats

from hierbayes import inputs
from hierbayes.errors import InputError, NotApplicable, listing
from hierbayes.evidence.many import posteriors
from hierbayes.fit import Fit
from hierbayes.fit.fit import check_fit
from hierbayes.meta.empirical_bayes import EmpiricalBayes
from hierbayes.meta.intervals import check_intervals, morris, normal_means
from hierbayes.meta.many_data_sets import (
    ManyEstimates,
    maximise_many,
    prior_means,
    prior_roots,
    simulated,
    simulated_at,
)
from hierbayes.numerics import as_rng
from hierbayes.statistics import Statistics

SIMULATED = ("plain", "bootstrap", "morris")

TOGETHER = 20
"""Data sets whose bootstraps run side by side."""


def interval_coverage(
    fit: Fit,
    intervals: Sequence[str] = ("plain",),
    *,
    phi: Mapping[str, Any] | None = None,
    level: float = 0.95,
    num_data_sets: int = 1000,
    num_bootstrap: int = 200,
    seed: int | jax.Array = 0,
) -> Any:
    r"""Coverage of θ's intervals over data sets simulated from a fit, or from a φ of your own.

    Each data set has the fit's tasks with other θ and other outcomes; φ is estimated from it anew,
    by the fit's criterion, and its intervals are asked whether they hold the θ that made it.

    Parameters
    ----------
    fit : Fit
        By :func:`~hierbayes.empirical_bayes` of Gaussian tasks, with ``criterion`` "ml" or "reml".
    intervals : sequence of "plain", "bootstrap" and "morris"
        As in :func:`~hierbayes.empirical_bayes`. Those of the bootstrap run between quantiles of
        the mixture, and take ``num_bootstrap`` refits a data set.
    phi : mapping, optional
        Values by name that take the place of the fit's: ``{"tau": [1.0]}``. With τ̂ = 0 there is
        no spread to simulate: give one.
    level : float
        Nominal coverage.
    num_data_sets, num_bootstrap : int
    seed : int or JAX key

    Returns
    -------
    Dataset
        ``coverage`` (intervals, coef), averaged over data sets and tasks that have rows, and its
        Monte-Carlo ``standard_error``, data sets as units.

    Raises
    ------
    InputError
        Of fits by other methods or criteria, where the intervals cannot be had, and of values in
        ``phi`` that no prior has.

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
    ...                                known_se="se")
    >>> fit = hb.empirical_bayes(model, tasks, "reml")
    >>> found = hb.checks.interval_coverage(fit, phi={"tau": [5.0]})
    >>> bool(found.coverage.sel(intervals="plain", coef="Intercept") < 0.7)
    True
    """
    import xarray as xr

    check_fit(fit)
    names, level = inputs.names("intervals", intervals), inputs.share("level", level)
    num_data_sets = inputs.count("num_data_sets", num_data_sets, least=2)
    seed = inputs.seed(seed)
    _check(fit, names, num_bootstrap)
    model, tasks, reml = fit.model, fit.tasks, fit.info["criterion"] == "reml"
    given = {} if phi is None else inputs.mapping("phi", phi, "a mapping from name to values")
    rng = as_rng(seed)
    drawn, theta = simulated(tasks, _merged(fit, given), num_data_sets, rng)
    many = maximise_many(drawn, model.shape(tasks), reml=reml, progress="data sets")
    z = special.ndtri((1 + level) / 2)
    with_rows, found = tasks.sizes > 0, {}
    for name in names:
        if name == "plain":
            inside = np.abs(theta - many.mean) <= z * many.sd
        elif name == "morris":
            _, variance = normal_means(model, tasks)
            mean, spread = morris((drawn.y[0] / drawn.x[0, 0][:, None]).T, variance)
            inside = np.abs(theta - mean[..., None]) <= z * np.sqrt(spread)[..., None]
        else:
            below = _bootstrap_ranks(fit, drawn, theta, many, num_bootstrap, rng)
            inside = np.abs(2 * below - 1) <= level
        found[name] = inside[:, with_rows].mean(1)
    shares = np.stack([found[name] for name in names])
    dims, coords = ("intervals", "coef"), {"intervals": list(names), "coef": list(tasks.coef)}
    error = stats.sem(shares, axis=1)
    return xr.Dataset(
        {"coverage": (dims, shares.mean(1)), "standard_error": (dims, error)}, coords=coords
    )


def _bootstrap_ranks(
    fit: Fit,
    drawn: Statistics,
    theta: np.ndarray,
    many: ManyEstimates,
    num_bootstrap: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Share of each data set's mixture over φ*_b that lies below its θ, (B, J, d)."""
    from tqdm.auto import tqdm

    shape, num_sets = fit.model.shape(fit.tasks), len(theta)
    reml, below = fit.info["criterion"] == "reml", np.empty(theta.shape)
    bar = tqdm(range(0, num_sets, TOGETHER), desc="bootstrap of data sets", leave=False, delay=2.0,
               disable=not sys.stderr.isatty())  # fmt: skip
    for first in bar:
        which = np.repeat(np.arange(first, min(first + TOGETHER, num_sets)), num_bootstrap)
        phis = {name: value[which] for name, value in many.phi.items()}
        again = maximise_many(simulated_at(fit.tasks, phis, rng)[0], shape, reml=reml)
        mean, sd = _posteriors_at(drawn, drawn.y[..., which], again.phi)
        away = theta[which] - mean
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(sd > 0, special.ndtr(away / sd), away > 0)
        each = share.reshape(-1, num_bootstrap, *theta.shape[1:])
        below[first : first + len(each)] = each.mean(1)
    return below


def _posteriors_at(
    drawn: Statistics, y: np.ndarray, phis: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations (B, J, d) of θ, each y of ``y`` (m, J, B) at its own φ."""
    d = drawn.num_coef
    sigma = np.asarray(phis.get("sigma", np.ones(len(phis["mu"]))))
    root = prior_roots(phis) / sigma[:, None, None]
    location = prior_means(phis, drawn.task_predictors)
    residual = y[:d] - np.einsum("idj,bjd->ijb", drawn.x[:d], location)
    if "beta" in phis:
        residual = residual - np.einsum("ipj,bp->ijb", drawn.z[:d], phis["beta"])
    mean, sd = posteriors(drawn.x[:d], residual, np.moveaxis(root, 0, -1), sigma)
    return location + mean.transpose(2, 1, 0), sd.transpose(2, 1, 0)


def _merged(fit: Fit, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    unknown = [name for name in given if name not in fit.phi]
    if unknown:
        raise InputError(
            f"phi holds {listing(unknown)}, which this fit has not; it has {listing(list(fit.phi))}"
        )
    merged = {name: np.asarray(value, float) for name, value in fit.phi.items()}
    for name, value in given.items():
        try:
            found = np.asarray(inputs.real_array(value), float)
        except (TypeError, ValueError) as error:
            raise InputError(f"phi[{name!r}] is no array of numbers: {error}") from error
        if found.shape != merged[name].shape:
            raise InputError(
                f"phi[{name!r}] must have shape {merged[name].shape}, found {found.shape}"
            )
        merged[name] = found
        fault = _fault(name, merged[name])
        if fault:
            raise InputError(f"phi[{name!r}] must {fault}, found {np.asarray(value).tolist()}")
    if (merged["tau"] == 0).any():
        where = "in the phi given" if "tau" in given else "in this fit"
        raise InputError(
            f"tau is 0 {where}: data sets without spread between tasks say nothing of intervals "
            'of theta; give a tau to simulate under, phi={"tau": [...]}'
        )
    return merged


def _fault(name: str, value: np.ndarray) -> str:
    """What a value of φ must be and is not."""
    if not np.isfinite(value).all():
        return "be finite"
    if name == "tau" and (value < 0).any():
        return "not be negative"
    if name == "sigma" and not (value > 0).all():
        return "be positive"
    if name == "corr":
        if not np.allclose(value, value.T, rtol=0, atol=1e-9):
            return "be symmetric"
        if not np.allclose(np.diag(value), 1.0, rtol=0, atol=1e-9):
            return "have ones on its diagonal"
        if np.linalg.eigvalsh(value)[0] < -1e-9:
            return "be positive semidefinite, as correlations are"
    return ""


def _check(fit: Fit, names: tuple[str, ...], num_bootstrap: Any) -> None:
    by_evidence = isinstance(fit.method, EmpiricalBayes)
    if not by_evidence or fit.info.get("criterion") not in ("ml", "reml"):
        raise NotApplicable(
            'interval_coverage is of empirical_bayes with criterion="ml" or "reml", found '
            f"{fit.method} with criterion {fit.info.get('criterion')!r}"
        )
    if not fit.model.conjugate:
        raise NotApplicable("interval_coverage simulates Gaussian tasks of a Gaussian prior only")
    if not names or not set(names) <= set(SIMULATED):
        raise InputError(f"intervals must be among {listing(SIMULATED)}, found {listing(names)}")
    for name in names:
        check_intervals(name, num_bootstrap, fit.model, fit.tasks, fit.info["criterion"])
