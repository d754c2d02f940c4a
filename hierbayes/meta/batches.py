r"""Tasks as a source of batches, by stochastic ascent on φ's parameters.

.. math:: \varphi^* = \arg\max_\varphi \; \mathbb E_{\text{tasks}}
    \left[\text{evidence}_j(\varphi)\right]

φ's parameters are pytrees as the user's own functions take them, so that an outer optimiser may
treat them by name; φ itself holds their vectors.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes import inputs
from hierbayes.adaptation import Adaptation, GradientSteps
from hierbayes.adaptation.base import PointAdaptation
from hierbayes.errors import InputError, NotApplicable, announce, listing
from hierbayes.evidence import Predictive
from hierbayes.fit import Fit
from hierbayes.likelihoods import LastLayer
from hierbayes.likelihoods.neural import Neural, refuse_filling
from hierbayes.meta.all_at_once import queries_judged
from hierbayes.meta.inner_loop import inner_noise, refuse_splits, step_or
from hierbayes.meta.outer_loop import SHARE, Run, WithOuterLoop
from hierbayes.meta.sources import Extra, Found, Source
from hierbayes.meta.training import Ascent, Score, ToTrain, train
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import arithmetic, to_numpy
from hierbayes.tasks import Episodes, Task, Tasks
from hierbayes.tasks.episodes import Sampled
from hierbayes.tasks.joining import joined

Parameters = dict[str, Any]

After = Callable[[HierarchicalModel, dict[str, Any], Tasks, Tasks], dict[str, Any]]
"""What is left of φ from (model, φ, support, query)."""

PLAIN_STEP = 0.01
"""Step size on the mean log likelihood where none is given: that of the sinusoids of MAML."""

UNIT_LOSS = float(np.sqrt(0.5))
"""σ at which the mean negative log likelihood is the mean squared error, up to a constant."""


SAMPLE_SEED, DEVIATION_SEED = 0x5A17_0001, 0x5A17_0002
"""Of the tasks that a fit shows, and of those on which ``sigma_query`` is learned: no user's."""


def on_episodes(model: HierarchicalModel, tasks: Any) -> bool:
    """Whether φ is to be learned batch by batch: from a source, or of a network."""
    return isinstance(tasks, Episodes) or isinstance(model.likelihood, Neural)


def _read(model: HierarchicalModel, tasks: Any, query: float, held: int) -> tuple[Episodes, Tasks]:
    """(source, the support rows of some of its tasks): a fixed set of tasks is split anew.

    Of a fixed set the tasks are themselves, all rows of them.
    """
    if not isinstance(tasks, Episodes):
        if not isinstance(tasks, Tasks):
            raise InputError(
                f"expected Tasks or Episodes, found {type(tasks).__name__}; make them with "
                "Tasks.from_arrays, hb.Episodes.from_sampler or from_classes"
            )
        model.likelihood.check(tasks)
        if tasks.num_tasks < 2:
            raise InputError(
                f"a prior cannot be learned from one task: found {tasks.num_tasks}; give more"
            )
        resplit = Episodes.from_tasks(tasks, query=query)
        _refuse_filled(model, resplit, tasks)
        return resplit, model.tasks(tasks)
    if query != SHARE:
        raise InputError("query is for a fixed set of tasks; episodes come with their query rows")
    if getattr(model.prior, "zero_mean", ()):
        raise InputError("zero_mean is for fixed sets of tasks: on episodes every mean is learned")
    with arithmetic(model.likelihood.precision):
        sample, _ = tasks.draw(held, seed=jax.random.key(SAMPLE_SEED))
    # not the names of other draws, whose rows would be predicted with these tasks' theta
    names = np.array([f"sample {j}" for j in range(sample.num_tasks)])
    named = model.tasks(replace(sample, labels=replace(sample.labels, names=names)))
    model.likelihood.check(named)
    _refuse_filled(model, tasks, named)
    return tasks, named


def _refuse_filled(model: HierarchicalModel, episodes: Episodes, sample: Tasks) -> None:
    """Refuse parts that are filled up, where rows would be mixed with those that fill up."""
    if episodes.filled and model.likelihood.mixes_rows(sample.predictors):
        refuse_filling(episodes.filled)


class Outer(NamedTuple):
    """φ's parameters of the outer loop: where they start and what φ they make."""

    model: HierarchicalModel
    num_coef: int

    def start(self, key: Any) -> Parameters:
        """μ, and the weights of shared features where the likelihood has some."""
        likelihood = self.model.likelihood
        one, two = jax.random.split(key)
        if isinstance(likelihood, LastLayer):
            head = jax.random.normal(two, (self.num_coef,)) / self.num_coef**0.5
            return {"mu": head, "features": likelihood.initial(one)}
        if isinstance(likelihood, Neural):
            return {"mu": likelihood.initial(one)}
        return {"mu": jnp.zeros(self.num_coef)}

    def phi(self, parameters: Parameters, fixed: dict[str, Any]) -> dict[str, Any]:
        """φ by name; parameters of a method's own, ``log_*``, become what they are the log of.

        ``fixed`` is the part of φ that is not learned.
        """
        likelihood = self.model.likelihood
        phi = {name: jnp.asarray(value) for name, value in fixed.items()}
        for name, value in parameters.items():
            if name == "features":
                assert isinstance(likelihood, LastLayer)
                phi[name] = likelihood.weights.vector(value)
            elif name == "mu":  # a vector, though the weights may be a single number
                phi[name] = jnp.asarray(likelihood.vector(value))
            elif name.startswith("log_"):
                phi[name[4:]] = jnp.exp(self._flat(value))
            else:
                phi[name] = self._flat(value)
        return phi

    def _flat(self, value: Any) -> Any:
        if isinstance(value, (jax.Array, np.ndarray)) and np.ndim(value) <= 1:
            return jnp.asarray(value)
        return self.model.likelihood.vector(value)


def fixed_noise(model: HierarchicalModel, sigma: float | None) -> dict[str, Any]:
    """φ's σ that sets the units of the inner loop and is not learned, where the family has one."""
    others = [name for name in model.likelihood.parameters() if name != "sigma"]
    if others:
        kind = type(model.likelihood).__name__
        raise NotApplicable(
            f"{listing(others)} of a {kind} likelihood cannot be learned from episodes: fit a "
            "fixed set of tasks, of which episodes.draw(1000) gives support and query, or state "
            "the value where the likelihood takes it, as in StudentT(df=4.0)"
        )
    if "sigma" not in model.likelihood.parameters():
        if sigma is not None:
            raise InputError("sigma has no place in this likelihood; leave it out")
        return {}
    return {"sigma": np.asarray(UNIT_LOSS if sigma is None else inputs.positive("sigma", sigma))}


def rows_together(support: Task, query: Task) -> Task:
    """All rows of each task, tasks on a leading axis."""

    def joined(a: Any, b: Any) -> Any:
        return jnp.concatenate([a, b], axis=1)

    return Task(
        joined(support.predictors, query.predictors), joined(support.shared, query.shared),
        support.task_predictors, joined(support.outcome, query.outcome),
        {name: joined(values, query.slots[name]) for name, values in support.slots.items()},
        joined(support.mask, query.mask),
    )  # fmt: skip


def per_row(values: Any, mask: Any) -> Any:
    """Means over each task's rows (B,), of values (B, n) that are zero where ``mask`` is False."""
    return values.sum(-1) / jnp.maximum(mask.sum(-1), 1)


class QueryScore(NamedTuple):
    """The mean log density of a task's query rows after adaptation."""

    outer: Outer
    evidence: Predictive

    def __call__(
        self, parameters: Parameters, support: Task, asked: Task, key: Any, given: Any
    ) -> Any:
        """Of every task (B,); ``given`` is the part of φ that is not learned."""
        del key
        phi = self.outer.phi(parameters, given)
        rows = self.evidence.of_rows(self.outer.model, phi, (support, None), (asked, None))
        return per_row(rows, asked.mask)


class Residuals(NamedTuple):
    """How well the problems behind an implicit gradient are solved in held-out tasks."""

    outer: Outer
    adaptation: GradientSteps

    def __call__(
        self, parameters: Parameters, support: Task, asked: Task, given: Any
    ) -> dict[str, Any]:
        """The worst of them, and the share without a maximum."""
        phi = self.outer.phi(parameters, given)
        left, solved = self.adaptation.how_solved(self.outer.model, phi, support, asked)
        return {
            "inner_residual": left.max(), "gradient_residual": solved.residual.max(),
            "not_a_maximum": (~solved.definite).mean(),
        }  # fmt: skip


@dataclass(frozen=True)
class Batches(Source):
    """Tasks drawn batch by batch; ``sample`` are some of them, which a fit shows."""

    plain: HierarchicalModel
    episodes: Episodes
    sample: Tasks
    method: WithOuterLoop
    run: Run
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
        """σ as given, or √½: then minus the mean log likelihood is the mean squared error.

        Other parameters of a family that is linear in θ are pooled within tasks that are drawn.
        """
        likelihood = self.plain.likelihood
        if likelihood.linear and not likelihood.gaussian_in_theta and likelihood.parameters():
            return inner_noise(self.plain, joined(*self._drawn()), sigma)
        return fixed_noise(self.plain, sigma)

    def _drawn(self) -> tuple[Tasks, Tasks]:
        """(support, query) of fresh tasks; a generator has given as many as there are held out."""
        num_tasks = 500 if isinstance(self.episodes, Sampled) else self.sample.num_tasks
        with arithmetic(self.plain.likelihood.precision):
            drawn = self.episodes.draw(num_tasks, seed=jax.random.key(DEVIATION_SEED))
            support, query = (self.plain.tasks(part) for part in drawn)
        return support, query

    def step_size(self, asked: Any, noise: dict[str, Any], loss: str) -> float:
        """0.01 unless asked otherwise; no bound is known."""
        del noise, loss
        return step_or(asked, PLAIN_STEP)

    def maximise(
        self, adaptation: PointAdaptation, given: dict[str, Any], described: dict[str, Any],
        extras: tuple[Extra, ...] = (),
    ) -> Found:  # fmt: skip
        """By stochastic ascent on φ's parameters as the user's own functions take them."""
        outer = Outer(self.plain, len(self.sample.coef))
        objective = QueryScore(outer, Predictive(adaptation))

        def start(key: Any) -> Parameters:
            parameters = outer.start(key)
            for extra in extras:
                log = jnp.log(jnp.asarray(extra.start))
                each = jax.tree.map(lambda m, log=log: jnp.full_like(m, log), parameters["mu"])
                parameters[f"log_{extra.name}"] = each if extra.each else log
            return parameters

        measure = None
        if isinstance(adaptation, GradientSteps) and adaptation.derivative == "implicit":
            measure = Residuals(outer, adaptation)
        to_train = ToTrain(Ascent(objective), objective, given, measure)
        return self.follow(outer, to_train, given, described, start)

    def ascend(
        self, outer: Outer, objective: Score, given: Any, described: dict[str, Any],
        start: Callable[[Any], Parameters] | None = None, precision: str | None = None,
        fixed: dict[str, Any] | None = None,
    ) -> Found:  # fmt: skip
        """Of the mean over tasks of ``objective(parameters, support, asked, key, given)`` (B,)."""
        to_train = ToTrain(Ascent(objective), objective, given)
        return self.follow(outer, to_train, fixed or {}, described, start, precision)

    def follow(
        self, outer: Outer, to_train: ToTrain, fixed: dict[str, Any], described: dict[str, Any],
        start: Callable[[Any], Parameters] | None = None, precision: str | None = None,
    ) -> Found:  # fmt: skip
        """Along a direction of φ's parameters; ``fixed`` is the part of φ that is not learned."""
        chosen = self.method.outer_settings(self.run)
        kept = ("batch_size", "held_out", "evaluate_every", "patience", "seed")
        settled = {name: chosen[name] for name in kept}
        trained = train(
            to_train, outer.start if start is None else start, self.episodes, chosen,
            precision or self.plain.likelihood.precision, self.method.name,
            described | {"query": self.method.query} | settled,
        )  # fmt: skip
        trained.settings = settled | {"num_meta_steps": chosen["num_meta_steps"]}
        last = {name: values[-1] for name, values in trained.history.items()}
        return Found({}, trained.warnings, last, (outer, fixed, trained))

    def fit(
        self, adaptation: Adaptation, found: Found, described: dict[str, Any],
        after: After | None = None, precision: str | None = None,
    ) -> Fit:  # fmt: skip
        """The fit; ``after`` learns what is left of φ from fresh tasks, φ being known by then.

        It is the deviation of query rows by default, where the family has a σ.
        """
        (outer, fixed, trained), plain = found.more, self.plain
        parameters = plain.likelihood.parameters()
        given = parameters and set(parameters) <= set(fixed)  # φ's own are learned elsewhere
        if after is None and given and isinstance(adaptation, PointAdaptation):
            by_deviation = plain.likelihood.gaussian_in_theta or not plain.likelihood.linear
            after = (
                query_deviation(adaptation)
                if by_deviation
                else _judged(self.method.name, adaptation)
            )
        with arithmetic(precision or plain.likelihood.precision):
            phi = {
                k: np.asarray(v, np.float64)
                for k, v in outer.phi(trained.parameters, fixed).items()
            }
        phi |= {name: np.array(value) for name, value in fixed.items()}  # not as rounded
        if after is not None and parameters:
            with arithmetic(plain.likelihood.precision):
                phi |= to_numpy(after(plain, phi, *self._drawn()))
        if "tau" in phi and np.ndim(phi["tau"]) == 0:
            phi["tau"] = np.full(len(self.sample.coef), phi["tau"])
        return Fit(
            self.method, plain, self.sample, phi, adaptation,
            no_evidence=self.method.no_evidence, warnings=announce(found.warnings),
            info=described | {"query": self.method.query} | trained.settings | {
                "outer_steps": trained.steps, "history": trained.history,
                "held_out_score": trained.held_out,
                "seconds": time.perf_counter() - self.run.started,
            },
        )  # fmt: skip


def batches(method: WithOuterLoop, model: HierarchicalModel, tasks: Any, run: Run) -> Batches:
    """The source of tasks that are drawn."""
    refuse_splits(method.num_splits, method.name)
    plain = model.without_encoder()
    episodes, sample = _read(plain, tasks, method.query, method.outer_settings(run)["held_out"])
    return Batches(plain, episodes, sample, method, run)


def _judged(method: str, adaptation: PointAdaptation) -> After:
    """``sigma_query``, ``concentration_query`` and the like at their maximum."""

    def learn(
        model: HierarchicalModel, phi: dict[str, Any], support: Tasks, query: Tasks
    ) -> dict[str, Any]:
        given = {name: phi[name] for name in model.likelihood.parameters()}
        return queries_judged(method, model, adaptation, phi, given, support, query).phi

    return learn


def query_deviation(adaptation: PointAdaptation) -> Any:
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
