r"""Follow an update direction to where it vanishes, for methods that maximise nothing.

.. math:: \varphi \leftarrow \varphi + \Delta(\varphi) \quad\text{until}\quad
          \lVert \Delta(\varphi) \rVert \approx 0

Plain steps shrink the distance by a constant factor, which may be close to one. Anderson's
acceleration takes the combination of earlier steps whose direction is smallest; where Δ is linear
in φ it ends after about dim φ + 1 of them, as GMRES does.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.meta.ascent import CHUNK
from hierbayes.numerics import to_numpy

if TYPE_CHECKING:
    import optax

MEMORY = 30
"""Earlier steps that the acceleration combines at most."""

GROWTH = 1e3
"""A direction longer than the shortest so far by this factor ends the acceleration's memory."""

DIVERGED = 1e6
"""Norm of the parameters, which are of order one, that is taken for divergence."""


Direction = Callable[..., jax.Array]
"""A function of (x, *data), hashable: one that is equal runs the programs that are compiled."""


@dataclass(frozen=True)
class FixedPoint:
    """Where the iteration ended, after how many steps."""

    x: np.ndarray
    taken: int
    warnings: list[str]


def follow(
    direction: Direction,
    start: np.ndarray,
    optimiser: optax.GradientTransformation | None,
    num_steps: int,
    tolerance: float,
    progress: bool | None,
    name: str,
    data: tuple[Any, ...] = (),
) -> FixedPoint:
    """Follow ``direction(x, *data)`` from ``start``; accelerated unless told otherwise.

    Both are of order one. An Optax optimiser is given minus the direction in the place of a
    gradient.
    """
    from tqdm.auto import tqdm

    shown = sys.stderr.isatty() if progress is None else progress
    with tqdm(total=num_steps, desc=name, disable=not shown, leave=False, delay=1.0) as bar:
        if optimiser is None:
            x, norm, taken = _accelerated(direction, start, data, num_steps, tolerance, bar)
        else:
            x, norm, taken = _optax(direction, start, data, optimiser, num_steps, tolerance, bar)
    warnings = []
    if not np.isfinite(norm):
        warnings.append(
            f"{name} diverged after {taken} outer steps; lower the outer optimiser's rate, or the "
            "inner step_size"
        )
    elif norm > tolerance:
        warnings.append(
            f"{name} has not converged after {taken} outer steps (its direction has norm "
            f"{norm:.1e} in scaled parameters, {tolerance:.0e} wanted); raise num_meta_steps"
        )
    return FixedPoint(x, taken, warnings)


@functools.partial(jax.jit, static_argnums=0)
def _move(direction: Direction, x: Any, data: Any) -> jax.Array:
    return direction(x, *data)


def _accelerated(
    direction: Direction, start: np.ndarray, data: Any, num_steps: int, tolerance: float, bar: Any
) -> tuple[np.ndarray, float, int]:
    """Anderson's acceleration of full steps; returns the point of the shortest direction."""
    at = np.asarray(start)
    points, moves = [], []
    best, shortest = at, np.inf
    for taken in range(1, num_steps + 1):
        move = np.asarray(_move(direction, at, data))
        norm = float(np.linalg.norm(move))
        bar.update(1)
        bar.set_postfix({"direction": f"{norm:.1e}"})
        if norm < shortest:
            best, shortest = at, norm
        if shortest <= tolerance:
            return best, shortest, taken
        if not norm <= GROWTH * shortest:  # a NaN too
            if not points:
                return best, np.nan, taken
            at, points, moves = best, [], []
            continue
        points, moves = [*points, at][-MEMORY:], [*moves, move][-MEMORY:]
        at = at + move
        if len(points) > 1:
            turned = np.diff(moves, axis=0).T
            units = np.linalg.norm(turned, axis=0)
            units = np.where(units > 0, units, 1.0)
            share = np.linalg.lstsq(turned / units, move, rcond=1e-13)[0] / units
            at = at - (np.diff(points, axis=0).T + turned) @ share
    return best, shortest, num_steps


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def _chunk(direction: Direction, optimiser: Any, carry: Any, length: int, data: Any) -> Any:
    def step(carry: Any, _: None) -> tuple[Any, None]:
        x, state = carry
        updates, state = optimiser.update(-direction(x, *data), state, x)
        return (x + updates, state), None

    carry, _ = jax.lax.scan(step, carry, None, length)
    norms = jnp.linalg.norm(jnp.stack([direction(carry[0], *data), carry[0]]), axis=1)
    return carry, norms


def _optax(
    direction: Direction,
    start: np.ndarray,
    data: Any,
    optimiser: optax.GradientTransformation,
    num_steps: int,
    tolerance: float,
    bar: Any,
) -> tuple[np.ndarray, float, int]:
    first = jnp.asarray(start)
    carry, taken, norm = (first, optimiser.init(first)), 0, np.inf
    while taken < num_steps and norm > tolerance:
        size = min(CHUNK, num_steps - taken)
        carry, (norm, far) = _chunk(direction, optimiser, carry, size, data)
        norm, taken = float(norm), taken + size
        bar.update(size)
        bar.set_postfix({"direction": f"{norm:.1e}"})
        if not float(far) < DIVERGED:
            return to_numpy(carry[0]), np.nan, taken
    return to_numpy(carry[0]), norm, taken
