r"""φ as a point x without bounds around an optimum, where only θ is integrated out.

.. math:: x = (\psi, b), \qquad \log p(\varphi(x)) + \log\left|\tfrac{d\varphi}{dx}\right|

ψ = (τ, R, the family's own parameters) is as in :mod:`hierbayes.phi.space`, without bounds, and
b = (μ, Γ, β) in units of its own. Few tasks that are known well leave μ a
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
from hierbayes.model import HierarchicalModel
from hierbayes.phi.space import Space, log_prob
from hierbayes.priors import Prior
from hierbayes.priors.normality import improper
from hierbayes.tasks import Tasks


class Made(NamedTuple):
    """All that decides a compiled program, and nothing that does not."""

    likelihood: Likelihood
    prior: Prior
    beliefs: Any


class Around(NamedTuple):
    """Numbers that x is about; b's are (P,): where it is, and units² = own² + share τ²."""

    beliefs: list[Any]
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
    beliefs = jax.tree.unflatten(made.beliefs, around.beliefs)
    k = around.psi.size
    at = around.psi.placed(x[:k], beliefs)
    unit = jnp.sqrt(around.own**2 + around.share * at.phi["tau"][coefficient_of(around.fixed)] ** 2)
    named = around.fixed.phi(around.centre + unit * x[k:])
    total = at.log_density + jnp.log(unit).sum()
    total = total + sum(log_prob(beliefs[name], value) for name, value in named.items())
    return at.phi | named, total


def coefficient_of(fixed: Space) -> np.ndarray:
    """The position of the coefficient that each of b's entries is about (P,); 0 of β."""
    rows = [
        p.entries(np.indices(p.shape)[0] if p.dims[0] == "coef" else np.zeros(p.shape, int))
        for p in fixed.parts
    ]
    return np.concatenate([np.zeros(0, int), *rows])


class Chart:
    """x around the optimum of empirical Bayes, where the sampler starts; use it in float64."""

    def __init__(self, model: HierarchicalModel, tasks: Tasks, optimum: Optimum):
        beliefs, space = model.phi_distributions(tasks), model.space(tasks)
        leaves, how = jax.tree.flatten(beliefs)
        self.made = Made(model.likelihood, model.prior, how)
        self.proper = not any(map(improper, beliefs.values()))
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
        self.around = Around(leaves, psi.in_units(tau=self.units), fixed, fixed.x(phi), own, share)
        self._begin = dict(phi) | {"tau": np.maximum(phi["tau"], 0.05 * scales.coef)}

    @property
    def start(self) -> np.ndarray:
        """A first guess of x, in its own units: empirical Bayes."""
        known = {n: v for n, v in self._begin.items() if n != "corr"}
        return np.concatenate([self.around.psi.x(known), np.zeros(len(self.around.own))])
