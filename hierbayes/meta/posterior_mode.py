r"""Type-II MAP: the evidence plus the hyperprior, maximised over φ.

The search runs over (μ, Γ, β, τ, unconstrained correlations, log σ); densities are those of τ and
R themselves, without the Jacobian of the correlations' parametrisation, and of log σ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from hierbayes.evidence.exact import log_evidence
from hierbayes.meta.correlations import SINGULAR
from hierbayes.meta.marginal import maximise_likelihood
from hierbayes.meta.optimum import (
    Minimum,
    Optimum,
    ValueAndSlope,
    curvature,
    descend,
    highest,
    minimise,
)
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64, to_numpy
from hierbayes.phi.space import Space, at_an_end, phi_at, standard_errors
from hierbayes.statistics import Statistics, placed_statistics
from hierbayes.tasks import Tasks

TINY_RATE = 1e-8
"""Rate of the default Gamma(2, rate → 0) prior on τ, in units of the data's own scale."""


RAISED = 0.3
"""Units of τ to which one that has been found at zero is raised, to see whether it returns."""


SIZES = (0.0, 1e-3, 1e-2, 0.1, 0.3, 3.0, 10.0, 100.0)
"""Times the τ that was found, where another optimum is looked for."""


TILTED = 0.5
"""Size of the correlations' entries that it is raised with."""


def resolve_for_mode(model: HierarchicalModel, tasks: Tasks) -> HierarchicalModel:
    """The model resolved, with Gamma(2, rate → 0) on τ where the user says nothing of it."""
    given, resolved = model.hyperprior.tau, model.resolve(tasks)
    if given is not None and not isinstance(given, Mapping):
        return resolved
    believed = resolved.column_map(tasks, "beliefs", scaled=False).tasks(tasks)
    scales = model.scales(believed).coef
    avoiding = {c: dist.Gamma(2.0, TINY_RATE / s) for c, s in zip(tasks.coef, scales, strict=True)}
    tau = {**avoiding, **(given or {})}
    return replace(resolved, hyperprior=replace(resolved.hyperprior, tau=tau))


def maximise_posterior(resolved: HierarchicalModel, tasks: Tasks) -> Optimum:
    """φ̂ at the mode of p(φ | D), with standard errors from the Hessian."""
    start = maximise_likelihood(resolved, tasks, reml=False)
    with float64():
        stats = jax.tree.map(jnp.asarray, placed_statistics(tasks))
        beliefs = resolved.phi_distributions(tasks)
        space = resolved.space(tasks)

        def log_density(x: Any, stats: Statistics) -> tuple[Any, Any]:
            evidence = log_evidence(stats, resolved.prior, space.phi(x)).sum()
            return evidence, space.log_belief(x, beliefs)

        def objective(x: jax.Array, stats: Statistics) -> Any:
            return -sum(log_density(x, stats))

        # as an argument, or every device would hold all tasks
        slope = jax.jit(jax.value_and_grad(objective))

        def value_and_slope(v: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = slope(v, stats)
            return finite(float(value), np.asarray(gradient))

        starts = [space.near(start.phi, floor) for floor in (0.05, 0.01)]
        pooled = space.near(start.phi | {"tau": 0 * start.phi["tau"]})
        best = off_the_boundary(value_and_slope, starts, space, [pooled])
        inside, ends = space.inside(best.x), at_an_end(space, best.x)
        hessian = curvature(value_and_slope, best.x, inside)
        phi = to_numpy(phi_at(space, best.x))
        evidence, belief = jax.jit(log_density)(best.x, stats)
        along = space.along(best.x, inside, hessian)
    errors = standard_errors(along)
    warnings = [*([best.problem] if best.problem else []), *ends]
    if np.isnan(errors["tau"]).any():
        warnings.append(
            "standard errors of tau are NaN where the mode lies at tau = 0 or the posterior "
            "is not concave there"
        )
    return Optimum(phi, float(evidence), errors, warnings, float(evidence + belief), along)


def finite(value: float, slope: np.ndarray) -> tuple[float, np.ndarray]:
    """A criterion and its slope as a minimiser can use them."""
    if np.isfinite(value) and np.isfinite(slope).all():
        return value, np.array(slope)
    return (value if np.isfinite(value) else 1e300), np.nan_to_num(slope)


def off_the_boundary(
    value_and_slope: ValueAndSlope,
    starts: list[np.ndarray],
    space: Space,
    rivals: list[np.ndarray] | None = None,
) -> Minimum:
    """The minimum, with a τ that is zero but for rounding exactly zero where that costs nothing.

    ``rivals`` are points that it must not be worse than, beside those with one τ, or all, larger
    or smaller; without any, no such are tried.
    """

    def climb(*starts: np.ndarray) -> Minimum:
        return _climbed(value_and_slope, list(starts), space)

    best = climb(*starts)
    if rivals is None:
        return best
    for _ in range(3):
        others = [*rivals, *_other_sizes(best.x, space)]
        values = [value_and_slope(x)[0] for x in others]
        rival = others[int(np.argmin(values))]
        again = highest(climb, best, [rival], value_and_slope)
        if again is best or not again.value < best.value - 1e-6 * max(1.0, abs(best.value)):
            return again
        best = again
    return best


def _other_sizes(x: np.ndarray, space: Space) -> list[np.ndarray]:
    """The vector with each τ at other sizes, and with all of them together."""
    tau = np.arange(len(x))[space.at["tau"]]
    size = np.where(x[tau] > 0, x[tau], 1.0)
    places = [tau[[i]] for i in range(len(tau))] + ([tau] if len(tau) > 1 else [])
    found = []
    for which in places:
        for share in SIZES:
            moved = x.copy()
            moved[which] = share * size[which - tau[0]]
            found.append(moved)
    return found


def _climbed(value_and_slope: ValueAndSlope, starts: list[np.ndarray], space: Space) -> Minimum:
    """From the best of the starts.

    τ = 0 is always stationary: a search that steps there stays, wherever the minimum is. From a τ
    that is raised again, damped Newton steps go to zero only where the way leads down; with a
    correlation of either sign, since one that is zero may be what makes them.
    """
    lower, spread = space.lower, space.lower == 0
    best = minimise(value_and_slope, starts, lower)
    flat = spread & (best.x < SINGULAR)
    if flat.any():
        raised = np.where(flat, RAISED, best.x)
        ends = []
        for sign in (0.0, 1.0, -1.0) if space.blocks else (0.0,):
            raised[space.at["corr"]] = sign * TILTED
            ends.append(descend(value_and_slope, raised, lower, lambda x: value_and_slope))
        near = min(ends, key=lambda x: value_and_slope(x)[0])
        again = minimise(value_and_slope, [near], lower)
        best = again if again.value < best.value else best
    snapped = np.where(spread & (best.x < SINGULAR), 0.0, best.x)
    if value_and_slope(snapped)[0] <= best.value + 1e-12 * abs(best.value):
        return replace(best, x=snapped)
    return best
