r"""Reptile: φ is where the tasks, after K gradient steps, pull it nowhere.

.. math:: \varphi \leftarrow \varphi + \epsilon\, \frac1J \sum_j
          \left(\theta_j^K(\varphi) - \varphi\right)
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes import inputs
from hierbayes.adaptation import GradientSteps
from hierbayes.adaptation.step_length import (
    bounded,
    check_step_size,
    largest_curvature,
    row_curvature,
)
from hierbayes.errors import announce
from hierbayes.evidence import Predictive
from hierbayes.fit import Fit
from hierbayes.fit.outward import enter_or_stay
from hierbayes.meta.ascent import maximise
from hierbayes.meta.episodic import PLAIN_STEP, on_episodes
from hierbayes.meta.fixed_point import follow
from hierbayes.meta.inner_loop import (
    Learned,
    Predicted,
    check_counts,
    check_optimiser,
    check_steps,
    inner_noise,
    outer_space,
    query_parameters,
    query_space,
    refuse_idle,
)
from hierbayes.meta.reptile_on_episodes import follow_moves
from hierbayes.meta.training import OuterLoop
from hierbayes.model import HierarchicalModel, check_model
from hierbayes.numerics import float64, to_numpy
from hierbayes.sharding import place
from hierbayes.tasks import Tasks
from hierbayes.tasks.layout import on_devices

if TYPE_CHECKING:
    import optax


def reptile(
    model: HierarchicalModel,
    tasks: Any,
    num_steps: int = 5,
    step_size: float | Literal["auto"] = "auto",
    *,
    loss: Literal["sum", "mean"] | None = None,
    inner_optimiser: optax.GradientTransformation | None = None,
    sigma: float | None = None,
    optimiser: optax.GradientTransformation | None = None,
    num_meta_steps: int | None = None,
    tolerance: float = 1e-10,
    query: float = 0.5,
    seed: int | jax.Array = 0,
    progress: bool | None = None,
    **outer_loop: Unpack[OuterLoop],
) -> Fit:
    r"""Reptile, full batch: φ moves to where tasks go from it, until they go nowhere on average.

    .. math::

        \theta_j^0 = \mu + \Gamma w_j, \qquad
        \theta_j^{k+1} = \theta_j^k + \eta \nabla \log p(D_j \mid \theta_j^k, \beta, \sigma),
        \qquad \Delta_\mu = \frac1J \sum_j (\theta_j^K - \theta_j^0)

    There is no objective, only this direction, and no split: all rows of a task are in its inner
    loop. With task predictors (Δ_μ, Δ_Γ) is the least-squares regression of the moves
    θ_j^K − θ_j^0 on (1, w_j), over the tasks with rows. The shared effects β stay as they are in
    the inner loop; their direction is the gradient of Σ_j log p(D_j | θ_j^K, β), multiplied by
    (Zᵀ C Z)⁻¹ with C the largest curvature that a row can have (1/σ² for Gaussian rows; on a log
    scale as for ``step_size``), so that a step of length one is as long as it may be. Where
    gradient steps are linear in φ the fixed point solves

    .. math:: \sum_j W_j (\hat\theta_j - \varphi) = 0, \qquad W_j = I - (I - \eta H_j)^K,

    a weighted mean of the tasks' own least squares: what K steps can reach counts.

    Parameters
    ----------
    model : HierarchicalModel
    tasks : Tasks, DataFrame or Episodes
    num_steps : int
        K, inner gradient steps.
    step_size : float or "auto"
        η in units of the **sum** of the log likelihood over a task's rows, in the user's columns;
        "auto" is 1/λ_max over all tasks in centred and scaled columns, see :func:`maml`. Beyond
        2/λ_max the steps diverge, which is refused; for families on a log scale see :func:`maml`.
    loss, inner_optimiser
        On episodes only; see :func:`maml`.
    sigma : float, optional
        Within-task noise σ, which sets the units of the inner loop; by default the pooled
        within-task estimate; so are the parameters of other families, see :func:`maml`.
    optimiser : optax.GradientTransformation, optional
        Given minus the direction, in scaled parameters, in the place of a gradient:
        ``optax.sgd(1.0)`` is Reptile with ε = 1. By default these steps of length one with
        Anderson's acceleration, which has the same fixed point and reaches it sooner: plain steps
        are slow where K steps hardly move a task. On episodes ``optax.sgd(0.1)``, in the weights'
        own units.
    num_meta_steps : int
        Outer steps at most; 1,000 by default, 10,000 on episodes.
    tolerance : float
        Norm of the direction, in scaled parameters, at which the iteration ends.
    query : float
        Share of each task's rows on which ``sigma_query`` is learned, φ being known by then: the
        plug-in predictive deviation of these rows after steps on the others.
    seed : int or JAX key
        For that split.
    progress : bool, optional
        Show a progress bar; by default where stderr is a terminal.
    **outer_loop
        On episodes; see :class:`~hierbayes.meta.training.OuterLoop`.

    Returns
    -------
    Fit
        ``phi`` holds ``mu``, ``beta``, ``gamma``, ``sigma`` and ``sigma_query``, the last where
        some task has two rows. ``theta`` are K steps from φ on all rows of a task.

    Raises
    ------
    InputError
        A step size beyond 2/λ_max (naming the task), or a single task.

    References
    ----------
    Nichol, Achiam and Schulman (2018), On first-order meta-learning algorithms, arXiv:1803.02999,
    algorithm 1.

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula(
    ...     "log_radon ~ 1 + floor + (1 + floor | county)", hb.datasets.radon()
    ... )
    >>> sorted(hb.reptile(model, tasks, num_steps=5).phi)
    ['mu', 'sigma', 'sigma_query']
    """
    started = time.perf_counter()
    check_model(model)
    seed, progress = inputs.seed(seed), inputs.optional_flag("progress", progress)
    query = inputs.share("query", query)
    tolerance = inputs.positive("tolerance", tolerance)
    check_steps(num_steps, step_size, loss, "first-order", inner_optimiser)
    if on_episodes(model, tasks):
        outer = dict(
            optimiser=optimiser, num_meta_steps=num_meta_steps, seed=seed, progress=progress
        )
        eta = PLAIN_STEP if step_size == "auto" else float(step_size)
        steps = GradientSteps(
            num_steps, eta if inner_optimiser is None else None, loss or "mean", inner_optimiser
        )
        return follow_moves(model, tasks, steps, eta, query, sigma, {**outer_loop, **outer})
    idle = {"loss": loss, "inner_optimiser": inner_optimiser}
    refuse_idle({**outer_loop, **idle}, "Reptile")
    num_meta_steps = 1000 if num_meta_steps is None else num_meta_steps
    tasks = model.tasks(tasks)
    check_counts(num_meta_steps=num_meta_steps)
    check_optimiser(optimiser)
    model.check(tasks, learns_prior=True)
    entered = enter_or_stay(model, tasks, stay=step_size != "auto")
    resolved, tasks = entered.inner_model, entered.inner_tasks
    fixed = inner_noise(resolved, tasks, sigma)
    longest = 1.0 / float(largest_curvature(resolved, tasks, fixed).max())
    eta = longest if step_size == "auto" else float(step_size)
    check_step_size(eta, resolved, tasks, fixed)
    adaptation = GradientSteps(num_steps, eta)
    with float64():
        space = outer_space(resolved, tasks, fixed, queries=False)
        start = space.x({"mu": resolved.scales(tasks).mu_location})
        how, given = adaptation.for_programs(fixed)
        learned, plain = Learned(space, given), resolved.without_encoder()
        level = float(resolved.likelihood.units(tasks)[0])
        found = follow(
            Pulled(how, plain), start, optimiser, num_meta_steps, tolerance, progress,
            "Reptile", (learned, level, *_data(resolved, tasks)),
        )  # fmt: skip
        phi = to_numpy(dict(fixed) | space.phi(jnp.asarray(found.x)))
    remarks = list(found.warnings)
    if eta > longest * (1 + 1e-9):
        remarks.append(
            f"step_size={eta:.3g} is longer than 1/λ_max = {longest:.3g}: gradient steps overshoot "
            "in some tasks, and for odd num_steps no Gaussian prior makes them a MAP estimate"
        )
    density, training = None, None
    if query_parameters(resolved, fixed):
        more, density, said = _query(resolved, tasks, adaptation, phi, fixed, query, seed)
        phi, remarks = phi | more, [*remarks, *said]
    if not bounded(resolved, tasks, fixed):
        training = adaptation(resolved, tasks, phi)
        remarks += training.remarks
    fit = Fit(
        "Reptile", resolved, tasks, phi, adaptation, training,
        no_evidence="Reptile follows a direction and maximises nothing",
        warnings=announce(remarks),
        info={
            "num_steps": num_steps, "step_size": eta, "query": query,
            "query_log_density": density, "num_meta_steps": num_meta_steps,
            "tolerance": tolerance, "sigma": sigma, "outer_steps": found.taken,
            "seed": seed, "seconds": time.perf_counter() - started,
        },
    )  # fmt: skip
    return entered.leave(fit)


class Pulled(NamedTuple):
    """Where the tasks pull x, that is μ, Γ and β in scaled units; of x and :func:`_data`."""

    adaptation: GradientSteps
    model: HierarchicalModel

    def __call__(
        self, x: Any, learned: Learned, level: Any, regression: Any, rows: Any, of_row: Any
    ) -> jax.Array:
        """The direction at x."""
        model, phi = self.model, learned.phi(x)
        thetas = self.adaptation.steps(model, phi, rows, of_row)
        moves = thetas - model.prior.location(phi, rows.task_predictors)
        effects = jnp.einsum("ckj,jc->ck", regression, moves)
        pull = {"mu": effects[:, 0], "gamma": effects[:, 1:]}
        if "beta" in phi:

            def log_likelihood(beta: Any) -> Any:
                each = model.likelihood.log_likelihood_of_rows(
                    thetas, phi | {"beta": beta}, rows, of_row
                )
                return each.sum()

            if model.likelihood.has_location:
                bound = row_curvature(model.likelihood, level, phi, rows)
                bound = jnp.where(rows.mask, bound, 0.0)[..., None]
                curvature = jnp.einsum("...p,...q->pq", rows.shared, bound * rows.shared)
            else:
                curvature = -jax.hessian(log_likelihood)(phi["beta"])
            slope = jax.grad(log_likelihood)(phi["beta"])
            pull["beta"] = jnp.linalg.solve(curvature, slope)
        space = learned.space
        return jnp.concatenate([p.entries(pull[p.name]) for p in space.parts]) / space.units


def _data(model: HierarchicalModel, tasks: Tasks) -> tuple[Any, ...]:
    """The regression and the rows, on the devices of the tasks and in the same order."""
    regression = _regression(tasks, np.array(model.shape(tasks).free_mean))
    return place(regression, tasks.sharding), *on_devices(model.likelihood.arrange(tasks), tasks)


def _regression(tasks: Tasks, free: np.ndarray) -> np.ndarray:
    """(d, 1 + q, J): from a coefficient's moves to its effects of (1, w), least squares.

    A mean that is pinned has no effect of 1; tasks without rows have nothing to say.
    """
    with_rows = (tasks.sizes > 0).astype(float)[:, None]
    columns = with_rows * np.column_stack([np.ones(tasks.num_tasks), tasks.task_predictors])
    pinned = columns * np.array([0.0] + [1.0] * (columns.shape[1] - 1))
    return np.stack([np.linalg.pinv(columns if f else pinned) for f in free])


def _query(
    model: HierarchicalModel,
    tasks: Tasks,
    adaptation: GradientSteps,
    phi: dict[str, Any],
    fixed: dict[str, Any],
    query: float,
    seed: int | jax.Array,
) -> tuple[dict[str, Any], float | None, list[str]]:
    """``sigma_query`` and the like at their maximum given the rest of φ, that log density, remarks.

    See :func:`~hierbayes.meta.inner_loop.query_parameters`.
    """
    names = query_parameters(model, fixed)
    support, asked = tasks.split(query, seed=seed)
    if not ((support.sizes > 0) & (asked.sizes > 0)).any():
        learned = ", ".join(f"{name}_query" for name in names)
        return {}, None, [
            f"no task has two rows, so that {learned}, the deviation of rows from what the others "
            "of their task predict, cannot be learned: predictions hold the noise alone and are "
            "too narrow"
        ]  # fmt: skip
    how, given = adaptation.for_programs(phi)
    evidence, plain = Predictive(how), model.without_encoder()
    with float64():
        space = query_space(model, tasks, fixed)
        parts = evidence.arrange(plain, support, asked)
        data = (Learned(space, given), *parts, float(asked.num_rows))
        start, objective = np.zeros(space.size), Predicted(evidence, plain)
        best = maximise(objective, start, None, 100, False, "Reptile's sigma_query", data)
        found = to_numpy(space.phi(jnp.asarray(best.x)))
    return found, best.value * asked.num_rows, best.warnings
