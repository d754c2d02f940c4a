"""The result of every method."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from hierbayes import inputs
from hierbayes.adaptation import (
    Draws,
)
from hierbayes.errors import InputError
from hierbayes.fit import adapting
from hierbayes.fit import datatree as trees
from hierbayes.fit.adapted import (
    AdaptedTasks,
    check_columns,
    phis_of,
)
from hierbayes.fit.adapting import averaged
from hierbayes.fit.learned import Learned
from hierbayes.fit.learned_prior import learned_prior, learned_priors
from hierbayes.fit.outward import adapted_outward
from hierbayes.fit.prediction import Prediction
from hierbayes.fit.summary import summary
from hierbayes.fit.targets import predict_unseen
from hierbayes.priors.learned import LearnedPrior

TARGETS = ("known", "new", "population")


@dataclass(frozen=True)
class Fit(Learned):
    """A learned prior and what every task concludes under it.

    Attributes
    ----------
    method : Method
        How φ was learned: ``fit.method(model, tasks)`` fits other tasks with the same settings,
        ``fit.method.name`` is what tables call it.
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
    learned : Tasks or None
        What φ has learned from, where that is not ``tasks``; see ``learned_from``.
    phi_bootstrap : dict or None
        By name the φ*_b, each (B, …), over which θ's posterior is averaged: of
        :func:`empirical_bayes` with ``intervals="bootstrap"``.
    inner, at : Fit and ColumnMap, or None
        The same fit in the centred and scaled columns that were computed with, and the linear map
        from there to the user's.
    """

    def __repr__(self) -> str:
        names = ", ".join(f"{n}={_short(v)}" for n, v in self.phi.items() if np.size(v) <= 4)
        return f"Fit({self.method.name!r}, {self.tasks.num_tasks} tasks, {names})"

    # --------------------------------------------------------------- estimates

    @functools.cached_property
    def adapted(self) -> AdaptedTasks:
        """The training tasks under the learned prior."""
        if self.inner is not None and self.at is not None:
            return adapted_outward(self.inner.adapted, self.at, self.model, self.tasks)
        if self.theta_draws is not None and self.phi_draws is not None:
            draws = self.theta_draws.reshape(-1, *self.theta_draws.shape[2:])
            phis = phis_of(self.phi, self.phi_draws)
            return AdaptedTasks(self.model, self.tasks, phis, Draws.of(draws))
        if self.phi_bootstrap is not None:
            phis = self.phi_bootstrap
            return averaged(self.model, self.tasks, phis, self.adaptation, self.training)
        found = self.training or self.adaptation(self.model, self.tasks, dict(self.phi))
        return AdaptedTasks(self.model, self.tasks, phis_of(self.phi, self.phi_draws), found)

    @property
    def theta(self) -> Any:
        """Point estimates of every task's parameters, labelled (task, coef)."""
        return self.adapted.theta

    @functools.cached_property
    def datatree(self) -> Any:
        """The fit as ``xarray.DataTree`` in ArviZ's schema, built when first read.

        Groups: ``posterior`` (draws), ``point_estimate`` (φ̂, standard errors), ``sample_stats``,
        ``log_likelihood`` (up to 10 million draws × rows; beyond, ask :meth:`log_likelihood`),
        ``observed_data``, ``constant_data``.

        ``posterior_predictive`` holds an outcome of every training row for each posterior draw of
        θ and φ, in the same chains and draws, up to as many; so ArviZ's ``plot_ppc_dist``,
        ``plot_ppc_pit`` and ``plot_loo_pit`` take the tree. Full Bayes under a proper hyperprior
        adds ``prior`` and ``prior_predictive``: 500 draws of φ, θ and the training rows before any
        data. Why one of these is not there say the tree's ``attrs``, ``no_posterior_predictive``
        and ``no_prior_predictive``. Counts are integers, drawn at rates of up to 1e15.

        ``theta`` (task, coef) stands first in its groups, and should in ``var_names`` too: where a
        variable with fewer of its dimensions is named before it, ``arviz_stats.summary`` (0.8 to
        1.3) gives θ's values to the wrong labels. :meth:`summary` takes names in any order.
        """
        return trees.build(self)

    def log_likelihood(self, by: str = "row") -> Any:
        """Log p(y | θ, φ) at every posterior draw, a Dataset (chain, draw, row or task).

        ``by="task"`` sums within tasks, conditional on θ_j.
        """
        inputs.one_of("by", by, ("row", "task"))
        if self.theta_draws is None:
            raise InputError(f"{self.method} holds no posterior draws of theta")
        inside = self.inside
        draws = {**(inside.phi_draws or {}), "theta": inside.theta_draws}
        return trees.log_likelihood(inside, draws, by)

    def summary(
        self, var_names: str | Sequence[str] | None = None, errors: Mapping[str, Any] | None = None
    ) -> Any:
        """φ, or what is named of φ and θ, as a pandas DataFrame, a row an entry.

        Parameters
        ----------
        var_names : str or sequence of str, optional
            Names of φ, and ``"theta"`` for the parameters of every task; all of φ by default.
        errors : mapping, optional
            Standard errors by name in the place of the fit's own:
            ``{"theta": hb.checks.theta_standard_errors(fit)}``.

        Returns
        -------
        DataFrame
            Rows ``mu[Intercept]``, ``corr[Intercept, days]``, ``theta[308, days]``: the task, then
            the coefficient. Names that would not tell two rows apart stand in quotes,
            ``theta['a, b', 'c']``. Under full Bayes ArviZ's columns (mean, sd, interval, ESS, R̂,
            some milliseconds for each θ); elsewhere ``estimate`` and ``se``, of θ the posterior
            standard deviation.

        Raises
        ------
        InputError
            For names that φ does not hold.

        Examples
        --------
        >>> import hierbayes as hb
        >>> model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
        ...                                known_se="se")
        >>> fit = hb.empirical_bayes(model, tasks, "reml")
        >>> fit.summary().index.tolist(), fit.summary("theta").index[0]
        (['mu[Intercept]', 'tau[Intercept]'], 'theta[A, Intercept]')
        """
        return summary(self, var_names, errors)

    # --------------------------------------------------------- use on new tasks

    @property
    def prior(self) -> LearnedPrior:
        """p(θ_new | D_1..J), a NumPyro distribution over (d,) that can be kept as JSON.

        A normal at φ̂, a point mass in directions with τ̂ = 0 (and no density where correlations
        are estimated as ±1); a mixture over draws under full Bayes. Student-t in the place of
        normal where the model's prior is.
        """
        return learned_prior(self)

    def prior_for(self, new_tasks: Any) -> list[LearnedPrior]:
        """p(θ_new | D_1..J, w_new) for each of some tasks, whose outcomes are not used."""
        tasks = self.model.tasks(new_tasks)
        check_columns(tasks, self.tasks)
        return learned_priors(self, tasks.task_predictors)

    def adapt(
        self,
        new_tasks: Any,
        *,
        after: AdaptedTasks | None = None,
        update_phi: bool = True,
        implied: bool = False,
        seed: int | jax.Array = 0,
    ) -> AdaptedTasks:
        r"""A(D_new; φ): what new tasks conclude under the learned prior, without refitting.

        .. math:: \theta_{\text{new}} \sim \int p(\theta \mid D_{\text{new}}, \varphi)\,
            p(\varphi \mid D_{1..J}, D_{\text{new}})\, d\varphi

        Parameters
        ----------
        new_tasks : Tasks or DataFrame
            Tasks with rows to learn from; a DataFrame goes through the model's formula. A task
            without rows gets the prior.
        after : AdaptedTasks, optional
            What ``adapt`` gave before, or ``fit.adapted``: the new rows join the rows of these
            tasks, by name. Where the posterior is exact the order in which rows arrive does not
            matter.
        update_phi : bool
            Under full Bayes, let φ learn from the new rows too, by weights on its draws; rows that
            the fit has learned from already count once. Where the weights cannot carry what the
            rows say, φ is left as it is, and a warning says so.
        implied : bool
            For K gradient steps: give the normal posterior too, under the prior that the steps
            imply (:func:`~hierbayes.equivalent_prior`).
        seed : int or JAX key
            For the draws, under full Bayes.

        Returns
        -------
        AdaptedTasks
            ``theta``, ``covariance``, ``draws`` and ``predict``; ``remarks`` say whether φ has
            learned from the new rows.

        Examples
        --------
        >>> import hierbayes as hb
        >>> model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
        ...                                known_se="se")
        >>> fit = hb.full_bayes(model, tasks[["B", "C", "D", "E", "F", "G", "H"]])
        >>> school = fit.adapt(tasks[["A"]])
        >>> school.theta.sizes["task"], school.pareto_k < 0.7
        (1, True)
        """
        return adapting.adapt(self, new_tasks, after, update_phi, implied, seed)

    def on(self, tasks: Any, *, update_phi: bool = True, seed: int | jax.Array = 0) -> Fit:
        """The same learned prior for other tasks: their θ, their predictions, their DataTree.

        What :meth:`adapt` gives, as a fit that can be compared and drawn.
        """
        return adapting.on(self, tasks, update_phi, seed)

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
        if target is not None:
            inputs.one_of("target", target, TARGETS)
        if target in (None, "known"):
            return self.adapted.predict(rows)
        unseen = "new" if target == "new" else "population"
        found = predict_unseen(self.inside, self.seen_inside(rows), unseen)
        return replace(found, tasks=rows)

    # ------------------------------------------------------------------ storage

    def save(self, path: Any) -> None:
        """Write the fit, its data and its model to one NetCDF file, whole or not at all.

        ArviZ and xarray read the file too (``arviz_base.convert_to_datatree``,
        ``xarray.open_datatree``); :func:`hierbayes.load` gives the fit back, and refuses a file
        that was damaged or changed. A link keeps its target. Predictive draws are not written, for
        their size: the ``datatree`` of the loaded fit draws the same ones again.
        """
        from hierbayes.fit.saving import save

        save(self, path)


def check_fit(fit: Any, name: str = "fit") -> None:
    """Refuse what is no fit, before anything is asked of it."""
    inputs.instance(name, fit, Fit, "a fit, as hb.full_bayes and the other methods return it")


def _short(value: Any) -> str:
    return np.array2string(np.asarray(value), precision=3, separator=", ").replace("\n", "")
