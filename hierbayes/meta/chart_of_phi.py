r"""φ as a point x without bounds around an optimum, where only θ is integrated out.

.. math:: x = (\psi, v, b), \qquad \log p(\varphi(x)) + \log\left|\tfrac{d\varphi}{dx}\right|

x holds ψ = (τ, R, σ) as in :mod:`hierbayes.meta.scales_of_phi`, the logarithms of the family's
other parameters, and b = (μ, Γ, β) in units of its own. Few tasks that are known well leave μ a
funnel, as wide as τ / √J: the units of μ and Γ grow with τ,

.. math:: \mu_c = \hat\mu_c + x \sqrt{v_c + \tau_c^2 / J}
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.likelihoods import Likelihood
from hierbayes.meta.optimum import Optimum
from hierbayes.meta.scales_of_phi import Beliefs, Coordinates, Units, fixed_by_name
from hierbayes.meta.supports import LINES, lines_of
from hierbayes.model import HierarchicalModel
from hierbayes.priors import Prior
from hierbayes.priors.hyperprior import Shape
from hierbayes.priors.normality import improper
from hierbayes.tasks import Tasks


class Made(NamedTuple):
    """All that decides a compiled program, and nothing that does not."""

    likelihood: Likelihood
    prior: Prior
    shape: Shape
    lines: tuple[tuple[str, str], ...]
    beliefs: Any


class Around(NamedTuple):
    """Numbers that x is about; b's are (P,): where it is, and units² = own² + share τ²."""

    beliefs: list[Any]
    units: Units
    centre: Any
    own: Any
    share: Any


def phi_and_density(made: Made, around: Around, x: Any) -> tuple[dict[str, Any], Any]:
    """φ at x, and the log of its density there."""
    shape, how = made.shape, made.beliefs
    beliefs: Beliefs = jax.tree.unflatten(how, around.beliefs)
    coordinates = Coordinates.of(shape)
    scales = coordinates.scales(x, around.units, beliefs)
    phi, total, at = dict(scales.phi), scales.log_density, coordinates.size
    for name, kind in made.lines:
        phi[name] = LINES[kind].at(x[at])
        total = total + jnp.log(LINES[kind].slope(phi[name]))
        total = total + jnp.sum(beliefs[name].log_prob(phi[name]))
        at += 1
    unit = _units_of_fixed(shape, around, phi["tau"])
    b = around.centre + unit * x[at:]
    phi |= fixed_by_name(shape.free_mean, len(shape.shared), len(shape.task_predictors), b)
    for name in ("mu", "gamma", "beta"):
        if name in phi and name in beliefs:
            support: Any = beliefs[name].support
            inside = jnp.all(support(phi[name]))
            total = total + jnp.where(
                inside, jnp.sum(jnp.asarray(beliefs[name].log_prob(phi[name]))), -jnp.inf
            )
    return phi, total + jnp.log(unit).sum()


def _units_of_fixed(shape: Shape, around: Around, tau: Any) -> Any:
    """The sizes of b's entries under τ, (P,); those of β do not depend on it."""
    d = len(shape.coef)
    free = [i for i in range(d) if shape.free_mean[i]]
    of_coef = [*free, *np.repeat(np.arange(d), len(shape.task_predictors))]
    of_coef += [0] * len(shape.shared)  # their share is zero
    return jnp.sqrt(around.own**2 + around.share * tau[np.array(of_coef, int)] ** 2)


class Chart:
    """x around the optimum of empirical Bayes, where the sampler starts; use it in float64."""

    def __init__(self, model: HierarchicalModel, tasks: Tasks, optimum: Optimum):
        shape = model.shape(tasks)
        beliefs = model.phi_distributions(tasks)
        leaves, how = jax.tree.flatten(beliefs)
        others = tuple(name for name in shape.parameters if name != "sigma")
        lines = lines_of(others, beliefs)
        self.made = Made(model.likelihood, model.prior, shape, lines, how)
        self.coordinates = Coordinates.of(shape)
        self.proper = not any(map(improper, beliefs.values()))
        scales, phi, errors = model.scales(tasks), optimum.phi, optimum.standard_errors
        free = np.array(shape.free_mean)
        parts, spread, rough = [phi["mu"][free]], [errors["mu"][free]], [scales.mu[free]]
        each = 1.0 / max(tasks.num_tasks, 1)
        tau, share = [phi["tau"][free]], [np.full(free.sum(), each)]
        if "gamma" in phi:
            rough.append(np.ravel(scales.coef[:, None] / scales.task_predictors))
            share.append(
                np.ravel(each / np.broadcast_to(scales.task_predictors, phi["gamma"].shape) ** 2)
            )
            tau.append(np.repeat(phi["tau"], len(scales.task_predictors)))
        if "beta" in phi:
            rough.append(scales.shared)
            share.append(np.zeros(len(phi["beta"])))
            tau.append(np.zeros(len(phi["beta"])))
        for name in ("gamma", "beta"):
            if name in phi:
                parts.append(np.ravel(phi[name]))
                spread.append(np.ravel(errors[name]))
        unit, whole = np.concatenate(spread), np.concatenate(rough)
        unit = np.where(np.isfinite(unit) & (unit > 0), unit, 0.1 * whole)
        units = Units(0.3 * scales.coef, float(phi.get("sigma", 1.0)))
        shares = np.concatenate(share)
        own = np.sqrt(np.maximum(unit**2 - shares * np.concatenate(tau) ** 2, (0.03 * unit) ** 2))
        self.around = Around(leaves, units, np.concatenate(parts), own, shares)
        self._own = [float(LINES[kind].inverse(phi[name])) for name, kind in lines]
        self._tau = np.maximum(phi["tau"], 0.05 * scales.coef)

    @property
    def start(self) -> np.ndarray:
        """A first guess of x, in its own units: empirical Bayes."""
        units = self.around.units
        scales = self.coordinates.vector(self._tau, units.sigma, units)
        return np.concatenate([scales, self._own, np.zeros(len(self.around.own))])

    def rescaled(self, x: np.ndarray, units: Units, new: Units) -> np.ndarray:
        """The same point in other units."""
        k = self.coordinates.size
        return np.concatenate(
            [self.coordinates.rescaled(x[..., :k], units, new), x[..., k:]], axis=-1
        )
