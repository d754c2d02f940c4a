"""One task's way from φ: gradient steps beside MAP estimates, over the task's likelihood.

What one task's landscape looks like from φ: where steps lead, where MAP estimates lie.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.curvature import slopes
from hierbayes.adaptation.descent import Descent
from hierbayes.adaptation.mode import LogJoint, find_mode
from hierbayes.equivalence import equivalent_prior
from hierbayes.equivalence.arguments import read_phi, read_tasks
from hierbayes.equivalence.discrepancy import WORST, measure
from hierbayes.equivalence.implied import FLAT, EquivalentPrior, described
from hierbayes.errors import InputError, listing, overhearing, suggestion
from hierbayes.fit import Fit
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64, to_numpy
from hierbayes.plots.labels import LEVEL_FIRST, Label, along, halo, named, place
from hierbayes.plots.style import axes_or_new, ellipse, looks
from hierbayes.rows import Whole
from hierbayes.tasks import Task, Tasks

IDENTIFIED = 1e-8
"""Curvature at the optimum, over the largest at φ, below which a direction has no optimum."""

NUM_ESTIMATES = 200


class Trajectories(NamedTuple):
    """One task's way from φ.

    ``steps`` (K + 1, d): θ_0, …, θ_K. ``estimates`` (P, d): the MAP estimates under N(φ, I/p), from
    p = ∞ at φ down to p = 0. ``rungs`` (M, d): those at p = 1/(Kη) for each K that is marked.
    ``missed`` (M,): nats by which θ_K misses the MAP estimate under its own equivalent prior, zero
    where the likelihood is Gaussian, NaN where no prior is. ``identified``: whether the task's rows
    determine the optimum at p = 0.
    """

    steps: np.ndarray
    estimates: np.ndarray
    rungs: np.ndarray
    missed: np.ndarray
    identified: bool


class Landscape:
    """The log likelihood of one task around φ, where gradient steps have their equivalent prior."""

    def __init__(
        self,
        model: HierarchicalModel,
        tasks: Tasks,
        phi: Mapping[str, np.ndarray],
        prior: EquivalentPrior,
    ) -> None:
        assert isinstance(prior.method, Descent)
        self.prior, self.num_steps = prior, prior.method.num_steps
        self.quadratic = model.likelihood.gaussian_in_theta
        self.rows = (model.without_encoder(), dict(phi), *model.likelihood.arrange(tasks))
        self.step_sizes = np.broadcast_to(np.asarray(prior.method.step_size), self.num_steps)
        # of the linearised task, along its directions; of the task itself where it is quadratic
        reached = (prior.posterior_mean - prior.location) @ prior.directions
        self.slope = reached / prior.moved
        self.largest = max(float(np.abs(prior.curvature).max()), np.finfo(float).tiny)

    def trajectories(self, marks: list[int]) -> Trajectories:
        """Steps, MAP estimates and what joins them at the numbers of steps in ``marks``."""
        steps, left, moved = self._steps()
        rungs = 1 / np.cumsum(self.step_sizes)[np.array(marks) - 1]
        least = max(float(self.prior.curvature.min()), 1e-4 * self.largest)
        between = np.geomspace(1e4 * self.largest, 1e-4 * least, NUM_ESTIMATES)
        found, identified = self._estimates(np.concatenate([between, rungs, [0.0]]))
        path = np.concatenate([self.prior.location[None], found[:NUM_ESTIMATES], found[-1:]])
        missed = np.array([self._missed(steps[k], left[k], moved[k]) for k in marks])
        return Trajectories(steps, path, found[NUM_ESTIMATES:-1], missed, identified)

    def log_likelihoods(self, thetas: np.ndarray) -> np.ndarray:
        """Log p(D | θ) at each of ``thetas`` (…, d), up to a constant."""
        if self.quadratic:
            away = (thetas - self.prior.location) @ self.prior.directions
            return away @ self.slope - 0.5 * away**2 @ self.prior.curvature
        with float64():
            values = _log_likelihoods(*self.rows, thetas.reshape(-1, thetas.shape[-1]))
        return np.asarray(values).reshape(thetas.shape[:-1])

    def _steps(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """θ_k, and what k steps leave of φ and move along each direction, each (K + 1, d)."""
        left, moved = [np.ones_like(self.slope)], [np.zeros_like(self.slope)]
        for eta in self.step_sizes:
            factor = 1 - eta * self.prior.curvature
            left.append(left[-1] * factor)
            moved.append(moved[-1] * factor + eta)
        responses = np.array(left), np.array(moved)
        if self.quadratic:
            along = responses[1] * self.slope
            return self.prior.location + along @ self.prior.directions.T, *responses
        with float64():
            steps = _steps(*self.rows, self.prior.location, self.prior.method)
        return np.asarray(steps), *responses

    def _estimates(self, precisions: np.ndarray) -> tuple[np.ndarray, bool]:
        """MAP estimates under N(φ, I/p), the last p being 0, and whether the last is identified."""
        if self.quadratic:
            curvature = self.prior.curvature + precisions[:, None]
            # nothing moves along a direction of which the rows say nothing, whatever p
            known = curvature > IDENTIFIED * self.largest
            along = np.where(known, self.slope / np.where(known, curvature, 1.0), 0.0)
            found = self.prior.location + along @ self.prior.directions.T
            return found, bool(known[-1].all())
        with float64():
            found, bend, converged = to_numpy(
                _estimates(*self.rows, self.prior.location, precisions)
            )
        least = np.linalg.eigvalsh(bend[-1])[0]
        return found, bool(converged[-1] and least > IDENTIFIED * self.largest)

    def _missed(self, theta: np.ndarray, left: np.ndarray, moved: np.ndarray) -> float:
        if (left < -FLAT).any():
            return np.nan
        if self.quadratic:
            return 0.0
        model, phi, rows, task_of_row = self.rows
        vectors = self.prior.directions
        hessian, precision = (
            (vectors * values @ vectors.T)[None] for values in (self.prior.curvature, left / moved)
        )
        # θ_k stands for the linearised end too, of which nothing is asked here
        end, location = theta[None], self.prior.location[None]
        with float64():
            measured = measure(
                model, "ggn", phi, rows, task_of_row, location, end, end, hessian, precision
            )
        return float(measured[0][0])


@functools.partial(jax.jit, static_argnums=0)
def _steps(
    model: HierarchicalModel, phi: Any, rows: Task, task_of_row: Any, location: Any, method: Any
) -> Any:
    def uphill(theta: Any) -> Any:
        return slopes(model, phi, rows, task_of_row, theta[None])[0]

    return method.path(uphill, jnp.asarray(location))


@functools.partial(jax.jit, static_argnums=0)
def _estimates(
    model: HierarchicalModel, phi: Any, rows: Task, task_of_row: Any, location: Any, precisions: Any
) -> Any:
    eye, centre = jnp.eye(location.shape[-1]), location[:, None]

    def one(precision: Any) -> Any:
        penalty = (precision * eye)[:, :, None]
        tasks = LogJoint(model.likelihood, Whole.of(rows, task_of_row), phi, centre, eye, penalty)
        mode = find_mode(tasks, jnp.zeros_like(centre))
        return tasks.theta(mode.z)[:, 0], tasks.bend(mode.z).curvature[..., 0], mode.converged[0]

    return jax.vmap(one)(precisions)


@functools.partial(jax.jit, static_argnums=0)
def _log_likelihoods(
    model: HierarchicalModel, phi: Any, rows: Task, task_of_row: Any, thetas: Any
) -> Any:
    def one(theta: Any) -> Any:
        return model.likelihood.log_likelihood_of_rows(theta[None], phi, rows, task_of_row).sum()

    return jax.vmap(one)(thetas)


STEPS, MAPS, FIELD = "#D55E00", "#111111", "#8C8C8C"
MARKED = (1, 2, 5)
"""Numbers of steps that are marked, in every decade."""


def adaptation_path(
    model: HierarchicalModel,
    task: Any,
    phi: Any,
    num_steps: int,
    step_size: Any,
    *,
    coef: tuple[str, str] | None = None,
    posterior: Fit | None = None,
    sigma: float | None = None,
    beta: Any = None,
    ax: Any = None,
) -> Any:
    """Gradient steps of one task from φ, over its likelihood, beside its MAP estimates.

    The steps θ_0 = φ, …, θ_K are one curve, with K at some of its points; the MAP estimates under
    N(φ, I/p), p falling from ∞ at φ to 0 at the task's own optimum, are the other. Thin lines join
    each marked θ_K to the MAP estimate of p = 1/(Kη), the prior that short steps imply: where they
    are short, that one prior will do. A hollow mark is a K without any Gaussian prior (an odd
    number of steps longer than 1/λ_max). Grey contours are the log likelihood's; with more than two
    coefficients, through the task's optimum.

    Parameters
    ----------
    model : HierarchicalModel
    task : Tasks of one task, DataFrame or (X, y)
    phi : mapping or array (d,)
        A fit's ``phi``, or where the steps start, with ``sigma`` and ``beta`` beside it.
    num_steps : int
        K.
    step_size : float or sequence of K floats
        η, or one a step, in units of the summed log likelihood.
    coef : pair of str, optional
        The coefficients shown; the first two by default.
    posterior : Fit, optional
        Full or empirical Bayes with this task: its posterior as ellipses that hold 50 and 90 % of
        a normal one with its mean and covariance, over its draws where there are any.
    sigma, beta : optional
        Noise and shared effects, where ``phi`` does not hold them.
    ax : matplotlib Axes, optional

    Returns
    -------
    matplotlib Axes

    Examples
    --------
    >>> import matplotlib, numpy as np, hierbayes as hb
    >>> matplotlib.use("Agg")
    >>> model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    >>> task = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), np.array([1.0, 2.0, 4.0])
    >>> ax = hb.plots.adaptation_path(model, task, [0.0, 0.0], 20, 0.1, sigma=1.0)
    """
    tasks, _ = read_tasks(model, task)
    if tasks.num_tasks != 1:
        raise InputError(
            f"adaptation_path shows one task, found {tasks.num_tasks}; "
            f"take one of them, as in tasks[{tasks.names.tolist()[0]!r}]"
        )
    pair = _pair(tasks, coef)
    found = read_phi(model, tasks, phi, sigma, beta)
    spread = None if posterior is None else _posterior(posterior, tasks, pair)
    with overhearing():  # the picture itself says what they say
        prior = equivalent_prior(model, tasks, found, num_steps, step_size)[tasks.names[0]]
    land = Landscape(model, tasks, found, prior)
    marks = _marks(land.num_steps)
    way = land.trajectories(marks)

    ax = axes_or_new(ax, (6.4, 4.6))
    _limits(ax, way, pair, spread)
    _contours(ax, land, way, pair)
    curves = []
    if posterior is not None and spread is not None:
        curves = _draw_posterior(ax, posterior, *spread)
    spots = _draw_paths(ax, way, pair, marks)
    if spread is not None:
        spots = np.concatenate([spots, spread[0][None]])
    _write(ax, way, pair, marks, spots, posterior, curves)
    _write_axes(ax, tasks, pair, described(prior.method))
    return ax


# ------------------------------------------------------------------------ input


def _pair(tasks: Tasks, coef: Any) -> list[int]:
    """Positions of the two coefficients."""
    known = list(tasks.coef)
    if len(known) < 2:
        raise InputError(
            f"a path is drawn over two coefficients; these tasks have one, {known[0]!r}"
        )
    names = known[:2] if coef is None else coef
    if isinstance(names, str) or len(names) != 2 or names[0] == names[1]:
        raise InputError(f"coef must name two different coefficients, found {coef!r}")
    for name in names:
        if name not in known:
            raise InputError(f"no coefficient is named {name!r}; {suggestion(name, known)}")
    return [known.index(name) for name in names]


def _posterior(fit: Any, tasks: Tasks, pair: list[int]) -> tuple[Any, Any, Any]:
    """Mean (2,), covariance (2, 2) and draws (S, 2) or None, of this task under the fit."""
    if not isinstance(fit, Fit):
        raise InputError(f"posterior must be a Fit, found {type(fit).__name__}")
    name = tasks.names.tolist()[0]
    j = fit.tasks.labels.position(name)
    if j is None:
        raise InputError(
            f"the posterior's fit has no task {name!r}; "
            f"{suggestion(str(name), [str(n) for n in fit.tasks.names.tolist()])}"
        )
    names = [named(tasks.coef[k]) for k in pair]
    if missing := [n for n in names if n not in fit.tasks.coef]:
        raise InputError(f"the posterior's fit has no coefficient {listing(missing)}")
    covariance = fit.adapted.posterior.covariance
    if covariance is None or "tau" not in fit.phi:
        raise InputError(
            f"{fit.method} has no posterior to draw; pass a fit of full_bayes or empirical_bayes"
        )
    at = [fit.tasks.coef.index(n) for n in names]
    draws = fit.adapted.draws
    return (
        fit.adapted.posterior.mean[j, at],
        covariance[j][np.ix_(at, at)],
        None if draws is None else draws[:, j][:, at],
    )


def _marks(num_steps: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, … and the last."""
    decades = [m * 10**e for e in range(len(str(num_steps))) for m in MARKED]
    return sorted({k for k in decades if k < num_steps} | {num_steps})


# ---------------------------------------------------------------------- drawing


def _limits(
    ax: Any, way: Trajectories, pair: list[int], spread: tuple[Any, Any, Any] | None
) -> None:
    """Around the steps, the MAP estimates where they end, and the posterior where there is one."""
    ends = [way.steps[:, pair]]
    if way.identified:
        ends.append(way.estimates[:, pair])
    if spread is not None:
        ends.append(ellipse(*spread[:2], 0.9))
    points = np.concatenate(ends)
    low, high = points.min(0), points.max(0)
    pad = 0.12 * np.maximum(high - low, 1e-9)
    ax.set_xlim(low[0] - pad[0], high[0] + pad[0])
    ax.set_ylim(low[1] - pad[1], high[1] + pad[1])


def _contours(ax: Any, land: Landscape, way: Trajectories, pair: list[int]) -> None:
    """Of the log likelihood: equal steps of √(2 (max − log p)), standard deviations if normal."""
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    x, y = np.linspace(x0, x1, 141), np.linspace(y0, y1, 141)
    centre = way.estimates[-1] if way.identified else way.steps[-1]
    grid = np.tile(centre, (len(y), len(x), 1))
    grid[..., pair[0]], grid[..., pair[1]] = np.meshgrid(x, y)
    values = land.log_likelihoods(grid)
    top = values.max()
    if way.identified:
        top = max(top, float(land.log_likelihoods(centre)))
    height = np.sqrt(2 * (top - values))
    levels = np.linspace(0, height.max(), 11)[1:]
    ax.contourf(x, y, height, levels=np.append(0, levels), cmap="Greys_r", alpha=0.22,
                vmin=-0.4 * levels[-1], vmax=levels[-1], zorder=0)  # fmt: skip
    ax.contour(x, y, height, levels=levels, colors=FIELD, linewidths=0.5, alpha=0.7, zorder=0.5)


def _draw_posterior(
    ax: Any, fit: Fit, mean: np.ndarray, covariance: np.ndarray, draws: Any
) -> list[np.ndarray]:
    """Draw it and return its curves."""
    colour = looks({"": fit})[""]["color"]
    if draws is not None:
        thin = draws[:: max(len(draws) // 1500, 1)]
        ax.plot(*thin.T, ".", color=colour, alpha=0.15, markersize=3, markeredgewidth=0, zorder=1)
    curves = [ellipse(mean, covariance, share) for share in (0.5, 0.9)]
    for curve, alpha in zip(curves, (0.16, 0.10), strict=True):
        ax.fill(*curve.T, color=colour, alpha=alpha if draws is None else 0, linewidth=0, zorder=1)
        ax.plot(*curve.T, color=colour, linewidth=1.2, zorder=2)
    ax.plot(*mean, "+", color=colour, markersize=7, markeredgewidth=1.6, zorder=2)
    return curves


def _draw_paths(ax: Any, way: Trajectories, pair: list[int], marks: list[int]) -> np.ndarray:
    """Draw both ways and return where marks stand (M, 2)."""
    steps, maps, rungs = (a[:, pair] for a in (way.steps, way.estimates, way.rungs))
    for k, rung, nats in zip(marks, rungs, way.missed, strict=True):
        if not np.isnan(nats):
            ax.plot(*np.stack([steps[k], rung]).T, color="#555555", linewidth=0.7, zorder=2.5)
            ax.plot(*rung, "o", color=MAPS, markersize=2.6, zorder=3)
    ax.plot(*maps.T, color=MAPS, linewidth=1.5, zorder=3, gid="MAP estimates")
    few = len(steps) <= 61
    ax.plot(*steps.T, color=STEPS, linewidth=1.0 if few else 1.8, zorder=3.5, gid="gradient steps",
            marker="o" if few else None, markersize=2.2)  # fmt: skip
    for k, nats in zip(marks, way.missed, strict=True):
        none, astray = np.isnan(nats), nats > WORST
        ax.plot(*steps[k], "s" if astray else "o", color=STEPS, markersize=6, markeredgewidth=1.4,
                markerfacecolor="white" if none else STEPS, path_effects=halo(3), zorder=4,
                gid="no prior" if none else "mark")  # fmt: skip
    ax.plot(*steps[0], "o", color="#000000", markersize=7, zorder=5)
    if way.identified:
        ax.plot(*maps[-1], "X", color="#000000", markersize=8, zorder=3.8, path_effects=halo(2))
    return np.concatenate([steps[:1], maps[-1:], steps[marks], rungs])


def _write(
    ax: Any, way: Trajectories, pair: list[int], marks: list[int],
    spots: np.ndarray, posterior: Fit | None, curves: list[np.ndarray],
) -> None:  # fmt: skip
    steps, maps = way.steps[:, pair], way.estimates[:, pair]
    labels = [Label("φ", [steps[0]], size=13)]
    if way.identified:
        labels.append(Label("the task alone", [maps[-1]], size=9))
    labels.append(Label(f"K = {marks[-1]}", [steps[-1]], STEPS, sides=LEVEL_FIRST))
    if posterior is not None:
        colour = looks({"": posterior})[""]["color"]
        labels.append(Label(f"posterior,\n{posterior.method}", list(curves[1][::6]), colour, 9))
    labels.append(Label("gradient steps", along(ax, steps), STEPS, 9))
    labels.append(Label("MAP under N(φ, I/p)\n(dots: p = 1/Kη)", along(ax, maps), MAPS, 9))
    labels += [Label(f"{k}", [steps[k]], STEPS, needed=False) for k in marks[:-1]]
    notes = "\n".join([*_notes(way, marks), "grey contours: log likelihood"])
    x0, x1, y0, y1 = *ax.get_xlim(), *ax.get_ylim()
    labels.append(Label(notes, [(x, y) for y in (y0, y1) for x in (x1, x0)], "#444444"))
    place(ax, labels, [steps, maps, *curves], spots)


def _write_axes(ax: Any, tasks: Tasks, pair: list[int], steps: str) -> None:
    """Title and names of the axes."""
    names = [named(tasks.coef[k]) for k in pair]
    ax.set_xlabel(f"θ, {names[0]}")
    ax.set_ylabel(f"θ, {names[1]}")
    task_name = f"{named(tasks.labels.task)} {named(tasks.names.tolist()[0])}"
    ax.set_title(f"{task_name}: {steps} from φ", loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def _notes(way: Trajectories, marks: list[int]) -> list[str]:
    """Where the picture must not be read as a MAP estimate."""

    def which(chosen: np.ndarray) -> str:
        return ", ".join(str(k) for k, c in zip(marks, chosen, strict=True) if c)

    notes, missed = [], way.missed
    if np.isnan(missed).any():
        notes.append(f"hollow: no Gaussian prior (K = {which(np.isnan(missed))})")
    if (missed > WORST).any():
        notes.append(
            f"squares: over {WORST} nats from their MAP estimate (K = {which(missed > WORST)})"
        )
    if not way.identified:
        notes.append("the task alone has no single optimum")
    return notes
