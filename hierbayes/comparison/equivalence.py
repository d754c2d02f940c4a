r"""How far K gradient steps are from the full posterior, and why: one table, one picture.

Distances of one fit's θ from another's, task by task, and what Monte-Carlo error alone gives.

How far apart two posteriors of the same tasks are, by their means and covariances.

.. math::

    \text{KL}(q \,\|\, p) &= \tfrac12\left[\operatorname{tr} V^{-1}\Sigma + \delta^\top V^{-1}\delta
        - d + \log |V| / |\Sigma|\right], \qquad \delta = m - \mu \\
    W_2^2(q, p) &= \lVert\delta\rVert^2 + \operatorname{tr}\!\left(\Sigma + V
        - 2 (V^{1/2} \Sigma V^{1/2})^{1/2}\right)

for q = N(μ, Σ) and p = N(m, V). Where m and V come from draws, each quantity has a floor: what it
would be if q were p itself and only the draws' own error were left.

From K gradient steps to the full posterior, one change at a time.

.. math::

    N(\theta_K, \Sigma_K) \;\to\; \text{MAP under } T \;\to\; p(\theta_j \mid D_j, \hat\varphi)
    \;\to\; p(\theta_j \mid D_{1..J})

The first step replaces the prior that the steps imply by the learned one, the second moves φ to
where the evidence is largest (and, where tasks are not Gaussian, takes the posterior itself in the
place of the normal at its mode), the third averages over φ.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes import inputs, plots
from hierbayes.adaptation import Adaptation, Conjugate, Draws, Laplace, Posterior
from hierbayes.adaptation.step_length import largest_curvature
from hierbayes.checks.scores import mean_over_tasks
from hierbayes.equivalence import EquivalentPrior, Status, equivalent_steps
from hierbayes.equivalence.implied_posterior import ImpliedPosterior
from hierbayes.errors import InputError, overhearing
from hierbayes.fit import Fit, Prediction
from hierbayes.fit.method import Derived
from hierbayes.meta import empirical_bayes
from hierbayes.meta.diagnostics import ess, remarks
from hierbayes.meta.inner_loop import check_inner_step, nth_seed
from hierbayes.meta.sampling import GivenPhi, run_nuts
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import as_key, as_rng, float64
from hierbayes.tasks import Tasks

STEPS, MODE, POINT, FULL = "gradient steps", "MAP, learned prior", "empirical Bayes", "full Bayes"

CAUSES = {
    (STEPS, MODE): "the shape of the prior (and where tasks that are not Gaussian are linearised)",
    (
        MODE,
        POINT,
    ): "where phi stands, sigma included (and the exact posterior in the place of a normal)",
    (POINT, FULL): "the uncertainty of phi",
}
"""What changes between one rung and the next."""

_CENTRE = ("mu", "gamma", "beta", "sigma")
_SPREAD = ("tau", "corr")


def build_ladder(
    start: Fit,
    posterior: Fit,
    point: Fit | None,
    num_steps: int | None,
    step_size: float | str | None,
    num_chains: int,
    num_draws: int,
    seed: int | jax.Array,
) -> tuple[dict[str, Fit], EquivalentPrior]:
    """The four rungs as fits of the same tasks, with draws of θ, and what the steps imply."""
    model, tasks = posterior.model, posterior.tasks
    model.require_gaussian_prior(
        "equivalence_report", "the prior that gradient steps imply is Gaussian",
        "fit with priors.Gaussian()",
    )  # fmt: skip
    gaussian = model.likelihood.gaussian_in_theta
    if point is None and gaussian:
        with overhearing():  # they are in the fit that is returned
            point = empirical_bayes(model, tasks, num_draws=num_draws, num_chains=num_chains)
    learned = posterior if point is None else point
    centre = {k: np.asarray(start.phi[k]) for k in _CENTRE if k in start.phi}
    spread = {k: np.asarray(learned.phi[k]) for k in _SPREAD if k in learned.phi}
    steps = _implied_steps(start, num_steps, step_size)
    implied = steps.prior(model, tasks, centre)
    exact: Adaptation = Conjugate() if gaussian else Laplace()
    both, draws = centre | spread, (num_chains, num_draws)
    at_mode = exact(model, tasks, both)
    rungs = {
        STEPS: _drawn(STEPS, model, tasks, centre, steps, steps.read(implied), draws, seed),
        MODE: _drawn(MODE, model, tasks, both, exact, at_mode, draws, nth_seed(seed, 1)),
    }
    if point is None:
        point = _sampled(model, tasks, posterior.phi, draws, nth_seed(seed, 2))
    return {**rungs, POINT: point, FULL: posterior}, implied


def _implied_steps(start: Fit, num_steps: Any, step_size: Any) -> ImpliedPosterior:
    """The gradient steps on the ladder's first rung, in the columns of the user."""
    loss: Any = getattr(start.adaptation, "loss", "sum")
    count, size = _steps(start, num_steps, step_size)
    if step_size is not None or start.at is None or "num_steps" not in start.info:
        return ImpliedPosterior(count, size, loss)
    size, inside = start.at.steps(size)
    return ImpliedPosterior(count, size, loss, np.asarray(inside).tolist())


def _steps(start: Fit, num_steps: int | None, step_size: float | str | None) -> tuple[int, float]:
    """K and η as asked, as the fit took them, or as they come closest to the fit's prior."""
    if num_steps is not None:
        num_steps = inputs.count("num_steps", num_steps)
    if isinstance(step_size, str) or not (step_size is None or np.iterable(step_size)):
        check_inner_step(step_size)
    if num_steps is None and "num_steps" not in start.info and step_size is not None:
        raise InputError(f"{start.method} takes no gradient steps: pass num_steps with step_size")
    if num_steps is None and "num_steps" not in start.info and np.any(start.phi.get("tau", 0) > 0):
        table = equivalent_steps(start.model, start.tasks, start.phi).table
        finite = table[np.isfinite(table.index)]
        best = finite["risk_ratio"].idxmin()
        return int(best), float(finite.loc[best, "step_size"])
    if num_steps is None and "num_steps" not in start.info:
        raise InputError(f"{start.method} takes no gradient steps: pass num_steps and step_size")
    if getattr(start.adaptation, "optimiser", None) is not None:
        raise InputError(
            f"the inner loop of {start.method} had an optimiser of its own; the report is for "
            "plain gradient steps"
        )
    size: Any = step_size
    if size is None:
        size = start.phi.get("step_size", start.info.get("step_size", "auto"))
    if np.ndim(size):
        raise InputError(f"step_size must be one number for all steps, found {size!r}")
    if size == "auto":
        loss = getattr(start.adaptation, "loss", "sum")
        size = 1 / float(largest_curvature(start.model, start.tasks, dict(start.phi), loss).max())
    if num_steps is None:
        num_steps = int(start.info["num_steps"])
    return num_steps, float(size)


def _drawn(
    rung: str,
    model: HierarchicalModel,
    tasks: Tasks,
    phi: dict[str, np.ndarray],
    adaptation: Adaptation,
    adapted: Posterior,
    draws: tuple[int, int],
    seed: int | jax.Array,
) -> Fit:
    """A fit at this φ, with draws from its normal posterior."""
    values = adapted.draw(as_rng(seed), draws[0] * draws[1])
    return Fit(
        Derived(rung), model, tasks, phi, adaptation, adapted,
        theta_draws=values.reshape(*draws, *adapted.mean.shape),
        no_evidence="phi was taken from another fit", warnings=adapted.remarks,
        info={k: v for k, v in vars(adaptation).items() if k in ("num_steps", "step_size")},
    )  # fmt: skip


def _sampled(
    model: HierarchicalModel, tasks: Tasks, phi: Any, draws: tuple[int, int], seed: int | jax.Array
) -> Fit:
    """The posterior of every θ_j at this φ, by NUTS."""
    phi = {name: np.asarray(value) for name, value in phi.items()}
    rows, of_row = model.likelihood.arrange(tasks)
    with float64():
        root = model.prior.scale_tril(phi)
        location = jnp.asarray(model.prior.location(phi, tasks.task_predictors))
        start = {"z": jnp.zeros((draws[0], *location.shape))}
        found, stats = run_nuts(
            GivenPhi(model.without_encoder()), (phi, location, root, rows, of_row),
            as_key(seed), start, dense=False, num_draws=draws[1], num_chains=draws[0],
            num_warmup=500, target_accept=0.9, progress=None,
        )  # fmt: skip
    theta = np.asarray(location) + found["z"] @ np.asarray(root).T
    flat = theta.reshape(-1, *theta.shape[2:])
    return Fit(
        Derived("posterior at a point"), model, tasks, phi, Laplace(), Draws.of(flat),
        theta_draws=theta, sample_stats=stats,
        no_evidence="phi was taken from the full posterior's mean",
        warnings=(
            "tasks are not Gaussian, and their evidence has no closed form: the third rung is the "
            "posterior of theta at the full posterior's mean of phi, drawn by NUTS",
            *remarks({"theta": theta}, None, stats, tasks, {}),
        ),
    )  # fmt: skip


LEVELS = (0.5, 0.8, 0.95)
"""Probabilities of the intervals that are held against the draws."""

SINGULAR = 1e-13
"""Eigenvalue of a correlation matrix below which a direction has no variance but rounding."""


def kl_divergence(
    mean: np.ndarray, covariance: np.ndarray, to_mean: np.ndarray, to_covariance: np.ndarray
) -> np.ndarray:
    """KL(N(mean, covariance) ‖ N(to_mean, to_covariance)) of each task, (J,), in nats.

    inf where one is a point in some direction and the other is not, or is another point; where
    both are the same point in some direction, the divergence of what is left.
    """
    sd = _sd(to_covariance)
    sd = np.where(sd > 0, sd, np.where(_sd(covariance) > 0, _sd(covariance), 1.0))
    outer = sd[..., :, None] * sd[..., None, :]
    gap, here, there = (to_mean - mean) / sd, covariance / outer, to_covariance / outer
    values, vectors = np.linalg.eigh(there)
    spread = values > SINGULAR
    root = vectors * np.where(spread, 1 / np.sqrt(np.where(spread, values, 1.0)), 0.0)[..., None, :]
    white = np.swapaxes(root, -1, -2) @ here @ root
    moved = (np.swapaxes(root, -1, -2) @ gap[..., None])[..., 0]
    own = np.linalg.eigvalsh(0.5 * (white + np.swapaxes(white, -1, -2)))
    rank = spread.sum(-1)
    # what is left out of the determinant are zeros, in the directions where `there` is a point
    counted = np.arange(own.shape[-1]) >= own.shape[-1] - rank[..., None]
    with np.errstate(divide="ignore"):
        log_det = np.log(np.where(counted, np.maximum(own, 0.0), 1.0)).sum(-1)
    found = 0.5 * (own.sum(-1) + (moved**2).sum(-1) - rank - log_det)
    beside = np.where(spread[..., None, :], 0.0, vectors)
    away = np.abs(np.swapaxes(beside, -1, -2) @ gap[..., None]).max((-1, -2))
    wide = np.linalg.norm(np.swapaxes(beside, -1, -2) @ here @ beside, axis=(-1, -2))
    # up to the rounding of means and of covariances
    size = (np.maximum(np.abs(mean), np.abs(to_mean)) / sd).max(-1)
    elsewhere = (away > 1e-12 * size) | (
        wide > SINGULAR * np.maximum(np.linalg.norm(here, axis=(-1, -2)), 1.0)
    )
    elsewhere |= _rank(covariance) < rank
    return np.where(elsewhere, np.inf, np.maximum(found, 0.0))


def wasserstein(
    mean: np.ndarray, covariance: np.ndarray, to_mean: np.ndarray, to_covariance: np.ndarray
) -> np.ndarray:
    """2-Wasserstein distance of each task, (J,), in sds of the second posterior.

    Every coefficient is divided by its standard deviation under the second posterior, so that
    coefficients of different units add up; where that is zero the distance is inf, or nothing if
    the first posterior is the same point.
    """
    sd = _sd(to_covariance)
    point = sd == 0
    other = point & ((mean != to_mean) | (_sd(covariance) > 0))
    sd = np.where(point, 1.0, sd)
    gap = np.where(point, 0.0, to_mean - mean) / sd
    outer = sd[..., :, None] * sd[..., None, :]
    here, there = covariance / outer, to_covariance / outer
    root = _root(there)
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ here @ root), 0.0)).sum(-1)
    traces = np.trace(here, axis1=-2, axis2=-1) + np.trace(there, axis1=-2, axis2=-1)
    found = np.sqrt((gap**2).sum(-1) + np.maximum(traces - 2 * cross, 0.0))
    return np.where(other.any(-1), np.inf, found)


def _sd(covariance: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(np.diagonal(covariance, axis1=-2, axis2=-1), 0.0))


def _rank(covariance: np.ndarray) -> np.ndarray:
    """In how many directions each is not a point, whatever the units of its coefficients."""
    sd = np.where(_sd(covariance) > 0, _sd(covariance), 1.0)
    return (np.linalg.eigvalsh(covariance / (sd[..., :, None] * sd[..., None, :])) > SINGULAR).sum(
        -1
    )


def _root(matrices: np.ndarray) -> np.ndarray:
    """Symmetric square roots."""
    values, vectors = np.linalg.eigh(matrices)
    scaled = vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :]
    return scaled @ np.swapaxes(vectors, -1, -2)


def kl_floor(num_coef: int, ess: np.ndarray) -> np.ndarray:
    """d (d + 3) / (4 ESS): the expected KL from a normal to its own moments out of ESS draws."""
    return num_coef * (num_coef + 3) / (4 * ess)


def wasserstein_floor(num_coef: int, ess: np.ndarray) -> np.ndarray:
    """√((d + d (d + 1) / 4) / ESS): the same for the distance, for coefficients of unit sd.

    The means' errors give d / ESS. An error E in the covariance moves its root by E / 2, and
    E‖E‖² = d (d + 1) / ESS where the coefficients are uncorrelated.
    """
    return np.sqrt((num_coef + num_coef * (num_coef + 1) / 4) / ess)


def coverage(
    mean: np.ndarray, covariance: np.ndarray, draws: np.ndarray, levels: tuple[float, ...] = LEVELS
) -> np.ndarray:
    """Share of draws (S, J, d) inside central normal intervals, by level and task: (L, J)."""
    from scipy import stats

    sd = np.sqrt(np.maximum(np.diagonal(covariance, axis1=-2, axis2=-1), 0.0))
    away = np.abs(draws - mean)
    return np.array(
        [(away <= stats.norm.ppf(0.5 + level / 2) * sd).mean(axis=(0, -1)) for level in levels]
    )


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
