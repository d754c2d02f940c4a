r"""The two ends between which every method lies.

.. math:: \tau \to \infty: \text{ no pooling, each task alone} \qquad
          \tau \to 0: \text{ complete pooling, one } \theta \text{ for all}
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hierbayes import inputs
from hierbayes.adaptation import Conjugate, Laplace, LeastSquares, MaximumLikelihood, Normal
from hierbayes.adaptation.least_squares import within_tasks
from hierbayes.adaptation.unpooled import determined
from hierbayes.errors import InputError, NotApplicable, announce, listing
from hierbayes.evidence import Integrated
from hierbayes.evidence.profile import profile, profile_problem
from hierbayes.fit import Fit
from hierbayes.fit.method import Method
from hierbayes.fit.outward import Entered, enter
from hierbayes.likelihoods.generalised import GeneralisedLinear
from hierbayes.meta.dispersion import over_all
from hierbayes.meta.dispersion import within as within_likelihood
from hierbayes.meta.marginal import fixed_along
from hierbayes.model import HierarchicalModel, check_model
from hierbayes.numerics import float64
from hierbayes.statistics import placed_statistics, statistics
from hierbayes.tasks import Tasks


def no_pooling(model: HierarchicalModel, tasks: Any, *, sigma: float | None = None) -> Fit:
    r"""Each task alone, by least squares or maximum likelihood: the limit τ → ∞.

    .. math:: \hat\theta_j = X_j^+ (y_j - Z_j\hat\beta) \quad\text{or}\quad
              \hat\theta_j = \arg\max_\theta \log p(D_j \mid \theta, \hat\beta)

    Shared effects β, the noise σ and the family's other parameters are estimated within tasks: at
    the maximum of the evidence under a flat prior on θ_j. Where a task's rows do not determine a
    coefficient the estimate is the one of minimum norm, marked in ``theta_identified`` of the
    DataTree; rows that need it are left out of scores. So are the directions along which a task has
    no maximum of its likelihood, with nothing but zeros or zeros and ones apart: the estimate is
    that of the rows which such a direction leaves unexplained.

    Parameters
    ----------
    model : HierarchicalModel
    tasks : Tasks or DataFrame
    sigma : float, optional
        The noise, where the tasks have too few rows to tell.

    Returns
    -------
    Fit

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
    ...                                known_se="se")
    >>> float(hb.no_pooling(model, tasks).theta.sel(task="A", coef="Intercept"))
    28.0
    """
    return NoPooling(sigma)(model, tasks)


@dataclass(frozen=True)
class NoPooling(Method):
    """No pooling; :func:`no_pooling` says what it is."""

    sigma: float | None = None

    name = "no pooling"
    command = "no_pooling"
    colour, marker, rank = "#777777", "x", 0.0
    compared = True

    def __post_init__(self) -> None:
        if self.sigma is not None:
            inputs.positive("sigma", self.sigma)

    def __call__(
        self, model: HierarchicalModel, tasks: Any, seed: Any = 0, *, progress: bool | None = None
    ) -> Fit:
        """Each task by its own rows; nothing is random here."""
        del seed, progress
        started = time.perf_counter()
        entered = _entered(model, tasks, "no_pooling")
        resolved, tasks = entered.inner_model, entered.inner_tasks
        refuse_idle_sigma(model, self.sigma)
        phi, within, remarks = _within(resolved, tasks, self.sigma)
        gaussian = model.likelihood.gaussian_in_theta
        adaptation = LeastSquares() if gaussian else MaximumLikelihood()
        training = replace(adaptation(resolved, tasks, phi), absorbed=within.absorbed)
        remarks += [*_absorbed(within, tasks), *training.remarks]
        remarks += _undetermined(model, tasks, np.abs(training.blind).max(axis=(1, 2)) > 1e-8)
        fit = Fit(
            self, resolved, tasks, phi, adaptation, training,
            no_evidence="the prior is flat", warnings=announce(remarks),
            info={"seconds": time.perf_counter() - started},
        )  # fmt: skip
        return entered.leave(fit)


def _entered(model: HierarchicalModel, tasks: Any, name: str) -> Entered:
    """The tasks as they are computed with, both ends of pooling reading rows alone."""
    check_model(model)
    tasks = model.tasks(tasks)
    model.check(tasks, learns_prior=False)
    if not model.likelihood.has_location:
        raise NotApplicable(
            f"{name} needs a linear predictor, to tell estimates that exist from infinite ones; "
            "a likelihood from a NumPyro program has none: use empirical_bayes or full_bayes"
        )
    return enter(model, tasks, "rows")


def _absorbed(within: Any, tasks: Tasks) -> list[str]:
    """What to say of shared effects that tasks' own coefficients absorb."""
    if within.identified.all():
        return []
    blind = [c for c, ok in zip(tasks.labels.shared, within.identified, strict=True) if not ok]
    return [
        f"without pooling the shared effect of {listing(blind)} is not identified: each task's "
        "own coefficients absorb it, and are marked as unidentified where they do"
    ]


def _undetermined(model: HierarchicalModel, tasks: Tasks, lacking: np.ndarray) -> list[str]:
    """What to say of tasks whose rows do not determine their coefficients."""
    remarks = []
    if isinstance(model.likelihood, GeneralisedLinear):
        endless = determined(tasks, model.likelihood).endless
        lacking = lacking & ~endless
        if endless.any():
            remarks.append(
                f"the likelihood of {endless.sum()} of {len(endless)} tasks has no maximum "
                f"({listing(tasks.names[endless].tolist(), 3)}): the outcomes are all zero, or "
                "some combination of columns separates them, and the estimate would be infinite. "
                "It is that of the rows which this leaves unexplained, of minimum norm, and marked "
                "as unidentified"
            )
    if lacking.any():
        remarks.append(
            f"{lacking.sum()} of {len(lacking)} tasks do not determine all their coefficients "
            f"alone ({listing(tasks.names[lacking].tolist(), 3)}): minimum-norm estimates there, "
            "marked as unidentified"
        )
    return remarks


def _within(
    model: HierarchicalModel, tasks: Tasks, sigma: float | None
) -> tuple[dict[str, np.ndarray], Any, list[str]]:
    """β and the family's own parameters within tasks, by name; how they were found; remarks."""
    if model.likelihood.gaussian_in_theta:
        within = within_tasks(statistics(tasks))
        phi: dict[str, np.ndarray] = {"beta": within.beta} if tasks.labels.shared else {}
        if "sigma" in model.likelihood.parameters():
            phi["sigma"] = np.asarray(noise(within.sigma, sigma))
        return phi, within, []
    if sigma is not None:
        noise(sigma, sigma)
    found = within_likelihood(model, tasks, sigma)
    return found.phi, found, list(found.remarks)


def refuse_idle_sigma(model: HierarchicalModel, sigma: float | None) -> None:
    """Refuse a σ that the likelihood has no place for."""
    if sigma is None or "sigma" in model.likelihood.parameters():
        return
    if model.likelihood.gaussian_in_theta:
        raise InputError("sigma has no place beside known standard errors; leave it out")
    kind = type(model.likelihood).__name__
    raise InputError(f"the {kind} likelihood has no sigma; leave it out")


def noise(estimate: float, given: float | None) -> float:
    """σ as given, or the pooled within-task estimate, where there is one."""
    if given is not None:
        return inputs.positive("sigma", given)
    if not (np.isfinite(estimate) and estimate > 0):
        raise NotApplicable(
            "sigma cannot be estimated within tasks: the tasks' own coefficients explain every row "
            "without an error (they may have no more rows than coefficients); pass sigma=…, or, "
            "where tasks have more than one row, use empirical_bayes, which learns it beside tau"
        )
    return estimate


def complete_pooling(model: HierarchicalModel, tasks: Any) -> Fit:
    r"""One θ for all tasks, by least squares or maximum likelihood: the limit τ → 0.

    .. math:: \theta_j = \hat\mu + \hat\Gamma w_j

    Parameters
    ----------
    model : HierarchicalModel
    tasks : Tasks or DataFrame

    Returns
    -------
    Fit
        With ``tau`` = 0; ``log_evidence`` is the log likelihood.

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
    ...                                known_se="se")
    >>> round(float(hb.complete_pooling(model, tasks).phi["mu"][0]), 4)
    7.6856
    """
    return CompletePooling()(model, tasks)


@dataclass(frozen=True)
class CompletePooling(Method):
    """Complete pooling; :func:`complete_pooling` says what it is."""

    name = "complete pooling"
    command = "complete_pooling"
    colour, marker, rank = "#000000", "|", 1.0
    compared = True

    def __call__(
        self, model: HierarchicalModel, tasks: Any, seed: Any = 0, *, progress: bool | None = None
    ) -> Fit:
        """All rows as those of one task; nothing is random here."""
        del seed, progress
        started = time.perf_counter()
        entered = _entered(model, tasks, "complete_pooling")
        gaussian = model.likelihood.gaussian_in_theta
        fit, along = (self._by_least_squares if gaussian else self._by_likelihood)(entered)
        fit = replace(fit, info={"seconds": time.perf_counter() - started})
        return entered.leave(fit, along)

    def _by_least_squares(self, entered: Entered) -> tuple[Fit, Any]:
        """The fit, weighted by what is known of the noise, and how φ̂ moves."""
        resolved, tasks, adaptation = entered.inner_model, entered.inner_tasks, Conjugate()
        shape, fixed = resolved.shape(tasks), resolved.fixed(tasks)
        known_noise = "sigma" not in shape.parameters
        d = len(shape.coef)
        with float64():
            problem = profile_problem(
                placed_statistics(tasks), shape, reml=False, known_noise=known_noise
            )
            best = profile(problem, np.zeros((d, d)))
        phi = fixed.phi(np.asarray(best.fixed)) | {"tau": np.zeros(d)}
        if not known_noise:
            phi["sigma"] = np.asarray(best.sigma)
        covariance = np.asarray(best.covariance)
        fit = Fit(
            self, resolved, tasks, phi, adaptation, adaptation(resolved, tasks, phi),
            standard_errors=fixed.phi(np.sqrt(np.diag(covariance))),
            evidence=float(best.log_evidence),
        )  # fmt: skip
        return fit, fixed_along(fixed, covariance)

    def _by_likelihood(self, entered: Entered) -> tuple[Fit, Any]:
        """Maximum likelihood over all tasks; standard errors from its curvature."""
        model, tasks = entered.inner_model, entered.inner_tasks
        found = over_all(model, tasks)
        phi = found.phi | {"tau": np.zeros(len(tasks.coef))}
        with float64():
            location = np.asarray(model.prior.location(phi, tasks.task_predictors))
        fit = Fit(
            self, model, tasks, phi, Laplace(),
            Normal(location, np.zeros((*location.shape, location.shape[1]))),
            standard_errors=found.errors, evidence=found.log_likelihood,
            warnings=announce(found.remarks),
        )  # fmt: skip
        return fit, found.along

    def scores_without(self, fit: Fit) -> np.ndarray | None:
        """Where tasks are not Gaussian: φ̂ from the rows of the others, from where all have led."""
        if fit.model.likelihood.gaussian_in_theta:
            return None
        scores = np.full(fit.tasks.num_tasks, np.nan)
        for j in np.flatnonzero(fit.tasks.sizes > 0):
            try:
                phi = over_all(fit.model, fit.tasks, without=int(j)).phi
            except InputError:
                continue
            at_zero = phi | {"tau": np.zeros(len(fit.tasks.coef))}
            scores[j] = Integrated(Laplace())(fit.model, fit.tasks, at_zero)[j]
        return scores
