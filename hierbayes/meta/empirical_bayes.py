r"""Empirical Bayes: φ̂ maximises the summed evidence, and each task gets its posterior at φ̂.

.. math:: \hat\varphi = \arg\max_\varphi \sum_j \log \int p(D_j \mid \theta, \varphi)\,
          p(\theta \mid \varphi)\, d\theta, \qquad
          \theta_j \sim p(\theta_j \mid D_j, \hat\varphi)
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any, Literal, Unpack

import jax
import numpy as np

from hierbayes import inputs
from hierbayes.adaptation import (
    Conjugate,
    Integrable,
    Laplace,
    MixedScales,
    Posterior,
    Quadrature,
    separation,
)
from hierbayes.errors import InputError, NotApplicable, announce, listing
from hierbayes.fit import Fit
from hierbayes.fit.outward import enter
from hierbayes.likelihoods import LastLayer
from hierbayes.meta.approximate_evidence import MOST_DIMENSIONS, maximise_approximate
from hierbayes.meta.batches import on_episodes
from hierbayes.meta.expected_coverage import remarks_on_coverage
from hierbayes.meta.inner_loop import refuse_idle
from hierbayes.meta.intervals import Intervals, check_intervals, draws_of_mixture, widened
from hierbayes.meta.last_layer import maximise_evidence_of_features
from hierbayes.meta.marginal import maximise_likelihood
from hierbayes.meta.posterior_mode import maximise_exact, resolve_for_mode
from hierbayes.meta.training import OuterLoop
from hierbayes.model import HierarchicalModel, check_model
from hierbayes.numerics import as_key
from hierbayes.tasks import Tasks

if TYPE_CHECKING:
    import optax

LARGEST_THETA = 20_000_000
"""Draws × tasks × coefficients up to which θ is kept as draws beside mean and covariance."""

FEW_TASKS = 30


def empirical_bayes(
    model: HierarchicalModel,
    tasks: Any,
    criterion: Literal["ml", "reml", "map"] = "ml",
    evidence: Literal["auto", "exact", "laplace", "quadrature"] = "auto",
    *,
    intervals: Intervals = "plain",
    num_bootstrap: int = 200,
    num_draws: int = 1000,
    num_chains: int = 4,
    seed: int | jax.Array = 0,
    optimiser: optax.GradientTransformation | None = None,
    num_meta_steps: int | None = None,
    progress: bool | None = None,
    **outer_loop: Unpack[OuterLoop],
) -> Fit:
    r"""Learn the prior by maximising the evidence (type-II maximum likelihood, REML or MAP).

    .. math::

        \text{ml:}\quad & \textstyle\max_\varphi \sum_j \log p(D_j \mid \varphi) \\
        \text{reml:}\quad & \textstyle\max_{\tau, R, \sigma} \log \int \prod_j
            p(D_j \mid \varphi)\, d\mu\, d\Gamma\, d\beta \\
        \text{map:}\quad & \textstyle\max_\varphi \sum_j \log p(D_j \mid \varphi)
            + \log p(\varphi)

    Parameters
    ----------
    model : HierarchicalModel
    tasks : Tasks, DataFrame or Episodes
        A DataFrame goes through the model's formula.
    criterion : "ml", "reml" or "map"
        "map" maximises over (mu, tau, corr, beta, gamma, log sigma), with densities in tau and
        corr and no Jacobian; under a prior on σ that ends, over σ's logit between the ends. Its
        default prior on τ is Gamma(2, rate → 0), density proportional to τ, which keeps τ̂ off zero
        (Chung et al. 2013); a prior on τ given by the user is used as it is.
    evidence : "auto", "exact", "laplace" or "quadrature"
        How θ_j is integrated out. Gaussian tasks are exact; under a Student-t prior but for one
        integral, which is right to 1e-10. Others take adaptive Gauss–Hermite quadrature, for up to
        three coefficients, with as many nodes as the evidence needs
        (``info["num_nodes"]`` a dimension, estimated error ``info["evidence_error"]``), or
        Laplace's approximation, which is biased for small tasks: up to three coefficients a
        warning says by how much, beyond them nothing does. "auto" is exact where that can be,
        quadrature up to two coefficients, Laplace beyond; ``info["evidence"]`` says which.
    intervals : "plain", "kass-steffey", "bootstrap" or "morris"
        Which posterior of θ_j: its mean, covariance, draws and predictions for known tasks.
        "plain" is p(θ_j | D_j, φ̂), which takes φ̂ for known and is too narrow with few tasks, far
        too narrow with τ̂ near zero; a warning says what its 95 % intervals are expected to cover.
        "kass-steffey" adds to the covariance what φ̂'s covariance adds to the mean, by the delta
        method ("ml" and "map"; at τ̂ = 0 nothing of τ, and a warning says so). "bootstrap"
        averages p(θ_j | D_j, φ*_b) over ``num_bootstrap`` refits φ*_b to data simulated under φ̂
        (Gaussian tasks, "ml" and "reml"); so does :meth:`Fit.adapt`. "morris" is Morris's closed
        form for normal means of equal known variance (his τ̂ is REML's). φ̂ and what is said of
        new tasks stay as they are.
    num_bootstrap : int
        Refits of the bootstrap, kept as ``fit.phi_bootstrap``.
    num_draws, num_chains : int
        Draws of θ in the DataTree.
    seed : int or JAX key
        For these draws; on episodes for weights and tasks.
    optimiser, num_meta_steps, progress, **outer_loop
        On episodes, with a :class:`~hierbayes.likelihoods.LastLayer` likelihood, whose features are
        learned by stochastic ascent: see :class:`~hierbayes.meta.training.OuterLoop`. Then there
        are neither draws nor standard errors, and ``log_evidence`` is replaced by the mean a row
        of held-out tasks in ``info["history"]``.

    Returns
    -------
    Fit
        ``phi`` = φ̂, ``theta`` the posterior means at φ̂ (or as ``intervals`` has them),
        ``standard_errors`` of μ, Γ and β by generalised least squares and of τ and σ from the
        Hessian of the profiled criterion (where tasks are not Gaussian all from the Hessian of the
        criterion),
        ``log_evidence`` the maximised criterion with all constants (lme4's ``logLik``; under
        "map" the ml value at φ̂, with ``log_posterior`` beside it). ``info["remarks"]`` names
        tasks that only the prior holds, with outcomes all alike or separated.

    Raises
    ------
    InputError
        For tasks that the model cannot be fitted to, a single task, or outcomes whose evidence
        has no maximum: all alike within each task, or separated by the predictors.

    References
    ----------
    Bates et al. (2015), Fitting linear mixed-effects models using lme4, JSS 67(1).
    Chung et al. (2013), A nondegenerate penalized likelihood estimator, Psychometrika 78(4).
    Kass and Steffey (1989), Approximate Bayesian inference in conditionally independent
    hierarchical models (parametric empirical Bayes models), JASA 84(407).
    Laird and Louis (1987), Empirical Bayes confidence intervals based on bootstrap samples,
    JASA 82(399).
    Morris (1983), Parametric empirical Bayes inference: theory and applications, JASA 78(381).

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula(
    ...     "log_radon ~ 1 + floor + (1 | county)", hb.datasets.radon()
    ... )
    >>> fit = hb.empirical_bayes(model, tasks)
    >>> round(float(fit.phi["tau"][0]), 3), round(fit.log_evidence, 2)
    (0.324, -1081.83)

    Few tasks, and a posterior that counts what they leave open of φ:

    >>> schools = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
    ...                           known_se="se")
    >>> wider = hb.empirical_bayes(*schools, intervals="bootstrap")
    >>> bool(wider.phi["tau"] == 0), bool((wider.adapted.sd > 3).all())
    (True, True)
    """
    started = time.perf_counter()
    check_model(model)
    criterion = inputs.one_of("criterion", criterion, ("ml", "reml", "map"))
    evidence = inputs.one_of("evidence", evidence, ("auto", "exact", "laplace", "quadrature"))
    num_draws, num_chains = inputs.counts(num_draws=num_draws, num_chains=num_chains)
    seed = inputs.seed(seed)
    given = {"optimiser": optimiser, "num_meta_steps": num_meta_steps, "progress": progress}
    if on_episodes(model, tasks):
        model.require_gaussian(
            "empirical_bayes",
            "the exact evidence log p(D_j | φ)",
            "use hb.maml, or hb.likelihoods.LastLayer for exact evidence on learned features",
        )
        if not isinstance(model.likelihood, LastLayer):
            raise NotApplicable(
                "empirical_bayes takes episodes with a LastLayer likelihood only; draw a fixed set "
                "of tasks, support, query = episodes.draw(1000), for other Gaussian tasks"
            )
        if criterion != "ml":
            raise InputError(f'criterion must be "ml" on episodes, found {criterion!r}')
        if intervals != "plain":
            raise NotApplicable(f'intervals must be "plain" on episodes, found {intervals!r}')
        return maximise_evidence_of_features(model, tasks, {**outer_loop, **given, "seed": seed})
    refuse_idle({**outer_loop, **given}, "empirical_bayes")
    tasks = model.tasks(tasks)
    model.check(tasks, learns_prior=True)
    check_intervals(intervals, num_bootstrap, model, tasks, criterion)
    integral = chosen_evidence(model, tasks, evidence, criterion)
    known = resolve_for_mode(model, tasks) if criterion == "map" else model
    entered = enter(
        known, tasks, "beliefs" if criterion == "map" else "prior", shared=intervals != "bootstrap"
    )
    resolved, tasks = entered.inner_model, entered.inner_tasks
    info: dict[str, Any] = {"criterion": criterion, "evidence": integral, "intervals": intervals}
    if intervals == "bootstrap":
        info["num_bootstrap"] = int(num_bootstrap)
    adaptation: Integrable = Conjugate() if model.prior.gaussian else MixedScales()
    more: list[str] = []
    if integral != "exact":
        found = maximise_approximate(
            resolved, tasks, quadrature=integral == "quadrature", with_belief=criterion == "map"
        )
        optimum, more = found.optimum, found.remarks
        adaptation = Quadrature(found.num_nodes) if integral == "quadrature" else Laplace()
        info |= {"num_nodes": found.num_nodes, "evidence_error": found.error}
    elif criterion == "map" or not model.prior.gaussian:
        with_belief = criterion == "map"
        optimum = maximise_exact(resolved, tasks, adaptation, with_belief=with_belief)
    else:
        optimum = maximise_likelihood(resolved, tasks, reml=criterion == "reml")
    found = widened(
        intervals, resolved, tasks, optimum.phi, adaptation,
        adaptation(resolved, tasks, optimum.phi),
        criterion=criterion, num_nodes=info.get("num_nodes", 1), num_bootstrap=num_bootstrap,
        seed=seed,
    )  # fmt: skip
    training, mixed = found.training, found.phi_bootstrap
    draws = None
    if num_chains * num_draws * training.mean.size <= LARGEST_THETA:
        draws = functools.partial(_draws, training, seed, num_chains, num_draws)
        if isinstance(adaptation, MixedScales):
            given = (adaptation, resolved, tasks, optimum.phi, seed, num_chains, num_draws)
            draws = functools.partial(_mixed_draws, *given)
        if mixed is not None:
            assert isinstance(adaptation, Conjugate)
            draws = functools.partial(draws_of_mixture, adaptation, resolved, tasks, mixed, seed,
                                      num_chains, num_draws)  # fmt: skip
    spread = resolved.scales(tasks).spread
    remarks = [*found.remarks, *_remarks(tasks, optimum.phi, spread, intervals)]
    if intervals in ("plain", "kass-steffey"):
        given = (resolved, tasks, optimum.phi, spread, criterion, intervals)
        remarks += _remarks_on_intervals(*given)
    remarks = entered.of_the_mean(remarks)
    fit = Fit(
        "empirical Bayes", resolved, tasks, optimum.phi, adaptation, training,
        theta_draws=draws, standard_errors=optimum.standard_errors,
        evidence=optimum.log_evidence, log_posterior=optimum.log_posterior,
        warnings=announce([*optimum.warnings, *more, *remarks]),
        info=info | {"num_draws": num_draws, "num_chains": num_chains,
                     "remarks": separation.remark(tasks, resolved.likelihood),
                     "seconds": time.perf_counter() - started},
        phi_bootstrap=mixed,
    )  # fmt: skip
    return entered.leave(fit, optimum.along)


def chosen_evidence(
    model: HierarchicalModel, tasks: Tasks, asked: str, criterion: str = "ml"
) -> str:
    """How θ_j is integrated out: "exact", "quadrature" or "laplace"."""
    gaussian, d = model.likelihood.gaussian_in_theta, len(tasks.coef)
    if not model.prior.gaussian:
        if not gaussian:
            model.require_gaussian_prior(
                f"empirical_bayes under a {type(model.likelihood).__name__} likelihood",
                "its evidence is not offered", 'use full_bayes(method="nuts")',
            )  # fmt: skip
        if criterion == "reml":
            model.require_gaussian_prior(
                'criterion="reml"', "mu and beta cannot be integrated out of its evidence",
                'use "ml" or "map", or full_bayes',
            )  # fmt: skip
    if gaussian:
        if asked not in ("auto", "exact"):
            raise InputError(f'evidence={asked!r}: of Gaussian tasks it is exact; leave it "auto"')
        return "exact"
    if asked == "exact":
        model.require_gaussian("evidence=\"exact\"", "a closed form of log p(D_j | φ)",
                               'leave it "auto"')  # fmt: skip
    if criterion == "reml":
        raise NotApplicable(
            'criterion="reml" integrates μ and β out of a Gaussian evidence; use "ml" or "map", or '
            "full_bayes"
        )
    if asked == "quadrature" and d > MOST_DIMENSIONS:
        raise InputError(
            f'evidence="quadrature" takes up to {MOST_DIMENSIONS} coefficients a task, found {d}; '
            'use "laplace", or full_bayes'
        )
    if asked != "auto":
        return asked
    return "quadrature" if d <= 2 else "laplace"


def _draws(
    training: Posterior, seed: int | jax.Array, num_chains: int, num_draws: int
) -> np.ndarray:
    """θ given φ̂ (chain, draw, task, coef); made when read, since many never ask."""
    # the numbers of a key's data, which an integer is made into
    rng = np.random.default_rng(np.asarray(jax.random.key_data(as_key(seed))))
    drawn = training.draw(rng, num_chains * num_draws)
    return drawn.reshape(num_chains, num_draws, *training.mean.shape)


def _mixed_draws(
    adaptation: MixedScales, model: HierarchicalModel, tasks: Tasks, phi: dict[str, np.ndarray],
    seed: int | jax.Array, num_chains: int, num_draws: int,
) -> np.ndarray:  # fmt: skip
    """The same under a Student-t prior, where posteriors are not normal."""
    drawn = adaptation.draws_at(model, tasks, phi, num_chains * num_draws, seed)
    return drawn.reshape(num_chains, num_draws, *drawn.shape[1:])


def _remarks(tasks: Tasks, phi: dict[str, np.ndarray], spread: float, intervals: str) -> list[str]:
    """What the estimate alone does not tell."""
    remarks = []
    zero = [c for c, tau in zip(tasks.coef, phi["tau"], strict=True) if tau == 0]
    if zero:
        width = ", and intervals of theta have no width" if intervals == "plain" else ""
        remarks.append(
            f"tau is estimated as exactly 0 for {listing(zero)}: the tasks are taken to be "
            f"identical there{width}. With few tasks this is "
            'common and says little; full_bayes averages over tau, and criterion="map" with its '
            "default prior keeps it off the boundary"
        )
    if _without_noise(phi, spread):
        remarks.append(
            f"sigma is estimated as {float(phi['sigma']):.2g}, next to nothing beside the "
            "outcome's spread: the coefficients explain the rows almost without an error, the "
            "evidence has no maximum there, and neither log_evidence nor the other estimates mean "
            "much"
        )
    return remarks


def _without_noise(phi: dict[str, np.ndarray], spread: float) -> bool:
    """Whether σ̂ is next to nothing beside the outcome's spread."""
    return "sigma" in phi and bool(phi["sigma"] < 1e-6 * spread)


def _remarks_on_intervals(
    model: HierarchicalModel,
    tasks: Tasks,
    phi: dict[str, np.ndarray],
    spread: float,
    criterion: str,
    intervals: str,
) -> list[str]:
    """Where a point estimate of φ makes intervals too narrow: by how much, where that is known."""
    num_tasks = int((tasks.sizes > 0).sum())
    gaussian = model.conjugate
    if intervals == "plain" and gaussian and criterion != "map":
        if _without_noise(phi, spread):
            return []  # an estimate that is none has no coverage
        return remarks_on_coverage(model, tasks, phi, reml=criterion == "reml")
    if num_tasks >= FEW_TASKS:
        return []
    ignored = "ignore its uncertainty" if intervals == "plain" else "count its curvature alone"
    return [
        f"only {num_tasks} tasks have rows: intervals at a point estimate of phi {ignored} "
        "and cover too little (below 90 % instead of 95 %, far below where tau is near 0); "
        "full_bayes accounts for it"
    ]
