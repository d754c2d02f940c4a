r"""Slope and curvature of every task's log likelihood in its own θ.

.. math::

    g_j = \nabla_\theta \log p(D_j \mid \theta), \qquad
    H_j = -\nabla_\theta^2 \log p(D_j \mid \theta)
    \quad\text{or}\quad
    H_j^{\text{GGN}} = J_j^\top W_j J_j, \;\; W_j = -\partial_f^2 \log p(y \mid f)

with J = ∂f/∂θ. The generalised Gauss–Newton matrix is positive semidefinite where the family is
log-concave in f; both are the same where f is linear in θ. A row moves its own task's θ only, so
one product with the sum over all rows is every task's product: d products give all matrices, and
no row is padded.

H and g of every task at φ, what steps do along the directions of H, and the steps themselves.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from hierbayes.adaptation.descent import Descent, Flow
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Task


class Response(NamedTuple):
    """λ, v, ṽ, r, s of every task and direction."""

    curvature: Any
    directions: Any
    dual: Any
    left: Any
    moved: Any


@functools.partial(jax.jit, static_argnums=(0, 1))
def linearise(
    model: HierarchicalModel, kind: Kind, phi: Any, rows: Task, task_of_row: Any, location: Any
) -> tuple[jax.Array, jax.Array]:
    """H and g of every task at φ."""
    hessian = curvatures_at(model, phi, rows, task_of_row, location, kind)
    return hessian, slopes(model, phi, rows, task_of_row, location)


@jax.jit
def respond(hessian: Any, method: Descent | Flow, root: Any) -> Response:
    """What the method does along each direction of the (preconditioned) curvature."""
    root = jnp.broadcast_to(root, hessian.shape)
    white = jnp.einsum("jki,jkl,jlm->jim", root, hessian, root)
    values, vectors = jnp.linalg.eigh(white)
    dual = jnp.linalg.solve(jnp.swapaxes(root, -1, -2), vectors)
    left, moved = method.responses(values)
    return Response(values, root @ vectors, dual, left, moved)


@functools.partial(jax.jit, static_argnums=0)
def run(
    model: HierarchicalModel,
    phi: Any,
    rows: Task,
    task_of_row: Any,
    location: Any,
    method: Descent | Flow,
    root: Any,
) -> jax.Array:
    """θ_K of the steps themselves, preconditioned by B = C Cᵀ with ``root`` C, or its diagonal."""

    def uphill(theta: jax.Array) -> jax.Array:
        slope = slopes(model, phi, rows, task_of_row, theta)
        if root.ndim == 1:
            return root**2 * slope
        return (root @ (jnp.swapaxes(root, -1, -2) @ slope[..., None]))[..., 0]

    return method.run(uphill, jnp.asarray(location))


Kind = Literal["ggn", "hessian"]


def slopes(
    model: HierarchicalModel, phi: dict[str, Any], rows: Task, task_of_row: Any, thetas: Any
) -> Any:
    """g_j of every task at its own θ (J, …)."""
    return jax.grad(
        lambda t: model.likelihood.log_likelihood_of_rows(t, phi, rows, task_of_row).sum()
    )(thetas)


def products(
    model: HierarchicalModel,
    phi: dict[str, Any],
    rows: Task,
    task_of_row: Any,
    thetas: Any,
    vectors: Any,
    kind: Kind,
) -> Any:
    """H_j v_j of every task, (J, …), without forming H."""
    linear = model.likelihood.linear  # then both are the same
    if kind == "hessian" or linear or not model.likelihood.has_location:
        return -jax.jvp(lambda t: slopes(model, phi, rows, task_of_row, t), (thetas,), (vectors,))[
            1
        ]
    likelihood = model.likelihood

    def outputs(t: Any) -> Any:
        return likelihood.locations(t, phi, rows, task_of_row)

    def slope_in_f(f: Any) -> Any:
        return jax.grad(
            lambda values: jnp.where(
                rows.mask, likelihood.family(values, phi, rows.slots).log_prob(rows.outcome), 0.0
            ).sum()
        )(f)

    f, moved = jax.jvp(outputs, (thetas,), (vectors,))
    weighted = jax.jvp(slope_in_f, (f,), (moved,))[1]
    return -jax.vjp(outputs, thetas)[1](weighted)[0]


def curvatures_at(
    model: HierarchicalModel,
    phi: dict[str, Any],
    rows: Task,
    task_of_row: Any,
    thetas: jax.Array,
    kind: Kind,
) -> jax.Array:
    """H_j of every task, (J, d, d), symmetric, one product a column."""
    d = thetas.shape[-1]

    def column(unit: jax.Array) -> jax.Array:
        vectors = jnp.broadcast_to(unit, thetas.shape)
        return products(model, phi, rows, task_of_row, thetas, vectors, kind)

    columns = jax.lax.map(column, jnp.eye(d, dtype=thetas.dtype))
    matrices = jnp.moveaxis(columns, 0, -1)
    return 0.5 * (matrices + jnp.swapaxes(matrices, -1, -2))
