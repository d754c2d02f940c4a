r"""Whether the tasks' θ_j are as Gaussian as p(θ | φ) says.

.. math::

    z_{jk} = \frac{(m_j - \mu_j)_k}{\sqrt{(\Sigma - C_j)_{kk}}} \sim N(0, 1), \qquad
    \operatorname{Cov}(m_j) = \Sigma - C_j

with m_j and C_j the posterior mean and covariance of θ_j and μ_j = μ + Γ w_j: by the law of total
variance what the prior spreads is what the posterior keeps and what its mean moves.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation import PointAdaptation
from hierbayes.adaptation.exact import collapse
from hierbayes.errors import NotApplicable, listing
from hierbayes.fit import Fit
from hierbayes.fit.adapted import label
from hierbayes.fit.fit import check_fit
from hierbayes.numerics import cholesky, float64, solve_lower
from hierbayes.priors import Prior
from hierbayes.statistics import Statistics, statistics

LEVEL = 0.05
"""Chance of a remark about Gaussian effects: of the test over all coefficients, and of an outlier
over all tasks of one."""

LEAST_INFORMATION = 1e-8
"""Share of the prior's variance below which a task says nothing about a coefficient."""

FEWEST_TASKS = 5

MOST_FOR_SHAPIRO = 5000
"""SciPy's p-values of Shapiro and Wilk's statistic hold up to here."""


@dataclass(frozen=True)
class TaskEffects:
    """Standardised effects of tasks, and what they say of a Gaussian prior.

    Attributes
    ----------
    z : DataArray (task, coef)
        Standard normal in every entry if the model is right at φ, and independent between tasks;
        NaN where a task says nothing about a coefficient.
    information : DataArray (task, coef)
        The share of the prior's variance that the task's rows (and the coefficient's correlation
        with others) explain, 1 − C_kk / Σ_kk. Where it is low z is mostly noise, which is Gaussian
        whatever the prior.
    statistic, p_value : DataArray (coef)
        Shapiro and Wilk's W over tasks (D'Agostino and Pearson's K² beyond 5,000), which is
        indifferent to a mean and a scale, and so to φ having been learned from the same tasks.
    outliers : dict from coefficient to tuple of task names
        Farther out than the farthest of as many Gaussian effects is in 5 % of cases (Grubbs).
    remarks : tuple of str
        The verdict, in sentences.
    """

    z: Any
    information: Any
    statistic: Any
    p_value: Any
    outliers: dict[str, tuple[Any, ...]]
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        """A line a coefficient, and the verdict."""
        lines = [
            f"{coef}: {int(np.isfinite(self.z.sel(coef=coef)).sum())} tasks, "
            f"W = {float(self.statistic.sel(coef=coef)):.4f}, "
            f"p = {float(self.p_value.sel(coef=coef)):.3g}"
            for coef in self.z["coef"].values.tolist()
        ]
        return "\n".join([*lines, *(f"- {remark}" for remark in self.remarks)])


def task_effects(fit: Fit) -> TaskEffects:
    r"""How far tasks are from the prior's centre, and whether Gaussian tasks would be.

    .. math::

        z_{jk} = (m_j - \mu - \Gamma w_j)_k \big/ \sqrt{(\Sigma - C_j)_{kk}}

    A Gaussian prior shrinks an unusual task as hard as any other, and one such task widens τ for
    all. φ is taken at its point estimate, under full Bayes at its posterior mean. At the true φ
    every z is exactly standard normal, however few rows a task has. Since φ̂ was learned from the
    same tasks, only the shape of z is tested, not its mean and scale.

    Parameters
    ----------
    fit : Fit
        Of Gaussian tasks, by a method that learns a prior (full Bayes, empirical Bayes).

    Returns
    -------
    TaskEffects
        ``z``, ``information``, ``statistic``, ``p_value``, ``outliers`` and ``remarks``; see
        :func:`hierbayes.plots.task_effects` for the picture. A test that finds nothing among few
        tasks, or tasks with little information, has found nothing.

    Raises
    ------
    InputError
        Of tasks that are not Gaussian, and of methods that learn no prior.

    References
    ----------
    Lange and Ryan (1989), Assessing normality in random effects models, Annals of Statistics 17(2).
    Shapiro and Wilk (1965), An analysis of variance test for normality, Biometrika 52(3–4).
    Grubbs (1969), Procedures for detecting outlying observations in samples, Technometrics 11(1).

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula(
    ...     "reaction ~ 1 + days + (1 + days | subject)", hb.datasets.sleepstudy()
    ... )
    >>> found = hb.checks.task_effects(hb.empirical_bayes(model, tasks, "reml"))
    >>> float(found.z.sel(task=335, coef="days").round(2))
    -1.97
    >>> found.outliers
    {'Intercept': (), 'days': ()}
    """
    check_fit(fit)
    _refuse(fit)
    phi = {name: np.asarray(value) for name, value in fit.phi.items()}
    design = fit.model.likelihood.design(fit.tasks, phi)
    with float64():
        moved, variance = map(np.asarray, _effects(statistics(design), fit.model.prior, phi))
        spread = np.asarray(fit.model.prior.covariance(phi)).diagonal()
    information = variance / np.where(spread > 0, spread, 1.0)
    known = information > LEAST_INFORMATION
    z = np.where(known, moved / np.sqrt(np.where(known, variance, 1.0)), np.nan)
    coefs, names = list(fit.tasks.coef), fit.tasks.names
    tests = [shape_test(column) for column in z.T]
    outliers = {c: tuple(names[far(column)].tolist()) for c, column in zip(coefs, z.T, strict=True)}
    remarks = _without_effects(coefs, spread, known)
    for k, c in enumerate(coefs):
        remarks += _verdict(c, z[:, k], tests[k][1], outliers[c], len(coefs))
    return TaskEffects(
        label(z, fit.tasks, ("task", "coef"), "z"),
        label(information, fit.tasks, ("task", "coef"), "information"),
        label(np.array([w for w, _ in tests]), fit.tasks, ("coef",), "statistic"),
        label(np.array([p for _, p in tests]), fit.tasks, ("coef",), "p_value"),
        outliers, tuple(remarks),
    )  # fmt: skip


def _refuse(fit: Fit) -> None:
    """Say of other fits why their effects cannot be judged."""
    if "tau" not in fit.phi or isinstance(fit.adaptation, PointAdaptation):
        raise NotApplicable(
            f"{fit.method} learns no spread of its tasks, so there is none to be judged: use "
            "full_bayes or empirical_bayes"
        )
    if not fit.model.likelihood.gaussian_in_theta:
        kind = type(fit.model.likelihood).__name__
        raise NotApplicable(
            f"task_effects needs the exact distribution of posterior means, which is not to be had "
            f"under a {kind} likelihood"
        )
    fit.model.require_gaussian_prior(
        "task_effects", "it asks whether the Gaussian one will do",
        "compare fits under both by leave_one_task_out",
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=1)
def _effects(stats: Statistics, prior: Prior, phi: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """m_j − μ_j and the diagonal of Σ − C_j, both (J, d).

    With V = σ² I + B Bᵀ = F Fᵀ they are L Bᵀ V⁻¹ a and the squares of L (F⁻¹ B)ᵀ: sums of squares,
    where Σ − C_j itself would cancel in a task of few rows.
    """
    c = collapse(stats, prior, phi)
    factor = cholesky(c.variance)
    white = solve_lower(factor, c.design)
    along = jnp.einsum("kl,ilj->kij", c.root, white)
    moved = jnp.einsum("kij,ij->jk", along, solve_lower(factor, c.moved))
    return moved, (along**2).sum(1).T


def shape_test(z: np.ndarray) -> tuple[float, float]:
    """A statistic of normality with any mean and scale, and its p-value; NaN of too few."""
    from scipy import stats

    z = z[np.isfinite(z)]
    if len(z) < FEWEST_TASKS:
        return float("nan"), float("nan")
    found: Any = stats.shapiro(z) if len(z) <= MOST_FOR_SHAPIRO else stats.normaltest(z)
    return float(found.statistic), float(found.pvalue)


def far(z: np.ndarray) -> np.ndarray:
    """Positions farther out than Grubbs's bound, the farthest first."""
    from scipy import stats

    known = np.isfinite(z)
    n = int(known.sum())
    if n < FEWEST_TASKS:
        return np.zeros(0, int)
    quantile = stats.t.isf(LEVEL / (2 * n), n - 2)
    bound = (n - 1) / np.sqrt(n) * np.sqrt(quantile**2 / (n - 2 + quantile**2))
    away = np.abs(z - np.nanmean(z)) / np.nanstd(z, ddof=1)
    away = np.where(known, away, 0.0)
    return np.argsort(-away)[: int((away > bound).sum())]


def _without_effects(coefs: list[str], spread: np.ndarray, known: np.ndarray) -> list[str]:
    """What cannot be judged, and why."""
    remarks = []
    none = [c for c, s in zip(coefs, spread, strict=True) if s == 0]
    if none:
        remarks.append(
            f"tau is 0 for {listing(none)}: the tasks are taken to be identical there, and have no "
            "effects to judge"
        )
    for c, s, of_coef in zip(coefs, spread, known.T, strict=True):
        if s > 0 and not of_coef.all():
            silent = int((~of_coef).sum())
            remarks.append(
                f"{silent} of {len(of_coef)} tasks say nothing about {c!r} and are left out"
            )
        if s > 0 and of_coef.sum() < FEWEST_TASKS:
            remarks.append(
                f"{int(of_coef.sum())} task(s) say something about {c!r}: too few to tell a shape"
            )
    return remarks


def _verdict(
    coef: str, z: np.ndarray, p_value: float, outliers: tuple[Any, ...], num_coefs: int
) -> list[str]:
    from scipy import stats

    if not np.isfinite(p_value):
        return []
    level, remarks = LEVEL / num_coefs, []
    rest = np.delete(z, far(z))
    rest = rest[np.isfinite(rest)]
    if outliers:
        others = (
            "The other tasks look Gaussian"
            if shape_test(rest)[1] >= level
            else "The other tasks do not look Gaussian either"
        )
        remarks.append(
            f"{coef!r}: {listing(list(outliers))} lie(s) farther out than Gaussian tasks would. "
            f"{others}. Look at the rows first; if they are right, a Student-t prior "
            "(hb.priors.StudentT) shrinks unusual tasks less, and keeps them from widening tau for "
            "all others"
        )
    # the shape of what is left: one outlier makes any sample heavy-tailed, or skewed
    if p_value >= level or (outliers and shape_test(rest)[1] >= level):
        return remarks
    heavy, skew = float(stats.kurtosis(rest)), float(stats.skew(rest))
    # standard errors of both under normality, √(24/n) and √(6/n)
    if abs(skew) * np.sqrt(len(rest) / 6) > abs(heavy) * np.sqrt(len(rest) / 24):
        advice = (
            f"they are skewed ({skew:+.1f}): a task predictor that tells the tasks apart, or a "
            "transformed outcome, may be missing"
        )
    elif heavy > 0:
        advice = (
            f"their tails are heavy (excess kurtosis {heavy:+.1f}): consider a Student-t prior "
            "(hb.priors.StudentT)"
        )
    else:
        advice = (
            f"their tails are light (excess kurtosis {heavy:+.1f}), as of tasks of two or more "
            "kinds: a task predictor that tells them apart may be missing"
        )
    return [
        *remarks,
        f"{coef!r}: the tasks' effects are not Gaussian (p = {p_value:.2g}); {advice}",
    ]
