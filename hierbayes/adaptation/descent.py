r"""First-order methods whose coefficients are fixed before the data, and what they leave of φ.

On a quadratic of curvature λ such a method multiplies the distance to the optimum by a polynomial
R_K(λ) with R_K(0) = 1, and moves by S_K(λ) a unit of slope:

.. math::

    r = R_K(\lambda), \qquad s = S_K(\lambda) = \frac{1 - R_K(\lambda)}{\lambda}, \qquad
    \text{gradient steps: } R_K = (1 - \eta\lambda)^K.

K steps are then the MAP estimate under a Gaussian prior of precision p = λ r / (1 − r) = **r / s**,
and s is the implied posterior variance. Both r and s come from the method's own recursion, so that
nothing cancels at λ = 0, where p = 1/s = 1/(Kη), and slopes in λ and η are finite everywhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes import inputs
from hierbayes.errors import InputError

if TYPE_CHECKING:
    import optax


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step_size", "momentum"],
    meta_fields=["num_steps", "nesterov", "optimiser", "rematerialise"],
)
@dataclass(frozen=True)
class Descent:
    r"""K steps of gradient descent, with momentum if wanted, or of an Optax optimiser.

    .. math:: \Delta_{k+1} = \beta \Delta_k + \eta_k \nabla \log p(D \mid \theta_k
              [+ \beta\Delta_k]), \qquad \theta_{k+1} = \theta_k + \Delta_{k+1}

    (heavy ball; Nesterov's looks ahead, in brackets.)

    Parameters
    ----------
    num_steps : int
        K.
    step_size : float or array (K,)
        η, or one a step; in sum-of-log-likelihood units.
    momentum : float, optional
        β in (0, 1).
    nesterov : bool
        Take the slope at the point to which momentum leads.
    optimiser : optax.GradientTransformation, optional
        In the place of ``step_size`` and ``momentum``; its steps imply no prior.
    rematerialise : bool
        Keep √K points for the derivative in the place of K, and compute what lies between again.
    """

    num_steps: int
    step_size: Any = None
    momentum: Any = None
    nesterov: bool = False
    optimiser: optax.GradientTransformation | None = None
    rematerialise: bool = False

    @property
    def plain(self) -> bool:
        """Equal gradient steps without momentum."""
        return self.optimiser is None and self.momentum is None and np.ndim(self.step_size) == 0

    @property
    def longest(self) -> float | None:
        """ηλ at which equal steps begin to diverge; None for schedules and Optax optimisers."""
        if self.optimiser is not None or np.ndim(self.step_size):
            return None
        kept = 0.0 if self.momentum is None else float(self.momentum)
        return 2 * (1 + kept) / (1 + 2 * kept if self.nesterov else 1.0)

    def path(self, slope: Callable[[Any], Any], start: Any) -> Any:
        """θ_0, …, θ_K along a new leading axis, climbing ``slope``; θ may be any pytree."""
        final, points = self._scan(slope, start, keep=True)
        del final
        return jax.tree.map(lambda s, p: jnp.concatenate([s[None], p]), start, points)

    def run(self, slope: Callable[[Any], Any], start: Any) -> Any:
        """θ_K."""
        return self._scan(slope, start, keep=False)[0]

    def _scan(self, slope: Callable[[Any], Any], start: Any, *, keep: bool) -> Any:
        import optax

        add = optax.tree.add
        scan = scan_in_segments if self.rematerialise and not keep else jax.lax.scan
        if self.optimiser is not None:
            chosen = self.optimiser

            def advance(carry: Any, _: Any) -> Any:
                theta, state = carry
                falling = jax.tree.map(jnp.negative, slope(theta))
                updates, state = chosen.update(falling, state, theta)
                theta = optax.apply_updates(theta, updates)
                return (theta, state), theta if keep else None

            counted = jnp.arange(self.num_steps)
            (theta, _), points = scan(advance, (start, chosen.init(start)), counted)
            return theta, points
        etas = jnp.broadcast_to(jnp.asarray(self.step_size), (self.num_steps,))
        if self.momentum is None:

            def climb(theta: Any, eta: Any) -> Any:
                theta = jax.tree.map(lambda t, g: t + eta * g, theta, slope(theta))
                return theta, theta if keep else None

            return scan(climb, start, etas)
        kept = self.momentum

        def step(carry: Any, eta: Any) -> Any:
            theta, moved = carry
            at = jax.tree.map(lambda t, m: t + kept * m, theta, moved)
            uphill = slope(at if self.nesterov else theta)
            moved = jax.tree.map(lambda m, g: kept * m + eta * g, moved, uphill)
            theta = add(theta, moved)
            return (theta, moved), theta if keep else None

        (theta, _), points = scan(step, (start, jax.tree.map(jnp.zeros_like, start)), etas)
        return theta, points

    def responses(self, curvature: Any) -> tuple[jax.Array, jax.Array]:
        """(r, s): what K steps leave of φ, and how far they move a unit of slope, for each λ."""
        curvature = jnp.asarray(curvature)
        if self.plain:
            return _equal_steps(curvature, self.step_size, self.num_steps)
        one, zero = jnp.ones_like(curvature), jnp.zeros_like(curvature)
        left = self.run(lambda distance: -curvature * distance, one)
        moved = self.run(lambda displacement: 1.0 - curvature * displacement, zero)
        return left, moved


def scan_in_segments(step: Any, carry: Any, xs: Any) -> tuple[Any, None]:
    """``jax.lax.scan`` without outputs, whose derivative keeps about 2√K carries in the place of K.

    The steps are cut into √K segments; the derivative keeps where each begins and computes the
    rest of a segment again when it comes to it.
    """
    length = len(xs)
    width = max(1, math.isqrt(length))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def once(carry: Any, x: Any) -> tuple[Any, None]:
        return step(carry, x)[0], None

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def segment(carry: Any, x: Any) -> tuple[Any, None]:
        return jax.lax.scan(once, carry, x)

    whole = length // width * width
    carry, _ = jax.lax.scan(segment, carry, xs[:whole].reshape(-1, width))
    return segment(carry, xs[whole:]) if whole < length else (carry, None)


def _equal_steps(curvature: jax.Array, step_size: Any, num_steps: int) -> tuple[Any, Any]:
    """K equal steps by doubling: the step δ → (1 − ηλ) δ + η composed with itself."""
    left, moved = jnp.ones_like(curvature), jnp.zeros_like(curvature)
    factor, shift = 1.0 - step_size * curvature, jnp.broadcast_to(step_size, curvature.shape)
    remaining = num_steps
    while remaining:
        if remaining % 2:
            left, moved = left * factor, moved * factor + shift
        factor, shift = factor * factor, shift * factor + shift
        remaining //= 2
    return left, moved


@functools.partial(jax.tree_util.register_dataclass, data_fields=["time"], meta_fields=[])
@dataclass(frozen=True)
class Flow:
    r"""Gradient flow for a time t: the limit of K → ∞ steps of size t / K.

    .. math:: r = e^{-t\lambda}, \qquad s = \frac{1 - e^{-t\lambda}}{\lambda}, \qquad
              p = \frac{\lambda}{e^{t\lambda} - 1} = \frac1t - \frac\lambda2 + \dots
    """

    time: Any

    def run(self, slope: Callable[[Any], Any], start: Any) -> Any:
        """θ at time t, by an adaptive Runge–Kutta method."""
        from jax.experimental.ode import odeint

        times = jnp.asarray([0.0, 1.0]) * self.time
        path = odeint(lambda t, _: slope(t), start, times, rtol=1e-11, atol=1e-12)
        return jax.tree.map(lambda p: p[-1], path)

    def path(self, slope: Callable[[Any], Any], start: Any, num_points: int = 100) -> Any:
        """θ at ``num_points`` + 1 equally spaced times from 0 to t."""
        from jax.experimental.ode import odeint

        times = jnp.linspace(0.0, 1.0, num_points + 1) * self.time
        return odeint(lambda t, _: slope(t), start, times, rtol=1e-10, atol=1e-12)

    def responses(self, curvature: Any) -> tuple[jax.Array, jax.Array]:
        """(r, s) of each curvature λ."""
        u = self.time * jnp.asarray(curvature)
        small = jnp.abs(u) < 1e-3
        safe = jnp.where(small, 1.0, u)
        # the first term left out is u⁵/720 < 2e-18
        series = 1 - u / 2 + u**2 / 6 - u**3 / 24 + u**4 / 120
        return jnp.exp(-u), self.time * jnp.where(small, series, -jnp.expm1(-safe) / safe)


def implied_precision(curvature: Any, num_steps: int, step_size: Any) -> jax.Array:
    r"""Precision of the prior that K gradient steps imply along a direction of curvature λ.

    .. math:: p = \frac{\lambda}{(1 - \eta\lambda)^{-K} - 1}, \qquad
              p \to \frac{1}{K\eta} \text{ as } \lambda \to 0

    Parameters
    ----------
    curvature : array
        λ, in sum-of-log-likelihood units.
    num_steps : int
        K.
    step_size : float or array (K,)
        η, or one a step.

    Returns
    -------
    jax.Array
        In JAX's own precision, float32 unless x64 is on. Negative where no Gaussian prior makes
        the steps a MAP estimate (odd K, ηλ in (1, 2)). Differentiable in λ and η, at λ = 0 and
        ηλ = 1 too.

    Examples
    --------
    >>> from hierbayes.adaptation import implied_precision
    >>> float(implied_precision(0.0, 5, 0.1))  # 1 / (K η)
    2.0
    >>> float(implied_precision(4.0, 1, 0.1))  # 1 / η − λ
    6.0
    """
    num_steps = inputs.count("num_steps", num_steps)
    if np.ndim(step_size) and np.shape(step_size) != (num_steps,):
        raise InputError(
            f"step_size has shape {np.shape(step_size)}; give one number, or one a step, "
            f"({num_steps},)"
        )
    left, moved = Descent(num_steps, step_size).responses(jnp.asarray(curvature, dtype=float))
    return left / moved
