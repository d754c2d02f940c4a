"""Fits in the columns that methods compute with, and what they say in the user's.

A method enters its columns, computes, and leaves them: the fit that it returns holds the one inside
(:attr:`~hierbayes.fit.Fit.inside`), which everything that is computed later goes by. What is read
from it is the exact linear map of that (:mod:`hierbayes.priors.column_map`), so that nothing is
lost where predictors lie a million standard deviations from zero.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hierbayes.errors import announce, listing
from hierbayes.fit.adapted import AdaptedTasks
from hierbayes.fit.learned import AFit, Learned
from hierbayes.model import HierarchicalModel
from hierbayes.priors import LearnedPrior
from hierbayes.priors.column_map import Column, ColumnMap
from hierbayes.priors.columns import FAR, Reads
from hierbayes.tasks import Tasks

FAR_AWAY = (
    "the mean of {names} lies more than {far:.0f} standard deviations from zero, and this model "
    "depends on where it lies: coefficients that are independent of the intercept, and priors, "
    "step sizes or precisions of yours, are as they are at a value of zero. Centre the column "
    "(subtract its mean), or leave the correlation and the defaults in, where the origin does not "
    "matter"
)


@dataclass(frozen=True)
class Entered:
    """A resolved model and its tasks as the user has them, and both as a method computes."""

    model: HierarchicalModel
    tasks: Tasks
    at: ColumnMap
    inner_model: HierarchicalModel
    inner_tasks: Tasks

    def leave(self, fit: AFit, along: Mapping[str, np.ndarray] | None = None) -> AFit:
        """The fit in the user's columns.

        ``along``: how φ̂ moves along independent normal directions of unit size, by name (…, r),
        from which standard errors in other columns follow.
        """
        assert self.model.columns is not None
        said: list[str] = []
        names = self.model.columns.far(self.at, self.model.shape(self.tasks))
        if names:
            said = [FAR_AWAY.format(names=listing([repr(n) for n in names]), far=FAR)]
        if said:
            draws = fit.__dict__["_theta_draws"]  # not made before they are read
            said = [*announce(said), *fit.warnings]
            fit = replace(fit, warnings=tuple(said), theta_draws=draws)
        return outward(fit, self.at, self.model, self.tasks, along)

    def of_the_mean(self, remarks: list[str]) -> list[str]:
        """Remarks that name the intercept, which is another one where columns are centred."""
        if not (self.at.intercept and (self.at.mixes or np.any(self.at.from_shared))):
            return remarks
        name = self.tasks.coef[self.at.intercept[0]]
        more = f" ({name!r} is meant where the predictors are at their means)"
        return [r + more if name in r else r for r in remarks]


def enter(model: HierarchicalModel, tasks: Tasks, reads: Reads, *, shared: bool = True) -> Entered:
    """Into columns that are centred and scaled as far as what the method reads allows.

    Not ``shared`` where moments of θ are averaged over φ: with the means of shared columns in the
    intercept they would have to know β too.
    """
    resolved = model.resolve(tasks)
    at = resolved.column_map(tasks, reads)
    if not shared and np.any(at.from_shared):
        at = replace(at, shared=tuple(Column(sd=c.sd) for c in at.shared))
    if at.trivial:
        return Entered(resolved, tasks, at, resolved, tasks)
    inner = resolved.seen_through(at, tasks, reads)
    return Entered(resolved, tasks, at, inner, at.tasks(tasks))


def as_given(model: HierarchicalModel, tasks: Tasks) -> Entered:
    """The user's own columns, for settings of the user's that are stated in them."""
    resolved, shape = model.resolve(tasks), model.shape(tasks)
    at = ColumnMap.none(len(shape.coef), len(shape.shared), len(shape.task_predictors))
    return Entered(resolved, tasks, at, resolved, tasks)


def enter_or_stay(model: HierarchicalModel, tasks: Tasks, *, stay: bool) -> Entered:
    """Into columns for methods that read rows alone, or the user's own."""
    return as_given(model, tasks) if stay else enter(model, tasks, "rows")


def outward(
    fit: AFit,
    at: ColumnMap,
    model: HierarchicalModel,
    tasks: Tasks,
    along: Mapping[str, np.ndarray] | None = None,
    learned: Tasks | None = None,
) -> AFit:
    """A fit of the map's columns in the user's."""
    if at.trivial:
        return fit
    phi_draws = None if fit.phi_draws is None else at.phi(fit.phi_draws)
    phi = at.phi(fit.phi)
    if phi_draws is not None:  # the mean of a root of variances is no map of the means
        phi = {name: phi_draws[name].mean(axis=(0, 1)) for name in phi}
    evidence, posterior = fit.evidence, fit.log_posterior
    shape = model.shape(tasks)
    if evidence is not None and fit.info.get("criterion") == "reml":
        evidence = evidence + at.log_volume(shape)
    if posterior is not None:
        posterior = posterior - at.log_volume(shape) - at.log_volume_of_spread()
    made: Any = None
    if fit.__dict__.get("_theta_draws") is not None:
        made = functools.partial(_theta_draws, fit, at)
    info = fit.info
    if info.get("step_size") is not None:  # steps in the map's columns are preconditioned outside
        info = info | {"preconditioner": at.steps(info["step_size"])[1]}
    return replace(
        fit, model=model, tasks=tasks, phi=phi, training=None, info=info, phi_draws=phi_draws,
        theta_draws=made, standard_errors=_errors(fit, at, along), evidence=evidence,
        log_posterior=posterior, learned=learned,
        phi_bootstrap=None if fit.phi_bootstrap is None else at.phi(fit.phi_bootstrap),
        inner=fit, at=at,
    )  # fmt: skip


def _theta_draws(fit: Learned, at: ColumnMap) -> np.ndarray:
    draws: Any = fit.theta_draws
    if fit.phi_draws is not None and "beta" in fit.phi_draws:
        return at.theta(draws, fit.phi_draws["beta"][:, :, None])
    return at.theta(draws, fit.phi.get("beta"))


def _errors(
    fit: Learned, at: ColumnMap, along: Mapping[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """Standard errors of φ in the user's columns."""
    known = fit.standard_errors
    if not known:
        return {}
    if along is None:
        along = {}
    moved = at.directions(fit.phi, along)
    return {name: np.sqrt((moved[name] ** 2).sum(-1)) if name in moved else value
            for name, value in known.items()}  # fmt: skip


def adapted_outward(
    found: AdaptedTasks, at: ColumnMap, model: HierarchicalModel, tasks: Tasks
) -> AdaptedTasks:
    """What tasks conclude, in the user's columns."""
    if at.trivial:
        return found
    posterior = found.posterior.outward(at, found.phis.get("beta"))
    return AdaptedTasks(
        model, tasks, at.phi(found.phis), posterior, found.remarks, found.pareto_k, found, at
    )


def prior_outward(prior: LearnedPrior, at: ColumnMap, phis: Mapping[str, np.ndarray]) -> Any:
    """A learned prior in the user's columns; ``phis`` as inside, with a leading axis."""
    return LearnedPrior(
        prior.coef, at.theta(prior.locations, phis.get("beta")), at.roots(prior.scale_trils),
        prior.weights, df=prior.df,
    )  # fmt: skip
