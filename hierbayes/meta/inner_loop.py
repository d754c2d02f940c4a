r"""What the methods share that learn φ through an inner loop.

.. math:: \theta_j = A(D_j^{\text{support}}; \varphi), \qquad
          \max_\varphi \sum_j \log p(D_j^{\text{query}} \mid \theta_j)

The noise σ that sets the inner loop's units, support/query splits, and parameters of order one for
the outer loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from hierbayes import inputs
from hierbayes.adaptation.gradient import DERIVATIVES
from hierbayes.adaptation.least_squares import within_tasks
from hierbayes.errors import InputError, NotApplicable
from hierbayes.evidence import Predictive
from hierbayes.meta.baselines import noise, refuse_idle_sigma
from hierbayes.meta.dispersion import dispersion
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import as_key
from hierbayes.phi import Part, Space
from hierbayes.statistics import statistics
from hierbayes.tasks import Tasks


def check_counts(**counts: int) -> None:
    """Refuse settings that are not positive integers, by name."""
    inputs.counts(**counts)


def check_inner_step(step_size: Any) -> None:
    """Refuse an inner step size that is neither one number nor "auto"."""
    if isinstance(step_size, str) and step_size == "auto":
        return
    one = not isinstance(step_size, (list, tuple)) and not getattr(step_size, "ndim", 0)
    if isinstance(step_size, str) or not one or step_size is None:
        found = inputs.shown(step_size)
        raise InputError(f'step_size must be a number or "auto", found {found}')
    inputs.positive("step_size", step_size)


def check_optimiser(optimiser: Any) -> None:
    """Refuse an outer optimiser that is neither None nor of Optax."""
    import optax

    if not (optimiser is None or isinstance(optimiser, optax.GradientTransformation)):
        raise InputError(
            f"optimiser must be an Optax optimiser, for example optax.adam(0.01), "
            f"found {inputs.shown(optimiser)}"
        )


def check_steps(
    num_steps: int,
    step_size: Any,
    loss: Any,
    derivative: Any,
    inner_optimiser: Any,
    learn_step_size: Any = False,
) -> None:
    """Refuse settings of the inner loop that cannot be, or that would be ignored."""
    import optax

    check_counts(num_steps=num_steps)
    check_inner_step(step_size)
    if loss is not None:
        inputs.one_of("loss", loss, ("sum", "mean"))
    inputs.one_of("derivative", derivative, DERIVATIVES)
    if not isinstance(learn_step_size, str):
        inputs.flag("learn_step_size", learn_step_size)
    elif learn_step_size != "coef":
        found = inputs.shown(learn_step_size)
        raise InputError(f'learn_step_size must be a bool or "coef", found {found}')
    if inner_optimiser is None:
        return
    if not isinstance(inner_optimiser, optax.GradientTransformation):
        found = inputs.shown(inner_optimiser)
        raise InputError(f"inner_optimiser must be an Optax optimiser, found {found}")
    if step_size != "auto" or learn_step_size:
        raise InputError(
            "inner_optimiser has step sizes of its own: leave step_size and learn_step_size out"
        )


def refuse_splits(num_splits: int, method: str) -> None:
    """Refuse several splits where every meta-step draws its own."""
    if num_splits != 1:
        raise InputError(
            f"{method} on episodes takes no num_splits: every meta-step splits its tasks anew"
        )


def step_or(step_size: Any, default: float) -> float:
    """The step size given, or ``default`` for None and "auto"."""
    return default if step_size in (None, "auto") else float(step_size)


def refuse_idle(training: Mapping[str, Any], method: str) -> None:
    """Refuse settings of training on episodes where all tasks are fitted at once."""
    idle = sorted(name for name, value in training.items() if value is not None)
    if idle:
        raise InputError(
            f"{method} on a fixed set of tasks takes no {', '.join(idle)}: all tasks "
            "are fitted at once; hb.Episodes.from_tasks(tasks) makes a source of batches of them"
        )


def inner_noise(
    model: HierarchicalModel, tasks: Tasks, sigma: float | None
) -> dict[str, np.ndarray]:
    """φ's part that is not learned: the family's own parameters, as given or pooled within tasks.

    They set the units of the inner loop (σ), or how much an outcome far from its mean pulls
    (``concentration``, ``shape``, ``df``). Families without parameters get an empty part.
    """
    refuse_idle_sigma(model, sigma)
    if not model.likelihood.parameters():
        return {}
    if not model.likelihood.gaussian_in_theta:
        if sigma is not None:
            noise(sigma, sigma)
        return dispersion(model, tasks, sigma)
    return {"sigma": np.asarray(noise(within_tasks(statistics(tasks)).sigma, sigma))}


def query_parameters(model: HierarchicalModel, fixed: Mapping[str, Any]) -> tuple[str, ...]:
    """The family's parameters that query rows are scored with by values of their own.

    All that say how far rows lie from what θ says, which absorb the posterior variance of θ_j: σ,
    ``concentration``, ``shape``; tails (``df``) are those of the inner loop. Known standard errors
    get a ``sigma_query`` beside them.
    """
    if model.likelihood.gaussian_in_theta:
        return ("sigma",)
    own = set(model.likelihood.parameters()) - {"df"}
    return tuple(name for name in fixed if name in own)


class Learned(NamedTuple):
    """φ from a vector x of order one: what is learned of it, and what is given."""

    space: Space
    given: dict[str, Any]

    def phi(self, x: Any) -> dict[str, Any]:
        """φ by name."""
        return dict(self.given) | self.space.phi(x)


class Predicted(NamedTuple):
    """Log p(y^query | A(D^support; φ), φ), the mean over all query rows, of x.

    Its ``data`` are how φ follows from x, the rows of both parts, and the number of the latter.
    """

    evidence: Predictive
    model: HierarchicalModel

    def __call__(self, x: Any, learned: Learned, support: Any, query: Any, count: Any) -> jax.Array:
        """The mean at x."""
        rows = self.evidence.of_rows(self.model, learned.phi(x), support, query)
        return rows.sum() / count


def nth_seed(seed: int | jax.Array, i: int) -> int | jax.Array:
    """The seed of the i-th split."""
    if isinstance(seed, int):
        return (seed + i) % inputs.LARGEST_SEED
    return jax.random.fold_in(as_key(seed), i)


def support_query_splits(
    tasks: Tasks, query: float, num_splits: int, seed: int | jax.Array, method: str
) -> list[tuple[Tasks, Tasks]]:
    """Random (support, query) parts of every task; refused where no task has both."""
    splits = [tasks.split(query, seed=nth_seed(seed, i)) for i in range(num_splits)]
    if not any(((s.sizes > 0) & (q.sizes > 0)).any() for s, q in splits):
        raise NotApplicable(
            f"{method} learns by predicting some rows of a task from others, but no task has two "
            "rows; use empirical_bayes or full_bayes"
        )
    return splits


def side_by_side(parts: Sequence[Tasks]) -> Tasks:
    """The same tasks' parts of several splits as one set of tasks, computed with once."""
    first = parts[0]
    offsets = np.cumsum([0] + [part.num_rows for part in parts[:-1]])
    starts = [part.starts[:-1] + offset for part, offset in zip(parts, offsets, strict=True)]
    return replace(
        first,
        predictors=np.concatenate([part.predictors for part in parts]),
        shared=np.concatenate([part.shared for part in parts]),
        task_predictors=np.concatenate([part.task_predictors for part in parts]),
        outcome=np.concatenate([part.outcome for part in parts]),
        slots={name: np.concatenate([part.slots[name] for part in parts]) for name in first.slots},
        starts=np.concatenate([*starts, [sum(part.num_rows for part in parts)]]),
        rows=np.concatenate([part.rows for part in parts]),
        labels=replace(first.labels, names=np.tile(first.names, len(parts))),
    )


def query_space(model: HierarchicalModel, tasks: Tasks, fixed: Mapping[str, Any]) -> Space:
    """How query rows are scored: ``sigma_query``, the plug-in predictive deviation, and the like.

    ``concentration_query`` and ``shape_query`` stand for it in other families, and families without
    parameters have none. ``fixed`` is the part of φ that is not learned.
    """
    starts = dict(fixed) | {"sigma": model.scales(tasks).spread}
    named = {f"{name}_query": starts[name] for name in query_parameters(model, fixed)}
    return Space.of([Part(name, (), (), "positive") for name in named], starts=named)


def outer_space(
    model: HierarchicalModel, tasks: Tasks, fixed: Mapping[str, Any], *, queries: bool = True
) -> Space:
    """What an outer loop learns of φ: μ, Γ, β and, for ``queries``, how their rows are scored."""
    space = model.space(tasks, "mu", "gamma", "beta").in_units(mu=model.scales(tasks).coef)
    return space + query_space(model, tasks, fixed) if queries else space
