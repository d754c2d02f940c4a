r"""Generalised linear families: one outcome distribution around a linear predictor.

.. math:: y_{ij} \sim \text{family}(f_{ij}, \varphi), \qquad
          f_{ij} = o_{ij} + x_{ij}^\top\theta_j + z_{ij}^\top\beta

Log densities by what they fall short of their largest value: large counts lose no digits.

.. math:: y f - e^f = y \log y - y - y\,(e^d - 1 - d), \qquad d = f - \log y

Of counts of 10⁹ the left side is a difference of numbers of 10¹⁰, right to 10⁻⁶, which is more than
what a search for a maximum has to see; the last term is right to 10⁻¹¹ near its maximum.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln

from hierbayes.errors import InputError, listing
from hierbayes.likelihoods.base import Likelihood
from hierbayes.sharding import filled_up, rung
from hierbayes.tasks import Task, Tasks

FROM = 32.0
"""Where Stirling's series, with four terms, is right to rounding."""


NEAR_ZERO = 1 / 32
"""Where eight terms of the exponential's series are right to rounding."""


def less_one(d: Any) -> Any:
    """e^d − 1, right to rounding near zero, for the price of one exponential; expm1 takes two."""
    near = jnp.abs(d) < NEAR_ZERO
    small = jnp.where(near, d, 0.0)
    series: Any = 1.0
    for k in range(8, 1, -1):
        series = 1.0 + small * series / k
    return jnp.where(near, small * series, jnp.exp(d) - 1.0)


def shortfall(d: Any) -> Any:
    """e^d − 1 − d."""
    return jnp.expm1(d) - d


def stirling(x: Any) -> Any:
    """x log x − x − log Γ(x), whose terms all but cancel where x is large; x > 0."""
    large = jnp.maximum(x, FROM)
    square = 1.0 / large**2
    series = (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680))) / large
    small = jnp.minimum(x, FROM)
    plain = small * jnp.log(small) - small - gammaln(small)
    return jnp.where(x >= FROM, 0.5 * jnp.log(large / (2 * jnp.pi)) - series, plain)


def count_peak(y: Any) -> Any:
    """y log y − y − log y!, the largest log density of a Poisson count; 0 of none."""
    some = jnp.where(y > 0, y, 1.0)
    return jnp.where(y > 0, stirling(some) - jnp.log(some), 0.0)


class GeneralisedLinear(Likelihood):
    """What the families share: weights, and the refusal of outcomes that they do not have."""

    refused: tuple[str, ...] = ("known_se", "trials")
    """Slots that the family would ignore."""

    def log_likelihood(self, theta: Any, phi: dict[str, Any], task: Task) -> jax.Array:
        """log p(y_i | x_i, θ, φ) of each row (n,), times the row's weight."""
        # a row that only fills up holds an outcome of 0, whose logarithm has no slope to multiply
        outcome = jnp.where(task.mask, task.outcome, 1.0)
        rows = self.distribution(theta, phi, task).log_prob(outcome)
        return jnp.where(task.mask, rows * task.slots.get("weight", 1.0), 0.0)

    def best_location(self, outcome: Any, slots: dict[str, Any]) -> Any:
        """The f under which a row's outcome is most likely; a finite one in any case."""
        del slots
        return outcome

    def best_of_rows(self, outcome: np.ndarray, slots: dict[str, Any]) -> np.ndarray:
        """The same of rows as they lie in tasks, filled up so that a row more compiles nothing."""
        y, known = _filled(outcome), {n: _filled(v) for n, v in slots.items()}
        return np.asarray(self.best_location(y, known), float)[: len(outcome)]

    def slopes_of_rows(
        self, f: np.ndarray, phi: dict[str, Any], slots: dict[str, Any], outcome: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Slope and second derivative in f of every row's log likelihood, filled up alike."""
        y, known = _filled(outcome), {n: _filled(v) for n, v in slots.items()}
        found = map(np.asarray, _second_order(self, _filled(f), phi, known, y)[1:])
        slope, second = (np.broadcast_to(a, len(y))[: len(outcome)] for a in found)
        return slope, second

    def endless(self, tasks: Tasks) -> tuple[np.ndarray, np.ndarray]:
        """Rows that become ever more likely as f goes up, and as it goes down, (N,) of bool.

        A task all of whose rows are such along some direction of θ has no maximum of its
        likelihood: none of one, or a column that separates zeros from ones.
        """
        none = np.zeros(tasks.num_rows, bool)
        return none, none

    def check(self, tasks: Tasks) -> None:
        """Refuse outcomes outside the family's support, and columns that would be ignored."""
        self._refuse_slots(tasks, self.refused)
        if self.log_link:
            _refuse_offsets(tasks, type(self).__name__)
        if tasks.outcome is not None:
            self._check_outcome(tasks)

    def _check_outcome(self, tasks: Tasks) -> None:
        """Refuse outcomes outside the family's support."""

    def _refuse_rows(self, tasks: Tasks, bad: np.ndarray, takes: str, advice: str) -> None:
        """Say of rows where ``bad`` (N,) what the family takes in their place, and what to do."""
        odd = np.flatnonzero(bad)
        if odd.size:
            task = tasks.names[tasks.task_of_row[odd[0]]]
            raise InputError(
                f"the {type(self).__name__} likelihood takes {takes}; {odd.size} row(s) of "
                f"{tasks.labels.outcome!r} hold others, the first {tasks.outcome[odd[0]]:g} in "
                f"task {listing([task])}; {advice}"
            )

    def _refuse_non_counts(self, tasks: Tasks) -> None:
        y = tasks.outcome
        advice = "leave such rows out, or use a gamma or Gaussian family for amounts"
        self._refuse_rows(tasks, (y < 0) | (y != np.floor(y)), "counts 0, 1, 2, …", advice)


LARGEST_OFFSET = 100.0
"""On a log scale: no exposure is e^100, and a few hundreds more overflow."""


def _refuse_offsets(tasks: Tasks, family: str) -> None:
    """Refuse offsets whose exponential is no exposure: they are exposures, and not their logs."""
    offset = tasks.slots.get("offset")
    if offset is None or not (odd := np.flatnonzero(np.abs(offset) > LARGEST_OFFSET)).size:
        return
    raise InputError(
        f"an offset of the {family} likelihood is the log of an exposure; {odd.size} row(s) hold "
        f"one beyond ±{LARGEST_OFFSET:g}, the first {offset[odd[0]]:g} in task "
        f"{listing([tasks.names[tasks.task_of_row[odd[0]]]])}: pass log(exposure), or the "
        "exposure itself as exposure= of from_formula"
    )


def mean_offset(tasks: Tasks) -> float:
    """The mean of the offsets, zero without."""
    return float(np.mean(tasks.slots.get("offset", 0.0)))


@functools.partial(jax.jit, static_argnums=0)
def _second_order(family: Any, f: Any, phi: Any, slots: Any, outcome: Any) -> Any:
    return family.to_second_order(f, phi, slots, outcome)


def _filled(values: np.ndarray) -> np.ndarray:
    return filled_up(values, rung(len(values)), fill=values[-1] if len(values) else 1.0)
