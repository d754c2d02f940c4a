"""What a network's ``apply`` does beside what it says: mix a task's rows, or draw numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.numerics import arithmetic

DRAWING = {
    "random_bits", "random_seed", "random_wrap", "random_fold_in", "random_split", "threefry2x32",
    "rng_bit_generator", "rng_uniform",
}  # fmt: skip
"""JAX's operations on keys and random numbers."""

WITHOUT_DRAWS = (
    "apply(params, x) must give the same f for the same weights and rows: switch dropout off "
    "(Linen: deterministic=True; nnx: model.eval(); Equinox: eqx.nn.inference_mode(model))"
)

ROWS, OTHERS = 4, 28
"""Rows of which f is asked, two by two and among others; rows beside them at most."""

SAME = {"float32": 1e-4, "float64": 1e-8}
"""Share of the largest f that rounding may move a row's by, when other rows stand beside it."""


def draws(jaxpr: Any) -> bool:
    """Whether a program of JAX's has random numbers in it, however deep."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in inner.eqns:
        if equation.primitive.name in DRAWING:
            return True
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            if hasattr(getattr(value, "jaxpr", value), "eqns") and draws(value):
                return True
    return False


def asks_for_draws(message: str) -> bool:
    """Whether an error is that of dropout without a key."""
    return any(word in message.lower() for word in ("rng", "dropout", "prng", "'key'"))


def depends_on_other_rows(
    apply: Callable[[Any, Any], Any], initial: Callable[[Any], Any], x: Any, dtype: str
) -> bool:
    """Whether f of some rows of ``x`` (N, …) changes with the rows that stand beside them.

    Rows of zeros, which fill up, and other rows of ``x`` are put beside them, at the initial
    weights and near by: a gate that is shut at the start opens in training. The slope of f in the
    other rows counts too; it is exactly zero where rows are not mixed. An ``apply`` that does not
    take other numbers of rows counts as one that mixes them.
    """
    # may be asked inside a trace: the weights and rows are known there too
    with jax.ensure_compile_time_eval(), arithmetic(dtype):
        rows = jnp.asarray(np.asarray(x), dtype)
        if not len(rows):
            rows = jnp.ones((1, *rows.shape[1:]), dtype)
        own = rows[np.arange(ROWS) % len(rows)]
        others = jnp.concatenate([rows[::-1][:OTHERS], jnp.zeros_like(own)])
        start = initial(jax.random.key(0))
        leaves, structure = jax.tree.flatten(start)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        moved = [
            w + 0.1 * (1 + jnp.abs(w)) * jax.random.normal(k, w.shape, w.dtype)
            for w, k in zip(leaves, keys, strict=True)
        ]
        try:
            return any(
                _changes(apply, weights, own, others, SAME[dtype])
                for weights in (start, structure.unflatten(moved))
            )
        except Exception:  # whatever the user's own function raises
            return True


def _changes(apply: Any, weights: Any, own: Any, others: Any, same: float) -> bool:
    count = len(own)
    run = jax.jit(apply)
    alone = np.concatenate([run(weights, own[i : i + 2]) for i in range(0, count, 2)])
    size = np.abs(np.where(np.isfinite(alone), alone, 0.0)).max(initial=0.0)
    for beside in (others, jnp.zeros_like(others)):
        among = np.asarray(run(weights, jnp.concatenate([own, beside])))[:count]
        if not np.allclose(among, alone, rtol=0, atol=same * size, equal_nan=True):
            return True
    turned = jnp.cos(jnp.arange(alone.size, dtype=own.dtype)).reshape(alone.shape)

    def weighed(beside: Any) -> Any:
        return (turned * apply(weights, jnp.concatenate([own, beside]))[:count]).sum()

    slope = np.nan_to_num(np.asarray(jax.jit(jax.grad(weighed))(others)))
    return bool((slope != 0).any())
