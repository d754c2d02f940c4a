"""What each method says of the same tasks, and how well it predicts rows that none has seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hierbayes import inputs, plots
from hierbayes.adaptation import GradientSteps
from hierbayes.checks import held_out_scores, leave_one_task_out, theta_differences
from hierbayes.checks.differences import score
from hierbayes.comparison.report import formatted, write_report
from hierbayes.errors import InputError, overhearing
from hierbayes.fit import Fit, Prediction
from hierbayes.likelihoods.neural import Neural
from hierbayes.tasks import Tasks

COLUMNS = (
    "log_density", "log_density_se", "difference", "difference_se", "rmse", "rmse_se",
    "coverage_50", "coverage_80", "coverage_95", "width_50", "width_80", "width_95",
    "theta_difference", "theta_sd_ratio", "rows", "left_out", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Several fits of the same tasks, side by side.

    Attributes
    ----------
    fits : dict
        The fits by label.
    table : DataFrame
        A row a method. ``log_density``: mean log predictive density of the held-out rows, with a
        standard error over tasks; ``difference``: the same minus the reference's, on the rows that
        both predict; ``rmse``; ``coverage_50`` … and ``width_50`` … of central predictive
        intervals; ``theta_difference`` and ``theta_sd_ratio`` of θ_j against the reference's
        posterior (in its standard deviations, and their ratio); ``rows`` scored and ``left_out``;
        ``seconds`` to fit.
    reference : str
        Label of the fit that the others are held against.
    scored_on : str
        What the scores are scores of.
    notes : tuple of str
        What to know when reading the table.
    """

    fits: dict[str, Fit]
    table: Any
    reference: str | None
    scored_on: str
    notes: tuple[str, ...] = ()
    predictions: dict[str, Prediction] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        """The table as text, and the notes."""
        lines = [formatted(self.table).to_string(), "", f"Scored on {self.scored_on}."]
        if self.reference is not None:
            lines.append(f"Differences are against {self.reference}.")
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        return formatted(self.table).to_html()

    def plot(self, *, coef: str | None = None) -> Any:
        """Shrinkage, learned prior and held-out score in one figure; returns its axes (3,).

        Of networks the score alone: their coefficients cannot be held against each other.
        """
        import matplotlib.pyplot as plt

        if _one_is_neural(*self.fits.values()):
            _, ax = plt.subplots(figsize=(6, 1.5 + 0.4 * len(self.fits)), layout="constrained")
            return plots.scores(self.table, ax=ax)
        width = 5 + 1.5 * len(self.fits)
        figure, axes = plt.subplots(
            1, 3, figsize=(width + 6, 4.2), layout="constrained",
            width_ratios=[1.1 * len(self.fits) / 2 + 1, 2.5, 2],
        )  # fmt: skip
        plots.shrinkage(self.fits, coef=coef, ax=axes[0])
        plots.learned_prior(self.fits, coef=coef, ax=axes[1])
        plots.scores(self.table, ax=axes[2])
        figure.align_titles()
        return axes

    def report(self, path: Any) -> None:
        """Write one self-contained HTML file: table, pictures, every task, warnings, settings."""
        write_report(self, path)


def compare(
    fits: Mapping[str, Fit | str],
    test: Any = None,
    *,
    support: Any = None,
    reference: str | None = None,
) -> Comparison:
    """Hold several fits of the same tasks against each other.

    Parameters
    ----------
    fits : mapping from label to Fit
        A string in the place of a fit says why a method has none; its row shows dashes.
    test : Tasks or DataFrame, optional
        Held-out rows of known tasks. Without them every task is predicted from the others
        (leave one task out).
    support : Tasks or DataFrame, optional
        New tasks, to which every fit is adapted first; ``test`` then holds other rows of these:
        ``support, query = episodes.draw(500)`` for methods that learn from episodes.
    reference : str, optional
        Label of the fit that θ_j and scores are held against; by default full Bayes, else the
        first fit with a posterior.

    Returns
    -------
    Comparison
        With ``table``, ``plot()`` and ``report(path)``.

    Examples
    --------
    >>> import hierbayes as hb
    >>> df = hb.datasets.radon()
    >>> model, tasks = hb.from_formula("log_radon ~ 1 + floor + (1 | county)", df)
    >>> train, test = tasks.hold_out(0.2, seed=0)
    >>> comparison = hb.compare({
    ...     "no pooling": hb.no_pooling(model, train),
    ...     "empirical Bayes": hb.empirical_bayes(model, train),
    ... }, test=test)
    >>> comparison.table["coverage_95"].between(0.9, 1.0).all()
    np.True_
    """
    import pandas as pd

    inputs.mapping("fits", fits, "a mapping from label to fit")
    usable = {label: fit for label, fit in fits.items() if isinstance(fit, Fit)}
    for label, fit in fits.items():
        if not isinstance(fit, (Fit, str)):
            raise InputError(f"compare takes fits; {label!r} is {type(fit).__name__}")
    if not usable:
        raise InputError("there is no fit to compare")
    if support is not None:
        if test is None:
            raise InputError("support is given without test: pass the rows to be predicted too")
        usable = {label: fit.on(support) for label, fit in usable.items()}
    _check_same_tasks(usable)
    if test is None and any(isinstance(f.model.likelihood, Neural) for f in usable.values()):
        raise InputError(
            "networks are compared on new tasks: support, query = episodes.draw(500), "
            "compare(fits, test=query, support=support)"
        )
    chosen = _reference(usable, reference)
    rows: dict[str, dict[str, float]] = {}
    notes = [f"{label}: {why}" for label, why in fits.items() if isinstance(why, str)]
    predictions: dict[str, Prediction] = {}
    if test is not None:
        predictions = {label: fit.predict(test, target="known") for label, fit in usable.items()}
        rows = {label: held_out_scores(p) for label, p in predictions.items()}
        pointwise = {label: p.log_density() for label, p in predictions.items()}
        held = next(iter(predictions.values())).tasks
        num_tasks = int((held.sizes > 0).sum())
        scored_on = f"{held.num_rows} held-out rows of {num_tasks} known tasks"
    else:
        rows, pointwise, more = _by_task(usable)
        notes += more
        held = next(iter(usable.values())).tasks
        scored_on = "every task, predicted from the others (log density a row of its tasks)"
    for label, fit in usable.items():
        rows[label]["seconds"] = float(fit.info.get("seconds", np.nan))
        if chosen is not None:
            if fit.tasks.coef == usable[chosen].tasks.coef:
                rows[label] |= theta_differences(fit, usable[chosen])
            rows[label] |= _paired(pointwise, label, chosen, held, by_task=test is None)
        if test is not None and rows[label].get("left_out"):
            notes.append(
                f"{label} leaves {rows[label]['left_out']:.0f} row(s) out of its score, which need "
                "a coefficient that it does not know; compare it by `difference`"
            )
    table = pd.DataFrame.from_dict(
        {label: rows.get(label, {}) for label in fits}, orient="index", columns=list(COLUMNS)
    ).astype(float)
    return Comparison(usable, table, chosen, scored_on, tuple(notes), predictions)


def _check_same_tasks(fits: dict[str, Fit]) -> None:
    first_label, first = next(iter(fits.items()))
    for label, fit in fits.items():
        same = (
            (fit.tasks.coef == first.tasks.coef or _one_is_neural(fit, first))
            and fit.tasks.num_rows == first.tasks.num_rows
            and fit.tasks.names.tolist() == first.tasks.names.tolist()
        )
        if not same:
            raise InputError(
                f"{label!r} and {first_label!r} were fitted to different tasks: {fit.tasks} and "
                f"{first.tasks}; compare fits of the same training data"
            )


def _one_is_neural(*fits: Fit) -> bool:
    """Whether coefficients mean different things: weights, features or columns."""
    return any(isinstance(fit.model.likelihood, Neural) for fit in fits)


def _reference(fits: dict[str, Fit], asked: str | None) -> str | None:
    if asked is not None:
        if not isinstance(asked, str) or asked not in fits:
            raise InputError(
                f"reference {inputs.shown(asked)} is not among the fits: {', '.join(fits)}"
            )
        return asked
    full = [label for label, fit in fits.items() if fit.phi_draws is not None]
    posterior = [label for label, fit in fits.items() if _has_posterior(fit) and "mu" in fit.phi]
    return next(iter(full + posterior), None)


def _has_posterior(fit: Fit) -> bool:
    return fit.adapted.posterior.is_distribution


def _by_task(
    fits: dict[str, Fit],
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray], list[str]]:
    """Leave-one-task-out scores: log density a row, and what to say of them."""
    rows: dict[str, dict[str, float]] = {}
    pointwise, notes = {}, []
    for label, fit in fits.items():
        num_rows = fit.tasks.num_rows
        try:
            with overhearing():  # a note says it
                result = leave_one_task_out(fit)
        except InputError as error:
            rows[label], pointwise[label] = {}, np.full(fit.tasks.num_tasks, np.nan)
            notes.append(f"{label}: {error}")
            continue
        values = result["log_density"]
        if isinstance(fit.adaptation, GradientSteps):
            notes.append(
                f"{label}: a task left out is scored at φ, before any step, its rows independent "
                f"of one another; {fit.method} learns no distribution of new tasks"
            )
        pointwise[label] = values
        found = score(values, fit.tasks, "task")
        left_out = num_rows - found.rows
        rows[label] = {"log_density": found.mean, "log_density_se": found.error,
                       "rows": found.rows, "left_out": left_out}  # fmt: skip
        if left_out:
            notes.append(
                f"{label}: {left_out} row(s) are left out of its score, of tasks without which the "
                "others cannot be fitted; compare it by `difference`"
            )
        good_k = result.get("good_k", np.inf)
        bad = int((result.get("pareto_k", np.zeros(1)) > good_k).sum())
        if bad:
            notes.append(
                f"{label}: {bad} task(s) have a Pareto k above {good_k:.2f}; their scores are "
                "rough: hb.checks.leave_one_task_out(fit, refit=True) refits without them"
            )
    return rows, pointwise, notes


def _paired(
    pointwise: dict[str, np.ndarray], label: str, reference: str, held: Tasks, *, by_task: bool
) -> dict[str, float]:
    """The score minus the reference's, on what both predict, with its own standard error."""
    if label == reference:
        return {}
    gap = pointwise[label] - pointwise[reference]
    found = score(gap, held, "task" if by_task else "row")
    return {"difference": found.mean, "difference_se": found.error} if found.tasks else {}
