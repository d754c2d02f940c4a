r"""The derivative of a maximum by the implicit function theorem, which keeps no step to it.

.. math:: \nabla_\theta \Psi(\theta^*, \varphi) = 0 \;\Rightarrow\;
          \frac{d\theta^*}{d\varphi} = A^{-1}\, \partial_\varphi \nabla_\theta \Psi, \qquad
          A = -\nabla_\theta^2 \Psi(\theta^*, \varphi)

A is never formed: a few conjugate-gradient iterations with products A v solve for its inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

NUM_ITERATIONS = 5
"""Conjugate-gradient iterations, as in Rajeswaran et al. (2019)."""


def with_implicit_slope(
    run: Callable[[Any, Any], Any], slope: Callable[[Any], Any], start: Any
) -> Any:
    """``run(slope, start)`` as a point, with the derivative in φ of the maximum it stands for.

    ``slope`` is ∇Ψ and may depend on φ, and so may ``start``, which only the path depends on.
    """
    still = jax.lax.stop_gradient(run(slope, start))

    def product(vector: Any) -> Any:
        return jax.tree.map(jnp.negative, jax.jvp(slope, (still,), (vector,))[1])

    at = slope(still)
    # zero in value, ∂_φ ∇Ψ in derivative
    moves = jax.tree.map(lambda g: g - jax.lax.stop_gradient(g), at)
    shift = jax.lax.custom_linear_solve(
        product, moves, lambda a, b: cg(a, b, maxiter=NUM_ITERATIONS)[0], symmetric=True
    )
    return jax.tree.map(jnp.add, still, shift)
