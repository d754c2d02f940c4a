r"""Full Bayes: integrate over φ.

.. math:: p(\varphi, \theta_{1..J} \mid D) = p(\varphi \mid D) \prod_j p(\theta_j \mid D_j, \varphi)

Where θ_j can be integrated out, in closed form or by quadrature, φ is sampled without it and every
θ_j is drawn afterwards (``method="collapsed"``); ``method="nuts"`` samples φ and θ jointly,
non-centred.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.distributions import biject_to

from hierbayes import inputs
from hierbayes.adaptation import (
    Adaptation,
    Conjugate,
    Laplace,
    MixedScales,
    NotOffered,
    Quadrature,
    separation,
)
from hierbayes.errors import InputError, announce
from hierbayes.fit import Fit
from hierbayes.fit.adapting import LARGEST_THETA, theta_under
from hierbayes.fit.outward import enter
from hierbayes.meta.approximate_evidence import MOST_DIMENSIONS
from hierbayes.meta.by_evidence import ByEvidence
from hierbayes.meta.by_quadrature import ByQuadrature
from hierbayes.meta.collapsed import Collapsed
from hierbayes.meta.collapsed_sampling import Doubted, sample_collapsed
from hierbayes.meta.diagnostics import remarks as judged
from hierbayes.meta.posterior_mode import maximise_exact
from hierbayes.meta.sampling import run_nuts
from hierbayes.model import HierarchicalModel, check_model
from hierbayes.numerics import as_key, as_rng, float64
from hierbayes.tasks import Tasks

SURE, LONG_STAY = 0.5, 50
"""Acceptance of independent proposals from which on, and refusals in a row up to which, R̂ and
effective sizes are not asked for."""

NO_EVIDENCE = (
    "the sampler draws from the posterior without its normalising constant, or the hyperprior is "
    "improper"
)

NO_ADAPTATION = (
    "new tasks cannot be adapted to under a Student-t prior where tasks are not Gaussian: fit them "
    "together with the others, or take priors.Gaussian()"
)


def full_bayes(
    model: HierarchicalModel,
    tasks: Any,
    method: Literal["auto", "collapsed", "nuts"] = "auto",
    num_draws: int = 1000,
    num_chains: int = 4,
    seed: int | jax.Array = 0,
    *,
    num_warmup: int = 1000,
    target_accept: float = 0.9,
    progress: bool | None = None,
) -> Fit:
    r"""Sample the posterior of the prior and of every task.

    Parameters
    ----------
    model : HierarchicalModel
    tasks : Tasks or DataFrame
        A DataFrame goes through the model's formula.
    method : "auto", "collapsed" or "nuts"
        "collapsed" integrates θ out, samples φ by independence Metropolis, then draws θ given
        φ: no funnel, and draws next to independent. Of Gaussian tasks θ and the fixed effects (μ,
        Γ, β) are integrated out exactly and drawn from their exact conditional, at a cost that does
        not depend on the number of rows. Under a Student-t prior θ alone is integrated out of
        Gaussian tasks, and φ sampled whole. Of others, with up to three coefficients, θ alone
        is, by quadrature (see :func:`empirical_bayes`), and drawn by short independence chains,
        which name the tasks where they do badly. Proposals whose tails prove too light get a part
        that reaches farther; where still fewer than 20 % are accepted, or Pareto's k̂ of their
        weights is above 0.7, NUTS samples the same density, and a warning says so. Nodes are judged
        over the draws of φ: where the finest do not do, or a task has two modes, "auto" takes
        "nuts" instead, and "collapsed" says so. "nuts" samples φ and θ
        jointly, non-centred; after it :meth:`Fit.adapt` draws new tasks' θ from Laplace posteriors,
        unless tasks are Gaussian. "auto" collapses Gaussian tasks, and those of the other families
        with up to three coefficients; NUTS samples tasks with more, NumPyro programs, and tasks
        that are not Gaussian under a Student-t prior.
    num_draws, num_chains : int
        Draws kept a chain, and chains. Above 50 million draws × tasks × coefficients θ is kept as
        mean and covariance, averaged over at least 200 draws of φ.
    num_warmup : int
        Warm-up draws a chain, of NUTS alone; independence Metropolis fits its proposal in rounds.
    seed : int or JAX key
        The same seed gives the same draws.
    target_accept : float
        Target acceptance of NUTS.
    progress : bool, optional
        Show a progress bar; by default where stderr is a terminal.

    Returns
    -------
    Fit
        ``phi`` and ``theta`` are posterior means; ``datatree`` holds the draws. How fine quadrature
        was say ``info["num_nodes"]``, a dimension (an even number: on rays), and
        ``info["evidence_error"]``: by how much the error of Σ log p(D_j | φ) varies over the draws.
        Under a proper hyperprior ``log_evidence`` is log p(D), from the weights of all proposals,
        with its standard error in ``info["log_evidence_se"]``. R̂, effective sample sizes and
        divergences are judged in ``warnings``: always after NUTS, and where fewer than half of the
        independent proposals were accepted (``info["acceptance"]``) or more than 50 in a row were
        not (``info["longest_stay"]``). ``info["pareto_k"]`` is k̂ of the proposals' weights, −1
        where none stands out.

    References
    ----------
    Gelman et al. (2013), Bayesian Data Analysis, section 5.4.
    Papaspiliopoulos, Roberts and Sköld (2007), A general framework for the parametrization of
    hierarchical models, Statistical Science 22(1).
    Tierney (1994), Markov chains for exploring posterior distributions, Annals of Statistics 22(4).

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
    ...                                known_se="se")
    >>> fit = hb.full_bayes(model, tasks, seed=0)
    >>> fit.datatree["posterior"]["theta"].dims
    ('chain', 'draw', 'task', 'coef')
    """
    started = time.perf_counter()
    check_model(model)
    method = inputs.one_of("method", method, ("auto", "collapsed", "nuts"))
    num_draws, num_chains, num_warmup = inputs.counts(
        num_draws=num_draws, num_chains=num_chains, num_warmup=num_warmup
    )
    target_accept = inputs.share("target_accept", target_accept)
    progress = inputs.optional_flag("progress", progress)
    seed = inputs.seed(seed)
    tasks = model.tasks(tasks)
    model.check(tasks, learns_prior=True)
    many = num_chains * num_draws * tasks.num_tasks * len(tasks.coef) > LARGEST_THETA
    entered = enter(model, tasks, "beliefs", shared=not many)  # moments of θ alone know no β
    resolved, tasks = entered.inner_model, entered.inner_tasks
    exact = resolved.likelihood.gaussian_in_theta
    normal = resolved.prior.gaussian
    integrable = exact or (normal and len(tasks.coef) <= MOST_DIMENSIONS)
    asked = method
    if method == "auto":
        method = "collapsed" if integrable and resolved.likelihood.linear else "nuts"
    if method == "collapsed" and not (exact or normal):
        resolved.require_gaussian_prior(
            'method="collapsed" where tasks are not Gaussian',
            "theta cannot be integrated out by the quadrature that is there", 'use method="nuts"',
        )  # fmt: skip
    if method == "collapsed" and not integrable:
        raise InputError(
            'method="collapsed" integrates theta out, by quadrature for up to '
            f"{MOST_DIMENSIONS} coefficients where tasks are not Gaussian; found "
            f'{len(tasks.coef)}: use method="nuts"'
        )
    adaptation: Any = _adaptation(resolved)
    target: Any = None
    settings: dict[str, Any] = dict(
        num_draws=num_draws, num_chains=num_chains, num_warmup=num_warmup,
        target_accept=target_accept, progress=progress,
    )  # fmt: skip
    training, evidence, remarks = None, None, []
    info: dict[str, Any] = {"method": method, "sampler": "nuts", **settings}
    key_theta: Any
    draws: dict[str, np.ndarray] = {}
    sample_stats: dict[str, np.ndarray] = {}
    with float64():
        if method == "collapsed":
            rng = as_rng(seed)  # NumPy's: of JAX's own each kind of draw would be compiled first
            key_theta = int(rng.integers(2**63))
            if exact and not normal:
                optimum = maximise_exact(resolved, tasks, adaptation, with_belief=True)
                cells = adaptation.num_nodes(resolved, tasks) * max(tasks.num_tasks, 1) / 5
                target = ByEvidence(resolved, tasks, adaptation, optimum, cells=cells)
            elif exact:
                target = Collapsed(resolved, tasks)
            else:
                target = ByQuadrature(resolved, tasks)
            try:
                found = sample_collapsed(target, rng, give_up=asked == "auto", **settings)
            except Doubted:  # why stands in target.doubt
                pass
            else:
                draws, sample_stats, remarks = found.draws, found.sample_stats, [*found.remarks]
                info |= found.info
                evidence = found.log_evidence
        if isinstance(target, ByQuadrature):
            adaptation = Quadrature(target.num_nodes)
            info |= {"num_nodes": target.num_nodes, "evidence_error": target.error}
            if target.doubt and asked == "auto":
                remarks = [f"{target.doubt}: NUTS has sampled phi and theta jointly instead"]
                method, adaptation, evidence = "nuts", _adaptation(resolved), None
                info = {"method": method, "sampler": "nuts", **settings}
            elif target.doubt:
                remarks.append(f'{target.doubt}: use method="nuts"')
        if method == "nuts":
            if tasks.sharding is not None:
                remarks.append(
                    'method="nuts" samples all theta together, on one device of each process: of '
                    "the devices that the tasks are spread over it makes no use"
                )
            key, key_start, key_theta = jax.random.split(as_key(seed), 3)
            start = _start(resolved, tasks, key_start, num_chains)
            program = resolved.numpyro_program(tasks, centred=False)
            white = jax.random.normal(key_theta, (num_chains, tasks.num_tasks, len(tasks.coef)))
            start["z"] = 0.1 * white
            draws, sample_stats = run_nuts(program, key, start, dense=False, **settings)
    theta = draws.pop("theta", None)
    draws.pop("z", None)
    if theta is None:
        phis = {name: value.reshape(-1, *value.shape[2:]) for name, value in draws.items()}
        found = theta_under(adaptation, resolved, tasks, phis, key_theta)
        if found.draws is None:
            training = found
        else:
            theta = found.draws.reshape(num_chains, num_draws, *found.draws.shape[1:])
    sure = info["sampler"] == "independence" and info["acceptance"] >= SURE
    if not sure or info["longest_stay"] > LONG_STAY:
        dims = {p.name: p.dims for p in resolved.parts(tasks)}
        remarks += judged(draws, theta, sample_stats, tasks, dims)
    phi = {name: value.mean(axis=(0, 1)) for name, value in draws.items()}
    sites = resolved.phi_distributions(tasks)
    fit = Fit(
        "full Bayes", resolved, tasks, {name: phi[name] for name in sites}, adaptation, training,
        phi_draws={name: draws[name] for name in sites}, theta_draws=theta,
        sample_stats=sample_stats,
        evidence=evidence, no_evidence=NO_EVIDENCE, warnings=announce(remarks),
        info=info | {"remarks": separation.remark(tasks, resolved.likelihood),
                     "seconds": time.perf_counter() - started},
    )  # fmt: skip
    return entered.leave(fit)


def _adaptation(model: HierarchicalModel) -> Adaptation:
    """How tasks are adapted to given draws of φ."""
    if model.conjugate:
        return Conjugate()
    if model.prior.gaussian:
        return Laplace()
    return MixedScales() if model.likelihood.gaussian_in_theta else NotOffered(NO_ADAPTATION)


def _start(
    model: HierarchicalModel, tasks: Tasks, key: jax.Array, num_chains: int
) -> dict[str, jax.Array]:
    """Overdispersed starting points, unconstrained, around a pooled fit.

    Least squares where the likelihood is Gaussian, else the overall level of f alone.
    """
    scales, shape = model.scales(tasks), model.shape(tasks)
    d = len(shape.coef)
    pooled = np.concatenate([scales.mu_location, np.zeros(len(shape.shared))])
    residual = scales.spread
    if model.likelihood.gaussian_in_theta:
        rows = np.column_stack([tasks.predictors, tasks.shared])
        y = tasks.outcome - tasks.slots.get("offset", 0.0)
        pooled, *_ = np.linalg.lstsq(rows, y, rcond=None)
        residual = float(np.std(y - rows @ pooled)) or scales.spread
    guess = {
        "mu": np.where(shape.free_mean, pooled[:d], 0.0), "tau": 0.3 * scales.coef,
        "corr": np.eye(d), "beta": pooled[d:],
        "gamma": np.zeros((d, len(shape.task_predictors))), "sigma": residual,
    }  # fmt: skip
    units = {"mu": 0.2 * scales.coef[np.array(shape.free_mean)], "beta": 0.2 * scales.shared}
    start = {}
    for i, (name, belief) in enumerate(model.phi_distributions(tasks).items()):
        transform = biject_to(belief.support)
        centre = transform._inverse(jnp.asarray(guess.get(name, 1.0), dtype=float))
        centre = jnp.where(jnp.isfinite(centre), centre, 0.0)
        noise = jax.random.uniform(
            jax.random.fold_in(key, i), (num_chains, *jnp.shape(centre)), minval=-1.0, maxval=1.0
        )
        real = belief.support is numpyro.distributions.constraints.real_vector
        unit = units[name] if name in units and np.size(units[name]) == np.size(centre) else 0.5
        start[name] = centre + noise * (unit if real or name in units else 0.5)
    return start
