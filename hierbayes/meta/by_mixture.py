r"""p(φ | D) of Gaussian tasks under a Student-t prior, as a density without bounds.

.. math:: \log p(x \mid D) = \log p(\varphi(x)) + \log\left|\tfrac{d\varphi}{dx}\right|
          + \sum_j \log p(D_j \mid \varphi(x))

with every θ_j integrated out (:mod:`hierbayes.evidence.mixed_scales`), and μ, Γ and β among what is
sampled: the mixture leaves them no closed form. x is that of :mod:`hierbayes.meta.chart_of_phi`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.evidence.exact import log_evidence
from hierbayes.meta.chart_of_phi import Around, Chart, Made, phi_and_density
from hierbayes.meta.collapsed import Point, in_batches
from hierbayes.meta.mixture_mode import maximise_mixture
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import to_numpy
from hierbayes.priors import StudentT
from hierbayes.priors.student_t import mixing
from hierbayes.statistics import Statistics, placed_statistics
from hierbayes.tasks import Tasks

NUMBERS_AT_ONCE = 1_000_000
"""Points × tasks × nodes of one compiled call."""

MOST_AT_ONCE = 1024


class Given(NamedTuple):
    """What a compiled program is given: numbers only."""

    stats: Statistics
    around: Around


def _point(made: Made, given: Given, x: Any) -> Point:
    phi, total = phi_and_density(made, given.around, x)
    total = total + log_evidence(given.stats, made.prior, phi).sum()
    return Point(phi, jnp.where(jnp.isnan(total), -jnp.inf, total))


@functools.partial(jax.jit, static_argnums=0)
def _points(made: Made, given: Given, xs: Any) -> Point:
    return jax.vmap(lambda x: _point(made, given, x))(xs)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_slope(made: Made, given: Given, x: Any) -> Any:
    return jax.value_and_grad(lambda v: _point(made, given, v).log_density)(x)


class ByMixture:
    """The posterior of φ under a Student-t prior, θ integrated out; use it in float64."""

    num_white, exact, has_rough = 0, True, False

    def __init__(self, model: HierarchicalModel, tasks: Tasks):
        assert isinstance(model.prior, StudentT)
        optimum = maximise_mixture(model, tasks, with_belief=True)
        self.chart = chart = Chart(model, tasks, optimum)
        self.made, self.proper, self.units = chart.made, chart.proper, chart.units
        self.num_coef, self.num_tasks = len(tasks.coef), tasks.num_tasks
        self.spread = tasks.sharding is not None
        self.num_nodes = len(mixing(model.prior.df, self.num_coef).precision)
        self.stats = jax.tree.map(jnp.asarray, placed_statistics(tasks))

    @property
    def start(self) -> np.ndarray:
        """A first guess of x, in ``units``: empirical Bayes."""
        return self.chart.start

    @property
    def at_once(self) -> int:
        """Points of one compiled call, a power of two."""
        together = self.num_nodes * max(self.num_tasks, 1)
        return 2 ** int(np.log2(np.clip(NUMBERS_AT_ONCE // together, 1, MOST_AT_ONCE)))

    def prepare(self, units: np.ndarray, x: np.ndarray) -> None:
        """Nothing is to be prepared."""
        del units, x

    def _given(self, units: np.ndarray) -> Given:
        return Given(self.stats, self.chart.around.within(units))

    def log_density(self, units: np.ndarray) -> Callable[[Any, Any], Any]:
        """The density of one point; without e."""
        given = to_numpy(self._given(units))
        return lambda x, e: _point(self.made, given, x).log_density

    @property
    def doubt(self) -> str | None:
        """None: the density is exact."""
        return None

    def refine(self, units: np.ndarray, xs: np.ndarray) -> bool:
        """The density is exact: nothing is to be refined."""
        del units, xs
        return False

    def value_and_slope(self, units: np.ndarray, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the log density at x and its slope, for a minimiser."""
        value, slope = _value_and_slope(self.made, self._given(units), x)
        value = -float(value)
        return (value if np.isfinite(value) else 1e300), -np.nan_to_num(np.asarray(slope))

    def points(
        self, units: np.ndarray, xs: np.ndarray, es: np.ndarray,
        advance: Callable[[], Any] = lambda: None, *, rough: bool = False,
    ) -> Point:  # fmt: skip
        """φ by name (n, …) and log densities (n,) at xs, in batches of one shape."""
        del es, rough
        given = self._given(units)
        return in_batches(lambda x: _points(self.made, given, x), (xs,), self.at_once, advance)
