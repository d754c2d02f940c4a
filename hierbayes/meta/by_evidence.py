r"""p(φ | D) with every θ_j integrated out by an adaptation, as a density without bounds.

.. math:: \log p(x \mid D) = \log p(\varphi(x)) + \log\left|\tfrac{d\varphi}{dx}\right|
          + \sum_j \log p(D_j \mid \varphi(x)), \qquad x = (\psi, b)

x lies around the optimum of empirical Bayes. ψ = (τ, R, the family's own parameters) is as in
:mod:`hierbayes.phi.space`, without bounds, and b = (μ, Γ, β) in units of its own. Few tasks that
are known well leave μ a funnel, as wide as τ / √J: the units of μ and Γ grow with τ,

.. math:: \mu_c = \hat\mu_c + x \sqrt{v_c + \tau_c^2 / J}
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.base import Given, Integrable
from hierbayes.meta.collapsed import Point, in_batches
from hierbayes.meta.optimum import Optimum
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import to_numpy
from hierbayes.phi.space import Space, log_prob
from hierbayes.priors.normality import improper
from hierbayes.sharding import on_device
from hierbayes.tasks import Tasks

NUMBERS_AT_ONCE = 200_000
"""Points × numbers of one compiled call: more than this leaves the processor's cache."""

MOST_AT_ONCE = 1024

FEW = 64
"""Points of the smaller of two compiled calls."""


class Made(NamedTuple):
    """All that decides a compiled program, and nothing that does not."""

    model: HierarchicalModel
    integrate: Given
    hyperpriors: Any


class Around(NamedTuple):
    """Numbers that x is about; b's are (P,): where it is, and units² = own² + share τ²."""

    hyperpriors: list[Any]
    psi: Space
    fixed: Space
    centre: Any
    own: Any
    share: Any

    def within(self, units: Any) -> Around:
        """The same with τ in other units (d,)."""
        return self._replace(psi=self.psi.in_units(tau=units))


def phi_and_density(made: Made, around: Around, x: Any) -> tuple[dict[str, Any], Any]:
    """φ at x, and the log of its density there."""
    hyperpriors = jax.tree.unflatten(made.hyperpriors, around.hyperpriors)
    k = around.psi.size
    at = around.psi.placed(x[:k], hyperpriors)
    unit = jnp.sqrt(around.own**2 + around.share * at.phi["tau"][coefficient_of(around.fixed)] ** 2)
    named = around.fixed.phi(around.centre + unit * x[k:])
    total = at.log_density + jnp.log(unit).sum()
    total = total + sum(log_prob(hyperpriors[name], value) for name, value in named.items())
    return at.phi | named, total


def coefficient_of(fixed: Space) -> np.ndarray:
    """The position of the coefficient that each of b's entries is about (P,); 0 of β."""
    rows = [
        p.entries(np.indices(p.shape)[0] if p.dims[0] == "coef" else np.zeros(p.shape, int))
        for p in fixed.parts
    ]
    return np.concatenate([np.zeros(0, int), *rows])


class Data(NamedTuple):
    """What a compiled program is given: numbers only.

    ``start`` is where a search for modes begins, ``known`` what is known of how they move.
    """

    tasks: Any
    around: Around
    start: Any = None
    known: Any = None

    def within(self, units: np.ndarray) -> Data:
        """The same in other units."""
        return self._replace(around=self.around.within(units))


def near_expected(made: Made, data: Data, phi: dict[str, Any], x: Any) -> Any:
    """Where a search for the modes at x begins."""
    return data.start if data.known is None else data.known.expected(made, data, phi, x)


def point(made: Made, data: Data, x: Any) -> Point:
    """φ and the log density at x."""
    phi, total = phi_and_density(made, data.around, x)
    start = near_expected(made, data, phi, x)
    found = made.integrate(made.model, phi, data.tasks, start).log_normaliser
    total = total + found.sum()
    return Point(phi, jnp.where(jnp.isnan(total), -jnp.inf, total))


@functools.partial(jax.jit, static_argnums=(0, 1))
def many(of: Callable[..., Any], made: Made, data: Data, xs: Any) -> Any:
    """``of(made, data, x)`` at many x."""
    return jax.vmap(lambda x: of(made, data, x))(xs)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_slope(made: Made, data: Data, x: Any) -> Any:
    return jax.value_and_grad(lambda v: point(made, data, v).log_density)(x)


class AtPoint(NamedTuple):
    """The log density of one point x; there is no e."""

    made: Made

    def __call__(self, data: Data, x: Any, e: Any) -> Any:
        """The log density."""
        del e
        return point(self.made, data, x).log_density


class ByEvidence:
    """The posterior of φ with θ integrated out by ``adaptation``; use it in float64.

    ``optimum`` is that of empirical Bayes, where the sampler starts, and ``start`` where the search
    for the modes there does. ``cells``: numbers that a density works on, the rows by default.
    """

    num_noncentred, exact, has_rough = 0, True, False

    def __init__(
        self, model: HierarchicalModel, tasks: Tasks, adaptation: Integrable, optimum: Optimum,
        *, cells: float | None = None, start: Any = None,
    ):  # fmt: skip
        hyperpriors, space = model.phi_distributions(tasks), model.space(tasks)
        leaves, how = jax.tree.flatten(hyperpriors)
        plain = model.without_encoder()
        self.made = Made(plain, adaptation.given, how)
        self.proper = not any(map(improper, hyperpriors.values()))
        self.num_coef, self.num_tasks = len(tasks.coef), tasks.num_tasks
        self.spread = tasks.sharding is not None
        phi, errors, scales = optimum.phi, optimum.standard_errors, model.scales(tasks)
        rough = space.only("mu", "gamma", "beta")
        fixed = rough.plain()
        unit = fixed.x(errors)
        unit = np.where(np.isfinite(unit) & (unit > 0), unit, 0.1 * rough.units)
        each = 1.0 / max(tasks.num_tasks, 1)
        share = fixed.x({
            "mu": np.full(len(tasks.coef), each), "beta": np.zeros(len(tasks.labels.shared)),
            "gamma": np.tile(each / scales.task_predictors**2, (len(tasks.coef), 1)),
        })  # fmt: skip
        tau = phi["tau"][coefficient_of(fixed)]
        own = np.sqrt(np.maximum(unit**2 - share * tau**2, (0.03 * unit) ** 2))
        psi = space.only("tau", "corr", *model.likelihood.parameters()).opened()
        if "sigma" in phi:
            psi = psi.around(sigma=phi["sigma"])
        self.units = 0.3 * scales.coef
        around = Around(leaves, psi.in_units(tau=self.units), fixed, fixed.x(phi), own, share)
        laid_out = on_device(adaptation.lay_out(plain, tasks))
        self.data = Data(laid_out, around, start)
        self.cells = laid_out.num_cells if cells is None else cells
        self._begin = dict(phi) | {"tau": np.maximum(phi["tau"], 0.05 * scales.coef)}

    @property
    def start(self) -> np.ndarray:
        """A first guess of x, in ``units``: empirical Bayes."""
        known = {n: v for n, v in self._begin.items() if n != "corr"}
        around = self.data.around
        return np.concatenate([around.psi.x(known), np.zeros(len(around.own))])

    @property
    def at_once(self) -> int:
        """Points of one compiled call, a power of two."""
        return 2 ** int(np.log2(np.clip(NUMBERS_AT_ONCE // max(self.cells, 1), 1, MOST_AT_ONCE)))

    def prepare(self, units: np.ndarray, x: np.ndarray) -> None:
        """Nothing is to be prepared."""
        del units, x

    def log_density(self, units: np.ndarray) -> tuple[AtPoint, Data]:
        """The density of one point, and its numbers."""
        return AtPoint(self.made), to_numpy(self.data.within(units))

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
        value, slope = _value_and_slope(self.made, self.data.within(units), x)
        value = -float(value)
        return (value if np.isfinite(value) else 1e300), -np.nan_to_num(np.asarray(slope))

    def points(
        self, units: np.ndarray, xs: np.ndarray, es: np.ndarray,
        advance: Callable[[], Any] = lambda: None, *, rough: bool = False,
    ) -> Point:  # fmt: skip
        """φ by name (n, …) and log densities (n,) at xs, in batches of one shape."""
        del es, rough
        return self.found(point, self.data.within(units), xs, advance)

    def found(
        self, of: Callable[..., Any], data: Data, xs: np.ndarray,
        advance: Callable[[], Any] = lambda: None,
    ) -> Any:  # fmt: skip
        """``of`` at xs, few of them in a smaller call."""
        call = functools.partial(many, of, self.made, data)
        at_once = min(FEW, self.at_once) if len(xs) <= FEW else self.at_once
        return in_batches(call, (xs,), at_once, advance)
