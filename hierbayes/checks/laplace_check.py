r"""How far Laplace's approximation is from the evidence, task by task and for φ̂ as a whole.

.. math::

    e_j = \log \hat p_{\text{Laplace}}(D_j \mid \hat\varphi) - \log \tilde p(D_j \mid \hat\varphi),
    \qquad
    \Delta = I(\hat\varphi)^{-1}\, \nabla \sum_j \log \tilde p(D_j \mid \hat\varphi)

with p̃ by adaptive Gauss–Hermite quadrature for up to three coefficients, and beyond by scrambled
Sobol nodes under a Student-t at the mode.

How skew the posterior of a task is: the largest third derivative in whitened directions.

.. math::

    \gamma_j = \max_{\lVert v \rVert = 1} \left|D^3 \Psi_j(z_j^*)[U_j v, U_j v, U_j v]\right|,
    \qquad A_j^{-1} = U_j U_j^\top

It is what Laplace's approximation leaves out first: with one coefficient its relative error begins
with (5/24) γ². Reference: Tierney and Kadane (1986), JASA 81(393).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes import inputs
from hierbayes.adaptation import Laplace, Quadrature
from hierbayes.adaptation.mode import LogJoint, Mode
from hierbayes.errors import InputError, NotApplicable
from hierbayes.fit import Fit
from hierbayes.fit.fit import check_fit
from hierbayes.likelihoods import Bernoulli, Binomial, NegativeBinomial, Poisson
from hierbayes.meta.better_evidence import (
    AroundPhi,
    Information,
    Runs,
    gauss_hermite,
    held_at,
    jackknife_error,
    log_evidences,
    newton_shift,
    observed_information,
    pooled,
    scrambled_sobol,
)
from hierbayes.meta.empirical_bayes import EmpiricalBayes
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import as_rng, float64, solve_upper
from hierbayes.sharding import gathered
from hierbayes.tasks import Tasks

ASCENT_STEPS = 60
"""Of the power method from every axis."""


def third_derivatives(tasks: LogJoint, z: jax.Array, factor: jax.Array) -> jax.Array:
    """D³Ψ_j (d, d, d, J) at z (d, J) along the columns of U_j, from factors of A_j (d, d, J)."""
    d, identity = len(z), jnp.broadcast_to(jnp.eye(len(z))[:, :, None], factor.shape)
    columns = jnp.stack([solve_upper(factor, identity[:, k]) for k in range(d)], axis=1)

    def along(k: jax.Array) -> jax.Array:
        direction = jnp.take(columns, k, axis=1)
        bent = jax.jvp(lambda at: tasks.bend(at).curvature, (z,), (direction,))[1]
        return -jnp.einsum("abj,apj,bqj->pqj", bent, columns, columns)

    return jax.lax.map(along, jnp.arange(d))


def largest(tensors: jax.Array) -> jax.Array:
    """max |T[v, v, v]| over unit vectors, (J,), of symmetric tensors (d, d, d, J).

    By the power method with a shift, which never falls (Kolda and Mayo 2011, SIAM Journal on Matrix
    Analysis 32(4)), from every axis and every diagonal between two.
    """
    d, num_tasks = tensors.shape[0], tensors.shape[-1]
    if d == 1:
        return jnp.abs(tensors[0, 0, 0])
    unit = jnp.eye(d)
    pairs = [unit[i] + s * unit[k] for i in range(d) for k in range(i) for s in (1.0, -1.0)]
    starts = jnp.stack([*unit, *(pair / jnp.sqrt(2.0) for pair in pairs)])
    shift = jnp.sqrt((tensors**2).sum((0, 1, 2)))

    def ascend(start: jax.Array) -> jax.Array:
        def step(v: jax.Array, _: None) -> tuple[jax.Array, None]:
            pull = jnp.einsum("abcj,bj,cj->aj", tensors, v, v)
            turned = jnp.where((pull * v).sum(0) < 0, -v, v)  # T is odd
            v = pull + 2.0 * shift * turned
            return v / jnp.maximum(jnp.sqrt((v**2).sum(0)), 1e-300), None

        first = jnp.broadcast_to(start[:, None], (d, num_tasks))
        v, _ = jax.lax.scan(step, first, None, length=ASCENT_STEPS)
        return jnp.abs(jnp.einsum("abcj,aj,bj,cj->j", tensors, v, v, v))

    return jax.lax.map(ascend, starts).max(0)


def skewness(tasks: LogJoint, z: jax.Array, factor: jax.Array) -> jax.Array:
    """γ_j of every task, (J,), at its mode z (d, J) with a lower factor of A_j (d, d, J)."""
    return largest(third_derivatives(tasks, z, factor))


NODES = {1: (41, 31), 2: (15, 11), 3: (9, 7)}
"""Gauss–Hermite nodes a dimension, and fewer, whose difference tells the error of the more."""

SOBOL_NODES, REPLICATES = 64, 8
"""Nodes of a scramble, and scrambles, of which the reference consists beyond three coefficients."""

RESIDUAL, ERROR, SKEWNESS = 1e-4, 0.05, 0.5
"""What is flagged: a whitened gradient that would raise Ψ by more than rounding; an error in
log p̂; and the skewness at which its first term, (5/24) γ², reaches that error."""


class OfTasks(NamedTuple):
    """Norms of the whitened gradient, Laplace's log p̂ and the skewness, each (J,)."""

    residual: Any
    laplace: Any
    skewness: Any


@functools.partial(jax.jit, static_argnums=0)
def _of_tasks(model: HierarchicalModel, around: AroundPhi, held: Mode) -> OfTasks:
    tasks = around.tasks(model, around.vector)
    laplace = held.log_integral + tasks.rows.constant
    return OfTasks(jnp.sqrt(2 * held.gain), laplace, skewness(tasks, held.z, held.factor))


def laplace_check(fit: Fit, *, seed: int | jax.Array = 0) -> Any:
    r"""Laplace's approximation of every task's evidence, held against a better one at φ̂.

    .. math::

        e_j = \log \hat p_{\text{Laplace}}(D_j \mid \hat\varphi)
            - \log \tilde p(D_j \mid \hat\varphi), \qquad
        \gamma_j = \max_{\lVert v \rVert = 1} |D^3\Psi_j(z_j^*)[U_j v, U_j v, U_j v]|

    An error of 0.01 a task looks like nothing, but it is systematic: over J tasks it adds up to
    J × 0.01, and moves φ̂ by an amount that more tasks do not mend. Read ``attrs["shift"]`` first.

    Parameters
    ----------
    fit : Fit
        By :func:`~hierbayes.empirical_bayes`, on tasks whose evidence has no closed form. Of a fit
        by Laplace the shift is that of its φ̂; of one by quadrature it is what is left, next to
        nothing, and ``error`` says what Laplace would have cost.
    seed : int or JAX key
        Of the scrambled nodes, beyond three coefficients.

    Returns
    -------
    DataFrame
        A row a task. ``residual``: norm of the whitened gradient at the mode. ``error``: e_j, in
        nats. ``reference_error``: the standard error of log p̃ over scrambles; by quadrature its
        change from fewer nodes. ``skewness``: γ_j. ``effective_count``: min(y, n − y) of binary and
        binomial outcomes, y of counts, NaN of others. ``flag``: "residual" above 1e-4, "error"
        beyond 0.05 and twice its own error, "skewness" above 0.5, or nothing.

        ``attrs``: ``total_error`` Σ_j e_j and its ``total_reference_error``; ``shift``, by name of
        φ's entries one Newton step on the better evidence in posterior standard deviations,
        ``shift_error`` its Monte Carlo error (NaN by quadrature) and ``farthest`` the largest; more
        than 0.25 is worth another evidence. Entries at a bound are NaN, and all are where the
        evidence is not concave at φ̂.

    Raises
    ------
    InputError
        Under full Bayes, of Gaussian tasks, and of methods that use no evidence: with the reason
        why nothing need be checked.

    References
    ----------
    Joe (2008), Accuracy of Laplace approximation for discrete response mixed models, Computational
    Statistics & Data Analysis 52(12).
    Owen (1997), Scrambled net variance for integrals of smooth functions, Annals of Statistics.

    Examples
    --------
    Eight pairs of coin tosses, of which Laplace's evidence knows too little:

    >>> import hierbayes as hb, pandas as pd
    >>> data = pd.DataFrame({"g": list("abcdefgh"), "y": [2, 0, 1, 2, 0, 2, 0, 1], "n": 2})
    >>> fit = hb.empirical_bayes(*hb.from_formula("p(y, n) ~ 1 + (1 | g)", data))
    >>> table = hb.checks.laplace_check(fit)
    >>> table["effective_count"].astype(int).tolist()
    [0, 0, 1, 0, 0, 0, 0, 1]
    >>> bool(abs(table.attrs["total_error"]) > 0.05)
    True
    """
    check_fit(fit)
    seed = inputs.seed(seed)
    seed = seed if isinstance(seed, int) else int(as_rng(seed).integers(2**31))
    _refuse(fit)
    fit = fit.inside
    model, tasks, d = fit.model.without_encoder(), fit.tasks, len(fit.tasks.coef)
    with float64():
        known = _information(fit)
        held = held_at(model, known.around)
        found = OfTasks(*gathered(_of_tasks(model, known.around, held), tasks.num_tasks))
        rule = _rule(d, tasks.num_tasks, seed)
        best, error, total_error = _reference(model, known.around, held, rule, d)
        step = (known.inside, known.hessian, known.tilt, rule, held)
        shift = newton_shift(model, known.around, *step)
    away = found.laplace - best[: tasks.num_tasks]
    table = _table(fit, found, away, error[: tasks.num_tasks])
    names = known.around.space.entry_names(fit.tasks.labels.by_dim)
    table.attrs = {
        "total_error": float(away.sum()),
        "total_reference_error": total_error,
        "shift": dict(zip(names, shift.step.tolist(), strict=True)),
        "shift_error": dict(zip(names, shift.error.tolist(), strict=True)),
        "farthest": shift.farthest,
        "num_nodes": int(np.prod(rule.log_weights.shape[:2])),
    }
    return table


def _information(fit: Fit) -> Information:
    """What φ̂ is known by, under the evidence that it was fitted by."""
    num_nodes = fit.adaptation.num_nodes if isinstance(fit.adaptation, Quadrature) else 1
    phi = {name: np.asarray(value) for name, value in fit.phi.items()}
    with_hyperprior = fit.info["criterion"] == "map"
    return observed_information(
        fit.model, fit.tasks, phi, num_nodes, with_hyperprior=with_hyperprior
    )


def _table(fit: Fit, found: OfTasks, away: np.ndarray, reference_error: np.ndarray) -> Any:
    """A row a task; see :func:`laplace_check`."""
    import pandas as pd

    table = pd.DataFrame(
        {
            "residual": found.residual,
            "error": away,
            "reference_error": reference_error,
            "skewness": found.skewness,
            "effective_count": effective_count(fit.tasks, fit.model.likelihood),
        },
        index=pd.Index(fit.tasks.names, name="task"),
    )
    table["flag"] = _flags(table)
    return table


def _refuse(fit: Fit) -> None:
    """Say of other fits why there is nothing to check."""
    if fit.phi_draws is not None:
        raise InputError(
            "full Bayes need not be checked for Laplace's error: it samples with quadrature's "
            "evidence, or with theta itself, and uses Laplace's only to propose"
        )
    if not isinstance(fit.method, EmpiricalBayes):
        raise NotApplicable(
            f"{fit.method} uses no approximation of log p(D | phi): there is nothing to check"
        )
    if fit.model.likelihood.gaussian_in_theta:
        raise InputError(
            "the evidence of Gaussian tasks has a closed form, which Laplace's approximation gives "
            "without an error: nothing need be checked"
        )
    if fit.evidence is None or not isinstance(fit.adaptation, Laplace | Quadrature):
        raise NotApplicable(
            "phi was learned from other tasks than these: check the fit that learned it"
        )


def _rule(dimensions: int, num_tasks: int, seed: int) -> Runs:
    if dimensions in NODES:
        return gauss_hermite(NODES[dimensions][0], dimensions)
    return scrambled_sobol(SOBOL_NODES, dimensions, REPLICATES, num_tasks, seed)


def _reference(
    model: HierarchicalModel, around: AroundPhi, held: Mode, rule: Runs, dimensions: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """log p̃ (J,), its error (J,), and that of the sum over tasks, which share their nodes."""
    logs = log_evidences(model, around, held, rule)
    best, without = pooled(logs)
    if dimensions not in NODES:
        total = float(jackknife_error(without.sum(1)))
        return np.asarray(best), np.asarray(jackknife_error(without)), total
    fewer = gauss_hermite(NODES[dimensions][1], dimensions)
    change = np.asarray(best - log_evidences(model, around, held, fewer)[0])
    return np.asarray(best), np.abs(change), float(np.abs(change.sum()))


def effective_count(tasks: Tasks, likelihood: Any) -> np.ndarray:
    """min(y, n − y) of each task (J,) for binary and binomial outcomes, y for counts, else NaN."""
    y = np.asarray(tasks.outcome, float) * tasks.slots.get("weight", 1.0)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(tasks.task_of_row, values, tasks.num_tasks)

    if isinstance(likelihood, Bernoulli | Binomial):
        trials = tasks.slots.get("trials", np.ones(tasks.num_rows))
        size = total(trials * tasks.slots.get("weight", 1.0))
        return np.minimum(total(y), size - total(y))
    if isinstance(likelihood, Poisson | NegativeBinomial):
        return total(y)
    return np.full(tasks.num_tasks, np.nan)


def _flags(table: Any) -> list[str]:
    """What stands out of each task, in words."""
    away = table["error"].abs()
    raised = {
        "residual": ~(table["residual"] <= RESIDUAL),
        "error": ~((away <= ERROR) | (away <= 2 * table["reference_error"])),
        "skewness": ~(table["skewness"] <= SKEWNESS),
    }
    return [
        ", ".join(name for name, up in zip(raised, row, strict=True) if up)
        for row in zip(*raised.values(), strict=True)
    ]
