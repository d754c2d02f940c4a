r"""Empirical Bayes: φ̂ maximises the summed evidence, and each task gets its posterior at φ̂.

.. math:: \hat\varphi = \arg\max_\varphi \sum_j \log \int p(D_j \mid \theta, \varphi)\,
          p(\theta \mid \varphi)\, d\theta, \qquad
          \theta_j \sim p(\theta_j \mid D_j, \hat\varphi)

φ̂ without one task, where the evidence is an integral without a closed form.

.. math:: \hat\varphi_{-j} = \arg\max_\varphi \sum_{i \ne j} \log \hat p(D_i \mid \varphi)
          \left[+ \log p(\varphi)\right]

One program serves all tasks: the sum leaves one of them out, and starts from the fit to all.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack

import jax
import numpy as np

from hierbayes import inputs
from hierbayes.adaptation import (
    Conjugate,
    Integrable,
    Laplace,
    Posterior,
    Quadrature,
    ScaleMixture,
    separation,
)
from hierbayes.errors import InputError, NotApplicable, announce, listing
from hierbayes.evidence import Integrated
from hierbayes.fit import Fit
from hierbayes.fit.outward import Entered, enter
from hierbayes.fit.updating import evidence_of
from hierbayes.likelihoods import LastLayer
from hierbayes.meta.approximate_evidence import MOST_DIMENSIONS, maximise_approximate
from hierbayes.meta.batches import on_episodes
from hierbayes.meta.criterion import Criterion
from hierbayes.meta.intervals import (
    Intervals,
    check_intervals,
    draws_of_mixture,
    remarks_on_coverage,
    widened,
)
from hierbayes.meta.last_layer import maximise_evidence_of_features
from hierbayes.meta.marginal import maximise_likelihood
from hierbayes.meta.outer_loop import OuterLoop, Run, WithOuterLoop, parted
from hierbayes.meta.posterior_mode import maximise_exact, off_the_boundary, resolve_for_mode
from hierbayes.model import HierarchicalModel, check_model
from hierbayes.numerics import as_key, float64
from hierbayes.tasks import Tasks

if TYPE_CHECKING:
    import optax

SHRUNK = 1e-3
"""Share of the identity in the correlations that a search sets out from, for none to be ±1."""


class WithoutOne:
    """The summed evidence of all tasks but some, from what a fit to all of them has found."""

    def __init__(self, model: HierarchicalModel, tasks: Tasks, adaptation: Integrable):
        self.model, self.tasks, self.adaptation = model, tasks, adaptation

    def scores(self, phi: dict[str, np.ndarray], *, with_hyperprior: bool) -> np.ndarray:
        """log p̂(D_j | φ̂_{−j}) of each task with rows (J,), NaN of the others."""
        scores = np.full(self.tasks.num_tasks, np.nan)
        known = {name: np.asarray(value) for name, value in phi.items()}
        with float64():
            criterion = Criterion(
                self.model, self.tasks, self.adaptation, with_hyperprior=with_hyperprior
            )
            begin = criterion.space.x(known, shrunk=SHRUNK)
            for j in np.flatnonzero(self.tasks.sizes > 0):
                criterion.counted = np.arange(self.tasks.num_tasks) != j
                x = off_the_boundary(criterion, [begin], criterion.space).x
                found = Integrated(self.adaptation)(self.model, self.tasks, criterion.phi(x))
                scores[j] = found[j]
        return scores


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
        learned by stochastic ascent: see :class:`~hierbayes.meta.outer_loop.OuterLoop`. Then there
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
    run, more = parted(outer_loop, EmpiricalBayes)
    method = EmpiricalBayes(
        criterion, evidence, intervals=intervals, num_bootstrap=num_bootstrap, num_draws=num_draws,
        num_chains=num_chains, optimiser=optimiser, num_meta_steps=num_meta_steps, **more,
    )  # fmt: skip
    return method(model, tasks, seed, progress=progress, **run)


@dataclass(frozen=True)
class EmpiricalBayes(WithOuterLoop):
    """Empirical Bayes with these settings; :func:`empirical_bayes` says what they are."""

    criterion: Literal["ml", "reml", "map"] = "ml"
    evidence: Literal["auto", "exact", "laplace", "quadrature"] = "auto"
    intervals: Intervals = field(default="plain", kw_only=True)
    num_bootstrap: int = field(default=200, kw_only=True)
    num_draws: int = field(default=1000, kw_only=True)
    num_chains: int = field(default=4, kw_only=True)

    name = "empirical Bayes"
    command = "empirical_bayes"
    colour, marker, rank = "#009E73", "s", 0.7
    compared = True
    learns_all = True
    no_evidence = (
        "tasks are drawn without end: info['history'] has the mean log evidence a row of held-out "
        "tasks"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        inputs.one_of("criterion", self.criterion, ("ml", "reml", "map"))
        inputs.one_of("evidence", self.evidence, ("auto", "exact", "laplace", "quadrature"))
        inputs.counts(num_draws=self.num_draws, num_chains=self.num_chains)

    def __call__(
        self, model: HierarchicalModel, tasks: Any, seed: Any = 0, *,
        progress: bool | None = None, checkpoint: Any = None,
    ) -> Fit:  # fmt: skip
        """Learn φ where the evidence is highest; ``seed`` is for draws of θ, which are random."""
        run = Run.begun(seed, progress, checkpoint)
        check_model(model)
        if on_episodes(model, tasks):
            _refuse_on_episodes(self, model)
            return maximise_evidence_of_features(self, model, tasks, run)
        self.refuse_batches(run, *IDLE)
        tasks, by_map = model.tasks(tasks), self.criterion == "map"
        model.check(tasks, learns_prior=True)
        check_intervals(self.intervals, self.num_bootstrap, model, tasks, self.criterion)
        integral = chosen_evidence(model, tasks, self.evidence, self.criterion)
        entered = enter(
            resolve_for_mode(model, tasks) if by_map else model, tasks,
            "hyperpriors" if by_map else "prior", shared=self.intervals != "bootstrap",
        )  # fmt: skip
        found = self._maximum(entered.inner_model, entered.inner_tasks, integral)
        return entered.leave(self._fit(entered, found, run), found.optimum.along)

    def _maximum(self, model: HierarchicalModel, tasks: Tasks, integral: str) -> _Maximum:
        """φ̂, how tasks are adapted at it, and what is to be said of both."""
        by_map, info = self.criterion == "map", dict[str, Any](evidence=integral)
        if integral != "exact":
            quadrature = integral == "quadrature"
            near = maximise_approximate(model, tasks, quadrature=quadrature, with_hyperprior=by_map)
            by: Integrable = Quadrature(near.num_nodes) if quadrature else Laplace()
            info |= {"num_nodes": near.num_nodes, "evidence_error": near.error}
            return _Maximum(near.optimum, by, info, near.remarks)
        exact: Integrable = Conjugate() if model.prior.gaussian else ScaleMixture()
        if by_map or not model.prior.gaussian:
            return _Maximum(
                maximise_exact(model, tasks, exact, with_hyperprior=by_map), exact, info
            )
        reml = self.criterion == "reml"
        return _Maximum(maximise_likelihood(model, tasks, reml=reml), exact, info)

    def _fit(self, entered: Entered, best: _Maximum, run: Run) -> Fit:
        """The fit, every task with the posterior that ``intervals`` asks for."""
        model, tasks, optimum = entered.inner_model, entered.inner_tasks, best.optimum
        found = widened(
            self.intervals, model, tasks, optimum.phi, best.adaptation,
            best.adaptation(model, tasks, optimum.phi), criterion=self.criterion,
            num_nodes=best.info.get("num_nodes", 1), num_bootstrap=self.num_bootstrap,
            seed=run.seed,
        )  # fmt: skip
        info = {"criterion": self.criterion, "intervals": self.intervals, **best.info}
        if self.intervals == "bootstrap":
            info["num_bootstrap"] = int(self.num_bootstrap)
        spread = model.scales(tasks).spread
        remarks = [*found.remarks, *_remarks(tasks, optimum.phi, spread, self.intervals)]
        if self.intervals in ("plain", "kass-steffey"):
            given = (model, tasks, optimum.phi, spread, self.criterion, self.intervals)
            remarks += _remarks_on_intervals(*given)
        said = [*optimum.warnings, *best.remarks, *entered.of_the_mean(remarks)]
        return Fit(
            self, model, tasks, optimum.phi, best.adaptation, found.training,
            theta_draws=self._draws(model, tasks, best, found, run.seed),
            standard_errors=optimum.standard_errors, evidence=optimum.log_evidence,
            log_posterior=optimum.log_posterior, warnings=announce(said),
            info=info | {"num_draws": self.num_draws, "num_chains": self.num_chains,
                         "remarks": separation.remark(tasks, model.likelihood),
                         "seconds": time.perf_counter() - run.started},
            phi_bootstrap=found.phi_bootstrap,
        )  # fmt: skip

    def _draws(
        self, model: HierarchicalModel, tasks: Tasks, best: _Maximum, found: Any, seed: Any
    ) -> Any:
        """Draws of θ, made when read; none where they are too many."""
        shape, phi = (self.num_chains, self.num_draws), best.optimum.phi
        if self.num_chains * self.num_draws * found.training.mean.size > LARGEST_THETA:
            return None
        if found.phi_bootstrap is not None:
            assert isinstance(best.adaptation, Conjugate)
            given = (best.adaptation, model, tasks, found.phi_bootstrap, seed, *shape)
            return functools.partial(draws_of_mixture, *given)
        if isinstance(best.adaptation, ScaleMixture):
            given = (best.adaptation, model, tasks, phi, seed, *shape)
            return functools.partial(_mixed_draws, *given)
        return functools.partial(_draws, found.training, seed, *shape)

    def for_phi_alone(self) -> EmpiricalBayes:
        """Intervals of θ do not move φ̂."""
        return replace(self, intervals="plain", num_draws=1, num_chains=1)

    def scores_without(self, fit: Fit) -> np.ndarray | None:
        """Where tasks are not Gaussian: one program finds φ̂ without each, from that of all."""
        model, tasks = fit.model, fit.tasks
        if model.likelihood.gaussian_in_theta:
            return None
        model.require_gaussian_prior(
            "leave_one_task_out where tasks are not Gaussian",
            "the evidence log p(D_j | phi) is not offered there", "take priors.Gaussian()",
        )  # fmt: skip
        without = WithoutOne(model, tasks, evidence_of(fit).by(model, tasks))
        return without.scores(dict(fit.phi), with_hyperprior=self.criterion == "map")


IDLE = ("optimiser", "num_meta_steps")
"""Settings of the outer loop that have no place on a fixed set of tasks."""


class _Maximum(NamedTuple):
    """Where the evidence is highest, and how θ is integrated out there."""

    optimum: Any
    adaptation: Integrable
    info: dict[str, Any]
    remarks: Sequence[str] = ()


def _refuse_on_episodes(method: EmpiricalBayes, model: HierarchicalModel) -> None:
    """Refuse what has no evidence on episodes, and settings that have no place there."""
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
    if method.criterion != "ml":
        raise InputError(f'criterion must be "ml" on episodes, found {method.criterion!r}')
    if method.intervals != "plain":
        raise NotApplicable(f'intervals must be "plain" on episodes, found {method.intervals!r}')


def chosen_evidence(
    model: HierarchicalModel, tasks: Tasks, asked: str, criterion: str = "ml"
) -> str:
    """How θ_j is integrated out: "exact", "quadrature" or "laplace"."""
    _refuse_under_prior(model, criterion)
    if model.likelihood.gaussian_in_theta:
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
    d = len(tasks.coef)
    if asked == "quadrature" and d > MOST_DIMENSIONS:
        raise InputError(
            f'evidence="quadrature" takes up to {MOST_DIMENSIONS} coefficients a task, found {d}; '
            'use "laplace", or full_bayes'
        )
    if asked != "auto":
        return asked
    return "quadrature" if d <= 2 else "laplace"


def _refuse_under_prior(model: HierarchicalModel, criterion: str) -> None:
    """Refuse what has no evidence under a prior that is not Gaussian."""
    if not model.likelihood.gaussian_in_theta:
        model.require_gaussian_prior(
            f"empirical_bayes under a {type(model.likelihood).__name__} likelihood",
            "its evidence is not offered", 'use full_bayes(method="nuts")',
        )  # fmt: skip
    if criterion == "reml":
        model.require_gaussian_prior(
            'criterion="reml"', "mu and beta cannot be integrated out of its evidence",
            'use "ml" or "map", or full_bayes',
        )  # fmt: skip


def _draws(
    training: Posterior, seed: int | jax.Array, num_chains: int, num_draws: int
) -> np.ndarray:
    """θ given φ̂ (chain, draw, task, coef); made when read, since many never ask."""
    # the numbers of a key's data, which an integer is made into
    rng = np.random.default_rng(np.asarray(jax.random.key_data(as_key(seed))))
    drawn = training.draw(rng, num_chains * num_draws)
    return drawn.reshape(num_chains, num_draws, *training.mean.shape)


def _mixed_draws(
    adaptation: ScaleMixture, model: HierarchicalModel, tasks: Tasks, phi: dict[str, np.ndarray],
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
