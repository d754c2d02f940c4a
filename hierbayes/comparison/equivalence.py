"""How far K gradient steps are from the full posterior, and why: one table, one picture.

Distances of one fit's θ from another's, task by task, and what Monte-Carlo error alone gives.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from hierbayes import inputs, plots
from hierbayes.adaptation import EquivalentPrior, Status
from hierbayes.checks.gaussians import (
    LEVELS,
    coverage,
    kl_divergence,
    kl_floor,
    wasserstein,
    wasserstein_floor,
)
from hierbayes.checks.scores import mean_over_tasks
from hierbayes.comparison.ladder import CAUSES, FULL, STEPS, build_ladder
from hierbayes.errors import InputError
from hierbayes.fit import Fit, Prediction
from hierbayes.fit.effective import ess
from hierbayes.tasks import Tasks


class Reference:
    """The full posterior's moments of every task, and how well the draws tell them."""

    def __init__(self, posterior: Fit):
        theta = posterior.theta_draws
        assert theta is not None
        adapted = posterior.adapted.posterior
        assert adapted.covariance is not None
        self.mean, self.covariance = adapted.mean, adapted.covariance
        self.draws = theta.reshape(-1, *theta.shape[2:])
        self.ess = ess(theta, "bulk").min(1)
        self.num_coef = theta.shape[-1]


def distances(fit: Fit, reference: Reference) -> dict[str, np.ndarray]:
    """Of every task (J,) from the full posterior, and the share of its draws inside intervals."""
    adapted = fit.adapted.posterior
    assert adapted.covariance is not None
    here = (adapted.mean, adapted.covariance)
    there = (reference.mean, reference.covariance)
    values = between(here, there)
    for level, inside in zip(LEVELS, coverage(*here, reference.draws), strict=True):
        values[f"coverage_{round(100 * level)}"] = inside
    return values


def between(here: Any, there: Any) -> dict[str, np.ndarray]:
    """Distances of each task from one normal posterior to another.

    A coefficient that is the same point in both is no shift, and a ratio of 1.
    """
    sd, own = (np.sqrt(np.maximum(np.diagonal(c, axis1=1, axis2=2), 0.0)) for _, c in (there, here))
    shift = np.abs(here[0] - there[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.where(shift == 0, 0.0, shift / sd)
        ratio = np.where(own == sd, 1.0, own / sd)
        return {
            "kl": kl_divergence(*here, *there),
            "wasserstein": wasserstein(*here, *there),
            "mean_shift": shift.mean(1),
            "sd_ratio": np.exp(np.log(ratio).mean(1)),
        }


def summarise(values: dict[str, np.ndarray]) -> dict[str, float]:
    """Over tasks: medians of divergences, means of shifts, geometric means of ratios."""

    def over(name: str, value: np.ndarray) -> float:
        known = value[~np.isnan(value)]
        if not known.size:
            return np.nan
        if name in ("kl", "wasserstein"):
            return float(np.median(known))
        if name == "sd_ratio":
            with np.errstate(divide="ignore"):
                return float(np.exp(np.log(known).mean()))
        return float(known.mean())

    return {name: over(name, value) for name, value in values.items()}


def density_error(prediction: Prediction, ess: float) -> float:
    """Monte-Carlo error of the mean log density: each draw's influence on Σ_i log mean_s p_is."""
    parts = prediction.log_density_of_components()
    if len(parts) == 1:
        return 0.0
    weight = np.exp(parts - parts.max(0))
    influence = (weight / weight.mean(0)).sum(1)
    return float(influence.std() / np.sqrt(ess) / parts.shape[1])


FLOOR = "Monte-Carlo floor"
"""The last row of the table."""

FEWEST = 400
"""Effective draws of a task's θ below which the reference's moments are called rough."""


@dataclass(frozen=True)
class EquivalenceReport:
    """K gradient steps, rung by rung, against the full posterior.

    Attributes
    ----------
    fits : dict
        The rungs as fits: "gradient steps" (the normal N(θ_K, Σ_K) that the steps imply), "MAP,
        learned prior" (from the same φ, under the learned prior), "empirical Bayes" (the posterior
        at a point φ), "full Bayes". Each has draws of θ in its ``datatree``.
    table : DataFrame
        A row a rung, against the full posterior: ``kl`` (median over tasks, nats) and ``kl_worst``;
        ``wasserstein`` (median, in posterior sds); ``mean_shift`` (mean absolute shift, in
        posterior sds); ``sd_ratio`` (geometric mean); ``coverage_50`` … (share of the full
        posterior's draws inside the rung's central intervals); ``log_density`` a held-out row with
        ``log_density_se`` over tasks, and ``difference`` from the full posterior's on the same
        rows, with its own ``difference_se``. Tasks without a Gaussian prior are left out of the
        first rung's distances, not out of its ``log_density``. With ``truth``, ``truth_50`` …: the
        share of true θ_j inside the intervals. The last row is what the full posterior's own draws
        leave open for a typical task: ``kl``, ``wasserstein`` and ``mean_shift`` as they would be
        if the rung were the full posterior itself, and the standard errors of ``sd_ratio``,
        ``coverage_50`` … and ``log_density``.
    gaps : DataFrame
        A row a step of the ladder: what changes, and the same distances between neighbours.
    by_task : DataFrame
        The distances of every rung and task, with the status of the task's equivalent prior.
    implied : EquivalentPrior
        The priors that the steps imply.
    notes : tuple of str
        What to know when reading the table.
    """

    fits: dict[str, Fit]
    table: Any
    gaps: Any = field(repr=False)
    by_task: Any = field(repr=False)
    implied: EquivalentPrior = field(repr=False)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The tables as text, and the notes."""
        lines = [
            "Against the full posterior:", self.table.round(3).to_string(), "",
            "From rung to rung:", self.gaps.round(3).to_string(), "",
        ]  # fmt: skip
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return f"{self.table.round(3).to_html()}{self.gaps.round(3).to_html()}<ul>{notes}</ul>"

    def plot(self, *, task: Any = None, axes: Any = None) -> Any:
        """Each task's distance by rung, and one task's rungs over its posterior; axes (2,)."""
        floor = float(self.table.loc[FLOOR, "kl"])
        return plots.ladder(self.fits, self.by_task, floor=floor, task=task, axes=axes)


def equivalence_report(
    start: Fit,
    posterior: Fit,
    *,
    empirical_bayes: Fit | None = None,
    num_steps: int | None = None,
    step_size: float | str | None = None,
    test: Any = None,
    truth: Any = None,
    num_draws: int = 1000,
    num_chains: int = 4,
    seed: int | jax.Array = 0,
) -> EquivalenceReport:
    r"""Hold K gradient steps against the full posterior of the same tasks.

    .. math::

        N(\theta_K, \Sigma_K) \to N\bigl(\text{MAP under } T\bigr)
        \to p(\theta_j \mid D_j, \hat\varphi) \to p(\theta_j \mid D_{1..J})

    Three things part the ends: each task's implied prior has another shape than the learned one,
    φ stands elsewhere (and tasks may not be Gaussian), and φ is not known. Each rung of the ladder
    changes one of them.

    Parameters
    ----------
    start : Fit
        Where the steps start: of MAML or Reptile, whose K and η are taken; or of any other method
        with a ``mu``, beside ``num_steps`` and ``step_size``. From a fit with a prior of its own
        the K and η that match it best are taken where none are given.
    posterior : Fit
        Of full_bayes, on the same tasks.
    empirical_bayes : Fit, optional
        Of empirical_bayes; fitted here where the tasks are Gaussian. Elsewhere φ is taken at the
        full posterior's mean, and θ drawn there by NUTS.
    num_steps, step_size : optional
        K and η in place of those of ``start``; "auto", or no η where it has none, is 1/λ_max over
        all tasks.
    test : Tasks or DataFrame, optional
        Held-out rows of the same tasks, for ``log_density``.
    truth : array (J, d), optional
        True θ_j of simulated tasks, for the coverage of the intervals.
    num_draws, num_chains : int
        Of the rungs' draws of θ.
    seed : int or JAX key
        For these draws.

    Returns
    -------
    EquivalenceReport
        With ``table``, ``gaps``, ``by_task``, ``fits``, ``implied`` and ``plot()``.

    Raises
    ------
    InputError
        Fits of different tasks, a ``posterior`` without draws, no steps where ``start`` took none,
        steps that diverge in a task.

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula(
    ...     "y ~ 1 + (1 | school)", hb.datasets.eight_schools(), known_se="se"
    ... )
    >>> full = hb.full_bayes(model, tasks, num_draws=250, num_warmup=250, num_chains=2)
    >>> eb = hb.empirical_bayes(model, tasks, criterion="map")
    >>> report = hb.equivalence_report(
    ...     eb, full, empirical_bayes=eb, num_steps=5, step_size="auto"
    ... )
    >>> list(report.fits)
    ['gradient steps', 'MAP, learned prior', 'empirical Bayes', 'full Bayes']
    >>> report.table.index[-1]
    'Monte-Carlo floor'
    """
    num_draws, num_chains = inputs.counts(num_draws=num_draws, num_chains=num_chains)
    seed = inputs.seed(seed)
    _check(start, posterior, empirical_bayes)
    fits, implied = build_ladder(
        start, posterior, empirical_bayes, num_steps, step_size, num_chains, num_draws, seed
    )
    reference = Reference(posterior)
    away = {rung: distances(fit, reference) for rung, fit in fits.items()}
    without = np.asarray(implied.status == Status.NO_PRIOR)
    away[STEPS] = {name: np.where(without, np.nan, v) for name, v in away[STEPS].items()}
    table = _table(fits, away, reference, truth, without)
    rungs = (fit for rung, fit in fits.items() if rung != FULL and fit is not empirical_bayes)
    notes = [*(note for fit in rungs for note in fit.warnings), *_remarks(reference, away, without)]
    if test is not None:
        scores = _score(fits, start, posterior.model.tasks(test), reference)
        table = table.join(scores, how="outer").reindex([*scores.index.drop(FLOOR), FLOOR])
    return EquivalenceReport(
        fits, table, _gaps(fits, without), _by_task(fits, away, implied), implied,
        tuple(notes),
    )  # fmt: skip


def _check(start: Fit, posterior: Fit, point: Fit | None) -> None:
    fits = {"posterior": posterior, "start": start, "empirical_bayes": point}
    for name, fit in fits.items():
        if fit is None and name == "empirical_bayes":
            continue
        fit = inputs.instance(name, fit, Fit, "a fit")
        if not _same(fit.tasks, posterior.tasks):
            raise InputError(f"{name} and posterior are fits of different tasks")
        if "mu" not in fit.phi:
            raise InputError(f"{fit.method} has no mu for steps to start from")
    if point is not None and ("tau" not in point.phi or point.adapted.posterior.covariance is None):
        raise InputError(
            f"empirical_bayes must be a fit of empirical_bayes; {point.method} learns no posterior"
        )
    if posterior.phi_draws is None or posterior.theta_draws is None:
        raise InputError(
            f"posterior must be a fit of full_bayes with draws of theta; {posterior.method} has "
            "none"
        )


def _same(first: Tasks, second: Tasks) -> bool:
    """Whether these are the same rows in the same tasks."""
    if first is second:
        return True
    names = all(
        getattr(first.labels, role) == getattr(second.labels, role)
        for role in ("coef", "shared", "task_predictors")
    )
    if not names or first.names.tolist() != second.names.tolist():
        return False
    if first.slots.keys() != second.slots.keys():
        return False
    arrays = ([*(getattr(t, name) for name in _ARRAYS), *t.slots.values()] for t in (first, second))
    return all(np.array_equal(a, b) for a, b in zip(*arrays, strict=True))


_ARRAYS = ("starts", "outcome", "predictors", "shared", "task_predictors")


def _table(
    fits: dict[str, Fit],
    away: dict[str, dict[str, np.ndarray]],
    reference: Reference,
    truth: Any,
    without: np.ndarray,
) -> Any:
    import pandas as pd

    rows = {}
    for rung, values in away.items():
        found = summarise(values)
        known = values["kl"][~np.isnan(values["kl"])]
        worst = float(known.max(initial=0.0)) if known.size else np.nan
        rows[rung] = {"kl": found.pop("kl"), "kl_worst": worst, **found}
        if truth is not None:
            left_out = without if rung == STEPS else np.zeros_like(without)
            rows[rung] |= _truth(fits[rung], truth, left_out)
    rows[FLOOR] = _floor(reference)
    return pd.DataFrame.from_dict(rows, orient="index")


def _floor(reference: Reference) -> dict[str, float]:
    """What its draws' error alone would show of one task's full posterior, or would add to it."""
    d, ess = reference.num_coef, reference.ess
    typical = float(np.median(ess))
    floor = {
        "kl": float(np.median(kl_floor(d, ess))),
        "wasserstein": float(np.median(wasserstein_floor(d, ess))),
        # E|error of a mean| = √(2/π) sd / √ESS
        "mean_shift": float(np.sqrt(2 / np.pi) * (1 / np.sqrt(ess)).mean()),
        "sd_ratio": 1 / np.sqrt(2 * typical),
    }  # fmt: skip
    shares = {f"coverage_{round(100 * p)}": np.sqrt(p * (1 - p) / typical) for p in LEVELS}
    return floor | shares


def _truth(fit: Fit, truth: Any, without: np.ndarray) -> dict[str, float]:
    values, adapted = np.asarray(truth, dtype=float), fit.adapted.posterior
    if values.shape != adapted.mean.shape:
        raise InputError(f"truth has shape {values.shape}; expected {adapted.mean.shape}")
    assert adapted.covariance is not None
    inside = coverage(adapted.mean, adapted.covariance, values[None])
    return {
        f"truth_{round(100 * level)}": float(share[~without].mean()) if (~without).any() else np.nan
        for level, share in zip(LEVELS, inside, strict=True)
    }


def _gaps(fits: dict[str, Fit], without: np.ndarray) -> Any:
    import pandas as pd

    rows = {}
    for (low, high), cause in CAUSES.items():
        here, there = fits[low].adapted.posterior, fits[high].adapted.posterior
        values = between((here.mean, here.covariance), (there.mean, there.covariance))
        if low == STEPS:
            values = {name: np.where(without, np.nan, value) for name, value in values.items()}
        rows[f"{low} → {high}"] = {**summarise(values), "what changes": cause}
    return pd.DataFrame.from_dict(rows, orient="index")


def _by_task(
    fits: dict[str, Fit], away: dict[str, dict[str, np.ndarray]], implied: EquivalentPrior
) -> Any:
    import pandas as pd

    tasks = fits[FULL].tasks
    frames = []
    for rung, values in away.items():
        frame = pd.DataFrame(values, index=pd.Index(tasks.names, name="task"))
        frame.insert(0, "rung", rung)
        frame.insert(1, "rows", tasks.sizes)
        frame.insert(2, "status", [str(s) if rung == STEPS else "" for s in implied.status])
        frames.append(frame)
    return pd.concat(frames).reset_index().set_index(["rung", "task"])


def _score(fits: dict[str, Fit], start: Fit, test: Any, reference: Reference) -> Any:
    """Held-out log density of each rung, and of the plug-in estimate that the start would use."""
    import pandas as pd

    scored = dict(fits)
    if start.adapted.posterior.covariance is None:
        scored[f"{start.method}, plug-in"] = start
    rows: dict[str, dict[str, float]] = {}
    full = fits[FULL].predict(test, target="known")
    error = density_error(full, float(np.median(reference.ess)))
    of_row, best = full.tasks.task_of_row, full.log_density()
    for rung, fit in scored.items():
        each = best if rung == FULL else fit.predict(test, target="known").log_density()
        mean, se = mean_over_tasks(each, of_row)
        rows[rung] = {"log_density": mean, "log_density_se": se}
        if rung != FULL:
            gap, gap_se = mean_over_tasks(each - best, of_row)
            rows[rung] |= {"difference": gap, "difference_se": gap_se}
    rows[FLOOR] = {"log_density": error}
    return pd.DataFrame.from_dict(rows, orient="index")


def _remarks(
    reference: Reference, away: dict[str, dict[str, np.ndarray]], without: np.ndarray
) -> list[str]:
    remarks = []
    if without.any():
        remarks.append(
            f"{without.sum()} task(s) have no Gaussian prior and are left out of the first rung's "
            "distances"
        )
    for rung, values in away.items():
        if (point := np.isinf(values["kl"])).any():
            remarks.append(
                f"{rung}: the posterior of {point.sum()} task(s) is a point in some direction, "
                "and its divergence from the full posterior infinite"
            )
    rough = reference.ess < max(FEWEST, 20 * reference.num_coef)
    if rough.any():
        remarks.append(
            f"{rough.sum()} task(s) have fewer than {max(FEWEST, 20 * reference.num_coef)} "
            "effective draws of theta: their distances are near the floor whatever the rung; take "
            "more draws"
        )
    return remarks
