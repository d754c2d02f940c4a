r"""How well every row is predicted by all others: by those of its own task, and by other tasks.

.. math:: \text{elpd}_{\text{row}} = \sum_j \sum_i \log p(y_{ij} \mid D_j \setminus i, D_{-j})

One row of a Gaussian task given the task's other rows, θ_j integrated out exactly.

.. math::

    \log p(y_i \mid D_j \setminus i, \varphi) = -\tfrac12\left[\log 2\pi s_i^2 - \log(1 - h_i)
        + \frac{e_i^2}{s_i^2\,(1 - h_i)}\right]

with e_i the row's residual at the posterior mean of θ_j, its own row counted, and h_i = x_iᵀ C_j
x_i / s_i² the share that it has in its own fitted value: taking a row out of a normal posterior is
an update of rank one, C + C x xᵀ C / (s² − xᵀ C x), and leaves the residual e / (1 − h) with
variance s² / (1 − h). No posterior is computed twice. Digits are lost where a row is all that its
task has and next to exact, one for each factor of ten in τ²/σ².
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation import PointAdaptation
from hierbayes.adaptation.exact import collapse
from hierbayes.checks.evidence_of_tasks import refuse_carried
from hierbayes.checks.importance import leave_one_out, relative_efficiency
from hierbayes.checks.scores import mean_over_tasks
from hierbayes.errors import InputError, NotApplicable, announce, listing
from hierbayes.fit import Fit
from hierbayes.fit.adapted import phis_of
from hierbayes.fit.fit import check_fit
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.priors import Prior
from hierbayes.statistics import Statistics, row_scale, statistics
from hierbayes.tasks import Tasks

NUMBERS_AT_ONCE = 4_000_000
"""Draws × rows that are worked on together (32 MB)."""

DRAWS_AT_ONCE = 16


class ScaledRows(NamedTuple):
    """Rows in units of their noise, on the last axis.

    ``x`` (d, W), ``z`` (p, W), ``y`` and ``log_scale`` (W,); ``task`` (W,): where a row's task
    stands among those of the statistics.
    """

    x: Any
    z: Any
    y: Any
    log_scale: Any
    task: Any


def log_density_without_row(
    stats: Statistics, rows: ScaledRows, prior: Prior, phi: dict[str, Any]
) -> jax.Array:
    """log p(y_i | D_j without i, φ) of every row, (W,)."""
    mean, root = collapse(stats, prior, phi).mean_and_root()
    noise_variance = phi["sigma"] ** 2 if "sigma" in phi else 1.0
    residual = rows.y - (rows.x * mean[:, rows.task]).sum(0)
    if "beta" in phi:
        residual = residual - phi["beta"] @ rows.z
    along = (root[:, :, rows.task] * rows.x[:, None]).sum(0)
    left = 1.0 - (along**2).sum(0) / noise_variance
    log_variance = jnp.log(2 * jnp.pi * noise_variance) - jnp.log(left)
    return rows.log_scale - 0.5 * (log_variance + residual**2 / (noise_variance * left))


@functools.partial(jax.jit, static_argnums=2)
def _over_draws(stats: Statistics, rows: ScaledRows, prior: Prior, phis: dict[str, Any]) -> Any:
    def one(phi: dict[str, Any]) -> Any:
        return log_density_without_row(stats, rows, prior, phi)

    return jax.lax.map(one, phis, batch_size=DRAWS_AT_ONCE)


def without_each_row(
    model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray], most: int | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """log p(y_i | D_j without i, φ_s), (S, W), a slice of the rows at a time.

    ``tasks`` as the likelihood's design has them; ``most`` rows together, by default as many as
    :data:`NUMBERS_AT_ONCE` allows. Every slice is a call of the same compiled program.
    """
    num_draws, num_rows = len(next(iter(phis.values()))), tasks.num_rows
    width = most or max(1, NUMBERS_AT_ONCE // num_draws)
    width = min(width, num_rows)
    stats, of_row = statistics(tasks), tasks.task_of_row
    # the last slice goes back to end with the last row: one shape, so one compilation
    starts = [min(start, num_rows - width) for start in range(0, num_rows, width)]
    breadth = max(of_row[start + width - 1] - of_row[start] + 1 for start in starts)
    scale = row_scale(tasks)
    y = (tasks.outcome - tasks.slots.get("offset", 0.0)) * scale
    done = 0
    for start in starts:
        here = slice(start, start + width)
        first = min(int(of_row[start]), tasks.num_tasks - breadth)
        some = jax.tree.map(lambda a, first=first: a[..., first : first + breadth], stats)
        rows = ScaledRows(
            tasks.predictors[here].T * scale[here], tasks.shared[here].T * scale[here], y[here],
            np.log(scale[here]), of_row[here] - first,
        )  # fmt: skip
        with float64():
            values = np.asarray(_over_draws(some, rows, model.prior, phis))
        yield slice(done, start + width), values[:, done - start :]
        done = start + width


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
