"""How well fits do on fresh sinusoids: errors after every gradient step, and predictive scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hierbayes as hb
from hierbayes.adaptation import GradientSteps
from hierbayes.adaptation.variational import Variational
from hierbayes.numerics import arithmetic
from hierbayes.tasks import Task, Tasks
from hierbayes.tasks.episodes import side_by_side

CHUNK = 200
"""Tasks scored at a time, so that their derivatives and draws fit into memory."""

LEVELS = (0.5, 0.8, 0.95)


@dataclass(frozen=True)
class Mean:
    """A mean over tasks and its standard error."""

    mean: float
    se: float

    @staticmethod
    def over(tasks: Any) -> Mean:
        """Of one value a task (J,)."""
        values = np.asarray(tasks, np.float64)
        return Mean(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean."""
        return self.mean - 1.96 * self.se, self.mean + 1.96 * self.se


def fresh_tasks(shots: int, queries: int, num_tasks: int, seed: int) -> tuple[Task, Task]:
    """(support, query) of fresh tasks; the same seed gives the same sinusoids at any shots."""
    return hb.datasets.sinusoids(shots, queries).batch(num_tasks, seed)


def errors(fit: hb.Fit, support: Task, query: Task, most: int = 10) -> np.ndarray:
    """Mean squared error of each task after 0, …, ``most`` gradient steps, (most + 1, J).

    A fit that takes no steps has one row. Of a normal over θ the mean is used.
    """
    if not isinstance(fit.adaptation, (GradientSteps, Variational)):
        return per_task(fit, support, query)["squared_error"][None]
    model, phi = fit.model.without_encoder(), dict(fit.phi)

    @jax.jit
    def chunk(support: Task, query: Task) -> Any:
        thetas = points(fit, support, most)

        def error(theta: Any, task: Task) -> Any:
            return jnp.mean((model.likelihood.location(theta, phi, task) - task.outcome) ** 2)

        return jax.vmap(jax.vmap(error, (0, None)))(thetas, query).T

    with arithmetic(model.likelihood.precision):
        phi = {name: jnp.asarray(value, float) for name, value in phi.items()}
        parts = [chunk(_part(support, i), _part(query, i)) for i in chunks(support)]
    return np.concatenate([np.asarray(part, np.float64) for part in parts], axis=1)


def points(fit: hb.Fit, support: Task, most: int) -> Any:
    """θ after 0, …, ``most`` steps, (J, most + 1, d), of tasks on a leading axis."""
    model, steps = fit.model.without_encoder(), fit.adaptation
    phi = {name: jnp.asarray(value, float) for name, value in fit.phi.items()}
    if isinstance(steps, Variational):
        key = jax.random.key(0)
        each = [
            replace(steps, num_steps=k).steps(model, phi, support, key)[0]
            for k in range(1, most + 1)
        ]
        start = jnp.broadcast_to(phi["mu"], each[0].shape)
        return jnp.stack([start, *each], axis=1)
    assert isinstance(steps, GradientSteps)
    longer = replace(steps, num_steps=most, derivative="unrolled")
    return jax.vmap(lambda task: longer.path(model, phi, task))(support)


def chunks(tasks: Task) -> list[slice]:
    """Slices of ``CHUNK`` tasks."""
    num_tasks = tasks.outcome.shape[0]
    return [slice(i, min(i + CHUNK, num_tasks)) for i in range(0, num_tasks, CHUNK)]


def _part(tasks: Task, which: slice) -> Task:
    return jax.tree.map(lambda values: values[which], tasks)


def per_task(fit: hb.Fit, support: Task, query: Task) -> dict[str, np.ndarray]:
    """Means over each task's query rows (J,): log density, squared error, coverage, widths."""
    found: dict[str, list[np.ndarray]] = {}
    for which in chunks(support):
        given, asked = as_tasks(_part(support, which)), as_tasks(_part(query, which))
        said = fit.adapt(given).predict(asked)
        pit = said.pit()
        rows = {
            "log_density": said.log_density(),
            "squared_error": (asked.outcome - said.mean) ** 2,
            "sd": said.sd,
        }
        for level in LEVELS:
            rows[f"coverage_{round(100 * level)}"] = np.abs(pit - 0.5) <= level / 2
        for name, values in rows.items():
            found.setdefault(name, []).append(
                np.asarray(values, np.float64).reshape(asked.num_tasks, -1).mean(1)
            )
    return {name: np.concatenate(parts) for name, parts in found.items()}


def as_tasks(part: Task) -> Tasks:
    """Tasks on a leading axis, as methods of a fit take them."""
    return side_by_side(part)


def scores(fit: hb.Fit, support: Task, query: Task) -> dict[str, float]:
    """Log score, RMSE and coverage over tasks, with standard errors."""
    each = per_task(fit, support, query)
    log_density, squared = Mean.over(each["log_density"]), Mean.over(each["squared_error"])
    found = {
        "log_score": log_density.mean, "log_score_se": log_density.se,
        "rmse": squared.mean**0.5, "rmse_se": squared.se / (2 * squared.mean**0.5),
        "sd": float(each["sd"].mean()),
    }  # fmt: skip
    for name in each:
        if name.startswith("coverage"):
            coverage = Mean.over(each[name])
            found |= {name: coverage.mean, f"{name}_se": coverage.se}
    return found


def tuned(fit: hb.Fit, support: Task, query: Task, most: int = 10) -> hb.Fit:
    """The point fit at the number of steps, and with the deviation, best on these tasks.

    They are tasks to learn from, none of those by which the fit is judged.
    """
    assert isinstance(fit.adaptation, GradientSteps)
    each = errors(fit, support, query, most).mean(1)
    best = 1 + int(np.argmin(each[1:]))
    return replace(
        fit, adaptation=replace(fit.adaptation, num_steps=best, derivative="unrolled"),
        phi={**fit.phi, "sigma_query": np.sqrt(each[best])}, training=None,
    )  # fmt: skip


def first(part: Task, count: int) -> Task:
    """The first tasks of some on a leading axis."""
    return _part(part, slice(0, count))
