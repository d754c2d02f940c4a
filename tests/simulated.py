"""Simulated tasks that tests of the methods with an inner loop share."""

import numpy as np
import pandas as pd

import hierbayes as hb


def normal_means(num_tasks, rows, tau, sigma, mu=1.5, seed=0):
    """Tasks of ``rows`` rows (a number or one a task) around θ_j ~ N(μ, τ²)."""
    rng = np.random.default_rng(seed)
    sizes = np.broadcast_to(rows, num_tasks)
    return hb.Tasks.from_arrays(
        [
            (np.ones((n, 1)), rng.normal(mu, tau) + sigma * rng.standard_normal(n))
            for n in sizes.tolist()
        ]
    )


def regressions(seed=4, num_tasks=30):
    """Ragged tasks, some of one row or of rank one, with a shared column, as a DataFrame."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 12, num_tasks)
    task = np.repeat(np.arange(num_tasks), sizes)
    x, z = rng.normal(size=task.size), rng.normal(size=task.size)
    x[task % 5 == 0] = 0.4  # no slope to be learned from these
    theta = [1.0, -0.7] + rng.standard_normal((num_tasks, 2)) * [0.8, 0.5]
    y = theta[task, 0] + theta[task, 1] * x + 0.6 * z + 0.5 * rng.standard_normal(task.size)
    return hb.from_formula(
        "y ~ 1 + x + z + (1 + x | g)", pd.DataFrame({"g": task, "x": x, "z": z, "y": y})
    )


def by_task(tasks):
    """(X_j, Z_j, y_j) of every task."""
    for low, high in zip(tasks.starts[:-1], tasks.starts[1:], strict=True):
        yield tasks.predictors[low:high], tasks.shared[low:high], tasks.outcome[low:high]


def explicit_steps(theta, x, y, sigma, eta, num_steps):
    """K gradient steps on ½‖y − Xθ‖²/σ², written out."""
    for _ in range(num_steps):
        theta = theta + eta * x.T @ (y - x @ theta) / sigma**2
    return theta
