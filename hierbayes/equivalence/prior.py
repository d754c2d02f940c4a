r"""K gradient steps from φ as a MAP estimate under a Gaussian prior centred at φ.

.. math::

    \theta_K = \varphi + \Sigma_K g = \varphi + (H + P)^{-1} g, \qquad
    \Sigma_K = \eta \sum_{k<K} (I - \eta H)^k, \qquad P = \Sigma_K^{-1} - H

exact where the log likelihood is quadratic, with H its curvature and g its slope at φ. Along each
eigenvector of H the prior's precision is p = λ r / (1 − r), r = (1 − ηλ)^K being what the steps
leave of φ; Σ_K is the implied posterior's covariance. P depends on the task's own H: it is one
prior for all tasks only where all H are equal, or as ηλ → 0, where P → I / (Kη).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from hierbayes import inputs
from hierbayes.adaptation.curvature import Kind, Response, linearise, respond
from hierbayes.adaptation.descent import Descent, Flow
from hierbayes.equivalence.arguments import (
    Asked,
    over_equal_rows,
    over_rows,
    read_diagonal,
    read_fit,
    read_method,
    read_phi,
    read_preconditioner,
    read_rank,
    read_tasks,
)
from hierbayes.equivalence.discrepancy import judge_validity, measure, taken
from hierbayes.equivalence.implied import Discrepancy, EquivalentPrior
from hierbayes.equivalence.matrix_free import LARGE, matrix_free_prior
from hierbayes.equivalence.validity import judge, says_nothing
from hierbayes.errors import announce
from hierbayes.model import HierarchicalModel, check_model
from hierbayes.numerics import float64, to_numpy
from hierbayes.tasks import Tasks


def equivalent_prior(
    model: HierarchicalModel,
    task: Any,
    phi: Any,
    num_steps: int | None = None,
    step_size: Any = None,
    *,
    sigma: float | None = None,
    beta: Any = None,
    preconditioner: Any = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    time: float | None = None,
    null: Literal["limit", "pinned"] = "limit",
    curvature: Kind = "ggn",
    loss: Literal["sum", "mean"] | None = None,
    rank: int | None = None,
) -> EquivalentPrior | Any:
    r"""The Gaussian prior under which K gradient steps from φ are a MAP estimate.

    .. math::

        P = \sum_i \frac{\lambda_i r_i}{1 - r_i} v_i v_i^\top, \qquad
        r_i = (1 - \eta\lambda_i)^K, \qquad \theta_K = \varphi + (H + P)^{-1} g

    with λ_i, v_i the curvatures and directions of the task's log likelihood at φ. Exact where the
    likelihood is Gaussian, for any design, rank-deficient ones too; elsewhere of the linearised
    task, and ``validity`` says how far the steps are from the MAP estimate.

    Parameters
    ----------
    model : HierarchicalModel
    task : Tasks, DataFrame or (X, y)
        Many tasks at once, or one as a pair of arrays.
    phi : Fit, mapping or array (d,)
        A fit, whose K and η are taken too where none are given; its ``phi``; or where the steps
        start, with ``sigma`` and ``beta`` beside it.
    num_steps : int
        K.
    step_size : float or sequence of K floats
        η, or one a step, in units of the **sum** of the log likelihood over a task's rows (see
        ``loss``). A step on squared errors ½ Σ (y − f)² without noise is one of ησ² here.
    sigma, beta : optional
        Noise and shared effects, where ``phi`` does not hold them.
    preconditioner : array (d,), (d, d) or (J, d, d), optional
        B in θ ← θ + ηB∇: diagonal, a matrix, or one a task. Small steps then imply a prior
        covariance of about KηB.
    momentum : float
        β of the heavy ball, in [0, 1).
    nesterov : bool
        Nesterov's momentum: the slope is taken where momentum leads.
    time : float, optional
        Gradient flow for this time t, the limit of K → ∞ steps of t / K; then no steps are given.
    null : "limit" or "pinned"
        Directions that a task's rows say nothing about, where the steps do not move; "limit" takes
        the limit λ → 0 of the formula, precision 1/(Kη), "pinned" infinite precision.
    curvature : "ggn" or "hessian"
        H at φ: generalised Gauss–Newton, or the exact Hessian, whose eigenvalues may be negative.
    loss : "sum" or "mean", optional
        What the steps descend: the summed negative log likelihood of a task, or its mean over the
        task's rows, as most MAML code does; a fit's own by default, else "sum". Steps on the mean
        are η / n_j long in the units of the sum: they shrink large tasks no less than small ones,
        so that the implied prior is tighter the more rows a task has.
    rank : int, optional
        Keep this many directions of largest curvature and take it as 0 in the others, without
        forming any (d, d) matrix; always so where d > 256, with as many as a task has rows
        ("hessian": as there are coefficients), 200 at most, unless rank says otherwise. A message
        says where more would have mattered. A preconditioner must then be a diagonal (d,).

    Returns
    -------
    EquivalentPrior
        ``precision``, ``covariance``, ``posterior_mean`` (θ_K), ``posterior_covariance`` (Σ_K),
        ``shrinkage``, ``filter``, ``status``, ``messages``, ``validity``, ``table``. Where no
        matrix is formed a :class:`MatrixFreePrior`, with ``precision_times(v)`` and the like.

    Raises
    ------
    InputError
        Steps that diverge in a task (of Gaussian tasks a step_size beyond 2/λ_max), naming it; φ
        that is not finite or of the wrong dimension; a preconditioner that is not positive
        definite; fits whose inner loop had an optimiser of its own.

    References
    ----------
    Santos (1996), Equivalence of regularization and truncated iteration for general ill-posed
    problems, Linear Algebra and its Applications 236. Grant et al. (2018), Recasting gradient-based
    meta-learning as hierarchical Bayes, ICLR, section 3.

    Examples
    --------
    >>> import numpy as np, hierbayes as hb
    >>> model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    >>> task = np.ones((4, 1)), np.array([1.0, 2.0, 3.0, 2.0])  # curvature n / σ² = 4
    >>> implied = hb.equivalent_prior(model, task, [0.0], num_steps=1, step_size=0.1, sigma=1.0)
    >>> implied.precision.round(12).tolist()  # I / η − H
    [[6.0]]
    >>> implied.posterior_mean.round(12).tolist()  # 4 / (4 + 6) of the way to the mean
    [0.8]
    """
    check_model(model)
    inputs.one_of("null", null, ("limit", "pinned"))
    inputs.one_of("curvature", curvature, ("ggn", "hessian"))
    tasks, single = read_tasks(model, task)
    asked = Asked(phi, num_steps, step_size, preconditioner, "sum")
    asked = read_fit(asked, flow=time is not None, loss=loss)
    found = read_phi(model, tasks, asked.phi, sigma, beta)
    method = read_method(asked.num_steps, asked.step_size, momentum, nesterov, time)
    d = len(tasks.coef)
    rank = read_rank(rank, d)
    if rank is not None or d > LARGE:
        root = read_diagonal(asked.preconditioner, d)
        root = over_equal_rows(root, tasks) if asked.loss == "mean" else root
        implied = matrix_free_prior(model, tasks, found, method, root, curvature, null, rank)
    else:
        root = read_preconditioner(asked.preconditioner, tasks)
        root = over_rows(root, tasks) if asked.loss == "mean" else root
        implied = _with_matrices(model, tasks, found, method, root, curvature, null)
    return implied[tasks.names[0]] if single else implied


def _with_matrices(
    model: HierarchicalModel,
    tasks: Tasks,
    phi: dict[str, Any],
    method: Descent | Flow,
    root: np.ndarray,
    kind: Kind,
    null: str,
) -> EquivalentPrior:
    """What :func:`equivalent_prior` returns of few coefficients, from each task's whole H."""
    bare, rows = model.without_encoder(), model.likelihood.arrange(tasks)
    gaussian = model.likelihood.gaussian_in_theta
    with float64():
        location = np.asarray(model.prior.location(phi, np.asarray(tasks.task_predictors)))
        at = linearise(bare, kind, phi, *rows, location)
        parts = to_numpy(respond(at[0], method, root))
    hessian, slope = to_numpy(at)
    status, messages = judge(
        tasks, method, parts.curvature, parts.left, parts.moved, refuse=gaussian
    )
    pinned = np.zeros(parts.left.shape, dtype=bool)
    if null == "pinned":
        pinned = _pinned(parts.curvature, messages)
    linear = location + np.einsum(
        "jki,ji,jli,jl->jk", parts.directions, parts.moved, parts.directions, slope, optimize=True
    )
    theta, validity = linear, Discrepancy.none(tasks.num_tasks)
    if not gaussian:
        theta = taken(bare, phi, rows, location, method, root, tasks)
        validity = _measured(bare, kind, phi, rows, location, theta, linear, hessian, parts)
        validity = judge_validity(validity, status, tasks, messages)
    return EquivalentPrior(
        tasks, method, location, theta, parts.curvature, parts.directions, parts.dual, parts.left,
        np.where(pinned, 0.0, parts.moved), pinned, status, announce(messages), validity,
        None,
    )  # fmt: skip


def _pinned(curvature: np.ndarray, messages: list[str]) -> np.ndarray:
    """(J, d): the directions that a task says nothing about; say in how many tasks there are."""
    pinned = says_nothing(curvature)
    if pinned.any():
        messages.append(
            f"{pinned.any(1).sum()} task(s) say nothing in some direction, which is pinned to "
            "phi: its precision is infinite, and stands as 0 in `precision`"
        )
    return pinned


def _measured(
    model: HierarchicalModel,
    kind: Kind,
    phi: dict[str, Any],
    rows: Any,
    location: np.ndarray,
    theta: np.ndarray,
    linear: np.ndarray,
    hessian: np.ndarray,
    parts: Response,
) -> Discrepancy:
    """How far the steps' θ is from the MAP estimate, and from the linearised task's."""
    with float64():
        precision = np.einsum(
            "jki,ji,jli->jkl", parts.dual, parts.left / parts.moved, parts.dual, optimize=True
        )
        measured = measure(model, kind, phi, *rows, location, theta, linear, hessian, precision)
    return Discrepancy(*to_numpy(measured))
