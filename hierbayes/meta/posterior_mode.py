r"""Type-II MAP: the evidence plus the hyperprior, maximised over φ.

The search runs over (μ, Γ, β, τ, unconstrained correlations, log σ); densities are those of τ and
R themselves, without the Jacobian of the correlations' parametrisation, and of log σ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions.transforms import CorrCholeskyTransform

from hierbayes.evidence.exact import log_evidence
from hierbayes.meta.marginal import SINGULAR, maximise_likelihood
from hierbayes.meta.optimum import Optimum, curvature, minimise
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64, to_numpy
from hierbayes.priors.hyperprior import Shape
from hierbayes.priors.scales import Scales
from hierbayes.statistics import Statistics, placed_statistics
from hierbayes.tasks import Tasks

TINY = 1e-300
"""Stands for τ = 0 in densities: NumPyro's half-normal gives 0 none, though it may be the mode."""

TINY_RATE = 1e-8
"""Rate of the default Gamma(2, rate → 0) prior on τ, in units of the data's own scale."""


def resolve_for_mode(model: HierarchicalModel, tasks: Tasks) -> HierarchicalModel:
    """The model resolved, with Gamma(2, rate → 0) on τ where the user says nothing of it."""
    given = model.hyperprior.tau
    if given is not None and not isinstance(given, Mapping):
        return model.resolve(tasks)
    scales = model.scales(tasks).coef
    avoiding = {c: dist.Gamma(2.0, TINY_RATE / s) for c, s in zip(tasks.coef, scales, strict=True)}
    return replace(
        model, hyperprior=replace(model.hyperprior, tau={**avoiding, **(given or {})})
    ).resolve(tasks)


def maximise_posterior(resolved: HierarchicalModel, tasks: Tasks) -> Optimum:
    """φ̂ at the mode of p(φ | D), with standard errors from the Hessian."""
    shape, scales = resolved.shape(tasks), resolved.scales(tasks)
    start = maximise_likelihood(resolved, tasks, reml=False)
    with float64():
        stats = jax.tree.map(jnp.asarray, placed_statistics(tasks))
        beliefs = resolved.phi_distributions(tasks)
        layout = _Layout(shape, scales)

        def log_density(phi: dict[str, Any], stats: Statistics) -> tuple[Any, Any]:
            evidence = log_evidence(stats, resolved.prior, phi).sum()
            beside = phi | {"tau": jnp.where(phi["tau"] > 0, phi["tau"], TINY)}
            belief = sum(jnp.sum(b.log_prob(beside[name])) for name, b in beliefs.items())
            jacobian = jnp.log(phi["sigma"]) if "sigma" in phi else 0.0
            return evidence, belief + jacobian

        def objective(v: jax.Array, stats: Statistics) -> Any:
            return -sum(log_density(layout.phi(v), stats))

        # as an argument, or every device would hold all tasks
        slope = jax.jit(jax.value_and_grad(objective))

        def value_and_slope(v: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = slope(v, stats)
            value = float(value)
            return (value if np.isfinite(value) else 1e300), np.nan_to_num(np.asarray(gradient))

        starts = [layout.vector(start.phi, floor) for floor in (0.5, 0.1)]
        best = minimise(value_and_slope, starts, layout.lower)
        snapped = np.where((layout.lower == 0) & (best.x < SINGULAR), 0.0, best.x)
        if value_and_slope(snapped)[0] <= best.value + 1e-12 * abs(best.value):
            best = replace(best, x=snapped)
        inside = best.x > layout.lower
        hessian = curvature(value_and_slope, best.x, inside)
        phi = to_numpy(jax.jit(layout.phi)(jnp.asarray(best.x)))
        evidence, belief = jax.jit(log_density)(phi, stats)
        errors = layout.errors(inside, hessian, phi)
    phi = _pinned(phi, shape)
    warnings = [best.problem] if best.problem else []
    if np.isnan(errors["tau"]).any():
        warnings.append(
            "standard errors of tau are NaN where the mode lies at tau = 0 or the posterior "
            "is not concave there"
        )
    return Optimum(phi, float(evidence), errors, warnings, float(evidence + belief))


class _Layout:
    """Between φ and a vector with entries of order one."""

    def __init__(self, shape: Shape, scales: Scales):
        self.shape, self.scales = shape, scales
        d, p, q = len(shape.coef), len(shape.shared), len(shape.task_predictors)
        self.free = np.flatnonzero(shape.free_mean)
        blocks = [b for b in shape.blocks if len(b) > 1]
        sizes = {
            "mu": len(self.free), "gamma": d * q, "beta": p, "tau": d,
            "corr": sum(len(b) * (len(b) - 1) // 2 for b in blocks),
            "sigma": int("sigma" in shape.parameters),
        }  # fmt: skip
        ends = np.cumsum(list(sizes.values()))
        self.at = {n: slice(e - s, e) for (n, s), e in zip(sizes.items(), ends, strict=True)}
        self.size, self.blocks = int(ends[-1]), blocks
        units = np.ones(self.size)
        units[self.at["mu"]] = scales.mu[self.free]
        units[self.at["gamma"]] = (scales.coef[:, None] / scales.task_predictors).ravel()
        units[self.at["beta"]] = scales.shared
        units[self.at["tau"]] = scales.coef
        self.units = units
        self.lower = np.full(self.size, -np.inf)
        self.lower[self.at["tau"]] = 0.0

    def phi(self, vector: jax.Array) -> dict[str, jax.Array]:
        v, d = vector * self.units, len(self.shape.coef)
        phi = {"mu": jnp.zeros(d).at[self.free].set(v[self.at["mu"]]), "tau": v[self.at["tau"]]}
        if self.shape.task_predictors:
            phi["gamma"] = v[self.at["gamma"]].reshape(d, -1)
        if self.shape.shared:
            phi["beta"] = v[self.at["beta"]]
        if "sigma" in self.shape.parameters:
            phi["sigma"] = self.scales.spread * jnp.exp(v[self.at["sigma"]][0])
        if self.blocks:
            corr, start = jnp.eye(d), 0
            for b in self.blocks:
                size = len(b) * (len(b) - 1) // 2
                factor = CorrCholeskyTransform()(v[self.at["corr"]][start : start + size])
                corr = corr.at[np.ix_(b, b)].set(factor @ factor.T)
                start += size
            phi["corr"] = corr
        return phi

    def vector(self, phi: dict[str, np.ndarray], floor: float) -> np.ndarray:
        """Start from φ, with no τ below ``floor`` times its unit and moderate correlations."""
        v = np.zeros(self.size)
        v[self.at["mu"]] = phi["mu"][self.free]
        for name in ("gamma", "beta"):
            if name in phi:
                v[self.at[name]] = np.ravel(phi[name])
        v[self.at["tau"]] = np.maximum(phi["tau"], 0.1 * floor * self.scales.coef)
        v = v / self.units
        if "sigma" in phi:
            v[self.at["sigma"]] = np.log(phi["sigma"] / self.scales.spread)
        return v

    def errors(
        self, inside: np.ndarray, hessian: np.ndarray, phi: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Standard errors from the inverse Hessian, NaN at the boundary or off a maximum."""
        se = np.full(self.size, np.nan)
        if np.linalg.eigvalsh(hessian)[0] > 0:
            se[inside] = np.sqrt(np.diag(np.linalg.inv(hessian)))
        se = se * self.units
        mu = np.zeros(len(self.shape.coef))
        mu[self.free] = se[self.at["mu"]]
        errors = {"mu": mu, "tau": se[self.at["tau"]]}
        if self.shape.task_predictors:
            errors["gamma"] = se[self.at["gamma"]].reshape(len(mu), -1)
        if self.shape.shared:
            errors["beta"] = se[self.at["beta"]]
        if "sigma" in phi:
            errors["sigma"] = se[self.at["sigma"]][0] * phi["sigma"]
        return errors


def _pinned(phi: dict[str, np.ndarray], shape: Shape) -> dict[str, np.ndarray]:
    return phi | {"mu": np.where(shape.free_mean, phi["mu"], 0.0)}
