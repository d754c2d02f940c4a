r"""iMAML: φ is where the MAP estimates from some rows predict the other rows best.

.. math:: \varphi^* = \arg\max_\varphi \sum_j
    \log p\!\left(D_j^{\text{query}} \mid \theta_j^*(D_j^{\text{support}}, \varphi)\right)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Unpack

import jax
import numpy as np

from hierbayes import inputs
from hierbayes.adaptation import GradientSteps, Proximal
from hierbayes.adaptation.gradient import Derivative
from hierbayes.errors import InputError, listing
from hierbayes.fit import Fit
from hierbayes.fit.outward import Entered, as_given, enter
from hierbayes.meta.all_at_once import AllAtOnce
from hierbayes.meta.inner_loop import check_counts, check_steps
from hierbayes.meta.learner import Learner
from hierbayes.meta.outer_loop import OuterLoop, parted
from hierbayes.meta.sources import Extra, Source
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Tasks

if TYPE_CHECKING:
    import optax


def imaml(
    model: HierarchicalModel,
    tasks: Any,
    *,
    prior_precision: float | Sequence[float] | Literal["learn"] = "learn",
    num_steps: int | None = None,
    step_size: float | None = None,
    loss: Literal["sum", "mean"] | None = None,
    derivative: Derivative | None = None,
    inner_optimiser: optax.GradientTransformation | None = None,
    query: float = 0.5,
    num_splits: int = 1,
    sigma: float | None = None,
    optimiser: optax.GradientTransformation | None = None,
    num_meta_steps: int | None = None,
    seed: int | jax.Array = 0,
    progress: bool | None = None,
    **outer_loop: Unpack[OuterLoop],
) -> Fit:
    r"""Meta-learning with implicit gradients: MAP estimates under one shared prior.

    .. math::

        \theta_j^*(D, \varphi) = \arg\max_\theta \left[\log p(D \mid \theta, \beta, \sigma)
            - \tfrac12 \sum_c \lambda_c (\theta_c - \mu_c - \Gamma_c w_j)^2\right], \quad
        \max_{\mu, \Gamma, \lambda, \beta, \sigma_q} \sum_j
            \log p(D_j^{\text{query}} \mid \theta_j^*(D_j^{\text{support}}, \varphi), \beta,
            \sigma_q)

    The inner problem is exactly the MAP estimate under N(μ + Γ w_j, diag(1/λ)), the same prior for
    every task, whatever its rows. The outer gradient goes through the solution by the implicit
    function theorem, and no path to it is kept.

    Parameters
    ----------
    model : HierarchicalModel
    tasks : Tasks, DataFrame or Episodes
    num_steps, step_size, loss, derivative, inner_optimiser
        On episodes, where the maximum is approached by K = 16 gradient steps of 0.01 on the mean
        log posterior unless said otherwise; see :func:`maml`. ``derivative`` "implicit" by default:
        conjugate gradients at the point reached, until 1e-5 (float64: 1e-10) of their system is
        left, which keep no step. They stop at a direction that bends upwards: there is no maximum.
        What is left of the slope and of the system on held-out tasks is in ``info["history"]``
        as ``inner_residual``, ``gradient_residual`` and ``not_a_maximum``, and warned of. On a
        fixed set of tasks the maximum is found by Newton's method and these are refused.
    prior_precision : float, sequence by coefficient, or "learn"
        λ > 0, one for all coefficients or one each, in units of 1/θ²: the log likelihood is summed
        over a task's rows. "learn" learns log λ, a number a coefficient; on episodes one for all.
        Numbers are those of the user's columns; what is learned is the precision in columns that
        are centred and scaled, so that in the user's the prior is correlated too (``corr``).
    query : float
        Share of each task's rows in the query part; a one-row task is query-only.
    num_splits : int
        Random support/query splits over which the evidence is summed.
    sigma : float, optional
        Within-task noise σ; by default the pooled within-task estimate. It is not learned:
        ``sigma_query``, the plug-in predictive deviation of the query rows, is, and absorbs the
        posterior variance of θ_j; so are the parameters of other families, see :func:`maml`.
    optimiser : optax.GradientTransformation, optional
        Of the outer loop; L-BFGS by default, which converges on these smooth problems, and Adam of
        rate 0.001 on episodes.
    num_meta_steps : int
        Outer steps at most; 500 by default, 10,000 on episodes.
    seed : int or JAX key
        For the splits; on episodes for weights and tasks.
    progress : bool, optional
        Show a progress bar; by default where stderr is a terminal.
    **outer_loop
        On episodes; see :class:`~hierbayes.meta.outer_loop.OuterLoop`.

    Returns
    -------
    Fit
        ``phi`` holds ``mu``, ``tau`` = 1/√λ, ``beta``, ``gamma``, ``sigma``, ``sigma_query``, so
        that ``fit.prior`` exists. ``theta`` are the MAP estimates from **all** rows of a task.

    Raises
    ------
    InputError
        A precision that is not positive, a single task, or no task with both parts.

    References
    ----------
    Rajeswaran, Finn, Kakade and Levine (2019), Meta-learning with implicit gradients, NeurIPS,
    equations 3 and 4.

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula(
    ...     "log_radon ~ 1 + floor + (1 | county)", hb.datasets.radon()
    ... )
    >>> fit = hb.imaml(model, tasks, prior_precision=10.0)
    >>> sorted(fit.phi)
    ['beta', 'mu', 'sigma', 'sigma_query', 'tau']
    >>> print(round(float(fit.prior.variance[0]), 6))
    0.1
    """
    run, more = parted(outer_loop, Imaml)
    method = Imaml(
        prior_precision=prior_precision, num_steps=num_steps, step_size=step_size, loss=loss,
        derivative=derivative, inner_optimiser=inner_optimiser, query=query, num_splits=num_splits,
        sigma=sigma, optimiser=optimiser, num_meta_steps=num_meta_steps, **more,
    )  # fmt: skip
    return method(model, tasks, seed, progress=progress, **run)


@dataclass(frozen=True, kw_only=True)
class Imaml(Learner):
    """iMAML with these settings; :func:`imaml` says what they are."""

    prior_precision: float | Sequence[float] | Literal["learn"] = "learn"
    num_steps: int | None = None
    step_size: float | None = None
    loss: Literal["sum", "mean"] | None = None
    derivative: Derivative | None = None
    inner_optimiser: optax.GradientTransformation | None = None
    num_splits: int = 1
    sigma: float | None = None

    name = "iMAML"
    command = "imaml"
    colour, marker, rank = "#CC79A7", "P", 0.3
    idle = ("num_steps", "step_size", "loss", "derivative", "inner_optimiser")
    no_evidence = (
        "iMAML maximises the predictive evidence of query rows, in info['query_log_density'] or "
        "info['history'], not log p(D | φ)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(num_splits=self.num_splits)
        given: Any = self.prior_precision
        if isinstance(given, (list, np.ndarray)):  # a value that can be compared and hashed
            object.__setattr__(self, "prior_precision", _hashable(np.asarray(given).tolist()))

    def check(self, model: HierarchicalModel) -> None:
        """Refuse priors under which the inner problem is another."""
        model.require_gaussian_prior(
            "iMAML", "its inner problem is a MAP estimate under N(φ, I/λ)",
            "use empirical_bayes or full_bayes, or priors.Gaussian()",
        )  # fmt: skip

    def enter(self, model: HierarchicalModel, tasks: Tasks) -> Entered:
        """Numbers are precisions in the user's columns; what is learned is one in scaled ones."""
        learn = _given(self.prior_precision, tasks) is None
        return enter(model, tasks, "prior") if learn else as_given(model, tasks)

    def learn(self, source: Source) -> Fit:
        """Through the maximum of each task's log posterior, or through steps towards it."""
        return self._by_maxima(source) if isinstance(source, AllAtOnce) else self._by_steps(source)

    def _by_maxima(self, source: AllAtOnce) -> Fit:
        """The maximum of each task's log posterior by Newton's method."""
        model, tasks, adaptation = source.model, source.tasks, Proximal()
        precision, noise = _given(self.prior_precision, tasks), source.noise(self.sigma)
        units, extras = model.scales(tasks).coef, ()
        if precision is None:  # its logarithm is learned
            extras = (Extra("tau", STARTING_TAU * units, each=True, unit=0.5),)
        else:
            noise = noise | {"tau": 1 / np.sqrt(precision)}
        found = source.maximise(adaptation, noise, {}, extras)
        training = adaptation(model, tasks, found.phi)
        remarks = [*found.warnings, *training.remarks]
        if not model.likelihood.gaussian_in_theta:  # the maxima that φ was learned through
            through = adaptation(model, found.more, found.phi).remarks
            remarks += [f"of the support rows: {said}" for said in through]
        if precision is None:
            remarks += _extremes(tasks, found.phi["tau"] / units)
        described = {
            "prior_precision": "learn" if precision is None else precision.tolist(),
            "sigma": self.sigma,
        }  # fmt: skip
        return source.fit(adaptation, found._replace(warnings=remarks, more=training), described)

    def _by_steps(self, source: Source) -> Fit:
        """K steps on the log posterior under N(φ, I/λ), and the derivative of its maximum."""
        num_steps = PROXIMAL_STEPS if self.num_steps is None else self.num_steps
        derivative, optimiser = self.derivative or "implicit", self.inner_optimiser
        asked = "auto" if self.step_size is None else self.step_size
        check_steps(num_steps, asked, self.loss, derivative, optimiser)
        noise, extras, tau = source.noise(self.sigma), (Extra("tau", STARTING_TAU),), "learn"
        if not (isinstance(self.prior_precision, str) and self.prior_precision == "learn"):
            name = (
                'prior_precision on episodes must be "learn", or one number for all weights, which'
            )
            tau = float(inputs.positive(name, self.prior_precision)) ** -0.5
            noise, extras = noise | {"tau": np.asarray(tau)}, ()
        loss = self.loss or source.loss
        eta = source.step_size(asked, noise, loss)
        fixed = eta if optimiser is None else None
        steps = GradientSteps(num_steps, fixed, loss, optimiser, derivative, proximal=True)
        described = {
            "num_steps": num_steps, "step_size": eta, "loss": loss, "derivative": derivative,
            "sigma": self.sigma, "tau": tau,
        }  # fmt: skip
        found = source.maximise(steps, noise, described, extras)
        if derivative == "implicit":
            found = found._replace(warnings=[*found.warnings, *_unsolved(steps, found.info)])
        return source.fit(steps, found, described)


SOLVED, SOLVED_SLOPE = 1e-2, 1e-3
"""Of the inner problem's slope, and of the right-hand side of the gradient's system: what may be
left for the gradient to be right to about as much."""


def _unsolved(adaptation: GradientSteps, last: dict[str, float]) -> list[str]:
    """What to say where the implicit gradient is not that of a maximum, from held-out tasks."""
    said = []
    if not last["inner_residual"] <= SOLVED:
        said.append(
            f"iMAML: {adaptation.num_steps} inner steps do not reach the maximum whose "
            f"derivative the outer loop takes: up to {last['inner_residual']:.2g} of the slope at "
            f"phi is left at theta in held-out tasks, {SOLVED:g} being little. Take more "
            'or longer steps, a larger prior_precision, or derivative="unrolled", that of the steps'
        )
    if last["not_a_maximum"] > 0:
        said.append(
            f"iMAML: in {100 * last['not_a_maximum']:.2g} % of held-out tasks the log posterior "
            "bends upwards somewhere at theta, which is no maximum there and has no implicit "
            "gradient: conjugate gradients stop at that direction, and a share of up to "
            f"{last['gradient_residual']:.2g} of their system is left. Take a larger "
            'prior_precision or more steps, or derivative="unrolled"'
        )
    elif not last["gradient_residual"] <= SOLVED_SLOPE:
        said.append(
            f"iMAML: conjugate gradients for the implicit gradient have not converged: a share "
            f"of up to {last['gradient_residual']:.2g} of their system is left in held-out tasks. "
            'Take a larger prior_precision, or dtype="float64" in the likelihood'
        )
    return said


def _hashable(given: Any) -> Any:
    return tuple(_hashable(one) for one in given) if isinstance(given, list) else given


PROXIMAL_STEPS = 16
"""Inner steps where none are given: as many as in the paper's Omniglot experiments."""

STARTING_TAU = 0.3
"""Where the learned 1/√λ starts, in units of each coefficient's own scale."""

NARROW, WIDE = 1e-3, 1e2
"""1/√λ in the same units beyond which a learned prior is as good as a point, or flat."""


def _given(prior_precision: Any, tasks: Tasks) -> np.ndarray | None:
    """λ by coefficient (d,), or None where it is to be learned."""
    if isinstance(prior_precision, str) and prior_precision == "learn":
        return None
    d = len(tasks.coef)
    try:
        values = np.asarray(inputs.real_array(prior_precision), dtype=float)
    except (TypeError, ValueError, OverflowError):
        values = np.asarray(np.nan)
    if values.shape not in ((), (d,)) or not (np.isfinite(values) & (values > 0)).all():
        raise InputError(
            f'prior_precision must be "learn", a positive number, or {d} of them, one for each of '
            f"{listing(tasks.coef)}; found {inputs.shown(prior_precision)}"
        )
    return np.broadcast_to(values, d)


def _extremes(tasks: Tasks, relative: np.ndarray) -> list[str]:
    """What to say where the learned prior has no width, or no end."""
    remarks = []
    for bad, what in (
        (relative < NARROW, "next to no width: the tasks are taken to be identical there"),
        (relative > WIDE, "no end: the tasks are taken to share nothing there"),
    ):
        if bad.any():
            named = listing([c for c, b in zip(tasks.coef, bad, strict=True) if b])
            remarks.append(f"the learned prior of {named} has {what}")
    return remarks
