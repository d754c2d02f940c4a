"""The result of every method."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist

from hierbayes.adaptation import (
    Adaptation,
    Adapted,
    GradientSteps,
    LeastSquares,
    MaximumLikelihood,
)
from hierbayes.errors import InputError, announce
from hierbayes.fit import datatree as trees
from hierbayes.fit.adapted import (
    POINT_DRAWS,
    AdaptedTasks,
    check_columns,
    finish,
    locations,
    outcomes,
    quadratic,
)
from hierbayes.fit.prediction import Prediction
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import as_key, float64, to_numpy
from hierbayes.priors.mixture import mixture
from hierbayes.tasks import Tasks

TARGETS = ("known", "new", "population")


class WhenRead:
    """A field of an array, or of a function that makes it, which is called when first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.place = f"_{name}"

    def __get__(self, fit: Any, owner: type | None = None) -> Any:
        if fit is None:
            return None  # the field's default
        value = fit.__dict__.get(self.place)
        if callable(value):
            value = fit.__dict__[self.place] = value()
        return value

    def __set__(self, fit: Any, value: np.ndarray | Callable[[], np.ndarray] | None) -> None:
        fit.__dict__[self.place] = value


@dataclass(frozen=True)
class Fit:
    """A learned prior and what every task concludes under it.

    Attributes
    ----------
    method : str
        The method's name.
    phi : mapping
        The learned prior by name: ``mu``, ``tau``, ``corr``, ``beta``, ``gamma``, ``sigma``;
        point values, posterior means under full Bayes.
    theta : DataArray (task, coef)
        Point estimates of every task's parameters.
    warnings : tuple of str
        What a careful colleague would say about this fit.
    log_evidence : float
        Summed log evidence at φ̂, where the method has one; an AttributeError with the reason
        where not.
    standard_errors : dict
        By name of φ, where the method gives them; NaN with a reason in ``warnings``.
    info : dict
        Settings and ``seconds``; ``remarks``, sentences on what is sound but worth knowing.
    """

    method: str
    model: HierarchicalModel
    tasks: Tasks
    phi: Mapping[str, np.ndarray]
    adaptation: Adaptation
    training: Adapted | None = None
    phi_draws: dict[str, np.ndarray] | None = None
    theta_draws: WhenRead = WhenRead()
    sample_stats: dict[str, np.ndarray] = field(default_factory=dict)
    standard_errors: dict[str, np.ndarray] = field(default_factory=dict)
    evidence: float | None = None
    no_evidence: str = "this method does not compute the evidence"
    log_posterior: float | None = None
    warnings: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        names = ", ".join(f"{n}={_short(v)}" for n, v in self.phi.items() if np.size(v) <= 4)
        return f"Fit({self.method!r}, {self.tasks.num_tasks} tasks, {names})"

    # --------------------------------------------------------------- estimates

    @functools.cached_property
    def adapted(self) -> AdaptedTasks:
        """The training tasks under the learned prior."""
        if self.theta_draws is not None and self.phi_draws is not None:
            draws = self.theta_draws.reshape(-1, *self.theta_draws.shape[2:])
            return AdaptedTasks(self.model, self.tasks, self._phis(), _moments(draws), draws)
        adapted = self.training or self.adaptation(self.model, self.tasks, dict(self.phi))
        return AdaptedTasks(self.model, self.tasks, self._phis(), adapted)

    @property
    def theta(self) -> Any:
        """Point estimates of every task's parameters, labelled (task, coef)."""
        return self.adapted.theta

    @property
    def log_evidence(self) -> float:
        """Summed log evidence; see the method for its definition."""
        if self.evidence is None:
            raise AttributeError(f"{self.method} has no log_evidence: {self.no_evidence}")
        return self.evidence

    @functools.cached_property
    def datatree(self) -> Any:
        """The fit as ``xarray.DataTree`` in ArviZ's schema, built when first read.

        Groups: ``posterior`` (draws), ``point_estimate`` (φ̂, standard errors), ``sample_stats``,
        ``log_likelihood`` (up to 10 million draws × rows; beyond, ask :meth:`log_likelihood`),
        ``observed_data``, ``constant_data``.
        """
        return trees.build(self)

    def log_likelihood(self, by: str = "row") -> Any:
        """Log p(y | θ, φ) at every posterior draw, a Dataset (chain, draw, row or task).

        ``by="task"`` sums within tasks, conditional on θ_j.
        """
        if by not in ("row", "task"):
            raise InputError(f'by must be "row" or "task", found {by!r}')
        if self.theta_draws is None:
            raise InputError(f"{self.method} holds no posterior draws of theta")
        draws = {**(self.phi_draws or {}), "theta": self.theta_draws}
        return trees.log_likelihood(self, draws, by)

    def summary(self, var_names: list[str] | None = None, errors: Any = None) -> Any:
        """φ and θ as a pandas DataFrame, a row each.

        Under full Bayes ArviZ's summary (mean, sd, interval, ESS, R̂); elsewhere ``estimate`` and
        ``se`` (for θ the posterior standard deviation, or what ``errors``, by name, has in its
        place: ``{"theta": hb.checks.theta_standard_errors(fit)}``).
        """
        import pandas as pd

        if self.phi_draws is not None:
            import arviz_stats

            tree = self.datatree.posterior.to_dataset()
            if "corr" in tree:  # the diagonal is constant: no diagnostics are to be had of it
                tree = tree.drop_vars("corr").assign(trees.correlation_pairs(tree["corr"]))
            if var_names is not None and "corr" in var_names:
                pairs = [str(n) for n in tree.data_vars if str(n).startswith("corr[")]
                var_names = [n for n in var_names if n != "corr"] + pairs
            settings: Any = {"var_names": var_names, "round_to": "none"}
            return arviz_stats.summary(tree, **settings)
        rows = {}
        estimates = trees.dataset({**self.phi, "theta": self.adapted.adapted.mean}, self.tasks)
        errors = {**self.standard_errors, "theta": self.adapted.sd.values, **(errors or {})}
        for name, values in estimates.items():
            if var_names is not None and name not in var_names:
                continue
            se = np.broadcast_to(errors.get(str(name), np.nan), values.shape)
            for index in np.ndindex(values.shape):
                labels = [str(values[d].values[i]) for d, i in zip(values.dims, index, strict=True)]
                if name == "corr" and index[0] >= index[1]:
                    continue
                key = f"{name}[{', '.join(labels)}]" if labels else str(name)
                rows[key] = (float(values.values[index]), float(se[index]))
        return pd.DataFrame.from_dict(rows, orient="index", columns=["estimate", "se"])

    # --------------------------------------------------------- use on new tasks

    @property
    def prior(self) -> dist.Distribution:
        """p(θ_new | D_1..J) as a NumPyro distribution over (d,).

        A normal at φ̂, a point mass in directions with τ̂ = 0 (and no density where correlations
        are estimated as ±1); a mixture over draws under full Bayes. Student-t in the place of
        normal where the model's prior is.
        """
        if self.tasks.labels.task_predictors:
            raise AttributeError(
                "the prior's mean depends on task predictors: use fit.prior_for(new_tasks)"
            )
        return self._prior(np.zeros((1, 0)))[0]

    def prior_for(self, new_tasks: Any) -> list[dist.Distribution]:
        """p(θ_new | D_1..J, w_new) for each of some tasks, whose outcomes are not used."""
        tasks = self.model.tasks(new_tasks)
        check_columns(tasks, self.tasks)
        return self._prior(tasks.task_predictors)

    def _prior(self, w: np.ndarray) -> list[dist.Distribution]:
        if "tau" not in self.phi:
            raise AttributeError(
                f"{self.method} learns no prior that all tasks share; the prior that gradient "
                "steps imply depends on each task's own curvature: ask for it with "
                "hb.equivalent_prior(fit.model, fit.tasks, fit)"
                if isinstance(self.adaptation, GradientSteps)
                else f"{self.method} learns no prior"
            )
        if not self.model.likelihood.linear and self.model.likelihood.has_location:
            tau = np.broadcast_to(self.phi["tau"], np.shape(self.phi["mu"]))
            each = dist.Normal(np.asarray(self.phi["mu"]), tau).to_event(1)
            return [each] * len(w)
        with float64():
            phis = self._phis()
            root = np.asarray(self.model.prior.scale_tril(phis))
            location = self._location(phis, w)
        # outside the context: what the caller draws from it follows the caller's own flag
        return [mixture(self.model.prior, location[:, j], root) for j in range(len(w))]

    def adapt(self, new_tasks: Any, *, seed: int = 0) -> AdaptedTasks:
        """A(D_new; φ): what new tasks conclude under the learned prior, without refitting.

        Parameters
        ----------
        new_tasks : Tasks or DataFrame
            Tasks with rows to learn from; a DataFrame goes through the model's formula.
        seed : int
            For the draws, under full Bayes.

        Returns
        -------
        AdaptedTasks
            ``theta``, ``covariance``, ``draws`` and ``predict``.
        """
        tasks = self.model.tasks(new_tasks)
        check_columns(tasks, self.tasks)
        self.model.likelihood.check(tasks)
        if tasks.outcome is None:
            raise InputError(f"the new tasks hold no outcome {tasks.labels.outcome!r}")
        if self.phi_draws is None:
            adapted = self.adaptation(self.model, tasks, dict(self.phi))
            announce(adapted.remarks)
            return AdaptedTasks(self.model, tasks, _batched(self.phi), adapted)
        phis = self._phis()
        draws = self.adaptation.draws(self.model, tasks, phis, as_key(seed))
        return AdaptedTasks(self.model, tasks, phis, _moments(draws), draws)

    def on(self, tasks: Any) -> Fit:
        """The same learned prior for other tasks: their θ, their predictions, their DataTree.

        For a point φ; what :meth:`adapt` gives, as a fit that can be compared and drawn.
        """
        if self.phi_draws is not None:
            raise InputError(
                f"{self.method} holds draws of phi: adapt to the new tasks with fit.adapt(tasks)"
            )
        found = self.model.tasks(tasks)
        check_columns(found, self.tasks)
        self.model.likelihood.check(found)
        if found.outcome is None:
            raise InputError(f"the new tasks hold no outcome {found.labels.outcome!r}")
        return replace(
            self, tasks=found, training=None, theta_draws=None, sample_stats={}, evidence=None,
            log_posterior=None, no_evidence="phi was learned from other tasks",
        )  # fmt: skip

    def predict(self, data: Any = None, *, target: str | None = None) -> Prediction:
        """Predictive distributions of rows.

        Parameters
        ----------
        data : Tasks or DataFrame, optional
            The rows; the training rows by default.
        target : "known", "new" or "population"
            A row of a task that the fit knows, by name; of a new task with θ drawn from the
            learned prior p(θ | φ); or of the population, θ at the prior's mean. "known" where
            all task names are known, else it must be said.

        Returns
        -------
        Prediction
            ``mean``, ``sd``, ``interval``, ``log_density``, ``draws``; its ``target`` says which.
            Their rows stand task by task, ``to_dataframe()`` in the order of the data.
        """
        rows = self.tasks if data is None else self.model.tasks(data)
        check_columns(rows, self.tasks)
        if target not in (None, *TARGETS):
            raise InputError(f"target must be one of {TARGETS}, found {target!r}")
        if target in (None, "known"):
            return self.adapted.predict(rows)
        if isinstance(self.adaptation, LeastSquares | MaximumLikelihood):
            raise InputError("no pooling learns nothing about tasks that it has not seen")
        if not self.model.likelihood.has_location:
            return self._predict_by_draws(rows, "new" if target == "new" else "population")
        if not self.model.likelihood.linear:
            return self._predict_unseen(rows, "new" if target == "new" else "population")
        point = {k: np.asarray(v) for k, v in self.phi.items()}
        rows = self.model.likelihood.design(rows, point)
        with float64():
            phis = {k: np.asarray(v) for k, v in self._phis().items()}
            location = self._location(phis, rows.task_predictors)
            means = np.einsum("sik,ik->si", location[:, rows.task_of_row], rows.predictors)
            variance: Any = 0.0 if "tau" in phis else None
            if target == "new" and "tau" in phis:
                covariance = to_numpy(self.model.prior.covariance(phis))
                variance = quadratic(rows.predictors[None], covariance[:, None])
                variance = self._widths(len(means))[:, None] * variance
                means = np.broadcast_to(means, variance.shape)
        return finish(f"{target} task" if target == "new" else "population", self.model, rows,
                      phis, means, variance)  # fmt: skip

    def _predict_unseen(self, rows: Tasks, target: str) -> Prediction:
        """Rows of new tasks, or at the prior's centre, where f is not linear in θ."""
        mu = np.asarray(self.phi["mu"])
        thetas = np.broadcast_to(mu, (1, rows.num_tasks, len(mu)))
        drawn = target == "new" and "tau" in self.phi
        if drawn:
            white = np.random.default_rng(0).standard_normal((POINT_DRAWS, *thetas.shape[1:]))
            # where sigma only sets the units of steps, sigma_query scales the prior with the noise
            scaled = "sigma_query" in self.phi
            unit = float(self.phi["sigma_query"] / self.phi["sigma"]) if scaled else 1.0
            thetas = mu + np.asarray(self.phi["tau"]) * unit * white
        means = locations(self.model, thetas, dict(self.phi), rows)
        what = "new task" if target == "new" else target
        return finish(what, self.model, rows, self._phis(), means, 0.0 if drawn else None)

    def _predict_by_draws(self, rows: Tasks, target: str) -> Prediction:
        """The same where the likelihood knows no f: from draws of θ, or at the prior's centre."""
        phis = {name: np.asarray(value) for name, value in self._phis().items()}
        drawn = target == "new" and "tau" in phis
        if drawn and self.phi_draws is None:
            phis = {name: np.repeat(value, POINT_DRAWS, axis=0) for name, value in phis.items()}
        with float64():
            thetas = self._location(phis, rows.task_predictors)
            if drawn:
                white = np.random.default_rng(0).standard_normal(thetas.shape)
                root = np.asarray(self.model.prior.scale_tril(phis))
                white = white * np.sqrt(self._widths(len(thetas)))[:, None, None]
                thetas = thetas + np.einsum("skl,sjl->sjk", root, white)
        what = "new task" if drawn else target
        return outcomes(what, self.model, rows, thetas, phis)

    # ------------------------------------------------------------------ storage

    def save(self, path: Any) -> None:
        """Write the fit, its data and its model to one NetCDF file, whole or not at all.

        ArviZ reads the file too (``arviz_base.from_netcdf``); :func:`hierbayes.load` gives the
        fit back.
        """
        from hierbayes.fit.storage import save

        save(self, path)

    def _widths(self, size: int) -> np.ndarray:
        """What Σ is multiplied by in each of ``size`` draws, or in draws made of one point."""
        if self.model.prior.gaussian:
            return np.ones(1)
        widths = self.model.prior.variance_factors(POINT_DRAWS if size == 1 else size)
        return np.random.default_rng(0).permutation(widths)  # not by the order of chains

    def _location(self, phis: dict[str, np.ndarray], w: np.ndarray) -> np.ndarray:
        """μ_s + Γ_s w_j of every draw and task, (S, J, d)."""
        over_draws = jax.vmap(lambda phi: self.model.prior.location(phi, w))
        return np.asarray(over_draws(phis))

    def _phis(self) -> dict[str, np.ndarray]:
        """φ with one leading axis over draws, or over the single point."""
        if self.phi_draws is None:
            return _batched(self.phi)
        return {k: v.reshape(-1, *v.shape[2:]) for k, v in self.phi_draws.items()}


def _batched(phi: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value)[None] for name, value in phi.items()}


def _moments(draws: np.ndarray) -> Adapted:
    mean = draws.mean(0)
    centred = draws - mean
    return Adapted(mean, np.einsum("sji,sjk->jik", centred, centred) / (len(draws) - 1))


def _short(value: Any) -> str:
    return np.array2string(np.asarray(value), precision=3, separator=", ").replace("\n", "")
