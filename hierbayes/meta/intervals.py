r"""Posteriors of θ_j that count what is not known of φ̂.

.. math::

    \text{plain:}\quad & p(\theta_j \mid D_j, \hat\varphi) \\
    \text{kass-steffey:}\quad & N\!\left(m_j,\; V_j + G_j I(\hat\varphi)^{-1} G_j^\top\right) \\
    \text{bootstrap:}\quad & \textstyle\frac1B \sum_b p(\theta_j \mid D_j, \varphi^*_b), \qquad
        \varphi^*_b = \hat\varphi(D^*_b), \quad D^*_b \sim p(D \mid \hat\varphi) \\
    \text{morris:}\quad & N\!\left((1 - \hat B) y_j + \hat B \bar y,\;
        V (1 - \tfrac{J-1}{J} \hat B) + \tfrac{2}{J-3} \hat B^2 (y_j - \bar y)^2\right)

with B̂ = (J − 3)/(J − 1) · V / (V + τ̂²). References: Kass and Steffey (1989), JASA 84(407); Laird
and Louis (1987), Empirical Bayes confidence intervals based on bootstrap samples, JASA 82(399), of
type III; Morris (1983), Parametric empirical Bayes inference, JASA 78(381).

How often the plain intervals of empirical Bayes would cover θ_j, in data sets like this one.

.. math:: P\!\left(\theta_j \in m_j(\hat\varphi^*) \pm 1.96\, s_j(\hat\varphi^*)\right), \qquad
          (\theta, D^*) \sim p(\theta, D \mid \hat\varphi)

by simulation under φ̂. A τ̂ of zero is no value to simulate under: it takes the place where the
evidence times τ is largest, which is never zero (Chung et al. 2013).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from hierbayes import inputs
from hierbayes.adaptation import Adaptation, Conjugate, Normal, Posterior
from hierbayes.errors import InputError, NotApplicable, listing
from hierbayes.evidence.many import ManyProblems
from hierbayes.evidence.profile import profile_problem
from hierbayes.meta.many_data_sets import maximise_many, prior_roots, simulated
from hierbayes.meta.marginal import positions, relative_units
from hierbayes.meta.theta_errors import REML_HAS_NONE, covariance_by_phi
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import as_rng
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


Intervals = Literal["plain", "kass-steffey", "bootstrap", "morris"]

FEWEST_FOR_MORRIS = 4

EQUAL = 1e-9
"""Relative difference up to which variances count as equal: they are sums of rows' precisions."""


@dataclass(frozen=True)
class Widened:
    """θ's posterior, what to say of it, and the φ*_b (B, …) where it is a mixture over them."""

    training: Posterior
    remarks: list[str] = field(default_factory=list)
    phi_bootstrap: dict[str, np.ndarray] | None = None


def check_intervals(
    intervals: str, num_bootstrap: Any, model: HierarchicalModel, tasks: Tasks, criterion: str
) -> None:
    """Refuse what these intervals cannot be had of, before any computation."""
    inputs.one_of("intervals", intervals, get_args(Intervals))
    inputs.count("num_bootstrap", num_bootstrap, least=2)
    if intervals != "plain":
        model.require_gaussian_prior(
            f'intervals="{intervals}"', "it counts what phi leaves open of a Gaussian one",
            "use full_bayes",
        )  # fmt: skip
    if intervals == "kass-steffey" and criterion == "reml":
        raise InputError(REML_HAS_NONE)
    if intervals in ("bootstrap", "morris"):
        if not model.likelihood.gaussian_in_theta:
            raise NotApplicable(
                f'intervals="{intervals}" is for Gaussian tasks; use intervals="kass-steffey", or '
                "full_bayes"
            )
        if criterion == "map":
            raise NotApplicable(
                f'intervals="{intervals}" goes with criterion="ml" or "reml", not with "map": it '
                'has no place for a prior on phi; use intervals="kass-steffey", or full_bayes'
            )
    if intervals == "morris":
        normal_means(model, tasks)


def widened(
    intervals: str,
    model: HierarchicalModel,
    tasks: Tasks,
    phi: Mapping[str, np.ndarray],
    adaptation: Adaptation,
    training: Posterior,
    *,
    criterion: str,
    num_nodes: int,
    num_bootstrap: int,
    seed: int | jax.Array,
) -> Widened:
    """θ's posterior under ``intervals``, from the plain one at φ̂."""
    if intervals == "kass-steffey":
        return _kass_steffey(
            model, tasks, phi, training, num_nodes, with_hyperprior=criterion == "map"
        )
    if intervals == "bootstrap":
        assert isinstance(adaptation, Conjugate)
        many = bootstrapped(
            model, tasks, phi, num_bootstrap, as_rng(seed), reml=criterion == "reml"
        )
        found = Normal(*adaptation.moments(model, tasks, many.phi))
        lost = int((~many.converged).sum())
        remarks = []
        if lost > 0.05 * num_bootstrap:
            remarks.append(
                f"{lost} of {num_bootstrap} refits of the bootstrap ended before a maximum: the "
                "data hardly determine the prior's spread; use full_bayes"
            )
        return Widened(found, remarks, many.phi)
    if intervals == "morris":
        mean, variance = morris(*normal_means(model, tasks))
        return Widened(Normal(mean[:, None], variance[:, None, None]))
    return Widened(training)


def bootstrapped(
    model: HierarchicalModel,
    tasks: Tasks,
    phi: Mapping[str, np.ndarray],
    num_bootstrap: int,
    rng: np.random.Generator,
    *,
    reml: bool,
) -> Any:
    """φ*_b of data sets simulated under φ̂, by the same criterion."""
    stats, _ = simulated(tasks, phi, num_bootstrap, rng)
    return maximise_many(stats, model.shape(tasks), reml=reml, progress="bootstrap")


def draws_of_mixture(
    adaptation: Conjugate,
    model: HierarchicalModel,
    tasks: Tasks,
    phis: dict[str, np.ndarray],
    seed: int | jax.Array,
    num_chains: int,
    num_draws: int,
) -> np.ndarray:
    """Exact draws of θ (chain, draw, task, coef), from one φ*_b after another in random order."""
    (rng,) = as_rng(seed).spawn(1)  # not the numbers of the bootstrap's own data sets
    size, count = num_chains * num_draws, len(next(iter(phis.values())))
    which = rng.permutation(np.resize(np.arange(count), size))
    some = {name: value[which] for name, value in phis.items()}
    key: Any = int(rng.integers(2**63))
    drawn = adaptation.draws(model, tasks, some, key)
    return drawn.reshape(num_chains, num_draws, *drawn.shape[1:])


def morris(y: np.ndarray, variance: float) -> tuple[np.ndarray, np.ndarray]:
    r"""Morris's posterior means and variances of normal means y_j ~ N(θ_j, V), each (…, J).

    Reference: Morris (1983), JASA 78(381); Carlin and Louis (2000), section 3.5.
    """
    num = y.shape[-1]
    centre = y.mean(-1, keepdims=True)
    away = y - centre
    total = (away**2).sum(-1, keepdims=True) / (num - 1)
    total = np.maximum(total, variance)  # V + τ̂², with τ̂² of REML
    shrinkage = (num - 3) / (num - 1) * variance / total
    mean = (1 - shrinkage) * y + shrinkage * centre
    spread = variance * (1 - (num - 1) / num * shrinkage)
    return mean, spread + 2 / (num - 3) * shrinkage**2 * away**2


def normal_means(model: HierarchicalModel, tasks: Tasks) -> tuple[np.ndarray, float]:
    """(y_j, V) of tasks that are normal means with one known variance; others are refused."""
    shape = model.shape(tasks)
    stats = statistics(tasks)
    found, with_rows = "", tasks.sizes > 0
    if len(shape.coef) > 1:
        found = f"the coefficients {listing(shape.coef)}"
    elif shape.shared or shape.task_predictors or not all(shape.free_mean):
        found = "other fixed effects than the mean of one coefficient"
    elif "sigma" in shape.parameters:
        found = "a noise that is not known"
    elif with_rows.sum() < FEWEST_FOR_MORRIS:
        found = f"{with_rows.sum()} tasks with rows, where {FEWEST_FOR_MORRIS} are the fewest"
    elif not with_rows.all():
        found = "tasks without rows"
    else:
        precision = stats.x[0, 0] ** 2
        if precision.min() < (1 - EQUAL) * precision.max():
            found = "tasks whose own estimates have different variances"
    if found:
        raise NotApplicable(
            'intervals="morris" is for normal means: one coefficient, its mean the only fixed '
            f'effect, known_se equal in all tasks; found {found}. Use intervals="bootstrap" or '
            '"kass-steffey", or full_bayes'
        )
    return stats.y[0] / stats.x[0, 0], float(1 / stats.x[0, 0, 0] ** 2)


def _kass_steffey(
    model: HierarchicalModel,
    tasks: Tasks,
    phi: Mapping[str, np.ndarray],
    training: Posterior,
    num_nodes: int,
    *,
    with_hyperprior: bool,
) -> Widened:
    remarks = []
    zero = [c for c, tau in zip(tasks.coef, phi["tau"], strict=True) if tau == 0]
    if zero:
        remarks.append(
            f'intervals="kass-steffey" counts nothing of tau for {listing(zero)}: at the boundary '
            "tau = 0 the delta method has no slope to go by, and the intervals stay too narrow; "
            'use intervals="bootstrap", criterion="map" or full_bayes'
        )
    more = covariance_by_phi(model, tasks, phi, num_nodes, with_hyperprior=with_hyperprior)
    if np.isnan(more.theta).any():
        remarks.append(
            'intervals="kass-steffey" adds nothing here: the evidence is not concave at the '
            "estimate, and phi has no covariance; the intervals are the plain ones. Use "
            'intervals="bootstrap" or full_bayes'
        )
        return Widened(training, remarks)
    return Widened(more.added_to(training), remarks)
