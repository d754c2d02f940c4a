"""Maximise a smooth objective over a pytree: SciPy's L-BFGS, or any Optax optimiser."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from hierbayes.meta.optimum import newton
from hierbayes.numerics import to_numpy

if TYPE_CHECKING:
    import optax

CHUNK = 50
"""Optax steps inside one compiled call."""

POLISHED = 50
"""Parameters up to which Newton steps end what L-BFGS leaves: it stops where the objective is flat
to rounding, which φ is not."""

CONVERGED = 1e-4
"""Largest gradient norm, in parameters of order one, that counts as a maximum."""


TOO_FAR = 1e300
"""Stands for an objective that is not finite."""


@dataclass(frozen=True)
class Ascent:
    """Where the ascent ended."""

    parameters: Any
    value: float
    warnings: list[str]


def maximise(
    objective: Callable[..., jax.Array],
    start: Any,
    optimiser: optax.GradientTransformation | None,
    num_steps: int,
    progress: bool | None,
    name: str,
    data: tuple[Any, ...] = (),
) -> Ascent:
    """Ascend ``objective(parameters, *data)`` from ``start``, of order one; L-BFGS unless told.

    ``data`` are arguments of the compiled programs, so that they stay spread over devices where
    they are; what an objective holds itself would be copied to every device.
    """
    from tqdm.auto import tqdm

    shown = sys.stderr.isatty() if progress is None else progress
    with tqdm(total=num_steps, desc=name, disable=not shown, leave=False, delay=1.0) as bar:
        if optimiser is None:
            parameters, value, norm, taken = _lbfgs(objective, start, data, num_steps, bar)
        else:
            parameters, value, norm, taken = _optax(
                objective, start, data, optimiser, num_steps, bar
            )
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
    objective: Callable[..., jax.Array], start: Any, data: Any, num_steps: int, bar: Any
) -> tuple[Any, float, float, int]:
    from scipy import optimize

    flat, unravel = ravel_pytree(start)
    value_and_grad = jax.jit(jax.value_and_grad(lambda v, *d: -objective(unravel(v), *d)))

    def loss(vector: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = value_and_grad(vector, *data)
        if np.isfinite(float(value)):
            return float(value), np.asarray(grad)
        return TOO_FAR, np.zeros(len(vector))  # a line search that went too far comes back

    def report(intermediate_result: Any) -> None:
        bar.update(1)
        bar.set_postfix({"log density a row": f"{-intermediate_result.fun:.4f}"})

    run: Any = optimize.minimize(
        loss, np.asarray(flat), jac=True, method="L-BFGS-B", callback=report,
        options={"maxiter": num_steps, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 20},
    )  # fmt: skip
    x, value, slope = np.asarray(run.x), float(run.fun), np.asarray(run.jac)
    if len(x) <= POLISHED and np.linalg.norm(slope) <= CONVERGED:
        x, value, slope, _ = newton(loss, x, np.full(len(x), -np.inf), flat=1e-8)
    value = np.nan if value >= TOO_FAR else -value
    return unravel(jnp.asarray(x)), value, float(np.linalg.norm(slope)), int(run.nit)


def _optax(
    objective: Callable[..., jax.Array],
    start: Any,
    data: Any,
    optimiser: optax.GradientTransformation,
    num_steps: int,
    bar: Any,
) -> tuple[Any, float, float, int]:
    import optax

    chosen = optax.with_extra_args_support(optimiser)

    @functools.partial(jax.jit, static_argnums=1)
    def chunk(carry: Any, length: int, data: Any) -> tuple[Any, jax.Array]:
        def loss(parameters: Any) -> jax.Array:
            return -objective(parameters, *data)

        def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
            parameters, state = carry
            value, grad = jax.value_and_grad(loss)(parameters)
            updates, state = chosen.update(
                grad, state, parameters, value=value, grad=grad, value_fn=loss
            )
            return (optax.apply_updates(parameters, updates), state), -value

        return jax.lax.scan(step, carry, None, length)

    carry, taken = (start, chosen.init(start)), 0
    while taken < num_steps:
        size = min(CHUNK, num_steps - taken)
        carry, values = chunk(carry, size, data)
        taken += size
        bar.update(size)
        bar.set_postfix({"log density a row": f"{float(values[-1]):.4f}"})
        if not np.isfinite(values).all():
            break
    value, grad = jax.jit(jax.value_and_grad(objective))(carry[0], *data)
    return to_numpy(carry[0]), float(value), float(optax.tree.norm(grad)), taken
