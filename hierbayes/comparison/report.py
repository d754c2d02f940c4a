"""A comparison as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import numpy as np

from hierbayes import plots
from hierbayes.files import write_whole

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
    first = next(iter(comparison.fits.values()))
    tasks = first.tasks
    warnings = [
        f'<div class="warning"><b>{html.escape(label)}</b>: {html.escape(warning)}</div>'
        for label, fit in comparison.fits.items()
        for warning in fit.warnings
    ]
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in comparison.notes)
    against = ""
    if comparison.reference is not None:
        against = f" Differences are against {html.escape(comparison.reference)}."
    reading = "".join(
        f"<dt><code>{html.escape(name)}</code></dt><dd>{html.escape(text)}</dd>"
        for name, text in _READING.items()
    )
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
<details><summary>How to read the columns</summary><dl>{reading}</dl></details>
<h2>What a careful colleague would say</h2>
{"".join(warnings) or "<p>Nothing: no warnings.</p>"}
<h2>Pictures</h2>{pictures}
<h2>The learned priors</h2><div class="wide">{_priors(comparison)}</div>
<h2>Every task</h2><details open><summary>Estimates of θ_j by method</summary>
<div class="wide">{_tasks(comparison)}</div></details>
<h2>Settings</h2><div class="wide">{_settings(comparison)}</div>
</body></html>
"""


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
