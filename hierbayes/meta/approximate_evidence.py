r"""Type-II maximum likelihood and MAP where the evidence is an integral without a closed form.

.. math:: \hat\varphi = \arg\max_\varphi \sum_j \log \hat p(D_j \mid \varphi)
          \left[+ \log p(\varphi)\right]

with Laplace's approximation or quadrature for p̂ (see :mod:`hierbayes.adaptation.quadrature`).

Where to begin where the evidence has no closed form: tasks as if they were Gaussian.

.. math:: z_i = f_i + \frac{\partial_f \log p(y_i \mid f_i)}{-\partial_f^2 \log p(y_i \mid f_i)},
          \qquad \operatorname{Var}(z_i) \approx \frac{1}{-\partial_f^2 \log p(y_i \mid f_i)}

A row that says much by itself is expanded around its own best f, one that says little around the
overall level: the working outcomes of penalised quasi-likelihood. Their evidence has the scales of
the tasks in it, and is looked at over all sizes of τ (:mod:`hierbayes.meta.first_look`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from hierbayes.adaptation import Quadrature
from hierbayes.adaptation.unpooled import determined
from hierbayes.errors import NotApplicable, listing
from hierbayes.evidence.integrated import by_nodes
from hierbayes.evidence.profile import profile_problem
from hierbayes.likelihoods.generalised import GeneralisedLinear
from hierbayes.meta.better_evidence import AroundPhi, newton_shift
from hierbayes.meta.criterion import Criterion
from hierbayes.meta.first_look import look, sample_of
from hierbayes.meta.optimum import (
    Optimum,
    ValueAndSlope,
    descend,
    held_entries,
    minimise,
    polish,
    unsettled,
)
from hierbayes.meta.posterior_mode import off_the_boundary
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.phi.space import Space, at_an_end
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


NODES = {1: (5, 7, 11, 15, 21, 31, 40, 60), 2: (5, 7, 11, 15, 21, 31, 40), 3: (3, 5, 7, 9, 13, 20)}
"""Numbers of nodes a dimension that are tried, by the number of coefficients; even ones on rays."""

MOST_DIMENSIONS = 3
"""Coefficients up to which quadrature is offered."""

ENOUGH = 1e-6
"""Difference of a task's log evidence, from one number of nodes to the next, that ends this."""

LEAST_ENOUGH = 1e-5
"""Of all tasks together."""

FOR_DRAWS = 1e-2
"""The same where the evidence is sampled: a hundredth of a standard deviation at the most."""

LARGE_ERROR = 0.05
"""Of the summed log evidence, with the finest nodes that there are, that goes unremarked."""

TOO_FEW_NODES = (
    "the log evidence by quadrature is off by about {error:.2g} with the finest nodes that there "
    "are: tasks' posteriors are far from normal, as where tau is large; "
    'full_bayes(method="nuts") needs no quadrature'
)

LARGE_SHIFT = 0.25
"""Posterior standard deviations by which Laplace's approximation may move φ̂ unremarked."""

NEAR_ZERO = 0.01
"""Units of τ below which the search is done with more patience: there lies a boundary."""

ENDLESS = 20.0
"""Units beyond which an effect that all tasks share is said to have no estimate."""

LEAST_START = 0.01
"""Units of τ below which the search does not begin."""

SURELY = 10.0
"""Nats by which some spread is better than none, of tasks as if they were Gaussian, for complete
pooling not to be looked at."""

SAMPLE, LEAST_SAMPLE = 16, 2000
"""The search begins on every so-manieth task, where these are so many."""


@dataclass(frozen=True)
class Integrated:
    """An optimum, the nodes that it took, the error that is left as estimated, and z* (d, J)."""

    optimum: Optimum
    num_nodes: int
    error: float
    remarks: list[str]
    modes: Any


def maximise_approximate(
    resolved: HierarchicalModel,
    tasks: Tasks,
    *,
    quadrature: bool,
    with_hyperprior: bool,
    for_draws: bool = False,
    judged: bool = True,
) -> Integrated:
    """φ̂ by Laplace's approximation, or by quadrature with as many nodes as the evidence needs.

    ``for_draws``: where a sampler starts, φ̂ of the fewest nodes and the nodes that draws need.
    ``judged``: Laplace's φ̂ is held against a better evidence, for the remarks.
    """
    counts = NODES.get(len(tasks.coef), ())
    with float64():
        how = by_nodes(counts[0] if quadrature else 1)
        search = _Search(Criterion(resolved, tasks, how, with_hyperprior=with_hyperprior))
        x = search.run()
        if not for_draws:
            search.refuse_endless(x)
        if not quadrature:
            return search.finish(x, np.nan, judged=judged)
        enough = max(LEAST_ENOUGH, ENOUGH * tasks.num_tasks)
        used = error = np.nan
        while True:
            used, error = search.nodes_for(
                x, counts, max(enough, FOR_DRAWS) if for_draws else enough
            )
            if used == search.num_nodes or for_draws:
                break
            search.criterion.integrate_by(by_nodes(used))
            x = search.run(x)
        found = search.finish(x, error, judged=False)
        remarks = [] if error <= LARGE_ERROR else [TOO_FEW_NODES.format(error=error)]
        return replace(found, num_nodes=used, remarks=[*found.remarks, *remarks])


@dataclass(frozen=True)
class _Search:
    """The search for the criterion's optimum."""

    criterion: Criterion

    @property
    def space(self) -> Space:
        return self.criterion.space

    @property
    def tasks(self) -> Tasks:
        return self.criterion.tasks

    @property
    def model(self) -> HierarchicalModel:
        return self.criterion.model

    @property
    def num_nodes(self) -> int:
        """Nodes a dimension; one is Laplace's approximation."""
        how = self.criterion.adaptation
        return how.num_nodes if isinstance(how, Quadrature) else 1

    @property
    def first(self) -> np.ndarray:
        """Tasks alike but for some spread, at the overall level."""
        scales = self.model.scales(self.tasks)
        return self.space.x({"mu": scales.mu_location, "tau": 0.5 * scales.coef})

    def run(self, near: np.ndarray | None = None) -> np.ndarray:
        """The best vector, from one nearby or from afar.

        Of many tasks a sample shows the way, and lends the curvature: its steps are Newton's but
        for a few per cent, and the slope is that of all tasks.
        """
        space, lower = self.space, self.space.lower
        start, around, pooled = self.first if near is None else near, None, None
        sample = self._sample
        if near is None:
            start, pooled = (self if sample is None else sample).begin()
        if sample is not None:
            if near is None:
                start = descend(sample.criterion, start, lower, lambda x: sample.criterion)
            around = sample._as_all
        if pooled is None and (near is not None or around is not None):
            best = polish(self.criterion, start, lower, around)
            if best.problem is None and (best.x[space.at["tau"]] > NEAR_ZERO).all():
                return best.x
        rivals = None if pooled is None else [self.without_spread(pooled)]
        return off_the_boundary(self.criterion, [start], space, rivals).x

    def begin(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Where to start, and complete pooling where that may be better than any spread."""
        start, space = self.first, self.space
        rough = rough_start(self.model, self.tasks, space.starts)
        if rough is None:
            return start, None
        better = space.near(rough.best, LEAST_START)
        if self.criterion(better)[0] < self.criterion(start)[0]:
            start = better
        return start, space.near(rough.pooled) if rough.gap < SURELY else None

    def without_spread(self, vector: np.ndarray) -> np.ndarray:
        """The best vector with every τ at zero."""
        space = self.space
        rest = np.ones(len(vector), bool)
        rest[space.at["tau"]] = rest[space.at["corr"]] = False
        full = np.where(rest, vector, 0.0)
        if not rest.any():
            return full

        def value_and_slope(v: np.ndarray) -> tuple[float, np.ndarray]:
            full[rest] = v
            value, slope = self.criterion(full)
            return value, slope[rest]

        full[rest] = minimise(value_and_slope, [vector[rest]], space.lower[rest]).x
        return full

    @functools.cached_property
    def _sample(self) -> _Search | None:
        """Every so-manieth task; None where tasks are few."""
        whole = self.criterion
        if len(self.tasks) < SAMPLE * LEAST_SAMPLE:
            return None
        some = self.tasks.take(np.arange(0, len(self.tasks), SAMPLE))
        share = len(some) / len(self.tasks)
        given: Any = {"with_hyperprior": whole.with_hyperprior, "space": self.space, "share": share}
        return _Search(Criterion(self.model, some, whole.adaptation, **given))

    def _as_all(self, x: np.ndarray) -> ValueAndSlope:
        """A sample's criterion, as large as that of all tasks."""
        del x

        def value_and_slope(vector: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = self.criterion(vector)
            return value / self.criterion.share, slope / self.criterion.share

        return value_and_slope

    def refuse_endless(self, vector: np.ndarray) -> None:
        """Refuse tasks whose evidence grows for ever with μ or τ, where the search has run off."""
        likelihood, space = self.model.likelihood, self.space
        if not (isinstance(likelihood, GeneralisedLinear) and likelihood.linear):
            return
        tau, mu = vector[space.at["tau"]], vector[space.at["mu"]] - self.first[space.at["mu"]]
        far = max(tau.max(), np.abs(mu).max(initial=0.0))
        if far < ENDLESS / 2 or determined(self.tasks, likelihood).rows.any():
            return
        what = "mu" if tau.max() < ENDLESS / 2 else "tau"
        raise NotApplicable(
            f"the evidence has no maximum: the outcomes of every task are all alike, or separated "
            f"by its predictors, so that it grows for ever as {what} goes to infinity; state a "
            'prior that holds it, hyperprior=hb.HyperPrior(tau=…, mu=…), with criterion="map", or '
            "use full_bayes"
        )

    def nodes_for(
        self, vector: np.ndarray, counts: tuple[int, ...], enough: float
    ) -> tuple[int, float]:
        """The fewest nodes, from those in use, after which more change the evidence too little.

        Beside them that change; of the most that there are, what the last of them have changed.
        """
        before, criterion = self.num_nodes, self.criterion
        first = min(counts.index(before), len(counts) - 2)
        values, used, error = [], before, np.nan
        for count in counts[first:]:
            criterion.integrate_by(by_nodes(count))
            values.append(criterion.evidence(vector)[0])
            if len(values) > 1:
                error = abs(values[-1] - values[-2])
                if error < enough:
                    break
                used = count
        criterion.integrate_by(by_nodes(before))
        return used, float(error)

    def finish(self, vector: np.ndarray, error: float, *, judged: bool) -> Integrated:
        """The optimum there, with standard errors and what is to be said."""
        space, criterion = self.space, self.criterion
        held, warnings = held_entries(space, criterion.phi(vector))
        inside = space.inside(vector) & ~held
        warnings += at_an_end(space, vector)
        optimum, hessian = criterion.optimum(vector, inside, warnings)
        errors = optimum.standard_errors
        value, slope = criterion(vector)
        if (problem := unsettled(slope[inside], hessian, value)) is not None:
            warnings.append(problem)
        warnings += self._on_errors(errors, inside, hessian)
        warnings += self._on_endless(vector)
        warnings += self._on_unfinished()
        remarks = self._on_better_evidence(vector, inside, hessian) if judged else []
        return Integrated(optimum, self.num_nodes, error, remarks, criterion.start)

    def _on_errors(
        self, errors: dict[str, Any], inside: np.ndarray, hessian: np.ndarray
    ) -> list[str]:
        """Where standard errors are NaN, why."""
        space = self.space
        if np.isnan(space["mu"].entries(errors["mu"])).any():
            flattest = np.linalg.eigh(hessian)[1][:, 0]
            entry = np.flatnonzero(inside)[np.abs(flattest).argmax()]
            name = next(n for n, at in space.at.items() if at.start <= entry < at.stop)
            return [
                "standard errors are NaN: the evidence is flat, or not concave, at the estimate, "
                f"most of all along {name}, which these data hardly determine"
            ]
        if np.isnan(errors["tau"]).any():
            return ["standard errors of tau are NaN where the estimate lies at tau = 0"]
        return []

    def _on_endless(self, vector: np.ndarray) -> list[str]:
        """Shared effects that have no estimate."""
        endless = np.abs(vector[self.space.at["beta"]]) > ENDLESS
        names = [n for n, far in zip(self.tasks.labels.shared, endless, strict=True) if far]
        if not names:
            return []
        return [
            f"the estimate of beta for {listing(names)} runs to infinity: the column separates "
            'the outcomes; criterion="map", or full_bayes, holds it by its hyperprior'
        ]

    def _on_unfinished(self) -> list[str]:
        """Tasks whose mode was not found."""
        unfinished = self.criterion.unfinished
        names = self.tasks.names[unfinished]
        if not len(names):
            return []
        return [
            f"Newton's method has not ended in {len(names)} of {len(unfinished)} "
            f"tasks ({', '.join(map(str, names[:3]))}): their evidence is not to be relied on"
        ]

    def _on_better_evidence(
        self, vector: np.ndarray, inside: np.ndarray, hessian: np.ndarray
    ) -> list[str]:
        """How far Laplace's approximation has moved φ̂, where that is far."""
        criterion = self.criterion
        around = AroundPhi(criterion.rows, self.space, vector, criterion.start)
        tilt = criterion.hyperprior(vector)[1]
        shift = newton_shift(criterion.plain, around, inside, hessian, tilt).surely
        if not shift > LARGE_SHIFT:
            return []
        by_quadrature = len(self.tasks.coef) <= MOST_DIMENSIONS
        return [
            f"Laplace's approximation has moved phi by about {shift:.1f} standard errors "
            + ('from where quadrature would put it; use evidence="quadrature"'
               if by_quadrature
               else "from where the integral itself would put it; use full_bayes")
        ]  # fmt: skip
