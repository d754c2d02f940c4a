r"""MAML: φ is where K gradient steps on some rows predict the other rows best.

.. math:: \varphi^* = \arg\max_\varphi \sum_j
    \log p\!\left(D_j^{\text{query}} \mid \theta_j^K(D_j^{\text{support}}, \varphi)\right)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Unpack

import jax
import numpy as np

from hierbayes.adaptation import GradientSteps
from hierbayes.adaptation.gradient import Derivative
from hierbayes.adaptation.step_length import bounded, curvatures
from hierbayes.errors import InputError
from hierbayes.fit import Fit
from hierbayes.fit.outward import Entered, enter_or_stay
from hierbayes.meta.all_at_once import AllAtOnce
from hierbayes.meta.inner_loop import check_counts, check_steps
from hierbayes.meta.learner import Learner
from hierbayes.meta.outer_loop import OuterLoop, parted
from hierbayes.meta.sources import Extra, Found, Source
from hierbayes.model import HierarchicalModel
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
        ``checkpoint``; see :class:`~hierbayes.meta.outer_loop.OuterLoop`.

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
    run, more = parted(outer_loop, Maml)
    method = Maml(
        num_steps, step_size, learn_step_size=learn_step_size, loss=loss, derivative=derivative,
        inner_optimiser=inner_optimiser, query=query, num_splits=num_splits, sigma=sigma,
        optimiser=optimiser, num_meta_steps=num_meta_steps, **more,
    )  # fmt: skip
    return method(model, tasks, seed, progress=progress, **run)


@dataclass(frozen=True)
class Maml(Learner):
    """MAML with these settings; :func:`maml` says what they are."""

    num_steps: int = 5
    step_size: float | Literal["auto"] = "auto"
    learn_step_size: bool | Literal["coef"] = field(default=False, kw_only=True)
    loss: Literal["sum", "mean"] | None = field(default=None, kw_only=True)
    derivative: Derivative = field(default="unrolled", kw_only=True)
    inner_optimiser: optax.GradientTransformation | None = field(default=None, kw_only=True)
    num_splits: int = field(default=1, kw_only=True)
    sigma: float | None = field(default=None, kw_only=True)

    name = "MAML"
    command = "maml"
    colour, marker, rank = "#D55E00", "D", 0.1
    compared = True
    no_evidence = (
        "MAML maximises the predictive evidence of query rows, in info['query_log_density'] or "
        "info['history'], not log p(D | φ)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.derivative, str) and self.derivative == "implicit":
            raise InputError(
                'derivative="implicit" is that of a maximum, which K steps on the likelihood alone '
                "do not stand for: use hb.imaml"
            )
        check_steps(
            self.num_steps, self.step_size, self.loss, self.derivative, self.inner_optimiser,
            self.learn_step_size,
        )  # fmt: skip
        check_counts(num_splits=self.num_splits)

    def enter(self, model: HierarchicalModel, tasks: Tasks) -> Entered:
        """Scaled columns, but for a step size of the user's, which is one in the user's."""
        stay = self.step_size != "auto" or self.inner_optimiser is not None
        return enter_or_stay(model, tasks, stay=stay)

    def learn(self, source: Source) -> Fit:
        """φ from which K steps on the support rows predict the query rows best."""
        noise, loss = source.noise(self.sigma), self.loss or source.loss
        eta = source.step_size(self.step_size, noise, loss)
        plain = self.inner_optimiser is None
        fixed = eta if plain and not self.learn_step_size else None
        steps = GradientSteps(self.num_steps, fixed, loss, self.inner_optimiser, self.derivative)
        extras = _learned_steps(source, noise, loss, eta, self.learn_step_size)
        described = {
            "num_steps": self.num_steps, "step_size": eta if plain else None, "loss": loss,
            "derivative": self.derivative, "learn_step_size": self.learn_step_size,
            "sigma": self.sigma,
        }  # fmt: skip
        found = source.maximise(steps, noise, described, extras)
        if isinstance(source, AllAtOnce):
            found = _judged(source, steps, noise, found, eta, self.learn_step_size)
            described["step_size"] = _chosen(found.phi, eta) if plain else None
        return source.fit(steps, found, described)


def _learned_steps(
    source: Source, noise: dict[str, Any], loss: str, eta: float, learn: bool | str
) -> tuple[Extra, ...]:
    """The step size as a part of φ: up to 1/λ_max where that is known."""
    if not learn:
        return ()
    if not isinstance(source, AllAtOnce):
        return (Extra("step_size", eta, learn == "coef"),)
    top = max(source.longest(noise, loss), eta)
    return (Extra("step_size", min(eta, 0.9 * top), learn == "coef", top),)


def _chosen(phi: dict[str, Any], eta: float) -> Any:
    chosen = phi.get("step_size", eta)
    return float(chosen) if np.ndim(chosen) == 0 else chosen


def _judged(
    source: AllAtOnce, steps: GradientSteps, noise: dict[str, Any], found: Found, eta: float,
    learn: bool | str,
) -> Found:  # fmt: skip
    """With what is to be said of the steps, and what tasks conclude where that is looked at."""
    model, tasks, remarks, training = source.model, source.tasks, found.warnings, None
    if steps.optimiser is not None:
        return found._replace(more=None)
    longest, chosen = source.longest(noise, steps.loss), _chosen(found.phi, eta)
    if not bounded(model, tasks, noise):
        training = steps(model, tasks, found.phi)
        remarks = [*remarks, *training.remarks]
    if learn and np.max(chosen) < NEGLIGIBLE * longest:
        remarks = [*remarks, _unmoved(float(np.max(chosen)), longest)]
    elif np.ndim(chosen) == 0:
        supports = [support for support, _ in source.splits()]
        given = (float(chosen), longest, steps.num_steps, supports, found.phi, steps.loss)
        remarks = [*remarks, *_remarks(model, *given)]
    return found._replace(warnings=remarks, more=training)


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
