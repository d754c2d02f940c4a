r"""Data that a model itself would have made.

.. math:: \varphi \sim p(\varphi), \qquad \theta_j \sim p(\theta_j \mid \varphi, w_j), \qquad
          y_{ij} \sim p(y \mid f_{ij}, \varphi)

for rows like those of given tasks: the same predictors, sizes, offsets, weights, standard errors
and trials, and other outcomes.

Draws from hyperpriors about φ, by NumPy where it knows them: nothing is compiled for a few draws.

Correlation matrices come by the onion: below the root of one of k rows goes the row
:math:`(\sqrt{y}\, u, \sqrt{1 - y})`, with y from a Beta distribution and u uniform on a sphere.
Reference: Lewandowski, Kurowicka and Joe (2009), Generating random correlation matrices based on
vines and extended onion method, Journal of Multivariate Analysis 100.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro.distributions as dist

from hierbayes.errors import InputError, NotApplicable, listing
from hierbayes.likelihoods import Likelihood
from hierbayes.likelihoods.categorical import ClassProbabilities
from hierbayes.likelihoods.generalised import GeneralisedLinear
from hierbayes.likelihoods.neural import Neural
from hierbayes.likelihoods.program import Program
from hierbayes.model import HierarchicalModel, check_model
from hierbayes.numerics import as_rng, float64, standard_promotion
from hierbayes.phi.assembled import Assembled
from hierbayes.phi.lkj import LKJ
from hierbayes.tasks import Tasks

_KNOWN: dict[type, Callable[[Any, np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    dist.Normal: lambda b, rng, n: rng.normal(b.loc, b.scale, n),
    dist.HalfNormal: lambda b, rng, n: np.abs(rng.normal(0.0, b.scale, n)),
    dist.Cauchy: lambda b, rng, n: b.loc + b.scale * rng.standard_cauchy(n),
    dist.HalfCauchy: lambda b, rng, n: np.abs(b.scale * rng.standard_cauchy(n)),
    dist.Exponential: lambda b, rng, n: rng.exponential(1.0, n) / b.rate,
    dist.Gamma: lambda b, rng, n: rng.gamma(b.concentration, 1.0, n) / b.rate,
    dist.InverseGamma: lambda b, rng, n: b.rate / rng.gamma(b.concentration, 1.0, n),
    dist.LogNormal: lambda b, rng, n: rng.lognormal(b.loc, b.scale, n),
    dist.Uniform: lambda b, rng, n: rng.uniform(b.low, b.high, n),
}


@standard_promotion()
def draw(
    name: str, hyperprior: dist.Distribution, num: int, rng: np.random.Generator
) -> np.ndarray:
    """``num`` draws of the parameter ``name`` (num, …), in float64.

    Raises
    ------
    InputError
        Where the hyperprior is improper, naming the parameter.
    """
    try:
        return _drawn(hyperprior, (num,), rng)
    except NotImplementedError as error:
        raise InputError(
            f"the hyperprior on {name} is improper: nothing can be drawn from it. Give a proper "
            f"one, HyperPrior({name}=…), to simulate from the prior"
        ) from error


def _drawn(hyperprior: Any, lead: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if isinstance(hyperprior, Assembled):
        whole = np.broadcast_to(hyperprior.background, (*lead, *hyperprior.background.shape)).copy()
        for part, index in hyperprior.parts:
            whole[(slice(None),) * len(lead) + tuple(index)] = _drawn(part, lead, rng)
        return whole
    if isinstance(hyperprior, dist.Independent):
        return _drawn(hyperprior.base_dist, lead, rng)
    if isinstance(hyperprior, dist.ExpandedDistribution) and not hyperprior.base_dist.batch_shape:
        return _drawn(hyperprior.base_dist, (*lead, *hyperprior.batch_shape), rng)
    if isinstance(hyperprior, LKJ):  # NumPyro's takes seconds to compile
        return draw_correlations(hyperprior.dimension, float(hyperprior.concentration), lead, rng)
    if type(hyperprior) in _KNOWN:
        shape = (*lead, *hyperprior.batch_shape)
        return np.asarray(_KNOWN[type(hyperprior)](_Numbers(hyperprior), rng, shape), float)
    with float64():
        return np.asarray(hyperprior.sample(jax.random.key(int(rng.integers(2**63))), lead), float)


class _Numbers:
    """A distribution's parameters as NumPy float64."""

    def __init__(self, hyperprior: Any):
        self.hyperprior = hyperprior

    def __getattr__(self, name: str) -> np.ndarray:
        return np.asarray(getattr(self.hyperprior, name), float)


def draw_correlations(
    size: int, concentration: float, lead: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    r"""Correlation matrices (…, size, size) with density proportional to :math:`|R|^{\eta - 1}`.

    Each correlation by itself is 2 b − 1 with b ~ Beta(a, a), a = η + (size − 2) / 2.
    """
    root = np.zeros((*lead, size, size))
    root[..., 0, 0] = 1.0
    for k in range(1, size):
        square = rng.beta(0.5 * k, concentration + 0.5 * (size - 1 - k), lead)
        direction = rng.standard_normal((*lead, k))
        direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
        root[..., k, :k] = np.sqrt(square)[..., None] * direction
        root[..., k, k] = np.sqrt(1.0 - square)
    found = root @ np.swapaxes(root, -1, -2)
    found[..., np.arange(size), np.arange(size)] = 1.0
    return found


LARGEST_LOG_RATE = float(np.log(1e15))
"""Of counts: floats hold whole numbers up to 9e15."""


class Simulated(NamedTuple):
    """φ by name, θ (J, d), and tasks whose outcomes were drawn from both."""

    phi: dict[str, np.ndarray]
    theta: np.ndarray
    tasks: Tasks


def simulate(model: HierarchicalModel, tasks_like: Any, seed: int | jax.Array = 0) -> Simulated:
    r"""φ, θ and a data set, drawn from the model.

    .. math:: p(\varphi) \prod_j p(\theta_j \mid \varphi, w_j) \prod_i p(y_{ij} \mid \theta_j,
              \varphi)

    Parameters
    ----------
    model : HierarchicalModel
        What its hyperprior leaves open is scaled to ``tasks_like``, as a fit would do.
    tasks_like : Tasks or DataFrame
        Its rows get new outcomes; all else is shared.
    seed : int or JAX key

    Returns
    -------
    Simulated
        ``phi``, ``theta`` and ``tasks``.

    Raises
    ------
    InputError
        Under an improper hyperprior, naming the parameter; where the likelihood is a network's,
        or carries weights that no distribution of outcomes has; for a rate beyond 1e15.

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
    ...                                known_se="se")
    >>> phi, theta, simulated = hb.simulation.simulate(model, tasks, seed=1)
    >>> theta.shape, simulated.outcome.shape
    ((8, 1), (8,))
    """
    check_model(model)
    tasks, rng = model.tasks(tasks_like), as_rng(seed)
    refuse_without_outcomes(model, tasks)
    resolved = model.resolve(tasks)
    at = resolved.column_map(tasks, "hyperpriors", scaled=False)
    inner, seen = resolved.seen_through(at, tasks, "hyperpriors"), at.tasks(tasks)
    phis = draw_phi(inner, seen, 1, rng)
    thetas = draw_theta(inner, seen, phis, rng)
    outcome = draw_outcomes(inner, seen, phis, thetas, rng)[0]
    if not np.isfinite(outcome).all():
        raise InputError(
            "the hyperprior allows for rates beyond 1e15, which no count follows: give tighter "
            "priors on mu and tau"
        )
    phi = {name: value[0] for name, value in phis.items()}
    theta = at.theta(thetas[0], phi.get("beta"))
    return Simulated(at.phi(phi), theta, replace(tasks, outcome=outcome))


def draw_phi(
    model: HierarchicalModel, tasks_like: Any, num: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """``num`` draws of φ by name, each (num, …), from the resolved hyperprior.

    Raises
    ------
    InputError
        Where a part of the hyperprior is improper, naming it.

    Examples
    --------
    >>> import numpy as np, hierbayes as hb
    >>> model, tasks = hb.from_formula(
    ...     "log_radon ~ 1 + floor + (1 + floor | county)", hb.datasets.radon()
    ... )
    >>> phis = hb.simulation.draw_phi(model, tasks, 10, np.random.default_rng(0))
    >>> phis["corr"].shape
    (10, 2, 2)
    """
    tasks = model.tasks(tasks_like)
    resolved = model.resolve(tasks)
    sites = resolved.hyperprior.distributions(model.shape(tasks))
    drawn = {name: draw(name, hyperprior, num, rng) for name, hyperprior in sites.items()}
    return resolved.column_map(tasks, "hyperpriors", scaled=False).phi(drawn)


def draw_theta(
    model: HierarchicalModel, tasks_like: Any, phis: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """One draw of every θ_j for each of the S values of φ, (S, J, d)."""
    tasks = model.tasks(tasks_like)
    w = np.asarray(tasks.task_predictors)
    with float64():
        location = np.asarray(jax.vmap(lambda phi: model.prior.location(phi, w))(phis))
        root = np.asarray(model.prior.scale_tril(phis))
    white = model.prior.noncentred_draws(rng, location.shape)
    return location + np.einsum("skl,sjl->sjk", root, white)


def draw_outcomes(
    model: HierarchicalModel, tasks_like: Any, phis: dict[str, np.ndarray], thetas: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Outcomes (S, N) of the rows of ``tasks_like`` under S values of φ and of θ (S, J, d).

    Counts whose rate lies beyond 1e15 are given as inf.

    Examples
    --------
    >>> import numpy as np, hierbayes as hb
    >>> model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
    ...                                known_se="se")
    >>> phis = {"mu": np.zeros((3, 1)), "tau": np.ones((3, 1))}
    >>> thetas = np.zeros((3, 8, 1))
    >>> hb.simulation.draw_outcomes(model, tasks, phis, thetas, np.random.default_rng(0)).shape
    (3, 8)
    """
    tasks, likelihood = model.tasks(tasks_like), model.likelihood
    refuse_without_outcomes(model, tasks)
    if isinstance(likelihood, Program):
        found = likelihood.outcomes(thetas, phis, tasks)
        return found.drawn(np.arange(len(thetas)), rng)
    f = _locations(model, tasks, phis, thetas)
    own = {name: np.asarray(phis[name]) for name in likelihood.parameters()}
    drawn = outcomes_at(likelihood, f, own, tasks, rng).astype(float)
    if likelihood.log_link and likelihood.discrete:
        return np.where(f > LARGEST_LOG_RATE, np.inf, drawn)
    # an amount that underflows is still one: a gamma of small shape falls below any float
    return np.maximum(drawn, np.finfo(float).tiny) if likelihood.log_link else drawn


def linear_location(thetas: np.ndarray, phis: dict[str, np.ndarray], rows: Tasks) -> np.ndarray:
    """f (S, N) = x θ_j + z β + offset of S draws of θ (S, J, d) and φ."""
    f = np.zeros((len(thetas), rows.num_rows))
    for k in range(rows.predictors.shape[1]):  # one coefficient at a time: S N numbers
        f += thetas[:, rows.task_of_row, k] * rows.predictors[:, k]
    if "beta" in phis:
        f += phis["beta"] @ rows.shared.T
    return f + rows.slots.get("offset", 0.0)


def outcomes_at(
    likelihood: Likelihood,
    f: np.ndarray,
    phis: dict[str, np.ndarray],
    rows: Tasks,
    rng: np.random.Generator,
) -> np.ndarray:
    """One outcome for every draw of f (S, N, …) and of φ, (S, N); counts as integers.

    Rates of counts are held below 1e15.
    """
    phi = {name: np.asarray(v)[:, None] for name, v in phis.items() if np.ndim(v) == 1}
    if likelihood.log_link and likelihood.discrete:
        f = np.minimum(f, LARGEST_LOG_RATE)
    with float64():
        frozen = likelihood.predictive(f, 0.0, phi, rows.slots)
    if isinstance(frozen, ClassProbabilities):
        return draw_classes(frozen.probabilities, rng)
    drawn = np.asarray(frozen.rvs(size=f.shape[:2], random_state=rng))
    return drawn.astype(np.int64) if likelihood.discrete else drawn


def draw_classes(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A class for each of some distributions (…, C)."""
    below = probabilities.cumsum(-1)[..., :-1]
    return (rng.random((*probabilities.shape[:-1], 1)) > below).sum(-1)


def refuse_without_outcomes(model: HierarchicalModel, tasks: Tasks) -> None:
    """Refuse what gives no distribution of outcomes to draw from."""
    if tasks.num_rows == 0:
        raise InputError("the tasks hold no rows to draw outcomes for")
    likelihood = model.likelihood
    if isinstance(likelihood, Neural):
        raise NotApplicable(
            f"{type(likelihood).__name__} has a prior on what a network computes, not on φ: "
            "there is nothing to draw its weights from; simulate from a model without a network"
        )
    if not (likelihood.linear or likelihood.has_location or isinstance(likelihood, Program)):
        raise NotApplicable(f"{type(likelihood).__name__} does not say how to draw outcomes")
    weight = tasks.slots.get("weight")
    if isinstance(likelihood, GeneralisedLinear) and weight is not None and np.any(weight != 1):
        raise InputError(
            f"the weights of a {type(likelihood).__name__} likelihood multiply the log likelihood "
            "of a row, and no distribution of one outcome has such a likelihood: simulate from "
            f"tasks without weights (found {listing(np.unique(weight)[:3].tolist())} …), one row "
            "an observation"
        )


def _locations(
    model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray], thetas: np.ndarray
) -> np.ndarray:
    """f (S, N) of every row under its own task's θ."""
    if not model.likelihood.linear:
        with float64():
            bare = model.without_encoder()
            return np.asarray(_curved(bare, *model.likelihood.arrange(tasks), thetas, phis))
    return linear_location(thetas, phis, tasks)


@functools.partial(jax.jit, static_argnums=0)
def _curved(
    model: HierarchicalModel, rows: Any, task_of_row: Any, thetas: Any, phis: Any
) -> jax.Array:
    likelihood = model.likelihood
    return jax.vmap(lambda t, p: likelihood.locations(t, p, rows, task_of_row))(thetas, phis)


__all__ = ["Simulated", "draw_outcomes", "draw_phi", "draw_theta", "simulate"]
