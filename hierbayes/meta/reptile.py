r"""Reptile: φ is where the tasks, after K gradient steps, pull it nowhere.

.. math:: \varphi \leftarrow \varphi + \epsilon\, \frac1J \sum_j
          \left(\theta_j^K(\varphi) - \varphi\right)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes import inputs
from hierbayes.adaptation import GradientSteps
from hierbayes.adaptation.step_length import bounded, row_curvature
from hierbayes.errors import InputError
from hierbayes.evidence import Predictive
from hierbayes.fit import Fit
from hierbayes.fit.outward import Entered, enter_or_stay
from hierbayes.likelihoods import LastLayer
from hierbayes.meta.all_at_once import AllAtOnce
from hierbayes.meta.batches import (
    Batches,
    Outer,
    Parameters,
    QueryScore,
    per_row,
    rows_together,
)
from hierbayes.meta.inner_loop import Learned, check_steps, query_parameters
from hierbayes.meta.learner import Learner
from hierbayes.meta.outer_loop import OuterLoop, parted
from hierbayes.meta.sources import Found, Source
from hierbayes.meta.training import ToTrain
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.sharding import place
from hierbayes.tasks import Task, Tasks
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
        On episodes; see :class:`~hierbayes.meta.outer_loop.OuterLoop`.

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
    run, more = parted(outer_loop, Reptile)
    method = Reptile(
        num_steps, step_size, loss=loss, inner_optimiser=inner_optimiser, sigma=sigma,
        optimiser=optimiser, num_meta_steps=num_meta_steps, tolerance=tolerance, query=query,
        **more,
    )  # fmt: skip
    return method(model, tasks, seed, progress=progress, **run)


@dataclass(frozen=True)
class Reptile(Learner):
    """Reptile with these settings; :func:`reptile` says what they are."""

    num_steps: int = 5
    step_size: float | Literal["auto"] = "auto"
    loss: Literal["sum", "mean"] | None = field(default=None, kw_only=True)
    inner_optimiser: optax.GradientTransformation | None = field(default=None, kw_only=True)
    sigma: float | None = field(default=None, kw_only=True)
    tolerance: float = field(default=1e-10, kw_only=True)

    name = "Reptile"
    command = "reptile"
    colour, marker, rank = "#E69F00", "v", 0.2
    no_evidence = "Reptile follows a direction and maximises nothing"
    most_steps = 1000
    idle = ("loss", "inner_optimiser")

    def __post_init__(self) -> None:
        super().__post_init__()
        inputs.positive("tolerance", self.tolerance)
        check_steps(self.num_steps, self.step_size, self.loss, "first-order", self.inner_optimiser)

    def outer_optimiser(self) -> optax.GradientTransformation:
        """On batches a tenth of the way to where the tasks go."""
        return self.optimiser or _sgd()

    def enter(self, model: HierarchicalModel, tasks: Tasks) -> Entered:
        """Scaled columns, but for a step size of the user's, which is one in the user's."""
        return enter_or_stay(model, tasks, stay=self.step_size != "auto")

    def learn(self, source: Source) -> Fit:
        """φ where the mean move of all tasks vanishes, or where it leads batch by batch."""
        if isinstance(source, AllAtOnce):
            return self._to_where_it_vanishes(source)
        assert isinstance(source, Batches)
        return self._along_batches(source)

    def _to_where_it_vanishes(self, source: AllAtOnce) -> Fit:
        """Of all tasks at once, with their regression on task predictors, and β."""
        model, tasks, plain = source.model, source.tasks, source.model.without_encoder()
        noise = source.noise(self.sigma)
        eta, longest = source.step_size(self.step_size, noise, "sum"), source.longest(noise, "sum")
        adaptation = GradientSteps(self.num_steps, eta)
        how, known = adaptation.for_programs(noise)
        with float64():
            data = float(model.likelihood.units(tasks)[0]), *_data(model, tasks)
        found = source.follow(Pulled(how, plain), noise, known, data, self.tolerance)
        phi, remarks, info, training = found.phi, found.warnings, found.info, None
        if eta > longest * (1 + 1e-9):
            remarks = [*remarks, _overshoots(eta, longest)]
        if query_parameters(model, noise):
            more = source.judge_queries(adaptation, phi, noise)
            phi, remarks, info = phi | more.phi, [*remarks, *more.warnings], info | more.info
        if not bounded(model, tasks, noise):
            training = adaptation(model, tasks, phi)
            remarks = [*remarks, *training.remarks]
        described = {
            "num_steps": self.num_steps, "step_size": eta, "tolerance": self.tolerance,
            "sigma": self.sigma, "query_log_density": None,
        }  # fmt: skip
        return source.fit(adaptation, Found(phi, remarks, info, training), described)

    def _along_batches(self, source: Batches) -> Fit:
        """Along the mean move of each batch's tasks, all their rows in the inner loop."""
        model = source.model
        if isinstance(model.likelihood, LastLayer):
            raise InputError(
                "Reptile moves φ to where tasks take θ, and tasks do not move features that all "
                "share: use hb.maml (ANIL) or hb.empirical_bayes with a LastLayer"
            )
        noise, loss = source.noise(self.sigma), self.loss or source.loss
        eta = source.step_size(self.step_size, noise, loss)
        fixed = eta if self.inner_optimiser is None else None
        adaptation = GradientSteps(self.num_steps, fixed, loss, self.inner_optimiser)
        outer = Outer(model, len(source.tasks.coef))
        described = {
            "num_steps": self.num_steps, "step_size": eta, "loss": loss, "sigma": self.sigma,
        }  # fmt: skip
        score = QueryScore(outer, Predictive(adaptation))
        to_train = ToTrain(Moved(outer, adaptation), score, noise)
        found = source.follow(outer, to_train, noise, described)
        return source.fit(adaptation, found, described)


@functools.cache
def _sgd() -> optax.GradientTransformation:
    """One and the same for all runs, which then share a compiled program."""
    import optax

    return optax.sgd(0.1)


def _overshoots(eta: float, longest: float) -> str:
    """What to say of steps that are too long for a prior."""
    return (
        f"step_size={eta:.3g} is longer than 1/λ_max = {longest:.3g}: gradient steps overshoot in "
        "some tasks, and for odd num_steps no Gaussian prior makes them a MAP estimate"
    )


class Moved(NamedTuple):
    """Where a batch's tasks pull φ: the mean of their moves, all their rows in the inner loop."""

    outer: Outer
    adaptation: GradientSteps

    def __call__(
        self, parameters: Parameters, support: Task, asked: Task, key: Any, given: Any
    ) -> Any:
        """(mean log density of each task's rows, the move); ``given`` is φ's that is fixed."""
        del key
        model = self.outer.model
        phi, rows = self.outer.phi(parameters, given), rows_together(support, asked)
        thetas = self.adaptation.steps(model, phi, rows, None)
        move = (thetas - phi["mu"]).mean(0)
        each = model.likelihood.log_likelihood_of_rows(thetas, phi, rows, None)
        return per_row(each, rows.mask), {"mu": _like(parameters["mu"], move, model)}


def _like(parameters: Any, move: jax.Array, model: HierarchicalModel) -> Any:
    """A move of θ as the parameters are: a network's are the pytree that it takes."""
    tree = model.likelihood.tree(move)
    return jax.tree.map(lambda p, m: m.reshape(p.shape).astype(p.dtype), parameters, tree)


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
