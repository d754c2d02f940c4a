"""How a meta-step's time and memory grow with the inner steps, and with the tasks of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hierbayes as hb
from benchmarks.meta_step_contest import BATCH, SHOTS, STEP_SIZE, hierbayes_rate, model
from hierbayes.adaptation import GradientSteps
from hierbayes.evidence import Predictive

MODES = ("unrolled", "rematerialised", "first-order", "implicit")
"""Ways from φ to the derivative of θ_K; "implicit" is that of iMAML's proximal inner loop."""

TEMPORARY = "temp_size_in_bytes"


def times(num_steps: Sequence[int], seconds: float) -> list[float]:
    """Seconds a meta-step of ``hb.maml`` for each K."""
    return [1 / hierbayes_rate(k, seconds) for k in num_steps]


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log value in log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def line(sizes: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Value = a + b size by least squares of relative errors, and the largest of these."""
    x, y = np.asarray(sizes, float), np.asarray(values, float)
    columns = np.column_stack([np.ones_like(x), x]) / y[:, None]
    (a, b), *_ = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)
    worst = np.abs((a + b * x) / y - 1).max()
    return {"constant": float(a), "slope": float(b), "largest_relative_error": float(worst)}


def tasks_a_second(batches: Sequence[int], num_steps: int, seconds: float) -> list[float]:
    """Tasks a second of ``hb.maml`` for each batch size."""
    return [b * hierbayes_rate(num_steps, seconds, b) for b in batches]


def memory(mode: str, num_steps: int, num_tasks: int = BATCH) -> int:
    """Bytes that one compiled meta-step takes beside its arguments and results.

    The compiler's own account of temporaries: forward, derivative and Adam's update.
    """
    built = model()
    steps = GradientSteps(
        num_steps, STEP_SIZE, "mean", derivative=mode, proximal=mode == "implicit"
    )
    evidence = Predictive(steps)
    parts = hb.datasets.sinusoids(shots=SHOTS).batch(num_tasks, 0)
    support, query = jax.tree.map(_float32, parts)
    params = built.likelihood.initial(jax.random.key(0))
    mu = built.likelihood.vector(params)
    adam = optax.adam(1e-3)

    def one(mu: Any, state: Any, support: Any, query: Any) -> Any:
        def loss(mu: Any) -> Any:
            phi = {"mu": mu, "sigma": jnp.sqrt(0.5)}
            if mode == "implicit":
                phi["tau"] = jnp.ones_like(mu)
            return -evidence.of_rows(built, phi, (support, None), (query, None)).mean()

        value, slope = jax.value_and_grad(loss)(mu)
        updates, state = adam.update(slope, state)
        return optax.apply_updates(mu, updates), state, value

    compiled = jax.jit(one).lower(mu, adam.init(mu), support, query).compile()
    return int(getattr(compiled.memory_analysis(), TEMPORARY))


def _float32(x: Any) -> Any:
    return x if x.dtype == bool else jnp.asarray(x, jnp.float32)
