r"""How well a learned prior predicts a task that it has not seen.

.. math:: \text{elpd}_{\text{task}} = \sum_j \log p(D_j \mid D_{-j})

Under full Bayes by Pareto-smoothed importance sampling on the marginal evidence log p(D_j | φ), and
where that is rough by a fit without the task; elsewhere by refitting without each task. The
evidence is exact of Gaussian tasks; of others it is that of the fit: quadrature with its nodes,
else with nodes enough for up to three coefficients, and Laplace's approximation beyond.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from scipy.special import logsumexp

from hierbayes import inputs
from hierbayes.adaptation import LeastSquares, MaximumLikelihood
from hierbayes.checks.evidence_of_tasks import evidence_of, refuse_carried
from hierbayes.checks.importance import leave_one_out, relative_efficiency
from hierbayes.errors import InputError, announce, listing, overhearing
from hierbayes.fit import Fit
from hierbayes.fit.fit import check_fit
from hierbayes.tasks import Tasks


def leave_one_task_out(fit: Fit, refit: bool = False) -> dict[str, Any]:
    r"""Log predictive density of every task, learned from the others.

    .. math::

        \log p(D_j \mid D_{-j}) = \log \int p(D_j \mid \varphi)\, p(\varphi \mid D_{-j})\, d\varphi

    Parameters
    ----------
    fit : Fit
        Of any method but no pooling, which learns nothing about tasks that it has not seen.
    refit : bool
        Under full Bayes: fit anew without each task whose Pareto k is above ``good_k``, with the
        same settings and hyperprior, and average p(D_j | φ) over those draws. Other methods are
        refitted without every task in any case.

    Returns
    -------
    dict
        ``log_density`` (J,), one a task, NaN of a task without rows; ``refitted`` (J,) of bool:
        where it comes from a fit to the other tasks. Under full Bayes also ``error`` (J,), its
        Monte Carlo standard error; ``pareto_k`` (J,), which tells how far the posterior of φ moves
        when the task is left out; and ``good_k``, up to which importance sampling is to be trusted
        with as many draws. Tasks above it that are not refitted are named in a warning.

    References
    ----------
    Merkle, Furr and Rabe-Hesketh (2019), Bayesian comparison of latent variable models:
    conditional versus marginal likelihoods, Psychometrika 84(3).
    Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, Journal of
    Machine Learning Research 25(72).

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
    ...                                known_se="se")
    >>> found = hb.checks.leave_one_task_out(hb.full_bayes(model, tasks, seed=0))
    >>> float(found["log_density"].sum().round(0))
    -31.0
    """
    check_fit(fit)
    refit = inputs.flag("refit", refit)
    if isinstance(fit.adaptation, LeastSquares | MaximumLikelihood):
        raise InputError("no pooling learns nothing about tasks that it has not seen")
    refuse_carried(fit, "leave_one_task_out")
    fit = fit.inside
    if fit.phi_draws is not None:
        return _importance(fit, refit)
    found = fit.method.scores_without(fit)
    if found is None:
        found = np.full(fit.tasks.num_tasks, np.nan)
        for j, without in _refits(fit, np.flatnonzero(fit.tasks.sizes > 0)):
            if isinstance(without, Fit):
                found[j] = _joint_log_density(without, fit.tasks.take([j]))
    return {"log_density": found, "refitted": np.isfinite(found)}


def _refits(fit: Fit, positions: Iterable[int]) -> Iterator[tuple[int, Fit | InputError]]:
    """The same method without each task; the refusal where the others cannot be fitted."""
    from tqdm.auto import tqdm

    bar = tqdm(
        list(map(int, positions)), desc=f"{fit.method} without each task", leave=False, delay=2.0,
        disable=not sys.stderr.isatty(),
    )  # fmt: skip
    for j in bar:
        rest = fit.tasks.take(np.delete(np.arange(fit.tasks.num_tasks), j))
        with overhearing():  # said once, of the fit to all tasks
            try:
                seed = fit.info.get("seed", 0)
                method = fit.method.for_phi_alone()
                without: Fit | InputError = method(fit.model, rest, seed, progress=False)
            except InputError as refusal:
                without = refusal
        yield j, without


def _joint_log_density(fit: Fit, task: Tasks) -> float:
    """log p(D_j | φ̂): the joint density of all rows of a new task."""
    if "tau" in fit.phi:
        return float(evidence_of(fit, task)[0, 0])
    prediction = fit.predict(task, target="new")
    return float(prediction.log_density().sum())


def _importance(fit: Fit, refit: bool) -> dict[str, Any]:
    assert fit.phi_draws is not None
    lead = next(iter(fit.phi_draws.values())).shape[:2]
    held = fit.tasks.sizes > 0
    values = evidence_of(fit, fit.tasks).reshape(*lead, -1)[:, :, held]
    found = leave_one_out(values, relative_efficiency(fit.phi_draws))

    def every(of_held: np.ndarray) -> np.ndarray:
        placed = np.full(fit.tasks.num_tasks, np.nan)
        placed[held] = of_held
        return placed

    log_density, error = every(found.log_density), every(found.error)
    pareto_k, refitted = every(found.pareto_k), np.zeros(len(held), bool)
    rough = held & ~(pareto_k <= found.good_k)
    failed: dict[int, str] = {}
    if refit:
        for j, without in _refits(fit, np.flatnonzero(rough)):
            if isinstance(without, InputError):
                failed[j] = str(without)
                continue
            log_density[j], error[j] = _averaged(without, fit.tasks.take([j]))
            refitted[j] = True
    announce(_said(fit, rough & ~refitted, found.good_k, failed))
    return {
        "log_density": log_density, "error": error, "pareto_k": pareto_k,
        "good_k": found.good_k, "refitted": refitted,
    }  # fmt: skip


def _averaged(fit: Fit, task: Tasks) -> tuple[float, float]:
    """log (1/S) Σ_s p(D | φ_s) of a task that the fit has not seen, and its standard error."""
    assert fit.phi_draws is not None
    values = evidence_of(fit, task)[:, 0]
    mean = float(logsumexp(values) - np.log(len(values)))
    effective = len(values) * relative_efficiency(fit.phi_draws)
    return mean, float(np.exp(values - mean).std() / np.sqrt(effective))


def _said(fit: Fit, rough: np.ndarray, good_k: float, failed: dict[int, str]) -> list[str]:
    """Which scores are rough, and what to do about it."""
    if not rough.any():
        return []
    names = listing(fit.tasks.names[rough].tolist())
    text = (
        f"without {rough.sum()} of {len(rough)} tasks ({names}) the posterior of phi is too far "
        f"from that of all tasks for importance sampling (Pareto k above {good_k:.2f}): their "
        "scores are rough. "
    )
    if failed:
        return [text + f"The fit without them was refused: {next(iter(failed.values()))}"]
    return [text + "leave_one_task_out(fit, refit=True) fits anew without each of them"]
