r"""New tasks under a learned prior, without refitting.

.. math::

    p(\theta_{\text{new}} \mid D_{\text{new}}, D_{1..J}) = \int
        p(\theta_{\text{new}} \mid D_{\text{new}}, \varphi)\,
        p(\varphi \mid D_{1..J}, D_{\text{new}})\, d\varphi

At a point φ̂ the first factor at φ̂. Over draws of φ the second is had by weighing them with
p(D_new | φ), what the new rows say about φ, as far as the draws can carry it.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np

from hierbayes import inputs
from hierbayes.adaptation import (
    Adaptation,
    Conjugate,
    Draws,
    GradientSteps,
    Mixture,
    Normal,
    NotOffered,
    Posterior,
)
from hierbayes.equivalence import equivalent_prior
from hierbayes.errors import InputError, NotApplicable, announce, listing
from hierbayes.fit.adapted import AdaptedTasks, check_columns, phis_of
from hierbayes.fit.learned import AFit, Learned
from hierbayes.fit.outward import adapted_outward, outward
from hierbayes.fit.updating import Updated, largest_k, updated
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import as_key, as_rng
from hierbayes.tasks import Tasks
from hierbayes.tasks.joining import joined, not_among

LARGEST_THETA = 50_000_000
"""Draws × tasks × coefficients up to which draws of θ are stored (400 MB)."""

FEWEST_FOR_MOMENTS, MOMENTS_OF = 200, 20_000_000
"""Draws of φ, and draws × tasks, over which moments of θ are taken where θ is not stored.

With so many tasks φ is known so well that its own spread hardly shows in θ's."""

LEFT_POINT = "phi is a point, as learned from the {num_tasks} tasks of the fit: it is not updated"
LEFT_ASKED = (
    "phi is as learned from the {num_tasks} tasks of the fit: update_phi=False leaves what the new "
    "rows say about it unused"
)


def read_new(fit: Learned, new_tasks: Any, after: AdaptedTasks | None = None) -> Tasks:
    """New tasks as the fit's model reads them, checked; joined to those that came before."""
    tasks = fit.model.tasks(new_tasks)
    check_columns(tasks, fit.tasks)
    fit.model.likelihood.check(tasks)
    if tasks.outcome is None:
        raise InputError(f"the new tasks hold no outcome {tasks.labels.outcome!r}")
    if after is None:
        return tasks
    if not isinstance(after, AdaptedTasks):
        raise InputError(
            f"after takes what fit.adapt or fit.adapted gave, found {type(after).__name__}"
        )
    check_columns(after.tasks, fit.tasks)
    return joined(after.tasks, tasks)


def adapt(
    fit: Learned,
    new_tasks: Any,
    after: AdaptedTasks | None,
    update_phi: bool,
    implied: bool,
    seed: Any,
) -> AdaptedTasks:
    """See :meth:`hierbayes.fit.Fit.adapt`."""
    update_phi, implied = inputs.flag("update_phi", update_phi), inputs.flag("implied", implied)
    seed = inputs.seed(seed)
    tasks = read_new(fit, new_tasks, after)
    if fit.inner is not None and fit.at is not None:
        given = (None, update_phi, implied, seed)
        found = adapt(fit.inner, fit.at.tasks(tasks), *given)
        return adapted_outward(found, fit.at, fit.model, tasks)
    if implied:
        return _implied(fit, tasks)
    if fit.phi_bootstrap is not None:
        said = (LEFT_POINT.format(num_tasks=fit.learned_from.num_tasks),)
        return replace(averaged(fit.model, tasks, fit.phi_bootstrap, fit.adaptation), remarks=said)
    phis = phis_of(fit.phi, fit.phi_draws)
    if fit.phi_draws is None:
        adapted = fit.adaptation(fit.model, tasks, dict(fit.phi))
        announce(adapted.remarks)
        said = (*adapted.remarks, LEFT_POINT.format(num_tasks=fit.learned_from.num_tasks))
        return AdaptedTasks(fit.model, tasks, phis, adapted, remarks=said)
    return _over_draws(fit, tasks, phis, update_phi, seed)[0]


def _over_draws(
    fit: Learned, tasks: Tasks, phis: dict[str, np.ndarray], update_phi: bool, seed: Any
) -> tuple[AdaptedTasks, bool]:
    """What tasks conclude under draws of φ, and whether these have learned from their rows."""
    if isinstance(fit.adaptation, NotOffered):
        raise NotApplicable(fit.adaptation.reason)
    rng = as_rng(seed)
    left = LEFT_ASKED.format(num_tasks=fit.learned_from.num_tasks)
    found = Updated(phis, np.nan, (left,), False)
    if update_phi:
        found = updated(fit, tasks, phis, rng)
    key = as_key(int(rng.integers(2**31)))
    posterior = theta_under(fit.adaptation, fit.model, tasks, found.phis, key)
    new = AdaptedTasks(fit.model, tasks, found.phis, posterior, found.remarks, found.pareto_k)
    return new, found.learned


def _carried(fit: AFit, found: AFit, tasks: Tasks) -> AFit:
    """What the fit in centred columns concludes on new tasks, in the user's columns."""
    assert fit.inner is not None
    assert fit.at is not None
    learned = fit.learned_from
    if found.learned_from is not fit.inner.learned_from:
        learned = joined(learned, not_among(tasks, learned))
    return outward(found, fit.at, fit.model, tasks, learned=learned)


def on(fit: AFit, new_tasks: Any, update_phi: bool, seed: Any) -> AFit:
    """See :meth:`hierbayes.fit.Fit.on`."""
    update_phi, seed = inputs.flag("update_phi", update_phi), inputs.seed(seed)
    tasks = read_new(fit, new_tasks)
    if fit.inner is not None and fit.at is not None:
        return _carried(fit, on(fit.inner, fit.at.tasks(tasks), update_phi, seed), tasks)
    bare = replace(
        fit, tasks=tasks, training=None, theta_draws=None, sample_stats={}, evidence=None,
        log_posterior=None, no_evidence="phi was learned from other tasks",
        learned=fit.learned_from,
    )  # fmt: skip
    if fit.phi_draws is None:
        if fit.info.get("intervals", "plain") != "plain" and fit.phi_bootstrap is None:
            # the wider ones are of the training tasks
            return replace(bare, info=fit.info | {"intervals": "plain"})
        return bare
    new, learned = _over_draws(fit, tasks, phis_of(fit.phi, fit.phi_draws), update_phi, seed)
    fresh = not_among(tasks, fit.learned_from)
    far = new.pareto_k > largest_k(len(next(iter(new.phis.values()))))
    lead = next(iter(fit.phi_draws.values())).shape[:2]

    def by_chain(values: np.ndarray) -> np.ndarray:
        return values.reshape(*lead, *values.shape[1:])

    return replace(
        bare, phi={name: value.mean(0) for name, value in new.phis.items()},
        phi_draws={name: by_chain(value) for name, value in new.phis.items()},
        theta_draws=None if new.draws is None else by_chain(new.draws),
        training=new.posterior if new.draws is None else None,
        learned=joined(fit.learned_from, fresh) if learned else fit.learned_from,
        warnings=(*fit.warnings, *new.remarks) if far else fit.warnings,
        info=fit.info | {"about_phi": new.remarks, "pareto_k": new.pareto_k},
    )  # fmt: skip


def _implied(fit: Learned, tasks: Tasks) -> AdaptedTasks:
    """K gradient steps, and the normal posterior under the prior that they imply."""
    if not isinstance(fit.adaptation, GradientSteps):
        raise InputError(
            f"implied=True asks for the posterior that K gradient steps imply; {fit.method} takes "
            "none: leave it out"
        )
    found = equivalent_prior(fit.model, tasks, fit)
    covariance = getattr(found, "posterior_covariance", None)
    if covariance is None:
        raise InputError(
            f"the posterior that steps imply over {len(tasks.coef)} coefficients is not formed as "
            "a matrix: ask hb.equivalent_prior(fit.model, tasks, fit) for what it does to vectors, "
            "and of networks hb.meta.implied_posterior for intervals"
        )
    none = ~np.isfinite(covariance).all((1, 2))
    said = list(found.messages)
    if none.any():
        said.append(
            f"the steps imply no posterior of task(s) {listing(tasks.names[none].tolist(), 3)}"
        )
    adapted = Normal(found.posterior_mean, covariance, remarks=tuple(said))
    said.append(LEFT_POINT.format(num_tasks=fit.learned_from.num_tasks))
    return AdaptedTasks(
        fit.model, tasks, phis_of(fit.phi, fit.phi_draws), adapted, remarks=tuple(said)
    )


def averaged(
    model: HierarchicalModel,
    tasks: Tasks,
    phis: dict[str, np.ndarray],
    adaptation: Adaptation,
    known: Posterior | None = None,
) -> AdaptedTasks:
    """What Gaussian tasks conclude, averaged over φ_b; ``known`` are its moments, if they are."""
    assert isinstance(adaptation, Conjugate)
    moments = known or Normal(*adaptation.moments(model, tasks, phis))
    assert moments.covariance is not None
    normals = functools.partial(_normals, model, tasks, phis, adaptation)
    mixed = Mixture(moments.mean, moments.covariance, normals, together=True)
    return AdaptedTasks(model, tasks, phis, mixed)


def _normals(
    model: HierarchicalModel,
    tasks: Tasks,
    phis: dict[str, np.ndarray],
    adaptation: Conjugate,
    positions: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The posterior of some tasks under each φ_b."""
    some, size = tasks.take(positions), len(next(iter(phis.values())))
    at: list[Any] = [
        adaptation(model, some, {n: v[b] for n, v in phis.items()}) for b in range(size)
    ]
    return np.stack([one.mean for one in at]), np.stack([one.covariance for one in at])


def theta_under(
    adaptation: Adaptation,
    model: HierarchicalModel,
    tasks: Tasks,
    phis: dict[str, np.ndarray],
    key: Any,
) -> Posterior:
    """A draw of every θ_j for each of the S values of φ.

    Beyond :data:`LARGEST_THETA` numbers their moments instead, averaged over some of the values.
    """
    size = len(next(iter(phis.values())))
    if size * tasks.num_tasks * len(tasks.coef) <= LARGEST_THETA:
        return Draws.of(adaptation.draws(model, tasks, phis, key))
    some: Any = adaptation
    return Normal(
        *some.moments(model, tasks, _evenly(phis, max(FEWEST_FOR_MOMENTS,
                                                      MOMENTS_OF // tasks.num_tasks)))
    )  # fmt: skip


def _evenly(phis: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """``count`` of the draws, evenly spread."""
    size = len(next(iter(phis.values())))
    kept = np.unique(np.linspace(0, size - 1, min(count, size)).astype(int))
    return {name: value[kept] for name, value in phis.items()}
