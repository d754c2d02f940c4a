r"""iMAML: φ is where the MAP estimates from some rows predict the other rows best.

.. math:: \varphi^* = \arg\max_\varphi \sum_j
    \log p\!\left(D_j^{\text{query}} \mid \theta_j^*(D_j^{\text{support}}, \varphi)\right)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes import inputs
from hierbayes.adaptation import GradientSteps, Proximal
from hierbayes.adaptation.gradient import Derivative
from hierbayes.errors import InputError, announce, listing
from hierbayes.evidence import Predictive
from hierbayes.fit import Fit
from hierbayes.fit.outward import as_given, enter
from hierbayes.meta.ascent import maximise
from hierbayes.meta.episodic import PLAIN_STEP, on_episodes
from hierbayes.meta.inner_loop import (
    Learned,
    Predicted,
    check_counts,
    check_optimiser,
    check_steps,
    inner_noise,
    outer_space,
    refuse_idle,
    refuse_splits,
    side_by_side,
    step_or,
    support_query_splits,
)
from hierbayes.meta.maml_on_episodes import maximise_predictive
from hierbayes.meta.training import OuterLoop
from hierbayes.model import HierarchicalModel, check_model
from hierbayes.numerics import float64, to_numpy
from hierbayes.phi import Part, Space
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
        On episodes; see :class:`~hierbayes.meta.training.OuterLoop`.

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
    started = time.perf_counter()
    check_model(model)
    seed, progress = inputs.seed(seed), inputs.optional_flag("progress", progress)
    query = inputs.share("query", query)
    model.require_gaussian_prior(
        "iMAML", "its inner problem is a MAP estimate under N(φ, I/λ)",
        "use empirical_bayes or full_bayes, or priors.Gaussian()",
    )  # fmt: skip
    inner: dict[str, Any] = dict(
        num_steps=num_steps, step_size=step_size, loss=loss, derivative=derivative,
        inner_optimiser=inner_optimiser,
    )  # fmt: skip
    if on_episodes(model, tasks):
        refuse_splits(num_splits, "iMAML")
        outer = dict(
            optimiser=optimiser, num_meta_steps=num_meta_steps, seed=seed, progress=progress
        )
        training = {**outer_loop, **outer}
        return _on_episodes(model, tasks, prior_precision, query, sigma, training, **inner)
    refuse_idle({**outer_loop, **inner}, "iMAML")
    num_meta_steps = 500 if num_meta_steps is None else num_meta_steps
    tasks = model.tasks(tasks)
    check_counts(num_splits=num_splits, num_meta_steps=num_meta_steps)
    check_optimiser(optimiser)
    model.check(tasks, learns_prior=True)
    given = _given(prior_precision, tasks)
    entered = enter(model, tasks, "prior") if given is None else as_given(model, tasks)
    resolved, tasks = entered.inner_model, entered.inner_tasks
    units = resolved.scales(tasks).coef
    fixed = inner_noise(resolved, tasks, sigma)
    splits = support_query_splits(tasks, query, num_splits, seed, "iMAML")
    adaptation = Proximal()
    evidence = Predictive(adaptation)
    with float64():
        space = outer_space(resolved, tasks, fixed)
        if given is None:  # x is the log of the precision, up to its sign
            space += Space.of(
                [Part("tau", ("coef",), units.shape, "positive")],
                units={"tau": 0.5}, starts={"tau": STARTING_TAU * units},
            )  # fmt: skip
        else:
            fixed = fixed | {"tau": 1 / np.sqrt(given)}
        start = space.x({"mu": resolved.scales(tasks).mu_location})

        support, asked = (side_by_side(parts) for parts in zip(*splits, strict=True))
        learned, plain = Learned(space, fixed), resolved.without_encoder()
        data = (learned, *evidence.arrange(plain, support, asked), float(asked.num_rows))
        objective = Predicted(evidence, plain)
        best = maximise(objective, start, optimiser, num_meta_steps, progress, "iMAML", data)
        phi = to_numpy(learned.phi(jnp.asarray(best.x)))
    adapted = adaptation(resolved, tasks, phi)
    remarks = [*best.warnings, *adapted.remarks]
    if not resolved.likelihood.gaussian_in_theta:  # the maxima that phi was learned through
        through = adaptation(resolved, support, phi).remarks
        remarks += [f"of the support rows: {said}" for said in through]
    if given is None:
        remarks += _extremes(tasks, phi["tau"] / units)
    fit = Fit(
        "iMAML", resolved, tasks, phi, adaptation, adapted,
        no_evidence="iMAML maximises the predictive evidence of the query rows, in "
        'info["query_log_density"], not log p(D | φ)',
        warnings=announce(remarks),
        info={
            "prior_precision": "learn" if given is None else given.tolist(),
            "query_log_density": best.value * asked.num_rows / num_splits, "query": query,
            "num_splits": num_splits, "num_meta_steps": num_meta_steps, "sigma": sigma,
            "seed": seed,
            "seconds": time.perf_counter() - started,
        },
    )  # fmt: skip
    return entered.leave(fit)


def _on_episodes(
    model: HierarchicalModel,
    tasks: Any,
    prior_precision: Any,
    query: float,
    sigma: float | None,
    training: Any,
    *,
    num_steps: int | None,
    step_size: float | None,
    loss: Any,
    derivative: Any,
    inner_optimiser: Any,
) -> Fit:
    """K steps on the log posterior under N(φ, I/λ), and the derivative of its maximum."""
    num_steps = PROXIMAL_STEPS if num_steps is None else num_steps
    derivative = derivative or "implicit"
    given = "auto" if step_size is None else step_size
    check_steps(num_steps, given, loss, derivative, inner_optimiser)
    learn = isinstance(prior_precision, str) and prior_precision == "learn"
    if not learn:
        name = 'prior_precision on episodes must be "learn", or one number for all weights, which'
        prior_precision = inputs.positive(name, prior_precision)
    eta = step_or(step_size, PLAIN_STEP)
    steps = GradientSteps(
        num_steps, eta if inner_optimiser is None else None, loss or "mean", inner_optimiser,
        derivative, proximal=True,
    )  # fmt: skip
    return maximise_predictive(
        "iMAML", model, tasks, steps, step_size=eta, learn_step_size=False, query=query,
        sigma=sigma, tau="learn" if learn else float(prior_precision) ** -0.5, training=training,
    )  # fmt: skip


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
