r"""The derivative of a maximum by the implicit function theorem, which keeps no step to it.

.. math:: \nabla_\theta \Psi(\theta^*, \varphi) = 0 \;\Rightarrow\;
          \frac{d\theta^*}{d\varphi} = A^{-1}\, \partial_\varphi \nabla_\theta \Psi, \qquad
          A = -\nabla_\theta^2 \Psi(\theta^*, \varphi)

A is never formed: conjugate gradients with products A v solve for its inverse, until what is left
is small. Where A is not positive definite the point is no maximum, and there is no such derivative;
conjugate gradients then stop at the first direction that bends upwards, the point before it of the
smallest residual is taken, and it is said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
"""Share of the right-hand side that may be left of it."""

A_WEIGHT, MOST = 20, 5000
"""Iterations at most: so many a weight, for rounding, and in all."""


class Solved(NamedTuple):
    """x with A x ≈ b, ‖b − A x‖ / ‖b‖, and whether A bends downwards in all directions taken."""

    x: jax.Array
    residual: jax.Array
    definite: jax.Array


def with_implicit_slope(
    run: Callable[[Any, Any], Any], slope: Callable[[Any], Any], start: Any
) -> Any:
    """``run(slope, start)`` as a point, with the derivative in φ of the maximum it stands for.

    ``slope`` is ∇Ψ and may depend on φ, and so may ``start``, which only the path depends on.
    """
    still = jax.lax.stop_gradient(run(slope, start))
    at = slope(still)
    # zero in value, ∂_φ ∇Ψ in derivative
    moves = jax.tree.map(lambda g: g - jax.lax.stop_gradient(g), at)
    shift = jax.lax.custom_linear_solve(
        curvature(slope, still), moves, lambda a, b: _solved(a, b)[0], symmetric=True
    )
    return jax.tree.map(jnp.add, still, shift)


def norm(tree: Any) -> jax.Array:
    """The length of a pytree as a vector."""
    return jnp.linalg.norm(ravel_pytree(tree)[0])


def curvature(slope: Callable[[Any], Any], at: Any) -> Callable[[Any], Any]:
    """v → A v at a point."""
    return lambda vector: jax.tree.map(jnp.negative, jax.jvp(slope, (at,), (vector,))[1])


def how_solved(slope: Callable[[Any], Any], at: Any, pull: Any) -> Solved:
    """How A x = ``pull`` is solved at a point, as the derivative of a score with this slope is."""
    return _solved(curvature(slope, at), pull)[1]


def _solved(product: Callable[[Any], Any], target: Any) -> tuple[Any, Solved]:
    flat, back = ravel_pytree(target)
    found = solve(lambda v: ravel_pytree(product(back(v)))[0], flat)
    return back(found.x), found


def solve(product: Callable[[Any], Any], target: jax.Array) -> Solved:
    """x with A x = ``target``, A symmetric, by conjugate gradients as far as A is definite."""
    square = target @ target
    enough = TOLERANCE[target.dtype.name] ** 2 * square
    most = min(A_WEIGHT * len(target), MOST)

    def body(state: Any) -> Any:
        count, x, residual, direction, before, best, _ = state
        turned = product(direction)
        bend = direction @ turned
        definite = bend > 0
        share = jnp.where(definite, before / jnp.where(definite, bend, 1.0), 0.0)
        residual = residual - share * turned
        after = residual @ residual
        onward = residual + after / before * direction
        x = x + share * direction
        closer = after < best[1]
        best = jnp.where(closer, x, best[0]), jnp.where(closer, after, best[1])
        return count + 1, x, residual, onward, after, best, definite

    def unfinished(state: Any) -> Any:
        count, *_, left, _, definite = state
        return (left > enough) & (count < most) & definite

    zero = jnp.zeros_like(target)
    start = (0, zero, target, target, square, (zero, square), jnp.asarray(True))
    _, x, *_, best, definite = jax.lax.while_loop(unfinished, body, start)
    x = jnp.where(definite, x, best[0])
    # computed anew: rounding moves it from what is carried along
    left = jnp.linalg.norm(target - product(x))
    size = jnp.sqrt(square)
    return Solved(x, jnp.where(size > 0, left / jnp.where(size > 0, size, 1.0), 0.0), definite)
