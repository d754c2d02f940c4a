r"""Full Bayes: integrate over φ.

.. math:: p(\varphi, \theta_{1..J} \mid D) = p(\varphi \mid D) \prod_j p(\theta_j \mid D_j, \varphi)

Where θ_j can be integrated out, in closed form or by quadrature, φ is sampled without it and every
θ_j is drawn afterwards (``method="collapsed"``); ``method="nuts"`` samples φ and θ jointly,
non-centred.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

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
    NotOffered,
    Quadrature,
    ScaleMixture,
    separation,
)
from hierbayes.errors import InputError, announce
from hierbayes.fit import Fit
from hierbayes.fit.adapting import LARGEST_THETA, theta_under
from hierbayes.fit.method import Method
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
    sampling = FullBayes(
        method, num_draws, num_chains, num_warmup=num_warmup, target_accept=target_accept
    )
    return sampling(model, tasks, seed, progress=progress)


class _Drawn(NamedTuple):
    """Draws of φ, and of θ where both were sampled, with all that a fit is told of them.

    ``doubt``: why the quadrature that they stand on is not to be relied on, if it is not.
    """

    draws: dict[str, np.ndarray]
    sample_stats: dict[str, np.ndarray]
    remarks: list[str]
    info: dict[str, Any]
    adaptation: Any
    key: Any
    evidence: float | None = None
    doubt: str = ""


@dataclass(frozen=True)
class FullBayes(Method):
    """Full Bayes with these settings; :func:`full_bayes` says what they are."""

    method: Literal["auto", "collapsed", "nuts"] = "auto"
    num_draws: int = 1000
    num_chains: int = 4
    num_warmup: int = field(default=1000, kw_only=True)
    target_accept: float = field(default=0.9, kw_only=True)

    name = "full Bayes"
    command = "full_bayes"
    colour, marker, rank = "#0072B2", "o", 0.8
    compared = True
    draws_phi = True
    learns_all = True

    def __post_init__(self) -> None:
        inputs.one_of("method", self.method, ("auto", "collapsed", "nuts"))
        inputs.counts(
            num_draws=self.num_draws, num_chains=self.num_chains, num_warmup=self.num_warmup
        )
        inputs.share("target_accept", self.target_accept)

    @classmethod
    def with_draws(cls, num_draws: int) -> FullBayes:
        """So many draws a chain, after as many of warm-up."""
        return cls(num_draws=num_draws, num_warmup=num_draws)

    def __call__(
        self, model: HierarchicalModel, tasks: Any, seed: Any = 0, *, progress: bool | None = None
    ) -> Fit:
        """Draw φ from its posterior, and every θ_j."""
        started = time.perf_counter()
        check_model(model)
        seed, progress = inputs.seed(seed), inputs.optional_flag("progress", progress)
        tasks = model.tasks(tasks)
        model.check(tasks, learns_prior=True)
        size = self.num_chains * self.num_draws * tasks.num_tasks * len(tasks.coef)
        # moments of θ alone know no β
        entered = enter(model, tasks, "hyperpriors", shared=size <= LARGEST_THETA)
        resolved, tasks = entered.inner_model, entered.inner_tasks
        with float64():
            found = self._sampled(resolved, tasks, seed, progress)
        return entered.leave(self._fit(resolved, tasks, found, started))

    def _sampled(
        self, model: HierarchicalModel, tasks: Tasks, seed: Any, progress: bool | None
    ) -> _Drawn:
        """φ with θ integrated out, or both together."""
        settings: dict[str, Any] = dict(
            num_draws=self.num_draws, num_chains=self.num_chains, num_warmup=self.num_warmup,
            target_accept=self.target_accept, progress=progress,
        )  # fmt: skip
        if not _is_collapsed(self.method, model, tasks):
            return _jointly(model, tasks, seed, settings)
        found = _collapsed(model, tasks, seed, settings, give_up=self.method == "auto")
        if not found.doubt:
            return found
        if self.method == "collapsed":
            advice = f'{found.doubt}: use method="nuts"'
            return found._replace(remarks=[*found.remarks, advice])
        said = f"{found.doubt}: NUTS has sampled phi and theta jointly instead"
        joint = _jointly(model, tasks, seed, settings)
        return joint._replace(remarks=[said, *joint.remarks])

    def _fit(self, model: HierarchicalModel, tasks: Tasks, found: _Drawn, started: float) -> Fit:
        """The fit: θ under every draw of φ, and what the diagnostics say."""
        draws, training = dict(found.draws), None
        theta = draws.pop("theta", None)
        draws.pop("z", None)
        if theta is None:
            phis = {name: value.reshape(-1, *value.shape[2:]) for name, value in draws.items()}
            under = theta_under(found.adaptation, model, tasks, phis, found.key)
            if under.draws is None:
                training = under
            else:
                theta = under.draws.reshape(self.num_chains, self.num_draws, *under.draws.shape[1:])
        remarks, info = found.remarks, found.info
        sure = info["sampler"] == "independence" and info["acceptance"] >= SURE
        if not sure or info["longest_stay"] > LONG_STAY:
            dims = {p.name: p.dims for p in model.parts(tasks)}
            remarks = [*remarks, *judged(draws, theta, found.sample_stats, tasks, dims)]
        sites = model.phi_distributions(tasks)
        return Fit(
            self, model, tasks, {name: draws[name].mean(axis=(0, 1)) for name in sites},
            found.adaptation, training,
            phi_draws={name: draws[name] for name in sites}, theta_draws=theta,
            sample_stats=found.sample_stats, evidence=found.evidence, no_evidence=NO_EVIDENCE,
            warnings=announce(remarks),
            info=info | {"remarks": separation.remark(tasks, model.likelihood),
                         "seconds": time.perf_counter() - started},
        )  # fmt: skip


def _is_collapsed(asked: str, model: HierarchicalModel, tasks: Tasks) -> bool:
    """Whether θ is integrated out; refused where that is asked for and cannot be."""
    exact, normal = model.likelihood.gaussian_in_theta, model.prior.gaussian
    integrable = exact or (normal and len(tasks.coef) <= MOST_DIMENSIONS)
    if asked == "auto":
        return integrable and model.likelihood.linear
    if asked == "collapsed" and not (exact or normal):
        model.require_gaussian_prior(
            'method="collapsed" where tasks are not Gaussian',
            "theta cannot be integrated out by the quadrature that is there", 'use method="nuts"',
        )  # fmt: skip
    if asked == "collapsed" and not integrable:
        raise InputError(
            'method="collapsed" integrates theta out, by quadrature for up to '
            f"{MOST_DIMENSIONS} coefficients where tasks are not Gaussian; found "
            f'{len(tasks.coef)}: use method="nuts"'
        )
    return asked == "collapsed"


def _collapsed(
    model: HierarchicalModel, tasks: Tasks, seed: Any, settings: dict[str, Any], *, give_up: bool
) -> _Drawn:
    """Draws of φ from its posterior, θ integrated out in closed form or by quadrature."""
    rng = as_rng(seed)  # NumPy's: of JAX's own each kind of draw would be compiled first
    key, adaptation = int(rng.integers(2**63)), _adaptation(model)
    target = _density(model, tasks, adaptation)
    info: dict[str, Any] = {"method": "collapsed", "sampler": "nuts", **settings}
    nothing = _Drawn({}, {}, [], info, adaptation, key)
    try:
        found = sample_collapsed(target, rng, give_up=give_up, **settings)
    except Doubted:
        return nothing._replace(doubt=target.doubt)
    info |= found.info
    drawn = nothing._replace(
        draws=found.draws, sample_stats=found.sample_stats, remarks=[*found.remarks],
        evidence=found.log_evidence,
    )  # fmt: skip
    if not isinstance(target, ByQuadrature):
        return drawn
    info |= {"num_nodes": target.num_nodes, "evidence_error": target.error}
    return drawn._replace(adaptation=Quadrature(target.num_nodes), doubt=target.doubt)


def _density(model: HierarchicalModel, tasks: Tasks, adaptation: Any) -> Any:
    """The posterior of φ, as the sampler sees it."""
    if not model.likelihood.gaussian_in_theta:
        return ByQuadrature(model, tasks)
    if model.prior.gaussian:
        return Collapsed(model, tasks)
    optimum = maximise_exact(model, tasks, adaptation, with_hyperprior=True)
    cells = adaptation.num_nodes(model, tasks) * max(tasks.num_tasks, 1) / 5
    return ByEvidence(model, tasks, adaptation, optimum, cells=cells)


def _jointly(model: HierarchicalModel, tasks: Tasks, seed: Any, settings: dict[str, Any]) -> _Drawn:
    """Draws of φ and θ together, non-centred, by NUTS."""
    remarks = []
    if tasks.sharding is not None:
        remarks.append(
            'method="nuts" samples all theta together, on one device of each process: of '
            "the devices that the tasks are spread over it makes no use"
        )
    key, key_start, key_theta = jax.random.split(as_key(seed), 3)
    num_chains = settings["num_chains"]
    start = _start(model, tasks, key_start, num_chains)
    program, data = model.program_of_data(tasks)
    white = jax.random.normal(key_theta, (num_chains, tasks.num_tasks, len(tasks.coef)))
    start["z"] = 0.1 * white
    draws, stats = run_nuts(program, data, key, start, dense=False, **settings)
    info = {"method": "nuts", "sampler": "nuts", **settings}
    return _Drawn(draws, stats, remarks, info, _adaptation(model), key_theta)


def _adaptation(model: HierarchicalModel) -> Adaptation:
    """How tasks are adapted to given draws of φ."""
    if model.conjugate:
        return Conjugate()
    if model.prior.gaussian:
        return Laplace()
    return ScaleMixture() if model.likelihood.gaussian_in_theta else NotOffered(NO_ADAPTATION)


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
    for i, (name, hyperprior) in enumerate(model.phi_distributions(tasks).items()):
        transform = biject_to(hyperprior.support)
        centre = transform._inverse(jnp.asarray(guess.get(name, 1.0), dtype=float))
        centre = jnp.where(jnp.isfinite(centre), centre, 0.0)
        noise = jax.random.uniform(
            jax.random.fold_in(key, i), (num_chains, *jnp.shape(centre)), minval=-1.0, maxval=1.0
        )
        real = hyperprior.support is numpyro.distributions.constraints.real_vector
        unit = units[name] if name in units and np.size(units[name]) == np.size(centre) else 0.5
        start[name] = centre + noise * (unit if real or name in units else 0.5)
    return start
