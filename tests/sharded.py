"""Every method on tasks of one device and on the same tasks spread over a mesh: how far apart."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import hierbayes as hb
from hierbayes.adaptation import Conjugate, Laplace
from hierbayes.evidence import Exact

Comparison = dict[str, float]
"""Largest relative difference by what was compared."""


def two_coefficients() -> tuple[hb.HierarchicalModel, hb.Tasks]:
    """21 ragged tasks, d = 2, a shared column and a task predictor; one task has no rows."""
    rng = np.random.default_rng(5)
    sizes = np.append(rng.integers(1, 12, 19), [0, 40])
    w = rng.normal(size=(len(sizes), 1))
    arrays, shared = [], []
    for n, level in zip(sizes, w[:, 0], strict=True):
        x, z = np.column_stack([np.ones(n), rng.normal(size=n)]), rng.normal(size=(n, 1))
        theta = np.array([1.0 + 0.5 * level, -0.5]) + rng.normal(size=2) * [0.8, 0.6]
        arrays.append((x, x @ theta + 0.7 * z[:, 0] + 0.5 * rng.normal(size=n)))
        shared.append(z)
    tasks = hb.Tasks.from_arrays(arrays, coef=["Intercept", "x"], shared=shared, task_predictors=w)
    return hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian()), tasks


def few_with_known_errors() -> tuple[hb.HierarchicalModel, hb.Tasks]:
    """Five tasks, d = 1, with known standard errors: fewer tasks than devices."""
    rng = np.random.default_rng(6)
    errors = [rng.uniform(0.5, 1.5, n) for n in (3, 1, 2, 4, 2)]
    arrays = [
        (np.ones((len(e), 1)), 2 * rng.normal() + e * rng.normal(size=len(e))) for e in errors
    ]
    tasks = hb.Tasks.from_arrays(arrays, known_se=errors)
    likelihood = hb.likelihoods.Gaussian(known_se=True)
    return hb.HierarchicalModel(likelihood, hb.priors.Gaussian()), tasks


def binary() -> tuple[hb.HierarchicalModel, hb.Tasks]:
    """Eleven tasks of yes and no, d = 2: no closed form."""
    rng = np.random.default_rng(7)
    arrays = []
    for n in (6, 9, 14, 5, 1, 8, 11, 7, 10, 0, 12):
        x = np.column_stack([np.ones(n), rng.normal(size=n)])
        chance = 1 / (1 + np.exp(-x @ (np.array([0.3, 0.8]) + 0.7 * rng.normal(size=2))))
        arrays.append((x, (rng.random(n) < chance).astype(float)))
    tasks = hb.Tasks.from_arrays(arrays)
    return hb.HierarchicalModel(hb.likelihoods.Bernoulli(), hb.priors.Gaussian()), tasks


def results(fit: Any) -> dict[str, Any]:
    """All numbers of a fit, by name."""
    found = {f"phi {name}": value for name, value in fit.phi.items()}
    found |= {"theta": fit.theta.values, "covariance": fit.adapted.covariance}
    found |= {f"se {name}": value for name, value in (fit.standard_errors or {}).items()}
    found |= {f"draws of {name}": value for name, value in (fit.phi_draws or {}).items()}
    found |= {"draws of theta": fit.theta_draws, "log evidence": fit.evidence}
    found |= {"query log density": fit.info.get("query_log_density")}
    return {name: np.asarray(value) for name, value in found.items() if value is not None}


def distance(one: Any, other: Any) -> float:
    """Largest difference, relative to the largest value where that is above one; NaN = NaN."""
    one, other = np.asarray(one, float), np.asarray(other, float)
    if one.shape != other.shape or not np.array_equal(np.isnan(one), np.isnan(other)):
        return float("inf")
    unit = max(1.0, float(np.nanmax(np.abs(one), initial=0.0)))
    return float(np.nanmax(np.abs(one - other), initial=0.0)) / unit


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest distance over all names, which must be the same."""
    if one.keys() != other.keys():
        return float("inf")
    return max(distance(one[name], other[name]) for name in one)


def compare(
    case: Callable[[], tuple[hb.HierarchicalModel, hb.Tasks]],
    mesh: Mesh,
    methods: dict[str, Callable[[hb.HierarchicalModel, hb.Tasks], Any]],
) -> Comparison:
    """How far each method's results on the mesh are from those on one device."""
    model, tasks = case()
    found = {}
    for name, method in methods.items():
        started = time.perf_counter()
        alone = method(model, tasks)
        middle = time.perf_counter()
        spread = method(model, tasks.shard(mesh))
        seconds = (middle - started, time.perf_counter() - middle)
        one, other = (x if isinstance(x, dict) else results(x) for x in (alone, spread))
        found[f"{name}, {case.__name__}"] = furthest(one, other)
        print(
            f"{name}, {case.__name__}: {len(one)} arrays, furthest {furthest(one, other):.1e}, "
            f"{seconds[0]:.1f} s on one device, {seconds[1]:.1f} s on {mesh.size}",
            flush=True, file=sys.stderr,
        )  # fmt: skip
    return found


def adapted(fit: hb.Fit, tasks: hb.Tasks) -> dict[str, Any]:
    """What new tasks conclude under a fit."""
    found = fit.adapt(tasks)
    return {"theta": found.theta.values, "covariance": found.covariance}


def evidence_and_draws(fit: hb.Fit, tasks: hb.Tasks) -> dict[str, Any]:
    """Log evidence, and the exact posterior's draws and moments over three values of φ."""
    phis = {name: np.stack([value, 1.1 * value, 0.9 * value]) for name, value in fit.phi.items()}
    phis |= {"corr": np.stack([fit.phi["corr"]] * 3)} if "corr" in fit.phi else {}
    mean, covariance = Conjugate().moments(fit.model, tasks, phis)
    return {
        "evidence": Exact()(fit.model, tasks, dict(fit.phi)),
        "draws": Conjugate().draws(fit.model, tasks, phis, jax.random.key(4)),
        "mean": mean, "covariance": covariance,
    }  # fmt: skip


def laplace(model: hb.HierarchicalModel, tasks: hb.Tasks) -> dict[str, Any]:
    """Draws from the Laplace posterior of every task."""
    phi = {"mu": np.array([0.3, 0.8]), "tau": np.array([0.7, 0.5]), "corr": np.eye(2)}
    phis = {name: value[None] for name, value in phi.items()}
    return {"draws": Laplace().draws(model, tasks, phis, jax.random.key(4))}


def quietly() -> None:
    """Remarks about these small data are not what is asked for."""
    warnings.simplefilter("ignore", hb.FitWarning)
