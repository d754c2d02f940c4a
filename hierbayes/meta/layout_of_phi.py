"""φ as a vector: (μ, Γ, β, τ, unconstrained correlations, the family's own without bounds)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions.transforms import CorrCholeskyTransform

from hierbayes.meta.optimum import root_of
from hierbayes.meta.supports import LINES, lines_of
from hierbayes.priors.hyperprior import Shape
from hierbayes.priors.scales import Scales

FLAT = 1e-12
"""Curvature, beside the largest, below which a direction is taken as not curved at all."""

TINY = 1e-300
"""Stands for τ = 0 in densities: NumPyro's half-normal gives 0 none, though it may be the mode."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["units", "own"], meta_fields=["shape", "lines"]
)
@dataclass(frozen=True)
class Layout:
    """Between φ and a vector with entries of order one, the family's parameters without bounds.

    ``units`` of the other entries; ``own``: where the family's parameters start; ``lines``:
    how each of them becomes an entry without bounds, by name.
    """

    shape: Shape
    units: Any
    own: dict[str, Any]
    lines: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, shape: Shape, scales: Scales, beliefs: Mapping[str, dist.Distribution]) -> Layout:
        """The layout of a prior's shape, in the data's units."""
        lines = lines_of(shape.parameters, beliefs)
        own = {name: LINES[kind].start for name, kind in lines}
        if "sigma" in own:
            own["sigma"] = float(scales.spread)
        bare = cls(shape, None, own, lines)
        units = np.ones(bare.size)
        units[bare.at["mu"]] = scales.mu[bare.free]
        units[bare.at["gamma"]] = (scales.coef[:, None] / scales.task_predictors).ravel()
        units[bare.at["beta"]] = scales.shared
        units[bare.at["tau"]] = scales.coef
        return cls(shape, units, own, lines)

    @property
    def free(self) -> np.ndarray:
        """Positions of the means that are learned."""
        return np.flatnonzero(self.shape.free_mean)

    @property
    def blocks(self) -> list[tuple[int, ...]]:
        """Groups of correlated coefficients."""
        return [b for b in self.shape.blocks if len(b) > 1]

    @property
    def at(self) -> dict[str, slice]:
        """Where each part of φ stands in the vector."""
        shape = self.shape
        d, p, q = len(shape.coef), len(shape.shared), len(shape.task_predictors)
        sizes = {
            "mu": len(self.free), "gamma": d * q, "beta": p, "tau": d,
            "corr": sum(len(b) * (len(b) - 1) // 2 for b in self.blocks),
        } | dict.fromkeys(shape.parameters, 1)  # fmt: skip
        ends = np.cumsum(list(sizes.values()))
        return {n: slice(e - s, e) for (n, s), e in zip(sizes.items(), ends, strict=True)}

    @property
    def size(self) -> int:
        """Length of the vector."""
        return max(place.stop for place in self.at.values())

    @property
    def lower(self) -> np.ndarray:
        """Bounds: τ may be zero, nothing else has one."""
        lower = np.full(self.size, -np.inf)
        lower[self.at["tau"]] = 0.0
        return lower

    def phi(self, vector: jax.Array) -> dict[str, jax.Array]:
        """φ by name."""
        v, d = vector * self.units, len(self.shape.coef)
        phi = {"mu": jnp.zeros(d).at[self.free].set(v[self.at["mu"]]), "tau": v[self.at["tau"]]}
        if self.shape.task_predictors:
            phi["gamma"] = v[self.at["gamma"]].reshape(d, -1)
        if self.shape.shared:
            phi["beta"] = v[self.at["beta"]]
        for name, kind in self.lines:
            line = LINES[kind]
            phi[name] = line.at(line.inverse(self.own[name]) + v[self.at[name]][0])
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
        v[self.at["tau"]] = np.maximum(phi["tau"], 0.1 * floor * self.units[self.at["tau"]])
        v = v / self.units
        for name, kind in self.lines:
            line = LINES[kind]
            v[self.at[name]] = line.inverse(phi[name]) - line.inverse(self.own[name])
        return v

    def log_belief(
        self, phi: dict[str, Any], beliefs: Mapping[str, dist.Distribution]
    ) -> jax.Array:
        """log p(φ), of the family's own parameters on their lines without bounds."""
        beside = phi | {"tau": jnp.where(phi["tau"] > 0, phi["tau"], TINY)}
        total = sum(jnp.sum(b.log_prob(beside[name])) for name, b in beliefs.items())
        return jnp.asarray(
            total + sum(jnp.log(LINES[kind].slope(phi[name])) for name, kind in self.lines)
        )

    def errors(
        self, inside: np.ndarray, hessian: np.ndarray, phi: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Standard errors from the inverse Hessian, NaN at the boundary or off a maximum."""
        se = np.full(self.size, np.nan)
        values = np.linalg.eigvalsh(hessian)
        if values.size and values[0] > FLAT * values[-1]:
            se[inside] = np.sqrt(np.diag(np.linalg.inv(hessian)))
        se = se * self.units
        mu = np.zeros(len(self.shape.coef))
        mu[self.free] = se[self.at["mu"]]
        errors = {"mu": mu, "tau": se[self.at["tau"]]}
        if self.shape.task_predictors:
            errors["gamma"] = se[self.at["gamma"]].reshape(len(mu), -1)
        if self.shape.shared:
            errors["beta"] = se[self.at["beta"]]
        for name, kind in self.lines:
            errors[name] = se[self.at[name]][0] * LINES[kind].slope(phi[name])
        return errors


def along_phi(
    layout: Layout, vector: np.ndarray, inside: np.ndarray, hessian: np.ndarray
) -> dict[str, np.ndarray]:
    """How φ moves along independent normal directions of unit size, by name (…, r).

    NaN as in :meth:`Layout.errors`; use it in float64.
    """
    values = np.linalg.eigvalsh(hessian)
    moves = np.full((layout.size, int(inside.sum())), np.nan)
    if values.size and values[0] > FLAT * values[-1]:
        moves[inside] = root_of(np.linalg.inv(hessian))
    d, size = len(layout.shape.coef), moves.shape[1]
    scaled = moves * np.asarray(layout.units)[:, None]
    mu = np.zeros((d, size))
    mu[layout.free] = scaled[layout.at["mu"]]
    along = {"mu": mu, "tau": scaled[layout.at["tau"]]}
    if layout.shape.task_predictors:
        along["gamma"] = scaled[layout.at["gamma"]].reshape(d, -1, size)
    if layout.shape.shared:
        along["beta"] = scaled[layout.at["beta"]]
    if layout.blocks:
        step, known = 1e-4, np.nan_to_num(moves)

        def corr(v: np.ndarray) -> np.ndarray:
            return np.asarray(phi_at(layout, v)["corr"])

        near, far = (
            np.stack([corr(vector + k * step * m) - corr(vector - k * step * m) for m in known.T],
                     -1) for k in (1, 2)
        )  # fmt: skip
        along["corr"] = (8 * near - far) / (12 * step)
    return along


@jax.jit
def phi_at(layout: Layout, vector: Any) -> dict[str, jax.Array]:
    """φ by name, compiled once for a shape."""
    return layout.phi(vector)


@jax.jit
def _belief(layout: Layout, beliefs: Any, vector: Any) -> tuple[jax.Array, jax.Array]:
    return jax.value_and_grad(lambda v: layout.log_belief(layout.phi(v), beliefs))(vector)


def belief_in(
    layout: Layout, beliefs: Mapping[str, dist.Distribution]
) -> Callable[[Any], tuple[jax.Array, jax.Array]]:
    """log p(φ) and its slope as functions of φ's vector."""
    return functools.partial(_belief, layout, dict(beliefs))
