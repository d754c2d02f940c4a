r"""The linear map between the user's columns and those that methods compute with.

.. math::

    x'_k = (x_k - m_k x_0 / c_0) / s_k, \quad z'_l = (z_l - m_l x_0 / c_0) / t_l, \quad
    w' = (w - m_w) / s_w, \qquad
    \theta = P \theta' + Q \beta', \quad \beta = T \beta', \quad \Sigma = P \Sigma' P^\top

with x_0 = c_0 the intercept, so that x θ + z β = x' θ' + z' β' in every row.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.numerics import float64, semidefinite_root
from hierbayes.priors.hyperprior import Shape
from hierbayes.tasks import Tasks
from hierbayes.tasks.container import kept


class Column(NamedTuple):
    """A column's mean, what rounding has left out of it, and its standard deviation.

    Zero, zero and one where there is nothing to centre or to scale.
    """

    mean: float = 0.0
    rest: float = 0.0
    sd: float = 1.0


@dataclass(frozen=True)
class ColumnMap:
    """The linear map between the user's columns and those that are computed with (primed).

    ``intercept`` and ``shared_intercept`` say into which column the means go, with its value.
    """

    varying: tuple[Column, ...]
    shared: tuple[Column, ...]
    task_predictors: tuple[Column, ...]
    intercept: tuple[int, float] | None = None
    shared_intercept: tuple[int, float] | None = None

    @classmethod
    def none(cls, d: int, p: int, q: int) -> ColumnMap:
        """The map that changes nothing."""
        return cls((Column(),) * d, (Column(),) * p, (Column(),) * q)

    @functools.cached_property
    def trivial(self) -> bool:
        """True where nothing changes."""
        return {*self.varying, *self.shared, *self.task_predictors} <= {Column()}

    @functools.cached_property
    def mixes(self) -> bool:
        """True where varying columns are centred: then Σ changes by more than units."""
        return any(c.mean for c in self.varying)

    def changed(self) -> frozenset[str]:
        """Names of what is another number in the user's columns; of a map that scales nothing."""
        changed = {"tau", "corr", "gamma", "theta", "mu"} if self.mixes else set()
        if any(c.mean for c in self.shared):
            changed |= {"theta", "mu"} if self.shared_intercept is None else {"beta"}
        if any(c.mean for c in self.task_predictors):
            changed |= {"mu"}
        return frozenset(changed)

    @functools.cached_property
    def of_theta(self) -> np.ndarray:
        """P (d, d)."""
        matrix = np.diag([1 / c.sd for c in self.varying])
        if self.intercept is not None:
            at, value = self.intercept
            matrix[at] -= [(c.mean + c.rest) / (c.sd * value) for c in self.varying]
        return matrix

    @functools.cached_property
    def from_shared(self) -> np.ndarray:
        """Q (d, p)."""
        matrix = np.zeros((len(self.varying), len(self.shared)))
        if self.intercept is not None:
            at, value = self.intercept
            matrix[at] = [-(c.mean + c.rest) / (c.sd * value) for c in self.shared]
        return matrix

    @functools.cached_property
    def of_shared(self) -> np.ndarray:
        """T (p, p)."""
        matrix = np.diag([1 / c.sd for c in self.shared])
        if self.shared_intercept is not None:
            at, value = self.shared_intercept
            matrix[at] -= [(c.mean + c.rest) / (c.sd * value) for c in self.shared]
        return matrix

    # -------------------------------------------------------------------- rows

    def tasks(self, tasks: Tasks) -> Tasks:
        """The tasks in the map's columns, the same object for the same tasks."""
        return tasks if self.trivial else _moved(tasks, self)

    # ------------------------------------------------------------ φ and θ, outward

    def theta(self, theta: Any, beta: Any = None) -> Any:
        """θ = P θ' + Q β' of θ' (…, d); ``beta`` has leading axes that go with θ's."""
        found = theta @ self.of_theta.T
        return found if beta is None or not self.shared else found + beta @ self.from_shared.T

    def covariance(self, covariance: Any) -> Any:
        """P C Pᵀ of C (…, d, d)."""
        return self.of_theta @ covariance @ self.of_theta.T

    def roots(self, roots: np.ndarray) -> np.ndarray:
        """L (…, d, d), lower triangular, with L Lᵀ = P L' L'ᵀ Pᵀ."""
        moved = self.of_theta @ roots
        if not self.mixes:
            return moved
        upper = np.linalg.qr(np.swapaxes(moved, -1, -2), mode="r")
        signs = np.where(np.diagonal(upper, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
        return np.swapaxes(upper * signs[..., :, None], -1, -2)

    def phi(self, phi: Mapping[str, Any]) -> dict[str, Any]:
        """φ in the user's columns of φ' by name; each may have leading axes."""
        out = dict(phi)
        if "mu" in phi:
            out["mu"] = self.theta(phi["mu"], phi.get("beta"))
        if "gamma" in phi:
            means = np.array([c.mean + c.rest for c in self.task_predictors])
            out["gamma"] = (
                self.of_theta @ phi["gamma"] / np.array([c.sd for c in self.task_predictors])
            )
            if "mu" in phi:
                out["mu"] = out["mu"] - out["gamma"] @ means
        if "beta" in phi:
            out["beta"] = phi["beta"] @ self.of_shared.T
        if "tau" in phi:
            out |= _spread(self.of_theta, self.mixes, phi)
        return out

    def directions(self, phi: Mapping[str, Any], along: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """How φ moves where φ' moves ``along`` (…, r), from φ'; NaN where τ is zero."""
        if not along:
            return {}
        moved = {name: np.moveaxis(value, -1, 0) for name, value in along.items()}
        linear = {n: v for n, v in moved.items() if n in ("mu", "gamma", "beta")}
        out = moved | self.phi(linear)
        if "tau" in moved:
            tau, dtau = np.asarray(phi["tau"]), moved["tau"]
            if self.mixes:
                corr = np.asarray(phi.get("corr", np.eye(len(tau))))
                still = np.where(tau == 0, 0.0, dtau)
                across = still[:, :, None] * tau + tau[:, None] * still[:, None, :]
                change = across * corr
                if "corr" in moved:
                    change = change + np.outer(tau, tau) * moved["corr"]
                own = self.of_theta @ change @ self.of_theta.T
                sd = np.asarray(self.phi({"tau": tau, "corr": corr})["tau"])
                with np.errstate(divide="ignore", invalid="ignore"):
                    out["tau"] = np.diagonal(own, axis1=1, axis2=2) / (2 * sd)
                out["tau"] = np.where(sd > 0, out["tau"], np.nan)
            else:
                out["tau"] = dtau * np.diag(self.of_theta)
        return {name: np.moveaxis(value, 0, -1) for name, value in out.items()}

    def steps(self, step_size: Any) -> tuple[Any, Any]:
        """(η, B): gradient steps of this size inside are steps of η B ∇ in the user's columns."""
        root = self.of_theta * np.sqrt(step_size) if np.ndim(step_size) else self.of_theta
        inside = root @ root.T if self.mixes else np.diag(root) ** 2
        return (1.0 if np.ndim(step_size) else step_size), inside

    # ------------------------------------------------------------ φ and θ, inward

    def theta_inward(self, theta: Any, beta: Any = None) -> Any:
        """θ' of θ; ``beta`` are the user's."""
        if beta is not None and self.shared:
            theta = theta - self.beta_inward(beta) @ self.from_shared.T
        return theta @ np.linalg.inv(self.of_theta).T

    def beta_inward(self, beta: Any) -> Any:
        """β' of β."""
        return beta @ np.linalg.inv(self.of_shared).T

    def phi_inward(self, phi: Mapping[str, Any]) -> dict[str, Any]:
        """φ' of φ by name, of one φ or of many."""
        out, back = dict(phi), np.linalg.inv(self.of_theta)
        mu = phi.get("mu")
        if "gamma" in phi:
            if mu is not None:
                mu = mu + phi["gamma"] @ np.array([c.mean + c.rest for c in self.task_predictors])
            out["gamma"] = back @ phi["gamma"] * np.array([c.sd for c in self.task_predictors])
        if mu is not None:
            out["mu"] = self.theta_inward(mu, phi.get("beta"))
        if "beta" in phi:
            out["beta"] = self.beta_inward(phi["beta"])
        if "tau" in phi:
            out |= _spread(back, self.mixes, phi)
        return out

    # ------------------------------------------------------------------ densities

    def log_volume(self, shape: Shape) -> float:
        """log |∂b / ∂b'| of the fixed effects b = (μ, Γ, β), means that are pinned left out."""
        theta = -np.log([c.sd for c in self.varying])
        levels = -np.log([c.sd for c in self.task_predictors])
        free, d, q = np.array(shape.free_mean), len(theta), len(levels)
        total = theta[free].sum() - np.log([c.sd for c in self.shared]).sum()
        return float(total + q * theta.sum() + d * levels.sum())

    def log_volume_of_spread(self) -> float:
        """log |∂τ / ∂τ'| where columns are scaled alone."""
        return float(-np.log([c.sd for c in self.varying]).sum())


def _spread(matrix: np.ndarray, mixes: bool, phi: Mapping[str, Any]) -> dict[str, Any]:
    """τ and R of P Σ Pᵀ."""
    tau = phi["tau"]
    if not mixes:
        return {"tau": tau * np.diag(matrix)}
    traced = any(isinstance(phi[n], jax.Array) for n in ("tau", "corr") if n in phi)
    xp: Any = jnp if traced else np
    eye = np.eye(matrix.shape[0])
    if "corr" not in phi:
        root = eye
        if not traced and not np.any(tau):
            return {"tau": tau}
    elif traced:
        root = semidefinite_root(phi["corr"])
    else:
        try:
            root = np.linalg.cholesky(phi["corr"])
        except np.linalg.LinAlgError:  # of correlations of one
            with float64():
                root = np.asarray(semidefinite_root(jnp.asarray(phi["corr"])))
    rows = matrix @ (tau[..., :, None] * root)
    found = xp.sqrt((rows**2).sum(-1))
    unit = rows / xp.where(found > 0, found, 1.0)[..., None]
    corr = xp.clip(unit @ xp.swapaxes(unit, -1, -2), -1.0, 1.0)
    return {"tau": found, "corr": xp.where(eye > 0, 1.0, corr)}


@kept
def _moved(tasks: Tasks, at: ColumnMap) -> Tasks:
    """The tasks in the columns of the map."""
    x, z = np.asarray(tasks.predictors, float), np.asarray(tasks.shared, float)
    unit: Any = 1.0
    if at.intercept is not None:
        unit = _unit(x, *at.intercept)
    elif at.shared_intercept is not None:
        unit = _unit(z, *at.shared_intercept)
    return replace(
        tasks,
        predictors=_columns(x, at.varying, unit),
        shared=_columns(z, at.shared, unit),
        task_predictors=_columns(tasks.task_predictors, at.task_predictors, 1.0),
    )


def _unit(values: np.ndarray, at: int, value: float) -> Any:
    """The intercept beside its value, a number where it is one everywhere."""
    found = values[:, at] / value
    return 1.0 if (found == 1.0).all() else found


def _columns(values: np.ndarray, columns: tuple[Column, ...], unit: Any) -> np.ndarray:
    if {*columns} <= {Column()}:
        return values
    out = np.empty_like(values, order="K")
    for k, (mean, rest, sd) in enumerate(columns):
        moved = values[:, k]
        if mean or rest:
            moved = moved - mean * unit - rest * unit
        out[:, k] = moved if sd == 1.0 else moved / sd
    return out
