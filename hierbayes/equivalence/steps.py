r"""The inverse question: which gradient steps stand for a given prior.

.. math::

    B_j = (H_j + P)^{-1}: \text{ one step is the MAP estimate under } P; \qquad
    \min_{K, \eta} \sum_j \operatorname{tr} S\,\bigl[R_j T R_j^\top
        + \Sigma_{K,j} H_j \Sigma_{K,j}\bigr]

With plain steps, equal for all tasks, no K and η can give every task its own best shrinkage where
tasks differ in size: what remains above the Bayes risk is the mismatch.

Searching the step size whose steps are closest to the posterior under a given prior.

.. math::

    \text{risk}_j = \operatorname{tr} S \bigl[R_j T R_j^\top + \Sigma_{K,j} H_j \Sigma_{K,j}\bigr],
    \qquad
    \text{KL}_j = \tfrac12\Bigl[\operatorname{tr} V_j^{-1}\bigl(\Sigma_{K,j} + M_j\bigr) - 2d
        + \log\frac{|V_j|}{|\Sigma_{K,j}|}\Bigr]

with M_j the bracket, V_j = (H_j + T⁻¹)⁻¹ and Σ_K, R diagonal in the directions of H_j: both are
expectations over tasks drawn from the prior N(φ, T).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes import inputs
from hierbayes.adaptation.curvature import Kind, linearise
from hierbayes.adaptation.descent import Descent, Flow
from hierbayes.equivalence.arguments import read_phi, read_preconditioner, read_tasks
from hierbayes.errors import InputError, listing
from hierbayes.model import HierarchicalModel, check_model
from hierbayes.numerics import float64, to_numpy
from hierbayes.tasks import Tasks

FLOW = float("inf")
"""The number of steps of gradient flow, in tables."""

ZOOMS, POINTS = 5, 160


@jax.jit
def rotate(hessian: Any, root: Any, inverse: Any) -> dict[str, Any]:
    """Everything in each task's own directions, where the steps are diagonal; inverse T⁻¹."""
    values, vectors = jnp.linalg.eigh(hessian)

    def rotated(matrix: Any) -> Any:
        matrix = jnp.broadcast_to(matrix, hessian.shape)
        return jnp.einsum("jki,jkl,jlm->jim", vectors, matrix, vectors)

    prior = root @ root.T
    white = jnp.einsum("ki,jkl,lm->jim", root, hessian, root)
    inner = jnp.linalg.inv(jnp.eye(len(root)) + white)
    bayes = jnp.einsum("ki,jil,ml->jkm", root, inner, root)
    weight = hessian.sum(0) / len(hessian)
    return {
        "curvature": jnp.maximum(values, 0.0),
        "prior": rotated(prior),
        "weight": rotated(weight),
        "bayes_precision": rotated(hessian + inverse),
        "bayes_risk": jnp.einsum("kl,jlk->j", weight, bayes),
        "log_det": jnp.linalg.slogdet(inner)[1] + 2 * jnp.linalg.slogdet(root)[1],
    }


@functools.partial(jax.jit, static_argnums=1)
def losses_after(problem: Any, num_steps: float, step_sizes: Any) -> tuple[Any, Any]:
    """(risk, expected KL) of every task (J,) after K steps of each task's own size (J,)."""

    def respond(curvature: Any, eta: Any) -> Any:
        method = Flow(eta) if num_steps == FLOW else Descent(int(num_steps), eta)
        return method.responses(curvature)

    left, moved = jax.vmap(respond)(problem["curvature"], step_sizes)
    error = left[:, :, None] * problem["prior"] * left[:, None, :]
    noise = moved**2 * problem["curvature"]
    d = left.shape[1]
    error = error + noise[:, :, None] * jnp.eye(d)
    risk = (problem["weight"] * error).sum((1, 2))
    precision = problem["bayes_precision"]
    spread = (jnp.diagonal(precision, axis1=1, axis2=2) * moved).sum(1)
    kl = spread + (precision * error).sum((1, 2)) - 2 * d + problem["log_det"]
    return risk, 0.5 * (kl - jnp.log(moved).sum(1))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _over(problem: Any, num_steps: float, which: int, step_sizes: Any) -> Any:
    """One of :func:`losses_after` for each of many step sizes, (M, J)."""
    return jax.lax.map(
        lambda eta: losses_after(problem, num_steps, eta)[which], step_sizes, batch_size=8
    )


def search(problem: Any, num_steps: float, criterion: str, overshoot: bool) -> dict[str, Any]:
    """The best η of all tasks and of each, by a grid and zooming in."""
    largest = float(problem["curvature"].max())
    own = problem["curvature"].max(1)
    own = np.where(own > 0, own, largest)
    which = 0 if criterion == "risk" else 1
    shortest, longest = _range(problem, num_steps)

    def best(limit: np.ndarray, reduce: bool) -> np.ndarray:
        if num_steps == FLOW:
            etas = np.geomspace(shortest, longest, POINTS)[:, None] * np.ones(len(limit))
        else:
            beyond = np.linspace(1, 2 * (1 - 1e-9), POINTS // 3)[1:] if overshoot else np.zeros(0)
            within = np.geomspace(
                np.minimum(shortest, 1e-5 / limit), 1 / limit, POINTS - len(beyond)
            )
            etas = np.concatenate([within, beyond[:, None] / limit])
        for _ in range(ZOOMS + 1):
            losses = np.asarray(_over(problem, num_steps, which, etas))
            losses = losses.sum(1, keepdims=True) if reduce else losses
            at = np.argmin(np.where(np.isfinite(losses), losses, np.inf), axis=0)
            columns = np.arange(etas.shape[1])
            at = np.broadcast_to(at, columns.shape)
            low, upper = etas[np.maximum(at - 1, 0), columns], etas[
                np.minimum(at + 1, len(etas) - 1), columns
            ]  # fmt: skip
            chosen = etas[at, columns]
            etas = np.linspace(low, upper, POINTS)
        return chosen

    count = len(own)
    shared = best(np.full(count, largest), reduce=True)[0]
    single = best(own, reduce=False)
    return {"num_steps": num_steps, "step_size": float(shared), "own": single}


def _range(problem: Any, num_steps: float) -> tuple[float, float]:
    """Between which η, or times of flow, the best are: Kη is about a posterior variance.

    In a direction of curvature λ and prior variance t the best s lies between t / (1 + λt) and,
    for flow, log(1 + λt) / λ ≤ t; where the prior is a point there is no shortest.
    """
    spread = np.linalg.eigvalsh(problem["prior"])
    widest = float(spread.max())
    precision = np.linalg.eigvalsh(problem["bayes_precision"]).max()
    narrowest = 1 / precision if precision > 0 else 1e-8 * widest
    count = 1.0 if num_steps == FLOW else num_steps
    return 0.1 * narrowest / count, 10 * widest


@dataclass(frozen=True, eq=False)
class EquivalentSteps:
    """The gradient steps that come closest to a prior; see :func:`equivalent_steps`.

    Attributes
    ----------
    num_steps, step_size : number
        The best K and η for all tasks together; ``num_steps`` inf is gradient flow, ``step_size``
        then its time.
    risk_ratio : float
        Their risk over the Bayes risk, 1 where they are the Bayes estimate: the irreducible
        mismatch of equal steps for all tasks.
    table : DataFrame
        A row a K: the best ``step_size``, ``risk_ratio``, ``kl`` (mean over tasks of the expected
        KL from the implied posterior to the exact one), ``largest_product`` η λ_max, and
        ``without_prior``, the number of tasks in which the steps have no Gaussian prior.
    by_task : DataFrame
        A row a task: its own best ``num_steps`` and ``step_size`` with their ``risk_ratio``, and
        ``risk_ratio_shared``, that of the steps that are best for all.
    """

    tasks: Tasks = field(repr=False)
    num_steps: int | float
    step_size: float
    risk_ratio: float
    table: Any = field(repr=False)
    by_task: Any = field(repr=False)
    curvature: np.ndarray = field(repr=False)
    root: np.ndarray = field(repr=False)

    @property
    def settings(self) -> dict[str, float]:
        """The best steps as arguments of :func:`equivalent_prior`: K and η, or the time of flow."""
        if self.num_steps == FLOW:
            return {"time": self.step_size}
        return {"num_steps": self.num_steps, "step_size": self.step_size}

    def preconditioner(self, num_steps: int = 1) -> np.ndarray:
        r"""B_j (J, d, d) with which ``num_steps`` unit steps are exactly the MAP estimate.

        .. math:: B_j = L\, V \operatorname{diag}\!\left(
                  \frac{1 - (1 + \lambda_i)^{-1/K}}{\lambda_i}\right) V^\top L^\top, \qquad
                  L^\top H_j L = V \operatorname{diag}(\lambda) V^\top, \; T = L L^\top

        For one step this is (H_j + P)⁻¹, Newton's step under the prior. Pass it to
        :func:`equivalent_prior` with ``step_size=1``; the prior it implies is the target's. Where a
        tau is 0 it is singular, and no preconditioner.
        """
        num_steps = inputs.count("num_steps", num_steps)
        white = np.einsum("ki,jkl,lm->jim", self.root, self.curvature, self.root)
        values, vectors = np.linalg.eigh(white)
        values = np.maximum(values, 0.0)
        safe = np.where(values > 0, values, 1.0)
        share = np.where(values > 0, -np.expm1(-np.log1p(safe) / num_steps) / safe, 1 / num_steps)
        outer = np.einsum("kl,jli->jki", self.root, vectors)
        return np.einsum("jki,ji,jli->jkl", outer, share, outer)


def equivalent_steps(
    model: HierarchicalModel,
    tasks: Any,
    phi: Any,
    *,
    precision: Any = None,
    num_steps: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    preconditioner: Any = None,
    sigma: float | None = None,
    beta: Any = None,
    criterion: Literal["risk", "kl"] = "risk",
    overshoot: bool = False,
    curvature: Kind = "ggn",
) -> EquivalentSteps:
    r"""The K and η whose steps come closest to the MAP estimate under a learned prior.

    With T the prior's covariance, the steps' estimate of a task drawn from the prior has the mean
    squared error

    .. math:: M_j = R_j T R_j^\top + \Sigma_{K,j} H_j \Sigma_{K,j}, \qquad R_j = I - \Sigma_{K,j}H_j

    which is at least that of the Bayes estimate, (H_j + T⁻¹)⁻¹. The risk is Σ_j tr S M_j with
    S = Σ_j H_j, the error of the predictor on an average row; its ratio to the Bayes risk is 1
    only where equal steps can give every task its own best shrinkage.

    Parameters
    ----------
    model : HierarchicalModel
    tasks : Tasks or DataFrame
    phi : mapping
        A fit's ``phi`` with ``tau`` (and ``corr``), of empirical or full Bayes; or an array (d,)
        beside ``precision``.
    precision : array (d,) or (d, d), optional
        The prior's precision, in the place of ``tau`` and ``corr``.
    num_steps : sequence of int
        The K to search; gradient flow is added.
    preconditioner : array (d,) or (d, d), optional
        B of steps θ ← θ + ηB∇, common to all tasks. With the prior's own covariance the steps are
        short where the prior is tight, which plain steps cannot be.
    criterion : "risk" or "kl"
        What the best steps minimise: the risk, or the expected KL divergence from the implied
        posterior N(θ_K, Σ_K) to the exact one, which counts its width too.
    overshoot : bool
        Allow η up to 2/λ_max; by default up to 1/λ_max, where all steps are proper priors.
    sigma, beta, curvature : optional
        As in :func:`equivalent_prior`.

    Returns
    -------
    EquivalentSteps
        The best steps, the table over K, each task's own, and ``preconditioner``.

    Examples
    --------
    >>> import numpy as np, hierbayes as hb
    >>> from hierbayes.equivalence import equivalent_steps
    >>> model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    >>> tasks = hb.Tasks.from_arrays([(np.ones((n, 1)), np.zeros(n)) for n in (5, 5, 5)])
    >>> steps = equivalent_steps(model, tasks, [0.0], precision=[1.0], sigma=1.0, num_steps=[1, 2])
    >>> round(steps.risk_ratio, 9)  # tasks of one size: nothing is lost
    1.0
    """
    check_model(model)
    inputs.one_of("criterion", criterion, ("risk", "kl"))
    inputs.one_of("curvature", curvature, ("ggn", "hessian"))
    overshoot = inputs.flag("overshoot", overshoot)
    tasks, _ = read_tasks(model, tasks)
    found = read_phi(model, tasks, phi, sigma, beta)
    root = _target_root(model, tasks, phi, precision)
    counts = _read_counts(num_steps)
    inverse = _inverse(root)
    if criterion == "kl" and inverse is None:
        raise InputError(
            "the prior's covariance is singular (a tau of 0, or a correlation of ±1), and the "
            'divergence of any steps from its posterior infinite; use criterion="risk"'
        )
    with float64():
        location = np.asarray(model.prior.location(found, np.asarray(tasks.task_predictors)))
        rows = model.likelihood.arrange(tasks)
        at = linearise(model.without_encoder(), curvature, found, *rows, location)
        hessian = np.asarray(at[0])
        _check_curvature(hessian, tasks)
        problem = _problem(hessian, _common(preconditioner, tasks), root, inverse)
        searches = [search(problem, k, criterion, overshoot) for k in [*counts, FLOW]]
    return _collect(tasks, problem, searches, criterion, hessian, root)


def _read_counts(num_steps: Any) -> list[int]:
    """The K to search."""
    try:
        counts = [inputs.count("num_steps", k) for k in num_steps]
    except (TypeError, InputError):
        counts = []
    if not counts:
        found = inputs.shown(num_steps)
        raise InputError(f"num_steps must be a list of positive integers, found {found}")
    return counts


def _problem(
    hessian: np.ndarray, scaling: np.ndarray, root: np.ndarray, inverse: np.ndarray | None
) -> dict[str, Any]:
    """What the search looks at; in the coordinates C⁻¹θ, with B = C Cᵀ, the steps are plain."""
    white = np.einsum("ki,jkl,lm->jim", scaling, hessian, scaling)
    # without an inverse of T the exact posterior is a point somewhere: KL is inf
    against = np.zeros_like(root) if inverse is None else scaling.T @ inverse @ scaling
    problem = to_numpy(rotate(white, np.linalg.solve(scaling, root), against))
    if not problem["bayes_risk"].sum() > 0:
        raise InputError(
            "under this prior the tasks do not differ (its tau is 0) where their rows say "
            "anything: the Bayes estimate is phi itself, and any step leaves it"
        )
    if inverse is None:
        problem["log_det"] = np.full(len(hessian), np.inf)
    return problem


def _common(preconditioner: Any, tasks: Tasks) -> np.ndarray:
    """C with B = C Cᵀ, one for all tasks."""
    root = read_preconditioner(preconditioner, tasks)
    if root.ndim != 2:
        raise InputError("steps that are equal for all tasks take one preconditioner for all")
    return root


def _target_root(model: HierarchicalModel, tasks: Tasks, phi: Any, precision: Any) -> np.ndarray:
    """L with T = L Lᵀ the target prior's covariance."""
    d = len(tasks.coef)
    if precision is None:
        if not (hasattr(phi, "keys") and "tau" in phi):
            raise InputError(
                "phi holds no tau to match: pass the phi of an empirical or full Bayes fit, or "
                "precision=…"
            )
        given = {name: phi[name] for name in ("tau", "corr") if name in phi}
        known = {name: _numbers(f"phi's {name}", value) for name, value in given.items()}
        expected = {"tau": (d,), "corr": (d, d)}
        for name, value in known.items():
            if value.shape != expected[name]:
                raise InputError(f"phi's {name} has shape {value.shape}; expected {expected[name]}")
            if not np.isfinite(value).all():
                raise InputError(f"phi's {name} is not finite: {value}")
        with float64():
            return np.asarray(model.prior.scale_tril(known))
    matrix = _numbers("precision", precision)
    matrix = np.diag(matrix) if matrix.shape == (d,) else matrix
    if matrix.shape != (d, d):
        raise InputError(f"precision has shape {matrix.shape}; expected ({d},) or ({d}, {d})")
    scale = np.abs(matrix).max()
    symmetric = np.isfinite(matrix).all() and np.abs(matrix - matrix.T).max() <= 1e-10 * scale
    if not symmetric or np.linalg.eigvalsh(matrix)[0] <= 0:
        raise InputError("precision must be symmetric and positive definite")
    return np.linalg.cholesky(np.linalg.inv(0.5 * (matrix + matrix.T)))


def _numbers(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(inputs.real_array(value), dtype=float)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name} is not an array of numbers") from error


def _inverse(root: np.ndarray) -> np.ndarray | None:
    """T⁻¹, or None where T = L Lᵀ is singular, whatever the units of its coefficients."""
    sd = np.linalg.norm(root, axis=1)
    if not sd.all() or np.linalg.svd(root / sd[:, None], compute_uv=False)[-1] < 1e-7:
        return None
    inverse = np.linalg.inv(root / sd[:, None]) / sd
    return inverse.T @ inverse


def _check_curvature(hessian: np.ndarray, tasks: Tasks) -> None:
    """Refuse tasks that say nothing, or whose log likelihood bends upwards at φ."""
    values = np.linalg.eigvalsh(hessian)
    largest = np.abs(values).max()
    if not largest > 0:
        raise InputError("the tasks' rows say nothing: all curvatures are zero")
    if (upwards := values[:, 0] < -1e-10 * largest).any():
        raise InputError(
            f"the log likelihood bends upwards at phi in {upwards.sum()} of {len(values)} task(s) "
            f"({listing(tasks.names[upwards].tolist(), 3)}), where the risk of a linear estimate "
            'means nothing; use curvature="ggn"'
        )


def _collect(
    tasks: Tasks,
    problem: Any,
    searches: list[dict[str, Any]],
    criterion: str,
    hessian: np.ndarray,
    root: np.ndarray,
) -> EquivalentSteps:
    import pandas as pd

    bayes = problem["bayes_risk"]
    rows, losses = [], []
    with float64():
        for found in searches:
            k, eta = found["num_steps"], found["step_size"]
            risk, kl = to_numpy(losses_after(problem, k, np.full(tasks.num_tasks, eta)))
            own = to_numpy(losses_after(problem, k, found["own"]))
            product = eta * problem["curvature"].max(1)
            rows.append({
                "num_steps": k, "step_size": eta, "risk_ratio": risk.sum() / bayes.sum(),
                "kl": kl.mean(), "largest_product": np.nan if k == FLOW else product.max(),
                "without_prior": int(((product > 1 + 1e-9) & (k % 2 == 1)).sum()),
            })  # fmt: skip
            losses.append((risk, kl, *own))
    table = pd.DataFrame(rows).set_index("num_steps")
    column = "risk_ratio" if criterion == "risk" else "kl"
    # the fewest steps among those as good as the best, to rounding
    best = int(np.argmax(table[column].to_numpy() <= table[column].min() * (1 + 1e-9) + 1e-12))
    score = np.array([loss[2 if criterion == "risk" else 3] for loss in losses])
    mine = np.argmax(score <= score.min(0) + 1e-9 * np.abs(score.min(0)) + 1e-12, axis=0)
    picked = np.arange(tasks.num_tasks)
    counts = np.array([found["num_steps"] for found in searches])
    by_task = pd.DataFrame(
        {
            "rows": tasks.sizes,
            "num_steps": counts[mine],
            "step_size": np.array([found["own"] for found in searches])[mine, picked],
            "risk_ratio": np.array([loss[2] for loss in losses])[mine, picked] / bayes,
            "risk_ratio_shared": losses[best][0] / bayes,
            "kl": np.array([loss[3] for loss in losses])[mine, picked],
            "kl_shared": losses[best][1],
        },
        index=pd.Index(tasks.names, name="task"),
    )
    chosen, count = table.iloc[best], float(table.index[best])
    return EquivalentSteps(
        tasks, int(count) if np.isfinite(count) else count, float(chosen["step_size"]),
        float(chosen["risk_ratio"]),
        table, by_task, hessian, root,
    )  # fmt: skip
