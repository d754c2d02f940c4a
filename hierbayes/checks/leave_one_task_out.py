r"""How well a learned prior predicts a task that it has not seen.

.. math:: \text{elpd}_{\text{task}} = \sum_j \log p(D_j \mid D_{-j})

Under full Bayes by Pareto-smoothed importance sampling on the marginal evidence log p(D_j | φ);
elsewhere by refitting without the task. The evidence is exact of Gaussian tasks; of others it is
that of the fit: quadrature with its nodes, else with nodes enough for up to three coefficients, and
Laplace's approximation beyond.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np

from hierbayes.adaptation import LeastSquares, MaximumLikelihood, Quadrature
from hierbayes.errors import FitWarning, InputError
from hierbayes.evidence.exact import log_evidence
from hierbayes.evidence.over_draws import log_evidence_over_draws
from hierbayes.fit import Fit
from hierbayes.fit.datatree import dataset
from hierbayes.meta import complete_pooling, empirical_bayes, imaml, maml, reptile
from hierbayes.meta.own_parameters import over_all
from hierbayes.meta.without_one import WithoutOne
from hierbayes.numerics import float64
from hierbayes.statistics import statistics


def leave_one_task_out(fit: Fit) -> dict[str, Any]:
    """Log predictive density of every task, learned from the others.

    Parameters
    ----------
    fit : Fit
        Of any method but no pooling, which learns nothing about tasks that it has not seen.

    Returns
    -------
    dict
        ``log_density`` (J,), one a task; ``pareto_k`` (J,) under full Bayes.
    """
    if isinstance(fit.adaptation, LeastSquares | MaximumLikelihood):
        raise InputError("no pooling learns nothing about tasks that it has not seen")
    if fit.phi_draws is not None:
        return _importance(fit)
    gaussian = fit.model.likelihood.gaussian_in_theta
    if fit.method == "empirical Bayes" and not gaussian:
        with_belief = fit.info["criterion"] == "map"
        return {"log_density": _evidence(fit).scores(dict(fit.phi), with_belief=with_belief)}
    if fit.method == "complete pooling" and not gaussian:
        return {"log_density": _pooled_scores(fit)}
    from tqdm.auto import tqdm

    with_rows = np.flatnonzero(fit.tasks.sizes > 0)
    scores = np.full(fit.tasks.num_tasks, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)  # said once, of the fit to all tasks
        bar = tqdm(
            with_rows, desc=f"{fit.method} without each task", leave=False, delay=2.0,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip
        for j in bar:
            rest = fit.tasks.take(np.delete(np.arange(fit.tasks.num_tasks), j))
            try:
                scores[j] = _joint_log_density(_refit(fit, rest), fit.tasks.take([int(j)]))
            except InputError:
                continue  # without this task the others cannot be fitted: its score stays open
    return {"log_density": scores}


def _refit(fit: Fit, tasks: Any) -> Fit:
    """The same method on other tasks; defaults of the hyperprior stay as they were resolved."""
    if fit.method == "empirical Bayes":
        return empirical_bayes(fit.model, tasks, fit.info["criterion"], num_draws=1, num_chains=1)
    if fit.method == "complete pooling":
        return complete_pooling(fit.model, tasks)
    if fit.method == "MAML":
        settings = _kept(fit, "num_steps", "query", "num_splits", "num_meta_steps", "sigma", "seed")
        learned = "step_size" in fit.phi
        step_size = "auto" if learned else fit.info["step_size"]
        return maml(fit.model, tasks, step_size=step_size, learn_step_size=learned, **settings)
    if fit.method == "iMAML":
        settings = _kept(fit, "query", "num_splits", "num_meta_steps", "sigma", "seed")
        return imaml(fit.model, tasks, prior_precision=fit.info["prior_precision"], **settings)
    if fit.method == "Reptile":
        settings = _kept(
            fit, "num_steps", "step_size", "query", "num_meta_steps", "tolerance", "sigma", "seed"
        )
        return reptile(fit.model, tasks, **settings)
    raise InputError(f"{fit.method} cannot be refitted")


def _kept(fit: Fit, *names: str) -> dict[str, Any]:
    """The fit's own settings; an outer optimiser of the user's is not among what a fit keeps."""
    return {name: fit.info[name] for name in names if name in fit.info}


def _joint_log_density(fit: Fit, task: Any) -> float:
    """log p(D_j | φ̂): the joint density of all rows of a new task."""
    if "tau" in fit.phi and fit.model.likelihood.gaussian_in_theta:
        with float64():
            return float(log_evidence(statistics(task), fit.model.prior, dict(fit.phi))[0])
    if "tau" in fit.phi:
        with float64():
            return float(WithoutOne(fit.model, task, None).of_tasks(dict(fit.phi))[0])
    prediction = fit.predict(task, target="new")
    return float(prediction.log_density().sum())


def _evidence(fit: Fit) -> WithoutOne:
    """The evidence of tasks that are not Gaussian, as the fit has it."""
    fit.model.require_gaussian_prior(
        "leave_one_task_out where tasks are not Gaussian",
        "the evidence log p(D_j | phi) is not offered there", "take priors.Gaussian()",
    )  # fmt: skip
    nodes = 1 if fit.info.get("evidence") == "laplace" else None
    if isinstance(fit.adaptation, Quadrature):
        nodes = fit.adaptation.num_nodes
    return WithoutOne(fit.model, fit.tasks, nodes)


def _pooled_scores(fit: Fit) -> np.ndarray:
    """log p(D_j | φ̂) of every task, φ̂ from all rows of the others."""
    scores = np.full(fit.tasks.num_tasks, np.nan)
    evidence = WithoutOne(fit.model, fit.tasks, 1)
    for j in np.flatnonzero(fit.tasks.sizes > 0):
        try:
            phi = over_all(fit.model, fit.tasks, without=int(j)).phi
        except InputError:
            continue
        with float64():
            scores[j] = evidence.of_tasks(phi | {"tau": np.zeros(len(fit.tasks.coef))})[j]
    return scores


def _over_draws(fit: Fit, phis: dict[str, np.ndarray]) -> np.ndarray:
    """log p(D_j | φ_s) of every draw and task, (S, J)."""
    nodes = None if fit.model.likelihood.gaussian_in_theta else _evidence(fit).num_nodes
    return log_evidence_over_draws(fit.model, fit.tasks, phis, nodes)


def _importance(fit: Fit) -> dict[str, Any]:
    import arviz_stats

    assert fit.phi_draws is not None
    chains, draws = next(iter(fit.phi_draws.values())).shape[:2]
    flat = {k: v.reshape(-1, *v.shape[2:]) for k, v in fit.phi_draws.items()}
    values = _over_draws(fit, flat).reshape(chains, draws, -1)
    tree = _tree_by_task(values, fit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # k̂ is returned and judged by the caller
        result: Any = arviz_stats.loo(tree, pointwise=True)
    pointwise = np.where(fit.tasks.sizes > 0, result.elpd_i.values, np.nan)
    return {"log_density": pointwise, "pareto_k": result.pareto_k.values}


def _tree_by_task(values: np.ndarray, fit: Fit) -> Any:
    """What ArviZ's loo needs: the draws of φ, and the log evidence of each task as its unit."""
    import xarray as xr

    chain, draw = np.arange(values.shape[0]), np.arange(values.shape[1])
    coords = {"chain": chain, "draw": draw, "task": fit.tasks.names}
    evidence = xr.DataArray(values, dims=("chain", "draw", "task"), coords=coords)
    posterior = dataset(fit.phi_draws or {}, fit.tasks, ("chain", "draw"))
    return xr.DataTree.from_dict(
        {"posterior": posterior, "log_likelihood": xr.Dataset({"y": evidence})}
    )
