r"""MAML: φ is where K gradient steps on some rows predict the other rows best.

.. math:: \varphi^* = \arg\max_\varphi \sum_j
    \log p\!\left(D_j^{\text{query}} \mid \theta_j^K(D_j^{\text{support}}, \varphi)\right)
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from hierbayes import inputs
from hierbayes.adaptation import GradientSteps
from hierbayes.adaptation.base import step_sizes
from hierbayes.adaptation.gradient import Derivative
from hierbayes.adaptation.step_length import (
    bounded,
    check_step_size,
    curvatures,
    largest_curvature,
)
from hierbayes.errors import InputError, announce
from hierbayes.evidence import Predictive
from hierbayes.fit import Fit
from hierbayes.fit.outward import enter_or_stay
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
    support_query_splits,
)
from hierbayes.meta.maml_on_episodes import maximise_predictive
from hierbayes.meta.training import OuterLoop
from hierbayes.model import HierarchicalModel, check_model
from hierbayes.numerics import float64, to_numpy
from hierbayes.phi import Space
from hierbayes.tasks import Tasks

if TYPE_CHECKING:
    import optax


def maml(
    model: HierarchicalModel,
    tasks: Any,
    num_steps: int = 5,
    step_size: float | Literal["auto"] = "auto",
    *,
    learn_step_size: bool | Literal["coef"] = False,
    loss: Literal["sum", "mean"] | None = None,
    derivative: Derivative = "unrolled",
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
    r"""Model-agnostic meta-learning, second order.

    .. math::

        \theta_j^0 = \mu + \Gamma w_j, \quad
        \theta_j^{k+1} = \theta_j^k
            + \eta \nabla \log p(D_j^{\text{support}} \mid \theta_j^k, \beta, \sigma), \quad
        \max_{\mu, \Gamma, \beta, \sigma_q} \sum_j
            \log p(D_j^{\text{query}} \mid \theta_j^K, \beta, \sigma_q)

    Parameters
    ----------
    model : HierarchicalModel
    tasks : Tasks, DataFrame or Episodes
        A fixed set of tasks, fitted all at once; or a source, or tasks of a network, from which
        batches are drawn.
    num_steps : int
        K, inner gradient steps.
    step_size : float or "auto"
        η in units of the **sum** of the log likelihood over a task's rows. A number is one in the
        user's columns. "auto" takes the steps in columns that are centred and scaled to unit
        standard deviation, and carries φ and θ back: there it is 1/λ_max over all tasks, with λ_max
        the largest curvature from all of a task's rows (Bernoulli, binomial and Student-t: the
        largest that any θ can give). Beyond 2/λ_max the steps can diverge, which is refused. On a
        log scale (Poisson, negative binomial, gamma) curvature has no bound: there λ_max takes of
        each row the largest between the overall level, where φ starts, and the row's own outcome;
        it stays that number throughout training, nothing is refused by it, and tasks whose log
        likelihood falls along the steps from φ are named in ``warnings``, here and in ``adapt``. On
        episodes in units of ``loss``; "auto" is 0.01 there, and no bound is known.
    learn_step_size : bool or "coef"
        Learn η too, in the same columns, within (0, 1/λ_max), where the steps are a MAP estimate
        for every K; "coef": one for each coefficient, which is Meta-SGD. On episodes log η is
        learned, without bounds.
    loss : "sum" or "mean"
        What the inner steps climb: a task's summed log likelihood, or its mean over the rows, as
        most MAML code does; "sum" by default, "mean" on episodes.
    derivative : "unrolled", "rematerialised" or "first-order"
        How θ_K depends on φ: through all steps, which are kept; the same with √K of them kept and
        the others computed again; or as if slopes did not depend on φ (first-order MAML).
    inner_optimiser : optax.GradientTransformation, optional
        In the place of plain gradient steps, run for each task by itself. Adam and its like have
        no derivative where a weight's slope is exactly zero, as under a ReLU that is off: give
        them a positive ``eps_root``, as in ``optax.adam(0.01, eps_root=1e-8)``.
    query : float
        Share of each task's rows in the query part; a one-row task is query-only.
    num_splits : int
        Random support/query splits over which the evidence is summed.
    sigma : float, optional
        Within-task noise σ, which sets the units of the inner loop; by default the pooled
        within-task estimate. It is not learned: ``sigma_query``, the plug-in predictive
        deviation of the query rows, is, and absorbs the posterior variance of θ_j. So are
        ``concentration`` and ``shape`` of other families, beside ``concentration_query`` and
        ``shape_query``; ``df`` serves both. A likelihood without parameters of its own (Bernoulli,
        binomial, Poisson) has neither. On episodes √½ by default, at which the mean negative log
        likelihood is the mean squared error.
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
        On episodes: ``batch_size``, ``held_out``, ``evaluate_every``, ``patience`` and
        ``checkpoint``; see :class:`~hierbayes.meta.training.OuterLoop`.

    Returns
    -------
    Fit
        ``phi`` holds ``mu``, ``beta``, ``gamma``, ``sigma``, ``sigma_query`` and, when learned,
        ``step_size``. ``theta`` are K steps from φ on **all** rows of a task. Steps of size η in
        scaled columns are steps η B ∇ log p(D_j | θ) in the user's, with B in
        ``info["preconditioner"]`` (d, d), the step sizes of single coefficients included.

    Raises
    ------
    InputError
        A step size beyond 2/λ_max (naming the task), a single task, or no task with both parts.

    References
    ----------
    Finn, Abbeel and Levine (2017), Model-agnostic meta-learning, ICML, equation 1.

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula(
    ...     "log_radon ~ 1 + floor + (1 + floor | county)", hb.datasets.radon()
    ... )
    >>> sorted(hb.maml(model, tasks, num_steps=5).phi)
    ['mu', 'sigma', 'sigma_query']
    """
    started = time.perf_counter()
    check_model(model)
    seed, progress = inputs.seed(seed), inputs.optional_flag("progress", progress)
    query = inputs.share("query", query)
    if isinstance(derivative, str) and derivative == "implicit":
        raise InputError(
            'derivative="implicit" is that of a maximum, which K steps on the likelihood alone do '
            "not stand for: use hb.imaml"
        )
    check_steps(num_steps, step_size, loss, derivative, inner_optimiser, learn_step_size)
    check_counts(num_splits=num_splits)
    if on_episodes(model, tasks):
        refuse_splits(num_splits, "MAML")
        outer = dict(
            optimiser=optimiser, num_meta_steps=num_meta_steps, seed=seed, progress=progress
        )
        eta = PLAIN_STEP if step_size == "auto" else float(step_size)
        fixed = None if learn_step_size or inner_optimiser is not None else eta
        steps = GradientSteps(num_steps, fixed, loss or "mean", inner_optimiser, derivative)
        return maximise_predictive(
            "MAML", model, tasks, steps, step_size=None if inner_optimiser is not None else eta,
            learn_step_size=learn_step_size, query=query, sigma=sigma,
            training={**outer_loop, **outer},
        )  # fmt: skip
    refuse_idle(outer_loop, "MAML")
    num_meta_steps = 500 if num_meta_steps is None else num_meta_steps
    tasks = model.tasks(tasks)
    check_counts(num_meta_steps=num_meta_steps)
    check_optimiser(optimiser)
    model.check(tasks, learns_prior=True)
    entered = enter_or_stay(model, tasks, stay=step_size != "auto" or inner_optimiser is not None)
    resolved, tasks = entered.inner_model, entered.inner_tasks
    noise = inner_noise(resolved, tasks, sigma)
    loss = loss or "sum"
    longest = 1.0 / float(largest_curvature(resolved, tasks, noise, loss).max())
    eta = longest if step_size == "auto" else float(step_size)
    check_step_size(eta, resolved, tasks, noise, loss)
    free = not bounded(resolved, tasks, noise)
    splits = support_query_splits(tasks, query, num_splits, seed, "MAML")
    fixed = None if learn_step_size or inner_optimiser is not None else eta
    adaptation = GradientSteps(num_steps, fixed, loss, inner_optimiser, derivative)
    with float64():
        space = outer_space(resolved, tasks, noise)
        if learn_step_size:
            top = max(longest, eta)
            space += Space.of(
                [step_sizes((len(tasks.coef),) if learn_step_size == "coef" else ())],
                beliefs={"step_size": dist.Uniform(0.0, top)},
                starts={"step_size": min(eta, 0.9 * top)},
            )
        start = space.x({"mu": resolved.scales(tasks).mu_location})

        support, asked = (side_by_side(parts) for parts in zip(*splits, strict=True))
        how, given = adaptation.for_programs(noise)
        evidence = Predictive(how)
        learned, plain = Learned(space, given), resolved.without_encoder()
        data = (learned, *evidence.arrange(plain, support, asked), float(asked.num_rows))
        objective = Predicted(evidence, plain)
        best = maximise(objective, start, optimiser, num_meta_steps, progress, "MAML", data)
        phi = to_numpy(dict(noise) | space.phi(jnp.asarray(best.x)))
    chosen: Any = phi.get("step_size", eta) if inner_optimiser is None else None
    if chosen is not None and np.ndim(chosen) == 0:
        chosen = float(chosen)
    remarks = best.warnings
    training = None
    if free and inner_optimiser is None:
        training = adaptation(resolved, tasks, phi)
        remarks = [*remarks, *training.remarks]
    if learn_step_size and chosen is not None and np.max(chosen) < NEGLIGIBLE * longest:
        remarks = [*remarks, _unmoved(float(np.max(chosen)), longest)]
    elif chosen is not None and np.ndim(chosen) == 0:
        supports = [support for support, _ in splits]
        remarks = remarks + _remarks(
            resolved, float(chosen), longest, num_steps, supports, phi, loss
        )
    fit = Fit(
        "MAML", resolved, tasks, phi, adaptation, training,
        no_evidence="MAML maximises the predictive evidence of the query rows, in "
        'info["query_log_density"], not log p(D | φ)',
        warnings=announce(remarks),
        info={
            "num_steps": num_steps, "step_size": chosen,
            "loss": loss, "derivative": derivative,
            "query_log_density": best.value * asked.num_rows / num_splits, "query": query,
            "num_splits": num_splits, "num_meta_steps": num_meta_steps, "sigma": sigma,
            "seed": seed,
            "seconds": time.perf_counter() - started,
        },
    )  # fmt: skip
    return entered.leave(fit)


NEGLIGIBLE = 1e-6
"""Share of 1/λ_max below which a learned step is taken as none."""

HARDLY_MATTERS = 0.1
"""Share of φ left in θ_K, in every task and direction, below which φ is hardly identified."""


def _unmoved(step_size: float, longest: float) -> str:
    """What to say of a learned step that is none."""
    return (
        f"the learned step size is {step_size:.1g} at most, next to nothing beside 1/λ_max = "
        f"{longest:.3g}: the tasks are not adapted at all, and theta is phi in each. A task's own "
        "rows did not help to predict its others, as with tasks that are all alike; "
        "complete_pooling says so without steps"
    )


def _remarks(
    model: HierarchicalModel,
    step_size: float,
    longest: float,
    num_steps: int,
    supports: list[Tasks],
    phi: dict[str, Any],
    loss: str,
) -> list[str]:
    """What to say of the steps chosen: too long for a prior, or so many that φ is forgotten."""
    remarks = []
    exact = model.likelihood.gaussian_in_theta
    if step_size > longest * (1 + 1e-9):
        remarks.append(
            f"step_size={step_size:.3g} is longer than 1/λ_max = {longest:.3g}: gradient steps "
            f"{'' if exact else 'may '}overshoot in some tasks, and for odd num_steps no Gaussian "
            "prior makes them a MAP estimate"
        )
    if not exact:  # a bound on the curvature does not tell how much of φ is left
        return remarks
    left = max(
        float(
            np.abs(1 - step_size * curvatures(model, s, phi, loss)[s.sizes > 0]).max(initial=0)
            ** num_steps
        )
        for s in supports
    )
    if left < HARDLY_MATTERS and all((s.sizes > 0).all() for s in supports):
        remarks.append(
            f"{num_steps} steps of {step_size:.3g} reach the least squares of every task (at most "
            f"{left:.1%} of phi is left in theta): phi hardly matters and is hardly determined. "
            "Take fewer or shorter steps"
        )
    return remarks
