"""Maximise a smooth objective over a vector: SciPy's L-BFGS, or any Optax optimiser."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

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


Objective = Callable[..., jax.Array]
"""A function of (x, *data), hashable: one that is equal runs the programs that are compiled."""


@dataclass(frozen=True)
class Ascent:
    """Where the ascent ended."""

    x: np.ndarray
    value: float
    warnings: list[str]


def maximise(
    objective: Objective,
    start: np.ndarray,
    optimiser: optax.GradientTransformation | None,
    num_steps: int,
    progress: bool | None,
    name: str,
    data: tuple[Any, ...] = (),
) -> Ascent:
    """Ascend ``objective(x, *data)`` from ``start``, of order one; L-BFGS unless told.

    ``data`` are arguments of the compiled programs, so that they stay spread over devices where
    they are, and other data of the same shapes compile nothing.
    """
    from tqdm.auto import tqdm

    shown = sys.stderr.isatty() if progress is None else progress
    with tqdm(total=num_steps, desc=name, disable=not shown, leave=False, delay=1.0) as bar:
        if optimiser is None:
            x, value, norm, taken = _lbfgs(objective, start, data, num_steps, bar)
        else:
            x, value, norm, taken = _optax(objective, start, data, optimiser, num_steps, bar)
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
    return Ascent(x, value, warnings)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_slope(objective: Objective, x: Any, data: Any) -> Any:
    return jax.value_and_grad(lambda v: -objective(v, *data))(x)


def _lbfgs(
    objective: Objective, start: np.ndarray, data: Any, num_steps: int, bar: Any
) -> tuple[np.ndarray, float, float, int]:
    from scipy import optimize

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = _value_and_slope(objective, x, data)
        if np.isfinite(float(value)):
            return float(value), np.asarray(slope)
        return TOO_FAR, np.zeros(len(x))  # a line search that went too far comes back

    def report(intermediate_result: Any) -> None:
        bar.update(1)
        bar.set_postfix({"log density a row": f"{-intermediate_result.fun:.4f}"})

    run: Any = optimize.minimize(
        loss, np.asarray(start), jac=True, method="L-BFGS-B", callback=report,
        options={"maxiter": num_steps, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 20},
    )  # fmt: skip
    x, value, slope = np.asarray(run.x), float(run.fun), np.asarray(run.jac)
    if len(x) <= POLISHED and np.linalg.norm(slope) <= CONVERGED:
        x, value, slope, _ = newton(loss, x, np.full(len(x), -np.inf), flat=1e-8)
    return x, np.nan if value >= TOO_FAR else -value, float(np.linalg.norm(slope)), int(run.nit)


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def _chunk(
    objective: Objective, optimiser: Any, carry: Any, length: int, data: Any
) -> tuple[Any, jax.Array]:
    """So many steps of an optimiser; one of the user's own compiles where it is another object."""
    import optax

    chosen = optax.with_extra_args_support(optimiser)

    def loss(x: Any) -> jax.Array:
        return -objective(x, *data)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        x, state = carry
        value, grad = jax.value_and_grad(loss)(x)
        updates, state = chosen.update(grad, state, x, value=value, grad=grad, value_fn=loss)
        return (x + updates, state), -value

    return jax.lax.scan(step, carry, None, length)


def _optax(
    objective: Objective,
    start: np.ndarray,
    data: Any,
    optimiser: optax.GradientTransformation,
    num_steps: int,
    bar: Any,
) -> tuple[np.ndarray, float, float, int]:
    carry, taken = (jnp.asarray(start), optimiser.init(jnp.asarray(start))), 0
    while taken < num_steps:
        size = min(CHUNK, num_steps - taken)
        carry, values = _chunk(objective, optimiser, carry, size, data)
        taken += size
        bar.update(size)
        bar.set_postfix({"log density a row": f"{float(values[-1]):.4f}"})
        if not np.isfinite(values).all():
            break
    value, slope = _value_and_slope(objective, carry[0], data)
    return to_numpy(carry[0]), -float(value), float(np.linalg.norm(slope)), taken
