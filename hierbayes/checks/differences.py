r"""Differences between the scores of several fits, with tasks as the units of sampling.

.. math:: \hat\Delta = \frac{\sum_j \Delta_j}{\sum_j n_j}, \qquad
          \Delta_j = \sum_{i \in j} \left[\log p_A(y_{ij}) - \log p_B(y_{ij})\right]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from hierbayes import inputs
from hierbayes.checks.scores import mean_of_totals
from hierbayes.errors import InputError, listing
from hierbayes.tasks import Tasks

Per = Literal["row", "task"]


class Score(NamedTuple):
    """A mean, its standard error over tasks, and of how many rows and tasks."""

    mean: float
    error: float
    rows: int
    tasks: int


def score_differences(
    scores: Mapping[str, Any],
    tasks: Tasks,
    *,
    reference: str | None = None,
    per: Per = "row",
    by: Literal["row", "task"] | None = None,
) -> Any:
    r"""Log densities of several fits on the same tasks, and their differences to one of them.

    .. math::

        \text{se}^2 = \frac{J}{J-1} \sum_j (\Delta_j - \hat\Delta\, n_j)^2
            \Big/ \Big(\sum_j n_j\Big)^2

    Two fits fail on the same hard tasks, so their difference is known better than either score,
    and rows of one task fail together, so that rows are no units of sampling.

    Parameters
    ----------
    scores : mapping from label to array
        Log predictive densities of every row, (N,), or of every task, (J,): of
        ``prediction.log_density()``, ``leave_one_row_out(fit)["log_density"]`` or
        ``leave_one_task_out(fit)["log_density"]``. NaN where a fit has none.
    tasks : Tasks
        The tasks that were scored.
    reference : str, optional
        Whom the others are held against; the best by default.
    per : "row" or "task"
        Means a row, or a task; J times a mean a task is the total elpd.
    by : "row" or "task", optional
        What a number is the score of, where (N,) and (J,) are the same length.

    Returns
    -------
    DataFrame
        A row a fit: ``log_density`` and ``log_density_se``; ``difference`` to the reference and
        ``difference_se``, on what both score; ``rows`` and ``tasks`` scored. ``attrs["reference"]``
        names the reference. With few tasks (below 20 or so) a standard error says little.

    Raises
    ------
    InputError
        For a length that is neither N nor J, an unknown reference, or nothing scored.

    References
    ----------
    Vehtari, Gelman and Gabry (2017), Practical Bayesian model evaluation using leave-one-out
    cross-validation and WAIC, Statistics and Computing 27(5).

    Examples
    --------
    >>> import numpy as np, hierbayes as hb
    >>> tasks = hb.Tasks.from_arrays([(np.ones((2, 1)), np.zeros(2))] * 3)
    >>> scores = {"a": np.array([-1.0, -2, -1, -1, -3, -1]), "b": -2 * np.ones(6)}
    >>> table = hb.checks.score_differences(scores, tasks)
    >>> table[["log_density", "difference", "difference_se"]].round(3).to_dict("list")
    {'log_density': [-1.5, -2.0], 'difference': [0.0, -0.5], 'difference_se': [0.0, 0.289]}
    """
    import pandas as pd

    inputs.mapping("scores", scores, "a mapping from label to scores")
    inputs.instance("tasks", tasks, Tasks, "Tasks")
    inputs.one_of("per", per, ("row", "task"))
    if not scores:
        raise InputError("there are no scores to compare")
    arrays = {label: _scores(label, values) for label, values in scores.items()}
    units = {label: _unit(label, values, tasks, by) for label, values in arrays.items()}
    if len(set(units.values())) > 1:
        raise InputError(
            f"scores by row and by task cannot be compared: {listing(list(units.items()))}; "
            "pass the same of every fit"
        )
    each = {label: score(values, tasks, units[label], per) for label, values in arrays.items()}
    chosen = _reference(each, reference)
    rows = {}
    for label, found in each.items():
        with np.errstate(invalid="ignore"):  # an outcome that both hold for impossible
            apart = arrays[label] - arrays[chosen]
        gap = score(apart, tasks, units[label], per)
        rows[label] = {
            "log_density": found.mean, "log_density_se": found.error, "difference": gap.mean,
            "difference_se": gap.error, "rows": found.rows, "tasks": found.tasks,
        }  # fmt: skip
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.attrs["reference"] = chosen
    return table


def score(values: np.ndarray, tasks: Tasks, by: str, per: Per = "row") -> Score:
    """The mean of scores by row or by task, over those that are numbers."""
    known = ~np.isnan(values)
    if by == "row":
        of_row = tasks.task_of_row[known]
        totals = np.bincount(of_row, values[known], tasks.num_tasks)
        sizes = np.bincount(of_row, minlength=tasks.num_tasks)
    else:
        totals, sizes = np.where(known, values, 0.0), np.where(known, tasks.sizes, 0)
    if not sizes.any():
        return Score(float("nan"), float("nan"), 0, 0)
    rows, held = int(sizes.sum()), int((sizes > 0).sum())
    with np.errstate(invalid="ignore"):  # −∞ has no standard error
        mean, error = mean_of_totals(totals, sizes if per == "row" else sizes > 0)
    return Score(mean, error, rows, held)


def _reference(scores: Mapping[str, Score], reference: str | None) -> str:
    """Whom the others are held against: the best by default."""
    known = {label: found.mean for label, found in scores.items() if found.tasks}
    if not known:
        raise InputError("no fit has a score of any task: all are NaN")
    if reference is None:
        return max(known, key=lambda label: known[label])
    if not (isinstance(reference, str) and reference in scores):
        raise InputError(
            f"reference {inputs.shown(reference)} is not among the scores: {listing(list(scores))}"
        )
    return reference


def _scores(label: str, values: Any) -> np.ndarray:
    """Scores as float64; NaN and infinite ones are scores too."""
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise InputError(f"the scores of {label!r} are no array of numbers: {error}") from error


def _unit(label: str, values: np.ndarray, tasks: Tasks, by: str | None) -> str:
    """What a number is the score of: "row" or "task"."""
    lengths = {"row": tasks.num_rows, "task": tasks.num_tasks}
    if by is not None:
        inputs.one_of("by", by, lengths)
    fitting = [unit for unit, n in lengths.items() if values.shape == (n,) and by in (None, unit)]
    if not fitting:
        raise InputError(
            f"the scores of {label!r} have shape {values.shape}, expected one of each of "
            f"{tasks.num_rows} rows or {tasks.num_tasks} tasks"
        )
    if len(fitting) > 1 and not (tasks.sizes == 1).all():
        raise InputError(
            f"there are as many rows as tasks, {tasks.num_rows}: say which the scores are of, "
            'by="row" or by="task"'
        )
    return fitting[-1]
