r"""Searching the step size whose steps are closest to the posterior under a given prior.

.. math::

    \text{risk}_j = \operatorname{tr} S \bigl[R_j T R_j^\top + \Sigma_{K,j} H_j \Sigma_{K,j}\bigr],
    \qquad
    \text{KL}_j = \tfrac12\Bigl[\operatorname{tr} V_j^{-1}\bigl(\Sigma_{K,j} + M_j\bigr) - 2d
        + \log\frac{|V_j|}{|\Sigma_{K,j}|}\Bigr]

with M_j the bracket, V_j = (H_j + T⁻¹)⁻¹ and Σ_K, R diagonal in the directions of H_j: both are
expectations over tasks drawn from the prior N(φ, T).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.descent import Descent, Flow

FLOW = float("inf")
"""The number of steps of gradient flow, in tables."""

ZOOMS, POINTS = 5, 160


@jax.jit
def rotate(hessian: Any, root: Any, inverse: Any) -> dict[str, Any]:
    """Everything in each task's own directions, where the steps are diagonal; inverse T⁻¹."""
    values, vectors = jnp.linalg.eigh(hessian)

    def rotated(matrix: Any) -> Any:
        matrix = jnp.broadcast_to(matrix, hessian.shape)
        return jnp.einsum("jki,jkl,jlm->jim", vectors, matrix, vectors)

    prior = root @ root.T
    white = jnp.einsum("ki,jkl,lm->jim", root, hessian, root)
    inner = jnp.linalg.inv(jnp.eye(len(root)) + white)
    bayes = jnp.einsum("ki,jil,ml->jkm", root, inner, root)
    weight = hessian.sum(0) / len(hessian)
    return {
        "curvature": jnp.maximum(values, 0.0),
        "prior": rotated(prior),
        "weight": rotated(weight),
        "bayes_precision": rotated(hessian + inverse),
        "bayes_risk": jnp.einsum("kl,jlk->j", weight, bayes),
        "log_det": jnp.linalg.slogdet(inner)[1] + 2 * jnp.linalg.slogdet(root)[1],
    }


@functools.partial(jax.jit, static_argnums=1)
def losses_after(problem: Any, num_steps: float, step_sizes: Any) -> tuple[Any, Any]:
    """(risk, expected KL) of every task (J,) after K steps of each task's own size (J,)."""

    def respond(curvature: Any, eta: Any) -> Any:
        method = Flow(eta) if num_steps == FLOW else Descent(int(num_steps), eta)
        return method.responses(curvature)

    left, moved = jax.vmap(respond)(problem["curvature"], step_sizes)
    error = left[:, :, None] * problem["prior"] * left[:, None, :]
    noise = moved**2 * problem["curvature"]
    d = left.shape[1]
    error = error + noise[:, :, None] * jnp.eye(d)
    risk = (problem["weight"] * error).sum((1, 2))
    precision = problem["bayes_precision"]
    spread = (jnp.diagonal(precision, axis1=1, axis2=2) * moved).sum(1)
    kl = spread + (precision * error).sum((1, 2)) - 2 * d + problem["log_det"]
    return risk, 0.5 * (kl - jnp.log(moved).sum(1))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _over(problem: Any, num_steps: float, which: int, step_sizes: Any) -> Any:
    """One of :func:`losses_after` for each of many step sizes, (M, J)."""
    return jax.lax.map(
        lambda eta: losses_after(problem, num_steps, eta)[which], step_sizes, batch_size=8
    )


def search(problem: Any, num_steps: float, criterion: str, overshoot: bool) -> dict[str, Any]:
    """The best η of all tasks and of each, by a grid and zooming in."""
    largest = float(problem["curvature"].max())
    own = problem["curvature"].max(1)
    own = np.where(own > 0, own, largest)
    which = 0 if criterion == "risk" else 1
    shortest, longest = _range(problem, num_steps)

    def best(limit: np.ndarray, reduce: bool) -> np.ndarray:
        if num_steps == FLOW:
            etas = np.geomspace(shortest, longest, POINTS)[:, None] * np.ones(len(limit))
        else:
            beyond = np.linspace(1, 2 * (1 - 1e-9), POINTS // 3)[1:] if overshoot else np.zeros(0)
            within = np.geomspace(
                np.minimum(shortest, 1e-5 / limit), 1 / limit, POINTS - len(beyond)
            )
            etas = np.concatenate([within, beyond[:, None] / limit])
        for _ in range(ZOOMS + 1):
            losses = np.asarray(_over(problem, num_steps, which, etas))
            losses = losses.sum(1, keepdims=True) if reduce else losses
            at = np.argmin(np.where(np.isfinite(losses), losses, np.inf), axis=0)
            columns = np.arange(etas.shape[1])
            at = np.broadcast_to(at, columns.shape)
            low, upper = etas[np.maximum(at - 1, 0), columns], etas[
                np.minimum(at + 1, len(etas) - 1), columns
            ]  # fmt: skip
            chosen = etas[at, columns]
            etas = np.linspace(low, upper, POINTS)
        return chosen

    count = len(own)
    shared = best(np.full(count, largest), reduce=True)[0]
    single = best(own, reduce=False)
    return {"num_steps": num_steps, "step_size": float(shared), "own": single}


def _range(problem: Any, num_steps: float) -> tuple[float, float]:
    """Between which η, or times of flow, the best are: Kη is about a posterior variance.

    In a direction of curvature λ and prior variance t the best s lies between t / (1 + λt) and,
    for flow, log(1 + λt) / λ ≤ t; where the prior is a point there is no shortest.
    """
    spread = np.linalg.eigvalsh(problem["prior"])
    widest = float(spread.max())
    precision = np.linalg.eigvalsh(problem["bayes_precision"]).max()
    narrowest = 1 / precision if precision > 0 else 1e-8 * widest
    count = 1.0 if num_steps == FLOW else num_steps
    return 0.1 * narrowest / count, 10 * widest
