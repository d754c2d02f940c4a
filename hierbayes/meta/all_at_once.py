r"""A fixed set of tasks as a source: all at once, over a vector of order one.

.. math:: \max_x \; \frac{1}{N_q} \sum_j \log p\!\left(D_j^{\text{query}} \mid
          A(D_j^{\text{support}}; \varphi(x))\right)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from hierbayes.adaptation import Adaptation, GradientSteps
from hierbayes.adaptation.base import PointAdaptation
from hierbayes.adaptation.step_length import check_step_size, largest_curvature
from hierbayes.errors import announce
from hierbayes.evidence import Predictive
from hierbayes.fit import Fit
from hierbayes.fit.outward import Entered
from hierbayes.meta.ascent import maximise
from hierbayes.meta.fixed_point import Direction, follow
from hierbayes.meta.inner_loop import (
    Learned,
    Predicted,
    inner_noise,
    outer_space,
    query_parameters,
    query_space,
    side_by_side,
    support_query_splits,
)
from hierbayes.meta.outer_loop import Run, WithOuterLoop
from hierbayes.meta.sources import Extra, Found, Source
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64, to_numpy
from hierbayes.phi import Part, Space
from hierbayes.tasks import Tasks


@dataclass(frozen=True)
class AllAtOnce(Source):
    """A fixed set of tasks, in the columns of ``entered``, whose rows are split at random."""

    entered: Entered
    method: WithOuterLoop
    run: Run
    num_meta_steps: int
    loss = "sum"
    whole = True

    @property
    def model(self) -> HierarchicalModel:
        """In the method's columns."""
        return self.entered.inner_model

    @property
    def tasks(self) -> Tasks:
        """In the method's columns."""
        return self.entered.inner_tasks

    def noise(self, sigma: float | None) -> dict[str, Any]:
        """The family's own parameters, as given or pooled within tasks."""
        return inner_noise(self.model, self.tasks, sigma)

    def longest(self, noise: dict[str, Any], loss: str) -> float:
        """1/λ_max, up to which steps are a MAP estimate for every K."""
        return 1.0 / float(largest_curvature(self.model, self.tasks, noise, loss).max())

    def step_size(self, asked: Any, noise: dict[str, Any], loss: str) -> float:
        """1/λ_max unless asked otherwise."""
        eta = self.longest(noise, loss) if asked == "auto" else float(asked)
        check_step_size(eta, self.model, self.tasks, noise, loss)
        return eta

    def splits(self) -> list[tuple[Tasks, Tasks]]:
        """Support and query parts of every task."""
        method, seed = self.method, self.run.seed
        return support_query_splits(self.tasks, method.query, method.num_splits, seed, method.name)

    def maximise(
        self, adaptation: PointAdaptation, given: dict[str, Any], described: dict[str, Any],
        extras: tuple[Extra, ...] = (),
    ) -> Found:  # fmt: skip
        """Over a vector of order one, by L-BFGS unless there is another optimiser."""
        del described
        model, tasks, plain = self.model, self.tasks, self.model.without_encoder()
        support, asked = (side_by_side(parts) for parts in zip(*self.splits(), strict=True))
        how, known = for_programs(adaptation, given)
        with float64():
            space = outer_space(model, tasks, given)
            for extra in extras:
                space += _part_of(extra, len(tasks.coef))
            start = space.x({"mu": model.scales(tasks).mu_location})
            evidence = Predictive(how)
            parts = evidence.arrange(plain, support, asked)
            data = (Learned(space, known), *parts, float(asked.num_rows))
            best = maximise(
                Predicted(evidence, plain), start, self.method.optimiser, self.num_meta_steps,
                self.run.progress, self.method.name, data,
            )  # fmt: skip
            phi = to_numpy(dict(given) | space.phi(jnp.asarray(best.x)))
        density = best.value * asked.num_rows / self.method.num_splits
        return Found(phi, list(best.warnings), {"query_log_density": density}, support)

    def follow(
        self, direction: Direction, given: dict[str, Any], known: dict[str, Any], data: Any,
        tolerance: float,
    ) -> Found:  # fmt: skip
        """φ where a direction of (μ, Γ, β) vanishes; ``known`` is what its program is given."""
        model, tasks = self.model, self.tasks
        with float64():
            space = outer_space(model, tasks, given, queries=False)
            start = space.x({"mu": model.scales(tasks).mu_location})
            found = follow(
                direction, start, self.method.optimiser, self.num_meta_steps, tolerance,
                self.run.progress, self.method.name, (Learned(space, known), *data),
            )  # fmt: skip
            phi = to_numpy(dict(given) | space.phi(jnp.asarray(found.x)))
        return Found(phi, list(found.warnings), {"outer_steps": found.taken})

    def judge_queries(
        self, adaptation: PointAdaptation, phi: dict[str, Any], given: dict[str, Any]
    ) -> Found:
        """``sigma_query`` and the like at their maximum given the rest of φ."""
        support, asked = self.tasks.split(self.method.query, seed=self.run.seed)
        if not ((support.sizes > 0) & (asked.sizes > 0)).any():
            learned = ", ".join(f"{name}_query" for name in query_parameters(self.model, given))
            return Found({}, [
                f"no task has two rows, so that {learned}, the deviation of rows from what the "
                "others of their task predict, cannot be learned: predictions hold the noise alone "
                "and are too narrow"
            ], {"query_log_density": None})  # fmt: skip
        name = self.method.name
        return queries_judged(name, self.model, adaptation, phi, given, support, asked)

    def fit(self, adaptation: Adaptation, found: Found, described: dict[str, Any]) -> Fit:
        """In the user's columns."""
        method = self.method
        own = {
            "query": method.query, "num_splits": method.num_splits,
            "num_meta_steps": self.num_meta_steps, "seed": self.run.seed,
        }  # fmt: skip
        made = Fit(
            method, self.model, self.tasks, found.phi, adaptation, found.more,
            no_evidence=method.no_evidence, warnings=announce(found.warnings),
            info=described | found.info | own | {"seconds": time.perf_counter() - self.run.started},
        )  # fmt: skip
        return self.entered.leave(made)


def queries_judged(
    method: str, model: HierarchicalModel, adaptation: PointAdaptation, phi: dict[str, Any],
    given: dict[str, Any], support: Tasks, asked: Tasks,
) -> Found:  # fmt: skip
    """How query rows are scored, at its maximum given the rest of φ."""
    how, known = for_programs(adaptation, phi)
    evidence, plain = Predictive(how), model.without_encoder()
    with float64():
        space = query_space(model, support, given)
        parts = evidence.arrange(plain, support, asked)
        data = (Learned(space, known), *parts, float(asked.num_rows))
        name, start = f"{method}'s sigma_query", np.zeros(space.size)
        best = maximise(Predicted(evidence, plain), start, None, 100, False, name, data)
        found = to_numpy(space.phi(jnp.asarray(best.x)))
    density = best.value * asked.num_rows
    return Found(found, list(best.warnings), {"query_log_density": density})


def for_programs(
    adaptation: PointAdaptation, phi: dict[str, Any]
) -> tuple[PointAdaptation, dict[str, Any]]:
    """An adaptation whose numbers stand in φ, so that one compiled program serves them all."""
    if isinstance(adaptation, GradientSteps):
        return adaptation.for_programs(phi)
    return adaptation, dict(phi)


def _part_of(extra: Extra, num_coef: int) -> Space:
    shape = (num_coef,) if extra.each else ()
    dims = ("coef",) * len(shape)
    if extra.top is not None:
        part = Part(extra.name, dims, shape, "hyperprior")
        given: Any = {"hyperpriors": {extra.name: dist.Uniform(0.0, extra.top)}}
    else:
        part, given = Part(extra.name, dims, shape, "positive"), {"units": {extra.name: extra.unit}}
    return Space.of([part], starts={extra.name: extra.start}, **given)


def all_at_once(
    method: WithOuterLoop, enter: Callable[[HierarchicalModel, Tasks], Entered],
    model: HierarchicalModel, tasks: Any, run: Run, *idle: str, most: int = 500,
) -> AllAtOnce:  # fmt: skip
    """The source of a fixed set of tasks; ``idle`` are settings that have no place here.

    ``enter`` takes them into the columns that are computed with; ``most`` outer steps are taken
    where nothing else is said.
    """
    method.refuse_batches(run, *idle)
    tasks = model.tasks(tasks)
    model.check(tasks, learns_prior=True)
    return AllAtOnce(enter(model, tasks), method, run, method.num_meta_steps or most)
