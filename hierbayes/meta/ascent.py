"""Maximise a smooth objective over a pytree with Optax, many steps in one compiled call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

CHUNK = 50
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Ascent:
    """Where the ascent ended; ``values`` holds the objective after every step."""

    parameters: Any
    value: float
    values: np.ndarray
    warnings: list[str]


def maximise(
    objective: Callable[[Any], jax.Array],
    start: Any,
    optimiser: optax.GradientTransformation | None,
    num_steps: int,
    progress: bool | None,
    name: str,
) -> Ascent:
    """Ascend ``objective`` (of order one a row) from ``start``; L-BFGS where no optimiser is given.

    Stops when the gradient, in parameters of order one, falls below 1e-9.
    """
    chosen = optax.with_extra_args_support(optax.lbfgs() if optimiser is None else optimiser)

    def loss(parameters: Any) -> jax.Array:
        return -objective(parameters)

    value_and_grad = jax.value_and_grad(loss)

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        parameters, state = carry
        value, grad = value_and_grad(parameters)
        norm = optax.tree.norm(grad)
        updates, new_state = chosen.update(
            grad, state, parameters, value=value, grad=grad, value_fn=loss
        )
        moved = optax.apply_updates(parameters, updates)
        done = norm < TOLERANCE
        keep = lambda new, old: jnp.where(done, old, new)  # noqa: E731
        carry = jax.tree.map(keep, (moved, new_state), (parameters, state))
        return carry, (-value, norm)

    @jax.jit
    def chunk(carry: Any) -> Any:
        return jax.lax.scan(step, carry, None, length=CHUNK)

    carry = (start, chosen.init(start))
    values: list[np.ndarray] = []
    norm, taken = np.inf, 0
    with _bar(progress, num_steps, name) as bar:
        while taken < num_steps:
            carry, (some, norms) = chunk(carry)
            values.append(np.asarray(some))
            taken += CHUNK
            norm = float(norms[-1])
            bar.update(min(CHUNK, num_steps - bar.n))
            bar.set_postfix({"log density a row": f"{values[-1][-1]:.4f}"})
            if not np.isfinite(values[-1]).all() or norm < TOLERANCE:
                break
        value = float(objective(carry[0]))
    warnings = []
    if not np.isfinite(value):
        warnings.append(
            f"{name} diverged: the objective is not finite after {taken} outer steps; lower "
            "the outer optimiser's rate, or the inner step_size"
        )
    elif norm > 1e-4:
        warnings.append(
            f"{name} has not converged after {taken} outer steps (gradient norm {norm:.1e} in "
            "scaled parameters, 1e-4 wanted); raise num_meta_steps"
        )
    return Ascent(carry[0], value, np.concatenate(values), warnings)


def _bar(progress: bool | None, total: int, name: str) -> Any:
    from tqdm.auto import tqdm

    shown = sys.stderr.isatty() if progress is None else progress
    return tqdm(total=total, desc=name, disable=not shown, leave=False, delay=1.0)
