"""What each method says of the same tasks, and how well it predicts rows that none has seen.

A comparison as one HTML file that needs nothing else.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hierbayes import inputs, plots
from hierbayes.adaptation import GradientSteps
from hierbayes.checks import held_out_scores, leave_one_task_out, theta_differences
from hierbayes.checks.differences import score
from hierbayes.errors import InputError, overhearing
from hierbayes.files import write_whole
from hierbayes.fit import Fit, Prediction
from hierbayes.likelihoods.neural import Neural
from hierbayes.tasks import Tasks

DASH = "—"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 78rem; margin: 2rem auto;
       padding: 0 1.2rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; } .wide { overflow-x: auto; }
th, td { padding: .28rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
thead th { border-bottom: 2px solid #999; } img { max-width: 100%; }
.warning { border-left: 4px solid #E69F00; padding: .2rem .8rem; margin: .4rem 0; }
code { background: #f3f3f3; padding: 0 .25rem; } dt { font-weight: 600; }
details { margin: 1rem 0; }
"""

_READING = {
    "log_density": "mean log predictive density of a held-out row; higher is better. Its standard "
    "error treats tasks, not rows, as the units",
    "difference": "log_density minus the reference's on the rows that both predict; its standard "
    "error is that of the paired difference",
    "rmse": "root mean squared error of the predictive mean, in the outcome's units",
    "coverage_…": "share of held-out rows inside the central predictive interval; 50, 80 and 95 % "
    "are wanted",
    "width_…": "mean width of these intervals; narrower is better at the same coverage",
    "theta_difference": "mean |θ_j − reference's θ_j| in posterior standard deviations of the "
    "reference",
    "theta_sd_ratio": "posterior standard deviation of θ_j over the reference's (geometric mean); "
    "below 1 claims more certainty",
}


def formatted(table: Any) -> Any:
    """The table as text: three decimals, dashes where there is nothing."""
    import pandas as pd

    whole = {"rows", "left_out"}

    def cell(column: str, value: float) -> str:
        if not np.isfinite(value):
            return DASH
        return f"{value:.0f}" if column in whole else f"{value:.3f}"

    shown = [c for c in table.columns if table[c].notna().any()]
    text = {c: [cell(c, v) for v in table[c].astype(float)] for c in shown}
    return pd.DataFrame(text, index=table.index)


def write_report(comparison: Any, path: Any) -> None:
    """Write the report, whole or not at all."""
    write_whole(path, render(comparison).encode("utf-8"))


def render(comparison: Any) -> str:
    """The page as a string."""
    tasks = next(iter(comparison.fits.values())).tasks
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in comparison.notes)
    against = ""
    if comparison.reference is not None:
        against = f" Differences are against {html.escape(comparison.reference)}."
    pictures = "".join(_pictures(comparison))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>hierbayes comparison</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style></head><body>
<h1>{html.escape(tasks.labels.outcome)} in {tasks.num_tasks} tasks
    ({html.escape(tasks.labels.task)})</h1>
<p>{html.escape(_model_in_words(comparison))}</p>
<h2>Scores</h2>
<div class="wide">{formatted(comparison.table).to_html(border=0)}</div>
<p>Scored on {html.escape(comparison.scored_on)}.{against}</p><ul>{notes}</ul>
<details><summary>How to read the columns</summary><dl>{_reading()}</dl></details>
<h2>What a careful colleague would say</h2>
{_warnings(comparison) or "<p>Nothing: no warnings.</p>"}
<h2>Pictures</h2>{pictures}
<h2>The learned priors</h2><div class="wide">{_priors(comparison)}</div>
<h2>Every task</h2><details open><summary>Estimates of θ_j by method</summary>
<div class="wide">{_tasks(comparison)}</div></details>
<h2>Settings</h2><div class="wide">{_settings(comparison)}</div>
</body></html>
"""


def _reading() -> str:
    """How to read the columns of the table."""
    return "".join(
        f"<dt><code>{html.escape(name)}</code></dt><dd>{html.escape(text)}</dd>"
        for name, text in _READING.items()
    )


def _warnings(comparison: Any) -> str:
    """Every fit's warnings."""
    return "".join(
        f'<div class="warning"><b>{html.escape(label)}</b>: {html.escape(warning)}</div>'
        for label, fit in comparison.fits.items()
        for warning in fit.warnings
    )


def _model_in_words(comparison: Any) -> str:
    fit = next(iter(comparison.fits.values()))
    tasks, labels = fit.tasks, fit.tasks.labels
    parts = getattr(fit.model.encoder, "parts", None)
    words = [f"{tasks.num_rows} rows."]
    if parts is not None:
        words.insert(0, f"{parts.text}.")
    words.append(f"Varying between tasks: {', '.join(tasks.coef)}.")
    if labels.shared:
        words.append(f"Shared: {', '.join(labels.shared)}.")
    return " ".join(words)


def _pictures(comparison: Any) -> list[str]:
    import matplotlib.pyplot as plt

    images = []
    with plt.rc_context({"figure.dpi": 110, "figure.max_open_warning": 0}):
        for coef in next(iter(comparison.fits.values())).tasks.coef[:4]:
            for draw in (plots.shrinkage, plots.learned_prior, plots.forest):
                ax = draw(comparison.fits, coef=coef)
                images.append(_image(ax, f"{draw.__name__} of {coef}"))
        if comparison.table["log_density"].notna().any():
            images.append(_image(plots.scores(comparison.table), "held-out scores"))
    return images


def _image(ax: Any, about: str) -> str:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    ax.figure.savefig(buffer, format="png")
    plt.close(ax.figure)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<p><img alt="{html.escape(about)}" src="data:image/png;base64,{data}"></p>'


def _priors(comparison: Any) -> str:
    import pandas as pd

    columns = {}
    for label, fit in comparison.fits.items():
        summary = fit.summary()
        estimate, spread = ("mean", "sd") if "mean" in summary else ("estimate", "se")
        columns[label] = {
            name: _with_spread(row[estimate], row[spread]) for name, row in summary.iterrows()
        }
    return pd.DataFrame(columns).fillna("—").to_html(border=0)


def _tasks(comparison: Any) -> str:
    import pandas as pd

    first = next(iter(comparison.fits.values())).tasks
    columns: dict[Any, Any] = {"rows": first.sizes}
    for k, coef in enumerate(first.coef):
        for label, fit in comparison.fits.items():
            means, sds = fit.theta.values[:, k], fit.adapted.sd.values[:, k]
            known = fit.adapted.posterior.identified[:, k]
            cells = [_with_spread(m, s) for m, s in zip(means, sds, strict=True)]
            cells = [c if ok else "—" for c, ok in zip(cells, known, strict=True)]
            columns[f"{coef}, {label}"] = cells
    return pd.DataFrame(columns, index=first.names).to_html(border=0)


def _settings(comparison: Any) -> str:
    import pandas as pd

    settings = {
        label: {name: str(value) for name, value in fit.info.items()}
        for label, fit in comparison.fits.items()
    }
    return pd.DataFrame.from_dict(settings, orient="index").fillna("").to_html(border=0)


def _with_spread(mean: Any, spread: Any) -> str:
    mean, spread = float(mean), float(spread)
    return f"{mean:.3g} ± {spread:.2g}" if np.isfinite(spread) else f"{mean:.3g}"


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
    usable = _usable(fits, test, support)
    chosen = _reference(usable, reference)
    notes = [f"{label}: {why}" for label, why in fits.items() if isinstance(why, str)]
    predictions: dict[str, Prediction] = {}
    if test is not None:
        predictions = {label: fit.predict(test, target="known") for label, fit in usable.items()}
        rows = {label: held_out_scores(p) for label, p in predictions.items()}
        pointwise = {label: p.log_density() for label, p in predictions.items()}
        notes += _left_out(rows)
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
    table = pd.DataFrame.from_dict(
        {label: rows.get(label, {}) for label in fits}, orient="index", columns=list(COLUMNS)
    ).astype(float)
    return Comparison(usable, table, chosen, scored_on, tuple(notes), predictions)


def _usable(fits: Mapping[str, Fit | str], test: Any, support: Any) -> dict[str, Fit]:
    """The fits to compare, adapted to the support; refused where they cannot be compared."""
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
    if test is None and _one_is_neural(*usable.values()):
        raise InputError(
            "networks are compared on new tasks: support, query = episodes.draw(500), "
            "compare(fits, test=query, support=support)"
        )
    return usable


def _left_out(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What to say of the methods that cannot predict all held-out rows."""
    return [
        f"{label} leaves {row['left_out']:.0f} row(s) out of its score, which need "
        "a coefficient that it does not know; compare it by `difference`"
        for label, row in rows.items()
        if row.get("left_out")
    ]


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
