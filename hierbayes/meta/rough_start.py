r"""Where to begin where the evidence has no closed form: tasks as if they were Gaussian.

.. math:: z_i = f_i + \frac{\partial_f \log p(y_i \mid f_i)}{-\partial_f^2 \log p(y_i \mid f_i)},
          \qquad \operatorname{Var}(z_i) \approx \frac{1}{-\partial_f^2 \log p(y_i \mid f_i)}

A row that says much by itself is expanded around its own best f, one that says little around the
overall level: the working outcomes of penalised quasi-likelihood. Their evidence has the scales of
the tasks in it, and is looked at over all sizes of τ (:mod:`hierbayes.meta.first_look`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from hierbayes.evidence.profile import profile_problem
from hierbayes.likelihoods.generalised import GeneralisedLinear
from hierbayes.meta.first_look import look, sample_of
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.statistics import statistics
from hierbayes.tasks import Tasks

MOST_TASKS = 2000
"""Of more, every so-manieth is looked at."""

TELLS = 3.0
"""Curvature of a row from which on it is expanded around its own best f."""

FURTHEST = 10.0
"""Units of f by which a working outcome may lie off."""

FROM_SIGMA = {"sigma": lambda s: s, "shape": lambda s: s**-2.0}
"""What the spread of working outcomes says of a family's own parameter."""


class Rough(NamedTuple):
    """φ with the best τ seen, and with τ = 0; by how much the first stands higher, in nats."""

    best: dict[str, np.ndarray]
    pooled: dict[str, np.ndarray]
    gap: float


def rough_start(model: HierarchicalModel, tasks: Tasks, own: dict[str, Any]) -> Rough | None:
    """φ of the tasks as if they were Gaussian; None where they have no working outcomes.

    ``own``: the family's parameters, to begin with.
    """
    likelihood = model.likelihood
    if not (isinstance(likelihood, GeneralisedLinear) and likelihood.linear):
        return None
    if tasks.num_tasks > MOST_TASKS:
        tasks = tasks.take(np.arange(0, tasks.num_tasks, tasks.num_tasks // MOST_TASKS))
    scale = [name for name in likelihood.parameters() if name in FROM_SIGMA]
    with float64(), np.errstate(all="ignore"):
        working = _working(model, tasks, own, weighed=not scale)
        shape, fixed = model.shape(tasks), model.fixed(tasks)
        problem = profile_problem(statistics(working), shape, reml=False, known_noise=not scale)
        try:
            many, _ = sample_of(problem)
            seen = look(many, shape.blocks)
        except np.linalg.LinAlgError:
            return None
        found = []
        for root in (seen.root, np.zeros_like(seen.root)):
            effects, sigma = many.estimates(root)
            sigma = float(sigma[0])
            tau = sigma * np.linalg.norm(root[:, :, 0], axis=1)
            phi = (
                dict(own) | fixed.phi(np.asarray(many.fixed_effects(effects)[:, 0])) | {"tau": tau}
            )
            found.append(phi | {name: FROM_SIGMA[name](sigma) for name in scale})
        gap = float(seen.at_zero[0] - seen.loss[0])
    fine = all(np.isfinite(value).all() for phi in found for value in phi.values())
    return Rough(found[0], found[1], gap) if fine and np.isfinite(gap) else None


def _working(
    model: HierarchicalModel, tasks: Tasks, own: dict[str, Any], *, weighed: bool
) -> Tasks:
    """The tasks with working outcomes and, where they are known, the standard errors of these."""
    likelihood, y, slots = model.likelihood, tasks.outcome, tasks.slots
    assert isinstance(likelihood, GeneralisedLinear)
    best = likelihood.best_of_rows(y, slots)
    kept = {name: slots[name] for name in ("offset", "weight") if name in slots}
    if not weighed:
        return replace(tasks, outcome=best, slots=kept, sharding=None)
    level = likelihood.units(tasks)[0] + slots.get("offset", np.zeros(len(y)))

    def expanded(f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slope, bend = likelihood.slopes_of_rows(f, own, slots, y)
        bend = np.maximum(-bend, 1e-12)
        return f + np.clip(slope / bend, -FURTHEST, FURTHEST), bend

    far, near = expanded(best), expanded(level)
    tells = (far[1] >= TELLS) | ~np.isfinite(near[0])
    outcome, bend = (np.where(tells, a, b) for a, b in zip(far, near, strict=True))
    return replace(
        tasks, outcome=outcome, slots=kept | {"known_se": bend**-0.5}, sharding=None
    )  # fmt: skip
