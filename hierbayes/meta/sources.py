r"""Where the tasks come from that φ is learned from: all at once, or batch by batch.

.. math:: \max_\varphi \sum_j \text{evidence}_j(\varphi)
          \qquad\text{or}\qquad \max_\varphi \; \mathbb E_j\, \text{evidence}_j(\varphi)

A method is written once. Its source says in which columns it computes, what sets the units of its
inner steps and how long these are where nothing is said, how φ follows from what is learned, and
how that is maximised; and it makes the fit.
"""

from __future__ import annotations

import abc
import time
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
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
from hierbayes.meta.episodic import (
    PLAIN_STEP,
    Outer,
    Parameters,
    finish,
    fixed_noise,
    per_row,
    run,
    source,
)
from hierbayes.meta.fixed_point import Direction, follow
from hierbayes.meta.inner_loop import (
    Learned,
    Predicted,
    check_counts,
    check_optimiser,
    inner_noise,
    outer_space,
    query_parameters,
    query_space,
    refuse_idle,
    refuse_splits,
    side_by_side,
    step_or,
    support_query_splits,
)
from hierbayes.meta.training import DEFAULTS, ascent_of
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64, to_numpy
from hierbayes.phi import Part, Space
from hierbayes.tasks import Episodes, Task, Tasks


class Extra(NamedTuple):
    """A positive number of φ, or one a coefficient, that is learned beside μ, Γ and β.

    ``start``: where its search begins; ``each``: whether there is one a coefficient; ``top``: where
    it ends, if it does; ``unit``: what its logarithm is measured in.
    """

    name: str
    start: Any
    each: bool = False
    top: float | None = None
    unit: float = 1.0


class Found(NamedTuple):
    """φ as an outer loop has learned it, what is to be said of that, and what a fit tells."""

    phi: dict[str, Any]
    warnings: list[str]
    info: dict[str, Any]
    more: Any = None


class Source(abc.ABC):
    """Tasks that φ is learned from, as a method sees them."""

    loss: Literal["sum", "mean"]
    """What inner steps climb where nothing is said: "sum" or "mean"."""

    whole: bool
    """Whether they are there all at once."""

    @property
    @abc.abstractmethod
    def model(self) -> HierarchicalModel:
        """The model as the method computes with it."""

    @property
    @abc.abstractmethod
    def tasks(self) -> Tasks:
        """The tasks that a fit shows."""

    @abc.abstractmethod
    def noise(self, sigma: float | None) -> dict[str, Any]:
        """φ's part that is given: what sets the units of the inner loop."""

    @abc.abstractmethod
    def step_size(self, asked: Any, noise: dict[str, Any], loss: str) -> float:
        """η, that asked for or the source's own; refused where steps would diverge."""

    @abc.abstractmethod
    def maximise(
        self, method: str, adaptation: PointAdaptation, given: dict[str, Any],
        described: dict[str, Any], extras: tuple[Extra, ...] = (),
    ) -> Found:  # fmt: skip
        """φ where adapted tasks predict their query rows best; ``given`` is what is not learned."""

    @abc.abstractmethod
    def fit(
        self, method: str, adaptation: Adaptation, found: Found, no_evidence: str,
        described: dict[str, Any],
    ) -> Fit:  # fmt: skip
        """The fit; ``described`` are the method's settings."""


# ----------------------------------------------------------------------- all at once


@dataclass(frozen=True)
class AllAtOnce(Source):
    """A fixed set of tasks, in the columns of ``entered``, whose rows are split at random."""

    entered: Entered
    method: str
    started: float
    query: float
    num_splits: int
    seed: Any
    optimiser: Any
    num_meta_steps: int
    progress: bool | None
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
        return support_query_splits(self.tasks, self.query, self.num_splits, self.seed, self.method)

    def maximise(
        self, method: str, adaptation: PointAdaptation, given: dict[str, Any],
        described: dict[str, Any], extras: tuple[Extra, ...] = (),
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
                Predicted(evidence, plain), start, self.optimiser, self.num_meta_steps,
                self.progress, method, data,
            )  # fmt: skip
            phi = to_numpy(dict(given) | space.phi(jnp.asarray(best.x)))
        density = best.value * asked.num_rows / self.num_splits
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
                direction, start, self.optimiser, self.num_meta_steps, tolerance, self.progress,
                self.method, (Learned(space, known), *data),
            )  # fmt: skip
            phi = to_numpy(dict(given) | space.phi(jnp.asarray(found.x)))
        return Found(phi, list(found.warnings), {"outer_steps": found.taken})

    def judge_queries(
        self, adaptation: PointAdaptation, phi: dict[str, Any], given: dict[str, Any]
    ) -> Found:
        """``sigma_query`` and the like at their maximum given the rest of φ."""
        model, tasks, plain = self.model, self.tasks, self.model.without_encoder()
        names = query_parameters(model, given)
        support, asked = tasks.split(self.query, seed=self.seed)
        if not ((support.sizes > 0) & (asked.sizes > 0)).any():
            learned = ", ".join(f"{name}_query" for name in names)
            return Found({}, [
                f"no task has two rows, so that {learned}, the deviation of rows from what the "
                "others of their task predict, cannot be learned: predictions hold the noise alone "
                "and are too narrow"
            ], {"query_log_density": None})  # fmt: skip
        how, known = for_programs(adaptation, phi)
        evidence = Predictive(how)
        with float64():
            space = query_space(model, tasks, given)
            parts = evidence.arrange(plain, support, asked)
            data = (Learned(space, known), *parts, float(asked.num_rows))
            name, start = f"{self.method}'s sigma_query", np.zeros(space.size)
            best = maximise(Predicted(evidence, plain), start, None, 100, False, name, data)
            found = to_numpy(space.phi(jnp.asarray(best.x)))
        density = best.value * asked.num_rows
        return Found(found, list(best.warnings), {"query_log_density": density})

    def fit(
        self, method: str, adaptation: Adaptation, found: Found, no_evidence: str,
        described: dict[str, Any],
    ) -> Fit:  # fmt: skip
        """In the user's columns."""
        own = {
            "query": self.query, "num_splits": self.num_splits,
            "num_meta_steps": self.num_meta_steps, "seed": self.seed,
        }  # fmt: skip
        made = Fit(
            method, self.model, self.tasks, found.phi, adaptation, found.more,
            no_evidence=no_evidence, warnings=announce(found.warnings),
            info=described | found.info | own | {"seconds": time.perf_counter() - self.started},
        )  # fmt: skip
        return self.entered.leave(made)


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
        part, beliefs = Part(extra.name, dims, shape, "belief"), dist.Uniform(0.0, extra.top)
        given: Any = {"beliefs": {extra.name: beliefs}}
    else:
        part, given = Part(extra.name, dims, shape, "positive"), {"units": {extra.name: extra.unit}}
    return Space.of([part], starts={extra.name: extra.start}, **given)


def all_at_once(
    enter: Any, model: HierarchicalModel, tasks: Any, method: str, idle: dict[str, Any],
    started: float, *, query: float, num_splits: int = 1, seed: Any, optimiser: Any,
    num_meta_steps: int,  progress: bool | None,
) -> AllAtOnce:  # fmt: skip
    """The source of a fixed set of tasks; ``idle`` are settings that have no place here."""
    refuse_idle(idle, method)
    tasks = model.tasks(tasks)
    check_counts(num_splits=num_splits, num_meta_steps=num_meta_steps)
    check_optimiser(optimiser)
    model.check(tasks, learns_prior=True)
    return AllAtOnce(
        enter(tasks), method, started, query, num_splits, seed, optimiser, num_meta_steps, progress
    )


# -------------------------------------------------------------------- batch by batch


@dataclass(frozen=True)
class Batches(Source):
    """Tasks drawn batch by batch; ``sample`` are some of them, which a fit shows."""

    plain: HierarchicalModel
    episodes: Episodes
    sample: Tasks
    started: float
    query: float
    training: dict[str, Any]
    loss = "mean"
    whole = False

    @property
    def model(self) -> HierarchicalModel:
        """The model alone."""
        return self.plain

    @property
    def tasks(self) -> Tasks:
        """The sample."""
        return self.sample

    def noise(self, sigma: float | None) -> dict[str, Any]:
        """σ as given, or √½: then minus the mean log likelihood is the mean squared error."""
        return fixed_noise(self.plain, sigma)

    def step_size(self, asked: Any, noise: dict[str, Any], loss: str) -> float:
        """0.01 unless asked otherwise; no bound is known."""
        del noise, loss
        return step_or(asked, PLAIN_STEP)

    def maximise(
        self, method: str, adaptation: PointAdaptation, given: dict[str, Any],
        described: dict[str, Any], extras: tuple[Extra, ...] = (),
    ) -> Found:  # fmt: skip
        """By stochastic ascent on φ's parameters as the user's own functions take them."""
        outer, evidence = Outer(self.plain, len(self.sample.coef), given), Predictive(adaptation)

        def start(key: Any) -> Parameters:
            parameters = outer.start(key)
            for extra in extras:
                log = jnp.log(jnp.asarray(extra.start))
                each = jax.tree.map(lambda m, log=log: jnp.full_like(m, log), parameters["mu"])
                parameters[f"log_{extra.name}"] = each if extra.each else log
            return parameters

        def objective(parameters: Parameters, support: Task, asked: Task, key: Any) -> Any:
            del key
            phi = outer.phi(parameters)
            rows = evidence.of_rows(self.plain, phi, (support, None), (asked, None))
            return per_row(rows, asked.mask)

        implicit = isinstance(adaptation, GradientSteps) and adaptation.derivative == "implicit"

        def residuals(parameters: Parameters, support: Task, asked: Task) -> dict[str, Any]:
            assert isinstance(adaptation, GradientSteps)
            left, solved = adaptation.how_solved(self.plain, outer.phi(parameters), support, asked)
            return {
                "inner_residual": left.max(), "gradient_residual": solved.residual.max(),
                "not_a_maximum": (~solved.definite).mean(),
            }  # fmt: skip

        trained = run(
            outer, ascent_of(objective), objective, self.episodes, self.training, method,
            described | {"query": self.query}, start, measure=residuals if implicit else None,
        )  # fmt: skip
        last = {name: values[-1] for name, values in trained.history.items()}
        return Found({}, trained.warnings, last, (outer, trained))

    def follow(
        self, method: str, direction: Any, score: Any, outer: Outer, described: dict[str, Any]
    ) -> Found:
        """Along a direction of φ's parameters; ``score`` judges held-out tasks."""
        trained = run(
            outer, direction, score, self.episodes, self.training, method,
            described | {"query": self.query},
        )  # fmt: skip
        return Found({}, trained.warnings, {}, (outer, trained))

    def fit(
        self, method: str, adaptation: Adaptation, found: Found, no_evidence: str,
        described: dict[str, Any],
    ) -> Fit:  # fmt: skip
        """With ``sigma_query`` learned on fresh tasks, φ being known by then."""
        outer, trained = found.more
        trained.warnings = found.warnings
        after = None
        if "sigma" in self.plain.likelihood.parameters() and isinstance(adaptation, GradientSteps):
            after = query_deviation(adaptation)
        fit = finish(
            method, outer, adaptation, trained, self.sample, self.episodes,
            described | {"query": self.query}, self.started, no_evidence, after,
        )  # fmt: skip
        if "tau" in fit.phi and np.ndim(fit.phi["tau"]) == 0:
            each = np.full(len(self.sample.coef), fit.phi["tau"])
            fit = replace(fit, phi={**fit.phi, "tau": each})
        return fit


def batches(
    model: HierarchicalModel, tasks: Any, method: str, started: float, *, query: float,
    num_splits: int = 1, training: dict[str, Any],
) -> Batches:  # fmt: skip
    """The source of tasks that are drawn; ``training`` are settings of the outer loop."""
    refuse_splits(num_splits, method)
    plain = model.without_encoder()
    held = training.get("held_out") or DEFAULTS["held_out"]
    episodes, sample = source(plain, tasks, query, held)
    return Batches(plain, episodes, sample, started, query, training)


def query_deviation(adaptation: GradientSteps) -> Any:
    """``sigma_query`` at its maximum: the deviation of query rows from what adapted tasks say.

    Tasks whose steps diverged are left out: adapting to one says so. Until then σ stands in its
    place, on which μ does not depend: it scales the loss.
    """

    def learn(
        model: HierarchicalModel, phi: dict[str, Any], support: Tasks, query: Tasks
    ) -> dict[str, Any]:
        thetas = adaptation(model, support, phi).mean
        rows, of_row = model.likelihood.arrange(query)
        f = np.asarray(model.likelihood.locations(thetas, phi, rows, of_row), np.float64)
        residual = (np.asarray(rows.outcome) - f)[np.asarray(rows.mask)]
        return {"sigma_query": np.sqrt(np.mean(residual[np.isfinite(residual)] ** 2))}

    return learn
