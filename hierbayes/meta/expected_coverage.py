r"""How often the plain intervals of empirical Bayes would cover θ_j, in data sets like this one.

.. math:: P\!\left(\theta_j \in m_j(\hat\varphi^*) \pm 1.96\, s_j(\hat\varphi^*)\right), \qquad
          (\theta, D^*) \sim p(\theta, D \mid \hat\varphi)

by simulation under φ̂. A τ̂ of zero is no value to simulate under: it takes the place where the
evidence times τ is largest, which is never zero (Chung et al. 2013).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from hierbayes.errors import listing
from hierbayes.evidence.many import ManyProblems
from hierbayes.evidence.profile import profile_problem
from hierbayes.meta.many_data_sets import maximise_many, prior_roots, simulated
from hierbayes.meta.marginal import positions, relative_units
from hierbayes.model import HierarchicalModel
from hierbayes.priors.hyperprior import Shape
from hierbayes.statistics import statistics
from hierbayes.tasks import Tasks

LOOKED_AT, MOST_TASKS = 50, 2000
"""Tasks below which coverage is computed whatever τ̂, and up to which it is where τ̂ is near 0."""

MOST_PRODUCTS, MOST_ENTRIES = 2e7, 15
"""Products of a step (d² for each pair of Λ's entries, task and data set; as many as there are
pairs of fixed effects for each coefficient, task and data set) and entries of Λ up to which it is
computed: five correlated coefficients in thirty tasks, thirty shared columns in two hundred. With
more entries Newton's steps on them are many."""

NUMBERS = 20_000
"""Data sets × tasks × pairs of Λ's entries: a few hundredths of a second."""

FEWEST_SETS, MOST_SETS = 100, 400
"""400 data sets of few tasks tell their coverage to about 0.02."""

ENOUGH = 0.93
"""Coverage of 95 % intervals from which on nothing is said."""

Z = 1.959963984540054


class Expected(NamedTuple):
    """Coverage of each coefficient (d,) in data sets simulated under ``tau`` (d,)."""

    coverage: np.ndarray
    tau: np.ndarray


def expected_coverage(
    model: HierarchicalModel, tasks: Tasks, phi: Mapping[str, np.ndarray], *, reml: bool
) -> Expected | None:
    """Of plain 95 % intervals; None where tasks are many and τ̂ far from zero, or it costs much.

    Parameters
    ----------
    model : HierarchicalModel
        With a Gaussian likelihood.
    tasks : Tasks
    phi : mapping
        φ̂ by name.
    reml : bool
        Whether φ̂ is REML's.
    """
    shape = model.shape(tasks)
    if not _doubtful(tasks, phi).any() or not _quick(tasks, shape):
        return None
    tau = np.array(phi["tau"], float)
    for i in np.flatnonzero(tau == 0):
        tau[i] = _plausible(model, tasks, phi, int(i), reml=reml)
    num = NUMBERS // (tasks.num_tasks * len(positions(shape.blocks)[0]) ** 2)
    rng = np.random.default_rng(0)
    under = {**phi, "tau": tau}
    stats, theta = simulated(tasks, under, int(np.clip(num, FEWEST_SETS, MOST_SETS)), rng)
    root = prior_roots(under) / float(phi.get("sigma", 1.0))
    many = maximise_many(stats, shape, reml=reml, starts=(root,), tolerance=1e-3)
    inside = np.abs(theta - many.mean) <= Z * many.sd
    return Expected(inside[:, tasks.sizes > 0].mean((0, 1)), tau)


def _doubtful(tasks: Tasks, phi: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of each coefficient (d,): few tasks, or τ̂² within two standard errors of zero."""
    num = int((tasks.sizes > 0).sum())
    if num < LOOKED_AT:
        return np.ones(len(tasks.coef), bool)
    precision = (statistics(tasks).x ** 2).sum((0, 2)) / num
    noise = float(phi.get("sigma", 1.0)) ** 2 / np.maximum(precision, 1e-300)
    spread = np.asarray(phi["tau"], float) ** 2
    return spread < 2 * np.sqrt(2 / num) * (spread + noise)


def _quick(tasks: Tasks, shape: Shape) -> bool:
    """Whether the simulation takes two seconds at most, or so."""
    num, d = int((tasks.sizes > 0).sum()), len(tasks.coef)
    size = len(positions(shape.blocks)[0])
    fixed = sum(shape.free_mean) + d * len(shape.task_predictors) + len(shape.shared)
    products = FEWEST_SETS * max(num * (d * size) ** 2, (num * d + fixed) * fixed**2)
    return num <= MOST_TASKS and size <= MOST_ENTRIES and products <= MOST_PRODUCTS


def _plausible(
    model: HierarchicalModel,
    tasks: Tasks,
    phi: Mapping[str, np.ndarray],
    which: int,
    *,
    reml: bool,
) -> float:
    """The τ of one coefficient that maximises evidence × τ, all else of Λ as φ̂ has it.

    It is looked for around the standard error of a task of average size. At each Λ the evidence is
    at its largest over σ, and τ = Λ σ.
    """
    stats, shape = statistics(tasks), model.shape(tasks)
    rows = max(float(np.mean(stats.num_rows[tasks.sizes > 0])), 1.0)
    relative = np.geomspace(0.01, 100.0, 150)
    sigma = float(phi.get("sigma", 1.0))
    root = prior_roots(phi) / sigma
    roots = np.repeat(root[:, :, None], len(relative), axis=2)
    roots[which, which] = relative * relative_units(stats)[which] / np.sqrt(rows)
    same = replace(stats, y=np.repeat(stats.y[..., None], len(relative), axis=2))
    known_noise = "sigma" not in shape.parameters
    problem = profile_problem(same, shape, reml=reml, known_noise=known_noise)
    found = ManyProblems.of(problem).profiles(roots, *positions(shape.blocks))
    best = int(np.argmin(found.loss - np.log(relative * found.sigma)))
    return float(roots[which, which, best] * found.sigma[best])


def remarks_on_coverage(
    model: HierarchicalModel, tasks: Tasks, phi: Mapping[str, np.ndarray], *, reml: bool
) -> list[str]:
    """What to say of the plain intervals' expected coverage, where it is too low."""
    doubtful = _doubtful(tasks, phi)
    if doubtful.any() and not _quick(tasks, model.shape(tasks)):
        return [_unmeasured(tasks, doubtful)]
    found = expected_coverage(model, tasks, phi, reml=reml)
    if found is None or (found.coverage >= ENOUGH).all():
        return []
    shares = [f"{100 * share:.0f} %" for share in found.coverage]
    if len(shares) > 1:
        shares = [f"{s} ({c})" for s, c in zip(shares, tasks.coef, strict=True)]
    zero = [i for i, tau in enumerate(phi["tau"]) if tau == 0]
    under = "this fit"
    if zero:
        values = " and ".join(f"{found.tau[i]:.3g}" for i in zero)
        names = listing([tasks.coef[i] for i in zero])
        under = f"this fit (with tau {values} for {names}, where the evidence times tau is largest)"
    return [
        f"plain 95 % intervals of theta take phi for known, and are expected to cover about "
        f"{', '.join(shares)} with these {int((tasks.sizes > 0).sum())} tasks, in data sets "
        f'simulated from {under}: ask for intervals="bootstrap", or use full_bayes'
    ]


def _unmeasured(tasks: Tasks, doubtful: np.ndarray) -> str:
    """The same without a figure, where a simulation would cost more than the fit."""
    num = int((tasks.sizes > 0).sum())
    why = f"only {num} tasks have rows"
    if num >= LOOKED_AT:
        names = listing([c for c, low in zip(tasks.coef, doubtful, strict=True) if low])
        why = f"tau for {names} is within two standard errors of 0, beside the tasks' own errors"
    return (
        f"{why}: plain intervals of theta take phi for known and cover too little there (how "
        "little, hb.checks.interval_coverage simulates); ask for "
        'intervals="bootstrap", or use full_bayes'
    )
