"""Maximise a smooth objective over a pytree: SciPy's L-BFGS, or any Optax optimiser."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

if TYPE_CHECKING:
    import optax

CHUNK = 50
"""Optax steps inside one compiled call."""

CONVERGED = 1e-4
"""Largest gradient norm, in parameters of order one, that counts as a maximum."""


@dataclass(frozen=True)
class Ascent:
    """Where the ascent ended."""

    parameters: Any
    value: float
    warnings: list[str]


def maximise(
    objective: Callable[[Any], jax.Array],
    start: Any,
    optimiser: optax.GradientTransformation | None,
    num_steps: int,
    progress: bool | None,
    name: str,
) -> Ascent:
    """Ascend ``objective`` from ``start``, both of order one; L-BFGS unless told otherwise."""
    from tqdm.auto import tqdm

    shown = sys.stderr.isatty() if progress is None else progress
    with tqdm(total=num_steps, desc=name, disable=not shown, leave=False, delay=1.0) as bar:
        if optimiser is None:
            parameters, value, norm, taken = _lbfgs(objective, start, num_steps, bar)
        else:
            parameters, value, norm, taken = _optax(objective, start, optimiser, num_steps, bar)
    warnings = []
    if not np.isfinite(value):
        warnings.append(
            f"{name} diverged: the objective is not finite after {taken} outer steps; lower "
            "the outer optimiser's rate, or the inner step_size"
        )
    elif norm > CONVERGED:
        warnings.append(
            f"{name} has not converged after {taken} outer steps (gradient norm {norm:.1e} in "
            f"scaled parameters, {CONVERGED:.0e} wanted); raise num_meta_steps"
        )
    return Ascent(parameters, value, warnings)


def _lbfgs(
    objective: Callable[[Any], jax.Array], start: Any, num_steps: int, bar: Any
) -> tuple[Any, float, float, int]:
    from scipy import optimize

    flat, unravel = ravel_pytree(start)
    value_and_grad = jax.jit(jax.value_and_grad(lambda v: -objective(unravel(v))))

    def loss(vector: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = value_and_grad(vector)
        return float(value), np.asarray(grad)

    def report(intermediate_result: Any) -> None:
        bar.update(1)
        bar.set_postfix({"log density a row": f"{-intermediate_result.fun:.4f}"})

    run: Any = optimize.minimize(
        loss, np.asarray(flat), jac=True, method="L-BFGS-B", callback=report,
        options={"maxiter": num_steps, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 20},
    )  # fmt: skip
    return unravel(run.x), -float(run.fun), float(np.linalg.norm(run.jac)), int(run.nit)


def _optax(
    objective: Callable[[Any], jax.Array],
    start: Any,
    optimiser: optax.GradientTransformation,
    num_steps: int,
    bar: Any,
) -> tuple[Any, float, float, int]:
    import optax

    chosen = optax.with_extra_args_support(optimiser)

    def loss(parameters: Any) -> jax.Array:
        return -objective(parameters)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        parameters, state = carry
        value, grad = jax.value_and_grad(loss)(parameters)
        updates, state = chosen.update(
            grad, state, parameters, value=value, grad=grad, value_fn=loss
        )
        return (optax.apply_updates(parameters, updates), state), -value

    chunk = jax.jit(lambda carry, length: jax.lax.scan(step, carry, None, length), static_argnums=1)
    carry, taken = (start, chosen.init(start)), 0
    while taken < num_steps:
        size = min(CHUNK, num_steps - taken)
        carry, values = chunk(carry, size)
        taken += size
        bar.update(size)
        bar.set_postfix({"log density a row": f"{float(values[-1]):.4f}"})
        if not np.isfinite(values).all():
            break
    value, grad = jax.value_and_grad(objective)(carry[0])
    return carry[0], float(value), float(optax.tree.norm(grad)), taken
