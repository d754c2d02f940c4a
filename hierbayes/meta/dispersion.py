r"""A family's own parameters and shared effects without a prior on θ: within tasks, and over all.

.. math::

    \text{within:}\quad \max_{\beta, \varphi} \sum_j \left[\log p(D_j \mid \hat\theta_j, \beta,
        \varphi) - \tfrac12 \log |H_j|\right], \qquad
    \text{over all:}\quad \max_{\mu, \Gamma, \beta, \varphi} \sum_j
        \log p(D_j \mid \mu + \Gamma w_j, \beta, \varphi)

The first integrates every θ_j under a flat prior, by Laplace: the limit τ → ∞ of the evidence. Of
Gaussian rows it is the pooled within-task σ on its degrees of freedom. The second is the limit
τ → 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from hierbayes.adaptation.least_squares import within_tasks
from hierbayes.adaptation.unpooled import (
    Unpooled,
    determined,
    integrated,
    perfectly_explained,
)
from hierbayes.errors import InputError, NotApplicable, listing
from hierbayes.likelihoods.generalised import GeneralisedLinear
from hierbayes.meta.approximate_evidence import maximise_approximate
from hierbayes.meta.optimum import ValueAndSlope, curvature, newton
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64, to_numpy
from hierbayes.phi.space import Space, phi_at, standard_errors
from hierbayes.statistics import statistics
from hierbayes.tasks import Tasks
from hierbayes.tasks.container import kept

STARTS = {"df": 8.0}
"""Of a family's parameters, 1 where nothing stands here; σ in units of f."""

RANGES = {"sigma": (1e-6, 1e3), "df": (1.0, 1e3)}
"""Where they are looked for, (1e-3, 1e6) where nothing stands here; σ in units of f."""

ENDS = {
    "concentration": ("the counts vary no more than Poisson counts do", "next to all counts are 0"),
    "df": ("the tails are no heavier than a normal's", "the tails are as heavy as Cauchy's"),
    "shape": ("the outcomes hardly vary around their means", "the outcomes vary without end"),
    "sigma": ("the spread has no end", "the rows are explained without an error"),
}
"""What an estimate at the upper, and at the lower end of its range says."""

FAR = 40.0
"""Units of f beyond which a shared effect is said to have no estimate."""


@dataclass(frozen=True)
class Found:
    """φ without ``tau``, the log likelihood there, standard errors, and what to say of it.

    ``along``: how the fixed effects move along independent normal directions, by name.
    """

    phi: dict[str, np.ndarray]
    log_likelihood: float
    errors: dict[str, np.ndarray]
    remarks: list[str]
    along: dict[str, np.ndarray]


@dataclass(frozen=True)
class Within:
    """β and the family's own parameters, and which tasks could hold an unidentified β instead."""

    phi: dict[str, np.ndarray]
    identified: np.ndarray
    absorbed: np.ndarray
    remarks: list[str]


def _ranges(names: tuple[str, ...], spread: float) -> np.ndarray:
    """(start, lower, upper) of the logarithms, (3, n)."""
    unit = {"sigma": spread}
    start = [unit.get(n, 1.0) * STARTS.get(n, 1.0) for n in names]
    ends = [np.asarray(RANGES.get(n, (1e-3, 1e6))) * unit.get(n, 1.0) for n in names]
    return np.log(np.column_stack([start, np.array(ends).reshape(-1, 2)]).T)


def _said(
    space: Space, names: tuple[str, ...], x: np.ndarray, low: np.ndarray, high: np.ndarray
) -> list[str]:
    """What to say of estimates at an end of their range."""
    remarks = []
    for name in names:
        (bottom,), (value,), (top,), (log,) = (
            v[space.at[name]] for v in (low, x, high, space.origin)
        )
        if min(value - bottom, top - value) < 1e-6:
            why = ENDS[name][0 if top - value < 1e-6 else 1]
            remarks.append(
                f"{name} is estimated as {np.exp(value + log):.3g}, the end of its range: {why}"
            )
    return remarks


class Ended(NamedTuple):
    """A minimum: x, which entries are at no end of their range, and the function of those alone."""

    x: np.ndarray
    value: float
    inside: np.ndarray
    of_inside: ValueAndSlope


def _minimise(function: Callable[[np.ndarray], Any], start: Any, low: Any, high: Any) -> Ended:
    """By bounded quasi-Newton steps, and Newton's from there, which know the last digits."""
    from scipy import optimize

    def finite(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = (np.asarray(part) for part in function(x))
        fine = np.isfinite(value) and np.isfinite(slope).all()
        return (float(value), slope) if fine else (1e300, np.zeros(len(x)))

    if not len(start):  # nothing is free
        return Ended(np.zeros(0), finite(np.zeros(0))[0], np.ones(0, bool), finite)
    run: Any = optimize.minimize(
        finite, start, jac=True, method="L-BFGS-B", bounds=list(zip(low, high, strict=True)),
        options={"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-9},
    )  # fmt: skip
    if not run.fun < 1e299:
        raise InputError(
            "the likelihood is not finite where its parameters are looked for: rescale predictors "
            "or offsets so that the linear predictor is of order one"
        )
    x = np.array(run.x)
    inside = (x > low + 1e-6) & (x < high - 1e-6)

    def of_inside(v: np.ndarray) -> tuple[float, np.ndarray]:
        full = x.copy()
        full[inside] = v
        value, slope = finite(full)
        return value, slope[inside]

    end = newton(of_inside, x[inside], np.full(int(inside.sum()), -np.inf), flat=1e-10)
    x[inside] = end.x
    return Ended(x, end.value, inside, of_inside)


@functools.partial(jax.jit, static_argnums=0)
def _within(model: HierarchicalModel, space: Space, x: Any, fixed: Any, given: Any) -> Any:
    def minus(v: Any) -> Any:
        return -integrated(model, dict(fixed) | space.phi(v), given)

    return jax.value_and_grad(minus)(x)


def within(model: HierarchicalModel, tasks: Tasks, sigma: float | None = None) -> Within:
    """β and the family's own parameters from what rows say within their tasks; ``sigma`` if given.

    Rows that a task alone explains perfectly say nothing.
    """
    likelihood = model.likelihood
    assert isinstance(likelihood, GeneralisedLinear)
    fixed = {} if sigma is None else {"sigma": np.asarray(float(sigma))}
    names = tuple(n for n in likelihood.parameters() if n not in fixed)
    shared, d = tasks.labels.shared, len(tasks.coef)
    known = determined(tasks, likelihood)
    rest = within_tasks(statistics(tasks.keep_rows(known.rows)))
    none = np.zeros((tasks.num_tasks, d), bool)
    if not (names or shared):
        return Within({}, np.ones(0, bool), none, [])
    free = int(known.rows.sum() - known.rank.sum() - rest.identified.sum())
    if free <= 0 and names:
        raise NotApplicable(
            f"{listing(names)} cannot be estimated within tasks: the tasks' own coefficients "
            "explain every row (they may have no more rows than coefficients); use empirical_bayes "
            "or full_bayes"
        )
    with float64():
        space = model.space(tasks, "beta", *names, likelihood_alone=True)
        given, far = Unpooled.of(tasks, likelihood), np.full(len(shared), FAR)
        logs = _ranges(names, model.scales(tasks).spread) - space.origin[len(far) :]
        begin, low, high = np.column_stack([[0 * far, -far, far], logs])

        def a_row(v: np.ndarray) -> tuple[Any, Any]:
            value, slope = _within(model.without_encoder(), space, v, fixed, given)
            return value / tasks.num_rows, slope / tasks.num_rows

        x = _minimise(a_row, begin, low, high).x
        _refuse_endless(shared, x[: len(far)], "within tasks")
        phi = to_numpy(phi_at(space, x))
    absorbed = rest.absorbed if shared else none
    return Within(fixed | phi, rest.identified, absorbed, _said(space, names, x, low, high))


@kept
def _own(tasks: Tasks, model: HierarchicalModel, sigma: float | None) -> Within:
    return within(model, tasks, sigma)


def dispersion(
    model: HierarchicalModel, tasks: Tasks, sigma: float | None = None
) -> dict[str, np.ndarray]:
    """The family's own parameters by name, estimated within tasks.

    Those of a NumPyro program are empirical Bayes' by Laplace: without a prior, its tasks may have
    no estimate of θ.
    """
    if not model.likelihood.parameters():
        return {}
    if model.likelihood.has_location:
        found = _own(tasks, model.without_encoder(), sigma).phi
    else:
        found = maximise_approximate(
            model, tasks, quadrature=False, with_hyperprior=False, judged=False
        ).optimum.phi
    return {name: found[name] for name in model.likelihood.parameters()}


def _refuse_endless(names: tuple[str, ...], values: np.ndarray, where: str) -> None:
    lost = [n for n, v in zip(names, values, strict=True) if abs(v) > 0.99 * FAR]
    if lost:
        raise NotApplicable(
            f"the maximum likelihood estimate of {listing(lost)} {where} is infinite: the column "
            'separates the outcomes; use empirical_bayes(criterion="map") or full_bayes, whose '
            "hyperprior holds it"
        )


# ------------------------------------------------------------------------ over all tasks


@functools.partial(jax.jit, static_argnums=0)
def _pooled(model: HierarchicalModel, space: Space, x: Any, data: Any) -> Any:
    def minus(v: Any) -> Any:
        phi = space.phi(v)
        thetas = model.prior.location(phi, data[0].task_predictors)
        return -model.likelihood.log_likelihood_of_rows(thetas, phi, *data).sum()

    return jax.value_and_grad(minus)(x)


def over_all(model: HierarchicalModel, tasks: Tasks, without: int | None = None) -> Found:
    """μ, Γ, β and the family's own parameters with one θ for all tasks; ``without`` one task."""
    scales, own = model.scales(tasks), model.likelihood.parameters()
    mask = np.ones(tasks.num_rows, bool) if without is None else tasks.task_of_row != without
    data = replace(tasks.flat(), mask=mask), tasks.task_of_row
    plain = model.without_encoder()
    with float64():
        space = model.space(tasks, "mu", "gamma", "beta", *own, likelihood_alone=True)
        count = space.size - len(own)
        begin = space.x({"mu": scales.mu_location})
        begin[count:], low, high = _ranges(own, scales.spread) - space.origin[count:]
        low, high = np.append(np.full(count, -np.inf), low), np.append(np.full(count, np.inf), high)

        end = _minimise(lambda v: _pooled(plain, space, v, data), begin, low, high)
        x, inside = end.x, end.inside
        hessian = curvature(end.of_inside, x[inside], np.ones(int(inside.sum()), bool))
        phi = to_numpy(phi_at(space, x))
        finite = np.isfinite(hessian).all()
        least = np.linalg.eigvalsh(hessian).min(initial=np.inf) if finite else -np.inf
        if not (least > 1e-6 and np.abs(x - begin)[:count].max(initial=0.0) < FAR):
            _refuse_separation(model, tasks, mask)
        along = space.along(x, inside, hessian)
    said = _said(space, own, x, low, high)
    fixed = {n: v for n, v in along.items() if n not in own}
    return Found(phi, -end.value, standard_errors(along), said, fixed)


def _refuse_separation(model: HierarchicalModel, tasks: Tasks, mask: np.ndarray) -> None:
    """Say which columns separate the outcomes, if any do."""
    likelihood = model.likelihood
    assert isinstance(likelihood, GeneralisedLinear)
    level = tasks.task_predictors[tasks.task_of_row]
    moved = [tasks.predictors * level[:, [k]] for k in range(level.shape[1])]
    free = np.array(model.shape(tasks).free_mean)
    columns = np.column_stack([tasks.predictors[:, free], tasks.shared, *moved])[mask]
    up, down = (ends[mask] for ends in likelihood.endless(tasks))
    one = np.zeros(len(columns), int)
    if not perfectly_explained(columns, one, 1, up, down).any():
        return
    names = [c for c, f in zip(tasks.coef, free, strict=True) if f] + list(tasks.labels.shared)
    raise NotApplicable(
        f"complete_pooling has no finite estimate: some combination of {listing(names)} separates "
        'the outcomes over all tasks; use empirical_bayes(criterion="map") or full_bayes, whose '
        "hyperprior holds it"
    )
