r"""θ of some tasks, learned under a prior: labelled estimates and the predictions they make.

Draws of outcomes, those of one task under one draw of its θ.

.. math:: s \sim \text{uniform}, \qquad \theta_j \mid \varphi_s, \qquad
          y_{ij} \mid \theta_j, \varphi_s \quad\text{for every row } i \text{ of task } j
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from hierbayes.adaptation import Posterior
from hierbayes.adaptation.posterior import Thetas
from hierbayes.errors import InputError, listing
from hierbayes.fit.prediction import Prediction
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import arithmetic, float64
from hierbayes.priors.column_map import ColumnMap
from hierbayes.simulation import linear_location, outcomes_at
from hierbayes.tasks import Task, Tasks


@dataclass(frozen=True)
class JointDraws:
    """Joint predictive draws of rows, where f is linear in θ.

    ``thetas`` draws θ of the tasks of ``rows`` for each of some of the ``size`` draws of φ.
    """

    model: HierarchicalModel
    rows: Tasks
    phis: dict[str, np.ndarray]
    size: int
    thetas: Thetas

    def __call__(self, num_draws: int, rng: np.random.Generator) -> np.ndarray:
        """Draws (num_draws, N), rows task by task."""
        at = rng.integers(self.size, size=num_draws)
        thetas = self.thetas(at, rng)
        used = {n: np.asarray(v) for n, v in self.phis.items() if n == "beta" or np.ndim(v) == 1}
        phis = {name: value[_chosen(value, at)] for name, value in used.items()}
        f = linear_location(thetas, phis, self.rows)
        return outcomes_at(self.model.likelihood, f, phis, self.rows, rng)


def _chosen(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Positions along the first axis, of which a single value serves all."""
    return at if len(values) > 1 else np.zeros_like(at)


@dataclass(frozen=True)
class AdaptedTasks:
    """What tasks conclude under a learned prior.

    Attributes
    ----------
    theta : DataArray (task, coef)
        Point estimates; posterior means where there is a posterior.
    covariance : DataArray (task, coef, coef_bis) or None
        Posterior covariances; None for a point estimate.
    posterior : Posterior
        What ``theta``, ``covariance`` and predictions are read from.
    draws : array (S, J, d) or None
        Posterior draws, under full Bayes one for each draw of φ.
    remarks : tuple of str
        What went wrong, and whether φ has learned from the rows of these tasks too.
    pareto_k : float
        Of the weights by which draws of φ learned from new tasks; NaN where none were needed.
    inner, at
        The same in the columns that were computed with, and the map from there.
    """

    model: HierarchicalModel
    tasks: Tasks
    phis: dict[str, np.ndarray]
    posterior: Posterior
    remarks: tuple[str, ...] = ()
    pareto_k: float = float("nan")
    inner: AdaptedTasks | None = field(default=None, repr=False)
    at: ColumnMap | None = field(default=None, repr=False)

    @property
    def theta(self) -> Any:
        """Point estimates, labelled (task, coef)."""
        return label(self.posterior.mean, self.tasks, ("task", "coef"), "theta")

    @property
    def covariance(self) -> Any:
        """Posterior covariances, labelled (task, coef, coef_bis), or None."""
        if (found := self.posterior.covariance) is None:
            return None
        return label(found, self.tasks, ("task", "coef", "coef_bis"), "theta_covariance")

    @property
    def sd(self) -> Any:
        """Posterior standard deviations, labelled (task, coef); NaN where they are not known."""
        return label(self.posterior.sd, self.tasks, ("task", "coef"), "theta_sd")

    @property
    def draws(self) -> np.ndarray | None:
        """Posterior draws (S, J, d), or None."""
        return self.posterior.draws

    def predict(self, data: Any) -> Prediction:
        """Predictive distributions of rows of these tasks, matched by task name."""
        rows = self.model.tasks(data)
        check_columns(rows, self.tasks)
        self.model.likelihood.check(rows)
        found = [self.tasks.labels.position(n) for n in rows.names.tolist()]
        unknown = [n for n, at in zip(rows.names.tolist(), found, strict=True) if at is None]
        if unknown:
            if len(unknown) == rows.num_tasks:
                raise InputError(
                    f"no parameters are known for task(s) {listing(unknown)}; adapt to their rows "
                    'first (fit.adapt), or predict with target="new" or target="population"'
                )
            raise InputError(
                f"no parameters are known for task(s) {listing(unknown)}, though they are for "
                f'{rows.num_tasks - len(unknown)} other(s): target="new" predicts all of them with '
                'theta drawn from the learned prior, target="population" with theta at its centre; '
                "or adapt to the unknown tasks' rows first (fit.adapt), or predict the known "
                "tasks by themselves"
            )
        return self._predict(rows, np.array(found, dtype=int))

    def _predict(self, rows: Tasks, found: np.ndarray) -> Prediction:
        """Predictions of rows whose tasks stand at the positions ``found``."""
        if self.inner is not None and self.at is not None:
            return replace(self.inner._predict(self.at.tasks(rows), found), tasks=rows)
        likelihood, posterior = self.model.likelihood, self.posterior
        point = {name: value[0] for name, value in self.phis.items()}
        if not likelihood.has_location:
            thetas = posterior.values(np.random.default_rng(0))[:, found]
            return outcomes("known task", self.model, rows, thetas, self.phis)
        if not likelihood.linear:
            thetas = posterior.values()[:, found]
            if all(len(value) == 1 for value in self.phis.values()):
                means = locations(self.model, thetas, point, rows)
            else:
                means = locations_by_draw(self.model, thetas, self.phis, rows)
            variance = posterior.variance_at(rows, found)
            return finish("known task", self.model, rows, self.phis, means, variance)
        rows = likelihood.design(rows, point)
        f = posterior.linear(rows.predictors, found, rows.task_of_row)
        blind = posterior.unidentified(rows.predictors, found[rows.task_of_row])
        return finish(
            "known task", self.model, rows, self.phis, f.mean, f.variance, blind, f.thetas
        )


POINT_DRAWS = 200
"""Draws of θ at a point φ, where outcomes cannot be averaged over it in closed form."""


def locations(
    model: HierarchicalModel, thetas: np.ndarray, phi: dict[str, np.ndarray], rows: Tasks
) -> np.ndarray:
    """f (S, N, …) of rows under S values of every task's θ (S, J, d), J the tasks of ``rows``."""
    parts: list[Any] = [None] * rows.num_tasks
    with arithmetic(model.likelihood.precision):
        for positions, arranged in model.likelihood.aggregate(rows):
            plain = model.without_encoder()
            found = np.asarray(_locations(plain, thetas[:, positions], phi, *arranged), np.float64)
            for k, j in enumerate(positions):
                parts[j] = found[:, k, : rows.sizes[j]]
    some = [part for part in parts if part is not None]
    return np.concatenate(some, axis=1) if some else np.zeros((len(thetas), 0))


@functools.partial(jax.jit, static_argnums=0)
def _locations(
    model: HierarchicalModel, thetas: Any, phi: dict[str, Any], rows: Task, of_row: Any
) -> Any:
    def one(draw: Any) -> Any:
        return model.likelihood.locations(draw, phi, rows, of_row)

    return jax.lax.map(one, thetas)


def locations_by_draw(
    model: HierarchicalModel, thetas: np.ndarray, phis: dict[str, np.ndarray], tasks: Tasks
) -> np.ndarray:
    """f (S, N, …) where it is curved in θ and has a φ of its own in every draw."""
    rows, of_row = model.likelihood.arrange(tasks)
    phis = {n: np.broadcast_to(v, (len(thetas), *v.shape[1:])) for n, v in phis.items()}
    with float64():
        found = np.asarray(_mapped(model.without_encoder(), thetas, phis, rows, of_row))
    return found if of_row is not None else found[:, rows.mask]


@functools.partial(jax.jit, static_argnums=0)
def _mapped(
    model: HierarchicalModel, thetas: Any, phis: dict[str, Any], rows: Task, of_row: Any
) -> jax.Array:
    def one(draw: Any) -> Any:
        theta, phi = draw
        return model.likelihood.locations(theta, phi, rows, of_row)

    return jax.lax.map(one, (thetas, phis))


def phis_of(
    phi: Mapping[str, np.ndarray], draws: dict[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """φ with one leading axis: over the draws (chain, draw, …), or over the single point."""
    if draws is None:
        return {name: np.asarray(value)[None] for name, value in phi.items()}
    return {name: value.reshape(-1, *value.shape[2:]) for name, value in draws.items()}


def prior_locations(
    model: HierarchicalModel, phis: dict[str, np.ndarray], w: np.ndarray
) -> np.ndarray:
    """μ_s + Γ_s w_j of every draw and task, (S, J, d)."""
    with float64():
        return np.asarray(jax.vmap(lambda phi: model.prior.location(phi, w))(phis))


def check_columns(rows: Tasks, known: Tasks) -> None:
    """Refuse rows whose columns are not those that the fit has coefficients for."""
    for role in ("coef", "shared", "task_predictors"):
        found, wanted = getattr(rows.labels, role), getattr(known.labels, role)
        if found != wanted:
            raise InputError(
                f"these rows have {role} {_few(found)}, but the fit knows {role} {_few(wanted)}; "
                "encode new rows by the training tasks: tasks.encode(data)"
            )

    shapes = rows.predictors.shape[1:], known.predictors.shape[1:]
    if len(shapes[0]) <= 1 and shapes[0] != shapes[1]:  # a network's; images may be of any size
        raise InputError(
            f"these rows have x of shape {shapes[0]} each, but the fit was made from rows of shape "
            f"{shapes[1]}; give rows with the same columns"
        )


def _few(names: tuple[str, ...]) -> str:
    return str(names) if len(names) <= 12 else f"({listing(names, 3)})"


def finish(
    target: str,
    model: HierarchicalModel,
    rows: Tasks,
    phis: dict[str, np.ndarray],
    means: np.ndarray,
    variance: Any,
    unidentified: np.ndarray | None = None,
    thetas: Thetas | None = None,
) -> Prediction:
    """Predictions from the varying part's means (S, N) and its variance, None for a point θ.

    ``thetas`` draws θ where f is linear in it, so that rows can be drawn jointly.
    ``sigma_query`` absorbs the variance of θ, so it takes the place of ``sigma`` for a point only.
    """
    joint = None
    if thetas is not None:
        size = max([len(means), *map(len, phis.values())])
        joint = JointDraws(model, rows, phis, size, thetas)
    if model.likelihood.linear and "beta" in phis:  # where f is curved it is whole already
        means = means + phis["beta"] @ rows.shared.T
    if model.likelihood.linear and "offset" in rows.slots:
        means = means + rows.slots["offset"]
    phi = {name: np.asarray(v)[:, None] for name, v in phis.items() if np.ndim(v) == 1}
    if variance is None or not model.likelihood.linear:
        phi, variance = model.likelihood.plug_in(phi), 0.0 if variance is None else variance
    with float64():
        components = model.likelihood.predictive(means, variance, phi, rows.slots)
    blind = np.zeros(rows.num_rows, bool) if unidentified is None else unidentified
    return Prediction(target, rows, components, blind, joint)


def outcomes(
    target: str,
    model: HierarchicalModel,
    rows: Tasks,
    thetas: np.ndarray,
    phis: dict[str, np.ndarray],
) -> Prediction:
    """Predictions under S values of θ (S, J, d) where the likelihood knows no f."""
    likelihood: Any = model.likelihood
    components = likelihood.outcomes(thetas, likelihood.plug_in(dict(phis)), rows)
    return Prediction(target, rows, components, np.zeros(rows.num_rows, bool))


def label(values: np.ndarray, tasks: Tasks, dims: tuple[str, ...], name: str) -> Any:
    """An array with the names of tasks and coefficients along its last dimensions."""
    import xarray as xr

    coords = {"task": tasks.names, "coef": list(tasks.coef), "coef_bis": list(tasks.coef)}
    return xr.DataArray(values, dims=dims, coords={d: coords[d] for d in dims}, name=name)
