r"""Type-II maximum likelihood and MAP where the evidence is an integral without a closed form.

.. math:: \hat\varphi = \arg\max_\varphi \sum_j \log \hat p(D_j \mid \varphi)
          \left[+ \log p(\varphi)\right]

with Laplace's approximation or quadrature for p̂ (see :mod:`hierbayes.evidence.quadrature`).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.evidence.quadrature import log_evidence
from hierbayes.meta.better_evidence import AroundPhi, newton_shift
from hierbayes.meta.correlations import held_entries
from hierbayes.meta.layout_of_phi import Layout, belief_in
from hierbayes.meta.optimum import Optimum, curvature
from hierbayes.meta.posterior_mode import finite, off_the_boundary, pinned
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64, to_numpy
from hierbayes.rows import Rows, Whole, rows_of
from hierbayes.tasks import Tasks

NODES = {1: (5, 7, 11, 15, 21, 31, 41, 61), 2: (5, 7, 11, 15, 21, 31), 3: (3, 5, 7, 9, 13)}
"""Numbers of nodes a dimension that are tried, by the number of coefficients."""

MOST_DIMENSIONS = 3
"""Coefficients up to which quadrature is offered."""

ENOUGH = 1e-3
"""Difference of the summed log evidence, from one number of nodes to the next, that ends this."""

LARGE_SHIFT = 0.25
"""Posterior standard deviations by which Laplace's approximation may move φ̂ unremarked."""


@functools.partial(jax.jit, static_argnums=(0, 4))
def _evidence(
    model: HierarchicalModel, rows: Rows | Whole, phi: dict[str, Any], start: Any, num_nodes: int
) -> Any:
    return log_evidence(model.likelihood, model.prior, rows, phi, start, num_nodes)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _value_and_slope(
    model: HierarchicalModel,
    layout: Layout,
    vector: Any,
    rows: Rows | Whole,
    start: Any,
    num_nodes: int,
) -> Any:
    def minus(v: jax.Array) -> Any:
        found = log_evidence(model.likelihood, model.prior, rows, layout.phi(v), start, num_nodes)
        return -found.log_evidence.sum(), found

    (value, found), slope = jax.value_and_grad(minus, has_aux=True)(vector)
    return value, slope, found.mode, found.converged


class ApproximateEvidence:
    """Σ_j log p̂(D_j | φ) as a function of φ's vector; use it inside ``numerics.float64()``."""

    def __init__(self, model: HierarchicalModel, tasks: Tasks, num_nodes: int):
        self.model, self.num_nodes = model.without_encoder(), num_nodes
        self.rows = jax.tree.map(jnp.asarray, rows_of(tasks, model.likelihood))
        self.layout = Layout.of(
            model.shape(tasks), model.scales(tasks), model.phi_distributions(tasks)
        )
        self.start = jnp.zeros((len(tasks.coef), tasks.num_tasks))
        self.unfinished = np.zeros(tasks.num_tasks, bool)

    def value_and_slope(self, vector: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the log evidence and its slope; every call starts from the last call's modes."""
        value, slope, mode, converged = _value_and_slope(
            self.model, self.layout, vector, self.rows, self.start, self.num_nodes
        )
        if np.isfinite(float(value)):
            self.start, self.unfinished = mode, ~np.asarray(converged)
        return finite(float(value), np.asarray(slope))

    def of_tasks(self, phi: dict[str, Any], num_nodes: int | None = None) -> np.ndarray:
        """log p̂(D_j | φ) of each task (J,)."""
        nodes = self.num_nodes if num_nodes is None else num_nodes
        return np.asarray(_evidence(self.model, self.rows, phi, self.start, nodes).log_evidence)


@dataclass(frozen=True)
class Integrated:
    """An optimum, the nodes that it took, the error that is left as estimated, and z* (d, J)."""

    optimum: Optimum
    num_nodes: int
    error: float
    remarks: list[str]
    modes: Any


def maximise_approximate(
    resolved: HierarchicalModel, tasks: Tasks, *, quadrature: bool, with_belief: bool,
    judged: bool = True,
) -> Integrated:  # fmt: skip
    """φ̂ by Laplace's approximation, or by quadrature with as many nodes as the evidence needs.

    ``judged``: Laplace's φ̂ is held against a better evidence, for the remarks.
    """
    d = len(tasks.coef)
    with float64():
        laplace = ApproximateEvidence(resolved, tasks, 1)
        search = _Search(resolved, tasks, laplace, with_belief)
        vector = search.run(search.starts())
        counts: tuple[int, ...] = NODES.get(d, ())
        error, used = np.nan, 1
        if quadrature:
            phi = search.phi(vector)
            values = {n: laplace.of_tasks(phi, n).sum() for n in counts[:2]}
            used = counts[0]
            for before, after in itertools.pairwise(counts):
                values[after] = values.get(after, laplace.of_tasks(phi, after).sum())
                error, used = abs(values[after] - values[before]), before
                if error < ENOUGH:
                    break
            better = ApproximateEvidence(resolved, tasks, used)
            better.start = laplace.start
            search = replace(search, evidence=better)
            vector = search.run([vector])
        return search.finish(vector, used, float(error), counts, judged=judged and used == 1)


@dataclass(frozen=True)
class _Search:
    """The summed evidence, with the hyperprior's density where that is wanted, in φ's vector."""

    model: HierarchicalModel
    tasks: Tasks
    evidence: ApproximateEvidence
    with_belief: bool

    @property
    def layout(self) -> Layout:
        return self.evidence.layout

    def phi(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        return to_numpy(jax.jit(self.layout.phi)(jnp.asarray(vector)))

    def starts(self) -> list[np.ndarray]:
        """Tasks alike but for some spread, at the overall level."""
        shape, scales = self.model.shape(self.tasks), self.model.scales(self.tasks)
        d, q = len(shape.coef), len(shape.task_predictors)
        phi = {"mu": np.where(shape.free_mean, scales.mu_location, 0.0), "tau": 0.5 * scales.coef}
        phi |= {"gamma": np.zeros((d, q)), "beta": np.zeros(len(shape.shared))}
        phi |= dict(self.layout.own)
        return [self.layout.vector(phi, floor) for floor in (0.5,)]

    def run(self, starts: list[np.ndarray]) -> np.ndarray:
        return off_the_boundary(self.value_and_slope, starts, self.layout).x

    def value_and_slope(self, vector: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = self.evidence.value_and_slope(vector)
        if self.with_belief:
            more, tilt = self._belief(vector)
            value, slope = value - float(more), slope - np.asarray(tilt)
        return finite(value, slope)

    @functools.cached_property
    def _belief(self) -> Any:
        return belief_in(self.layout, self.model.phi_distributions(self.tasks))

    def finish(
        self, vector: np.ndarray, used: int, error: float, counts: tuple[int, ...], *, judged: bool
    ) -> Integrated:
        layout, evidence = self.layout, self.evidence
        phi = self.phi(vector)
        held, warnings = held_entries(layout, phi)
        inside = (vector > layout.lower) & ~held
        hessian = curvature(self.value_and_slope, vector, inside)
        errors = layout.errors(inside, hessian, phi)
        value, _ = self.value_and_slope(vector)
        log_density = -evidence.value_and_slope(vector)[0]
        if np.isnan(errors["mu"][layout.free]).any():
            flattest = np.linalg.eigh(hessian)[1][:, 0]
            entry = np.flatnonzero(inside)[np.abs(flattest).argmax()]
            name = next(n for n, at in layout.at.items() if at.start <= entry < at.stop)
            warnings.append(
                "standard errors are NaN: the evidence is flat, or not concave, at the estimate, "
                f"most of all along {name}, which these data hardly determine"
            )
        elif np.isnan(errors["tau"]).any():
            warnings.append("standard errors of tau are NaN where the estimate lies at tau = 0")
        if evidence.unfinished.any():
            names = self.tasks.names[evidence.unfinished]
            warnings.append(
                f"Newton's method has not ended in {len(names)} of {len(evidence.unfinished)} "
                f"tasks ({', '.join(map(str, names[:3]))}): their evidence is not to be relied on"
            )
        remarks = []
        if judged:
            tilt = np.asarray(self._belief(vector)[1]) if self.with_belief else 0.0
            around = AroundPhi(evidence.rows, layout, vector, evidence.start)
            shift = newton_shift(evidence.model, around, inside, hessian, tilt).surely
            if shift > LARGE_SHIFT:
                remarks.append(
                    f"Laplace's approximation has moved phi by about {shift:.1f} standard errors "
                    + ('from where quadrature would put it; use evidence="quadrature"' if counts
                       else "from where the integral itself would put it; use full_bayes")
                )  # fmt: skip
        posterior = -value if self.with_belief else None
        optimum = Optimum(pinned(phi, layout.shape), log_density, errors, warnings, posterior)
        return Integrated(optimum, used, error, remarks, evidence.start)
