r"""What empirical Bayes maximises, as a function of φ's vector x, and the optimum that it has.

.. math:: \sum_j \log p(D_j \mid \varphi(x)) \left[+ \log p(\varphi(x))\right]
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.base import Given, Integrable
from hierbayes.adaptation.quadrature import RowsAndRule
from hierbayes.meta.optimum import Optimum, curvature
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import to_numpy
from hierbayes.phi.space import Space, log_hyperprior_in, phi_at, standard_errors
from hierbayes.rows import Rows, Whole
from hierbayes.sharding import filled_up, on_device, padded
from hierbayes.tasks import Tasks


@functools.partial(jax.jit, static_argnums=(0, 1))
def _value_and_slope(
    given: Given, model: HierarchicalModel, space: Space, x: Any, data: Any, start: Any,
    counted: Any,
) -> Any:  # fmt: skip
    def minus(v: jax.Array) -> Any:
        found = given(model, space.phi(v), data, start)
        each = found.log_normaliser
        each = each if counted is None else jnp.where(counted, each, 0.0)
        return -each.sum(), (found.start, found.converged)

    (value, more), slope = jax.value_and_grad(minus, has_aux=True)(x)
    return value, slope, *more


class Criterion:
    """Minus the criterion and its slope at x; use it inside ``numerics.float64()``.

    ``adaptation`` says how θ is integrated out. ``share`` of log p(φ) counts where the tasks are a
    sample of all. Every evaluation starts from the modes that the last one has found, and
    ``unfinished`` (J,) says of which tasks it has found none. ``counted`` (J,) of bool, which may
    be changed, leaves tasks out of the sum.
    """

    counted: Any = None

    def __init__(
        self, model: HierarchicalModel, tasks: Tasks, adaptation: Integrable, *,
        with_hyperprior: bool, space: Space | None = None, share: float = 1.0,
    ):  # fmt: skip
        self.model, self.plain, self.tasks = model, model.without_encoder(), tasks
        self.space = model.space(tasks) if space is None else space
        self.with_hyperprior, self.share = with_hyperprior, share
        self.start = on_device(adaptation.begin(tasks))
        # a search for modes begins at a place for every task, on one device
        self.laid_out = tasks if self.start is None else tasks.shard(None)
        self.unfinished = np.zeros(tasks.num_tasks, bool)
        self.integrate_by(adaptation)

    def integrate_by(self, adaptation: Integrable) -> None:
        """Integrate θ out in this way from now on."""
        self.adaptation = adaptation
        self.data = on_device(adaptation.lay_out(self.plain, self.laid_out))

    @property
    def rows(self) -> Rows | Whole:
        """The rows of tasks whose modes are searched."""
        return self.data.rows if isinstance(self.data, RowsAndRule) else self.data

    def evidence(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the log evidence and its slope."""
        num_tasks, counted = self.tasks.num_tasks, self.counted
        if counted is not None:
            counted = filled_up(counted, padded(num_tasks, self.laid_out.sharding))
        value, slope, start, converged = _value_and_slope(
            self.adaptation.given, self.plain, self.space, x, self.data, self.start, counted
        )
        if np.isfinite(float(value)):
            self.start, self.unfinished = start, ~np.asarray(converged)[:num_tasks]
        return finite(float(value), np.asarray(slope))

    @functools.cached_property
    def _hyperprior(self) -> Any:
        return log_hyperprior_in(self.space, self.model.phi_distributions(self.tasks))

    def hyperprior(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """log p(φ) and its slope, zero where it is not part of the criterion."""
        if not self.with_hyperprior:
            return 0.0, np.zeros(len(x))
        value, slope = self._hyperprior(x)
        return float(value), np.asarray(slope)

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the criterion and its slope."""
        value, slope = self.evidence(x)
        more, tilt = self.hyperprior(x)
        return finite(value - self.share * more, slope - self.share * tilt)

    def phi(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """φ by name at x."""
        return to_numpy(phi_at(self.space, x))

    def optimum(
        self, x: np.ndarray, inside: np.ndarray, warnings: list[str]
    ) -> tuple[Optimum, np.ndarray]:
        """The optimum at x, with standard errors from the Hessian ``inside`` bounds, and that."""
        hessian = curvature(self, x, inside)
        along = self.space.along(x, inside, hessian)
        value = -self.evidence(x)[0]
        posterior = value + self.hyperprior(x)[0] if self.with_hyperprior else None
        errors = standard_errors(along)
        return Optimum(self.phi(x), value, errors, warnings, posterior, along), hessian


def finite(value: float, slope: np.ndarray) -> tuple[float, np.ndarray]:
    """A criterion and its slope as a minimiser can use them."""
    if np.isfinite(value) and np.isfinite(slope).all():
        return value, np.array(slope)
    return (value if np.isfinite(value) else 1e300), np.nan_to_num(slope)
