r"""Type-II MAP, and maximum likelihood under a Student-t prior: the criterion maximised over φ.

The search runs over (μ, Γ, β, τ, unconstrained correlations, log σ); densities are those of τ and
R themselves, without the Jacobian of the correlations' parametrisation, and of log σ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpyro.distributions as dist

from hierbayes.adaptation import Integrable
from hierbayes.meta.criterion import Criterion
from hierbayes.meta.marginal import maximise_likelihood
from hierbayes.meta.optimum import (
    SINGULAR,
    Minimum,
    Optimum,
    ValueAndSlope,
    descend,
    highest,
    minimise,
)
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.phi.space import Space, at_an_end
from hierbayes.priors import Gaussian, StudentT
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
    believed = resolved.column_map(tasks, "hyperpriors", scaled=False).tasks(tasks)
    scales = model.scales(believed).coef
    avoiding = {c: dist.Gamma(2.0, TINY_RATE / s) for c, s in zip(tasks.coef, scales, strict=True)}
    tau = {**avoiding, **(given or {})}
    return replace(resolved, hyperprior=replace(resolved.hyperprior, tau=tau))


def maximise_exact(
    resolved: HierarchicalModel, tasks: Tasks, adaptation: Integrable, *, with_hyperprior: bool
) -> Optimum:
    """φ̂ of Gaussian tasks, with standard errors from the Hessian.

    From type-II maximum likelihood under a Gaussian prior: under a Student-t prior with less
    spread, for where a few tasks alone are what makes that large.
    """
    prior, normal = resolved.prior, resolved
    shares: Any = ((1.0, 0.05), (1.0, 0.01))
    if isinstance(prior, StudentT):
        normal = replace(resolved, prior=Gaussian(prior.correlated, prior.zero_mean))
        shares = ((0.7, 0.05), (0.3, 0.01))
    start = maximise_likelihood(normal, tasks, reml=False).phi
    with float64():
        criterion = Criterion(resolved, tasks, adaptation, with_hyperprior=with_hyperprior)
        space = criterion.space
        starts = [space.near(start | {"tau": share * start["tau"]}, floor)
                  for share, floor in shares]  # fmt: skip
        pooled = space.near(start | {"tau": 0 * start["tau"]})
        best = off_the_boundary(criterion, starts, space, [pooled])
        warnings = [*([best.problem] if best.problem else []), *at_an_end(space, best.x)]
        found, _ = criterion.optimum(best.x, space.inside(best.x), warnings)
    if np.isnan(found.standard_errors["tau"]).any():
        warnings.append(
            "standard errors of tau are NaN where the estimate lies at tau = 0 or the criterion is "
            "not concave there"
        )
    return found


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
