r"""How well a learned prior predicts a task that it has not seen.

.. math:: \text{elpd}_{\text{task}} = \sum_j \log p(D_j \mid D_{-j})

Under full Bayes by Pareto-smoothed importance sampling on the marginal evidence log p(D_j | φ), and
where that is rough by a fit without the task; elsewhere by refitting without each task. The
evidence is exact of Gaussian tasks; of others it is that of the fit: quadrature with its nodes,
else with nodes enough for up to three coefficients, and Laplace's approximation beyond.

What draws of a posterior say of the posterior without one unit of the data.

.. math::

    p(y_i \mid y_{-i}) = \frac{\sum_s w_s\, p(y_i \mid y_{-i}, \varphi_s)}{\sum_s w_s}, \qquad
    w_s \propto \frac{1}{p(y_i \mid y_{-i}, \varphi_s)}

with the largest weights smoothed by a generalised Pareto distribution, whose shape k̂ says whether
the average can be trusted.

log p(D_j | φ) of any tasks under the φ that a fit has learned, θ_j integrated out.

Exact of Gaussian tasks; of others it is that of the fit: quadrature with its nodes, else with nodes
enough for up to three coefficients, and Laplace's approximation beyond.

How well every row is predicted by all others: by those of its own task, and by other tasks.

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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from hierbayes import inputs
from hierbayes.adaptation import LeastSquares, MaximumLikelihood, PointAdaptation
from hierbayes.adaptation.exact import collapse
from hierbayes.checks.scores import mean_over_tasks
from hierbayes.errors import InputError, NotApplicable, announce, listing, overhearing
from hierbayes.fit import Fit, updating
from hierbayes.fit.adapted import phis_of
from hierbayes.fit.fit import check_fit
from hierbayes.meta.diagnostics import arviz_statistics, ess
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.priors import Prior
from hierbayes.statistics import Statistics, row_scale, statistics
from hierbayes.tasks import Tasks


def evidence_of(fit: Fit, tasks: Tasks) -> np.ndarray:
    """log p(D_j | φ_s) of every φ of the fit and every task, (S, J); zero of tasks without rows."""
    tasks, fit = fit.seen_inside(tasks), fit.inside
    phis = phis_of(fit.phi, fit.phi_draws)
    if not tasks.num_rows:
        return np.zeros((len(next(iter(phis.values()))), tasks.num_tasks))
    if fit.phi_draws is None:
        tasks = fit.model.likelihood.design(tasks, {k: np.asarray(v) for k, v in fit.phi.items()})
    found = updating.evidence_of(fit).over(fit.model, tasks, phis)
    return np.where(tasks.sizes > 0, found, 0.0)


def refuse_carried(fit: Fit, what: str) -> None:
    """Refuse a fit whose φ was learned from other tasks than its own: nothing can be left out."""
    if fit.learned is not None:
        raise NotApplicable(
            f"{what} asks of the tasks that phi was learned from, and this fit was carried to "
            "others: ask it of the fit itself, or use new_task_scores"
        )


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
    found, shapes = arviz_statistics().psislw(y, r_eff=efficiency, dim=["chain", "draw"])
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
    announce(_said_of_tasks(fit, rough & ~refitted, found.good_k, failed))
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


def _said_of_tasks(fit: Fit, rough: np.ndarray, good_k: float, failed: dict[int, str]) -> list[str]:
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
        return _result(tasks, POINT, _at_point(fit))
    lead, each, given = _by_draws(fit)
    efficiency = 1.0 if fit.phi_draws is None else relative_efficiency(fit.phi_draws)
    found = [
        leave_one_out(values.reshape(*lead, here.stop - here.start), efficiency)
        for here, values in _with_bar(each, tasks.num_rows)
    ]
    log_density, pareto_k, error = (
        np.concatenate([getattr(part, name) for part in found])
        for name in ("log_density", "pareto_k", "error")
    )
    good_k = found[0].good_k
    announce(_said_of_rows(tasks, ~(pareto_k <= good_k), good_k, marginal=gaussian))
    more = {"pareto_k": _by_row(pareto_k, tasks), "error": _by_row(error, tasks), "good_k": good_k}
    return _result(tasks, given, log_density) | more


def _at_point(fit: Fit) -> np.ndarray:
    """log p(y_i | y_{−i}, φ̂) of every row of Gaussian tasks, in closed form."""
    phi = {name: np.asarray(value) for name, value in fit.phi.items()}
    design = fit.model.likelihood.design(fit.tasks, phi)
    parts = without_each_row(fit.model, design, phis_of(fit.phi, fit.phi_draws))
    return np.concatenate([values[0] for _, values in parts])


def _by_draws(fit: Fit) -> tuple[tuple[int, ...], Any, str]:
    """(chains, draws), the rows' log densities in parts, and what they condition on.

    Of Gaussian tasks θ is integrated out; of others the density is at the draws of θ.
    """
    if fit.model.conjugate:
        assert fit.phi_draws is not None
        each = without_each_row(fit.model, fit.tasks, phis_of(fit.phi, fit.phi_draws))
        return next(iter(fit.phi_draws.values())).shape[:2], each, MARGINAL
    if fit.theta_draws is None:
        raise NotApplicable(
            "the fit holds no draws of theta, which tasks that are not Gaussian need here: fit "
            "again with fewer draws"
        )
    given = CONDITIONAL if fit.phi_draws else CONDITIONAL_AT_POINT
    return fit.theta_draws.shape[:2], _conditional(fit), given


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


def _said_of_rows(tasks: Tasks, rough: np.ndarray, good_k: float, *, marginal: bool) -> list[str]:
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
