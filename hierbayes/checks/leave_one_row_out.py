r"""How well every row is predicted by all others: by those of its own task, and by other tasks.

.. math:: \text{elpd}_{\text{row}} = \sum_j \sum_i \log p(y_{ij} \mid D_j \setminus i, D_{-j})
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from hierbayes.adaptation import PointAdaptation
from hierbayes.checks.evidence_of_tasks import refuse_carried
from hierbayes.checks.importance import leave_one_out, relative_efficiency
from hierbayes.checks.scores import mean_over_tasks
from hierbayes.errors import InputError, NotApplicable, announce, listing
from hierbayes.evidence.without_row import NUMBERS_AT_ONCE, without_each_row
from hierbayes.fit import Fit
from hierbayes.fit.adapted import phis_of
from hierbayes.fit.fit import check_fit
from hierbayes.tasks import Tasks

POINT = (
    "the other rows of its task at phi-hat, which was learned from all rows, the one left out "
    "among them"
)
MARGINAL = "all other rows, theta integrated out exactly and phi learned anew by importance weights"
CONDITIONAL = "all other rows, theta and phi learned anew by importance weights on their draws"
CONDITIONAL_AT_POINT = (
    "the other rows of its task by importance weights on draws of theta, at phi-hat"
)


def leave_one_row_out(fit: Fit) -> dict[str, Any]:
    r"""Log predictive density of every row given all other rows.

    .. math::

        p(y_i \mid y_{-i}) = \int p(y_i \mid D_j \setminus i, \varphi)\,
            p(\varphi \mid y_{-i})\, d\varphi

    A new row of a known task; :func:`leave_one_task_out` asks for a new task. Of Gaussian tasks the
    first factor is exact, so that importance weights have φ alone to correct, which one row moves
    little: Pareto k is low even where a row is all that its task has. Of other tasks, and under a
    Student-t prior, they have θ_j to correct too, and k is high for rows of small tasks.

    Parameters
    ----------
    fit : Fit
        By full Bayes; or at a point φ̂ with a posterior of θ, by empirical Bayes for example. There
        φ̂ stays where all rows have put it, the one left out among them: with few tasks the score is
        too good by about the number of φ's entries, in nats over all rows.

    Returns
    -------
    dict
        ``log_density``, a DataArray (row): rows stand task by task as in ``fit.tasks``, with their
        numbers in the data as ``row`` and their tasks as ``row_task``. ``mean`` a row and its
        standard error over tasks, ``se``. ``given``, in words: what a row is predicted from. Where
        importance sampling was used ``pareto_k`` and ``error``, the Monte Carlo standard error,
        DataArrays (row), and ``good_k``: rows above it are counted in a warning, and their scores
        are rough.

    Raises
    ------
    InputError
        For methods without a posterior of θ.

    References
    ----------
    Vehtari, Gelman and Gabry (2017), Practical Bayesian model evaluation using leave-one-out
    cross-validation and WAIC, Statistics and Computing 27(5).
    Vehtari, Mononen, Tolvanen, Sivula and Winther (2016), Bayesian leave-one-out cross-validation
    approximations for Gaussian latent variable models, Journal of Machine Learning Research
    17(103).

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula(
    ...     "log_radon ~ 1 + floor + (1 | county)", hb.datasets.radon()
    ... )
    >>> found = hb.checks.leave_one_row_out(hb.empirical_bayes(model, tasks))
    >>> round(found["mean"], 3), found["log_density"].dims
    (-1.164, ('row',))
    """
    check_fit(fit)
    refuse_carried(fit, "leave_one_row_out")
    fit = fit.inside
    tasks, gaussian = fit.tasks, fit.model.conjugate
    if isinstance(fit.adaptation, PointAdaptation) or "tau" not in fit.phi:
        raise NotApplicable(
            f"{fit.method} gives no posterior of theta to take a row out of: use full_bayes or "
            "empirical_bayes"
        )
    if tasks.outcome is None:
        raise InputError(f"the tasks hold no outcome {tasks.labels.outcome!r} to score")
    if gaussian and fit.phi_draws is None:
        design = fit.model.likelihood.design(tasks, {k: np.asarray(v) for k, v in fit.phi.items()})
        parts = without_each_row(fit.model, design, phis_of(fit.phi, fit.phi_draws))
        log_density = np.concatenate([values[0] for _, values in parts])
        return _result(tasks, POINT, log_density)
    draws = fit.phi_draws
    if gaussian:
        assert draws is not None
        lead = next(iter(draws.values())).shape[:2]
        each, given = without_each_row(fit.model, tasks, phis_of(fit.phi, fit.phi_draws)), MARGINAL
    else:
        if fit.theta_draws is None:
            raise NotApplicable(
                "the fit holds no draws of theta, which tasks that are not Gaussian need here: fit "
                "again with fewer draws"
            )
        lead = fit.theta_draws.shape[:2]
        each, given = _conditional(fit), CONDITIONAL if draws else CONDITIONAL_AT_POINT
    efficiency = 1.0 if draws is None else relative_efficiency(draws)
    found = []
    for here, values in _with_bar(each, tasks.num_rows):
        found.append(leave_one_out(values.reshape(*lead, here.stop - here.start), efficiency))
    log_density, pareto_k, error = (
        np.concatenate([getattr(part, name) for part in found])
        for name in ("log_density", "pareto_k", "error")
    )
    good_k = found[0].good_k
    announce(_said(tasks, ~(pareto_k <= good_k), good_k, marginal=gaussian))
    more = {"pareto_k": _by_row(pareto_k, tasks), "error": _by_row(error, tasks), "good_k": good_k}
    return _result(tasks, given, log_density) | more


def _result(tasks: Tasks, given: str, log_density: np.ndarray) -> dict[str, Any]:
    if (lost := ~np.isfinite(log_density)).any():
        names = listing(tasks.names[np.unique(tasks.task_of_row[lost])].tolist(), 3)
        announce(
            [f"{lost.sum()} row(s) (of {names}) have no finite log density given the others: sigma "
             "is next to nothing beside tau, and rounding is all that is left"],
        )  # fmt: skip
    mean, se = mean_over_tasks(log_density, tasks.task_of_row)
    return {"log_density": _by_row(log_density, tasks), "mean": mean, "se": se, "given": given}


def _conditional(fit: Fit) -> Iterator[tuple[slice, np.ndarray]]:
    """log p(y_i | θ_s, φ_s) of every draw of θ and φ, some tasks at a time."""
    assert fit.theta_draws is not None
    tasks = fit.tasks
    most = max(1, NUMBERS_AT_ONCE // int(np.prod(fit.theta_draws.shape[:2])))
    first = 0
    while first < tasks.num_tasks:
        last = int(np.searchsorted(tasks.starts, tasks.starts[first] + most, side="right")) - 1
        last = min(max(last, first + 1), tasks.num_tasks)
        here = slice(int(tasks.starts[first]), int(tasks.starts[last]))
        if here.stop > here.start:
            some = np.arange(first, last)
            part = replace(
                fit, tasks=tasks.take(some), theta_draws=fit.theta_draws[:, :, some], training=None
            )
            yield here, part.log_likelihood()["y"].values
        first = last


def _with_bar(
    parts: Iterator[tuple[slice, np.ndarray]], num_rows: int
) -> Iterator[tuple[slice, np.ndarray]]:
    from tqdm.auto import tqdm

    with tqdm(
        total=num_rows, desc="rows left out", leave=False, delay=2.0,
        disable=not sys.stderr.isatty(),
    ) as bar:  # fmt: skip
        for here, values in parts:
            yield here, values
            bar.update(here.stop - here.start)


def _said(tasks: Tasks, rough: np.ndarray, good_k: float, *, marginal: bool) -> list[str]:
    if not rough.any():
        return []
    names = listing(tasks.names[np.unique(tasks.task_of_row[rough])].tolist(), 3)
    text = (
        f"{rough.sum()} of {len(rough)} rows (of {names}) have a Pareto k above {good_k:.2f}: "
        "their scores are rough. "
    )
    if marginal:
        return [text + "The posterior of phi hangs on them; fit without them and compare"]
    return [
        text + "Importance weights must do without the row in theta too, which a task of few rows "
        "does not allow: hold rows out (tasks.hold_out), or leave out whole tasks "
        "(leave_one_task_out)"
    ]


def _by_row(values: np.ndarray, tasks: Tasks) -> Any:
    import xarray as xr

    coords = {"row": tasks.rows, "row_task": ("row", tasks.names[tasks.task_of_row])}
    return xr.DataArray(values, dims=("row",), coords=coords)
