r"""Tasks never seen: adapted on a few rows, judged on others. What MAML is trained for.

.. math::

    \log p(D_j^{\text{query}} \mid D_j^{\text{support}}, D_{1..J})
        = \log p(D_j^{\text{support}}, D_j^{\text{query}} \mid D_{1..J})
        - \log p(D_j^{\text{support}} \mid D_{1..J})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import logsumexp

from hierbayes.adaptation import PointAdaptation
from hierbayes.checks.differences import score, score_differences
from hierbayes.checks.leave_out import evidence_of
from hierbayes.checks.scores import root_mean_square
from hierbayes.errors import InputError, announce, listing
from hierbayes.fit import Fit, Prediction
from hierbayes.fit.adapted import check_columns
from hierbayes.tasks import Tasks
from hierbayes.tasks.joining import joined


def new_task_scores(
    fits: Fit | Mapping[str, Fit], support: Any, query: Any, *, reference: str | None = None
) -> Any:
    r"""How well each fit predicts some rows of tasks that it has not seen, from other rows of them.

    .. math::

        \log p(D_j^{q} \mid D_j^{s}) = \log \int p(D_j^{s}, D_j^{q} \mid \varphi)\,
            p(\varphi \mid D_{1..J})\, d\varphi
            - \log \int p(D_j^{s} \mid \varphi)\, p(\varphi \mid D_{1..J})\, d\varphi

    φ is learned from the training tasks, and of a new task its own support is all that is added: in
    the joint density the draws of φ are weighted by p(D_j^s | φ), task by task; row by row they are
    as they were learned, and the support moves θ_j alone. At a point φ̂
    both integrals are the evidence there, and the difference is log ∫ p(D^q | θ) p(θ | D^s, φ̂) dθ.
    Methods that adapt a point θ̂_j (MAML, Reptile, iMAML) predict rows independently of one another:
    their joint density is the product over rows.

    Parameters
    ----------
    fits : Fit, or mapping from label to Fit
    support : Tasks or DataFrame
        Rows to adapt to. A task without any is predicted from the prior alone.
    query : Tasks or DataFrame
        Other rows of the same tasks, matched by name. Tasks of the support without a query row
        cannot be scored: they are left out, and named in a warning.
    reference : str, optional
        Whom the others are held against; by default the best by ``log_density``.

    Returns
    -------
    DataFrame
        A row a fit. Row by row: ``log_density``, the mean over query rows of the log predictive
        density after ``fit.adapt(support, update_phi=False)``, ``difference`` to the reference on
        the rows that both predict, and ``rmse``. Task by task: ``joint``, the mean over tasks of
        log p(D_j^q | D_j^s), and ``joint_difference``; NaN of methods that give no joint density
        of rows. Each with a standard error over tasks, ``…_se``. ``rows`` and ``tasks`` scored, and
        ``left_out``, rows that the fit cannot predict. ``attrs["reference"]``.

    Raises
    ------
    InputError
        For a task without a query row in all tasks, rows without outcomes, or columns that are not
        those of the fit.

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula(
    ...     "log_radon ~ 1 + floor + (1 | county)", hb.datasets.radon()
    ... )
    >>> seen, unseen = tasks.take(range(60)), tasks.take(range(60, 85))
    >>> support, query = unseen.split(query=0.5, seed=0)
    >>> fits = {
    ...     "partial": hb.empirical_bayes(model, seen), "complete": hb.complete_pooling(model, seen)
    ... }
    >>> table = hb.checks.new_task_scores(fits, support, query)
    >>> table.attrs["reference"], bool(table.loc["complete", "joint_difference"] < 0)
    ('partial', True)
    """
    predictions: dict[str, Prediction] = {}
    joint, parts = {}, {}
    for label, fit in _by_label(fits).items():
        given, asked = _matched(fit, support, query, say=not parts)
        predictions[label] = fit.adapt(given, update_phi=False).predict(asked)
        parts[label] = asked
        joint[label] = joint_log_density(fit, given, asked, predictions[label])
    held = _the_same(parts)
    by_row = {label: found.log_density() for label, found in predictions.items()}
    table = score_differences(by_row, held, reference=reference, by="row")
    of_reference = joint[table.attrs["reference"]]
    for label, found in predictions.items():
        for name, value in _more(found, joint[label], of_reference, held).items():
            table.loc[label, name] = value
    counts = ["rows", "tasks", "left_out"]
    table[counts] = table[counts].astype(int)
    return table[[c for c in table.columns if c not in counts] + counts]


def _by_label(fits: Any) -> dict[str, Fit]:
    """Fits by label: a mapping as it is, one fit by the name of its method."""
    mapped = isinstance(fits, (Fit, Mapping))
    named = {} if not mapped else {fits.method.name: fits} if isinstance(fits, Fit) else dict(fits)
    if not named or not all(isinstance(fit, Fit) for fit in named.values()):
        raise InputError("expected a fit, or a mapping from label to fit")
    return named


def _the_same(parts: dict[str, Tasks]) -> Tasks:
    """The query's rows as the first fit reads them, refused where another reads others."""
    first_label, held = next(iter(parts.items()))
    for label, asked in parts.items():
        if asked.rows.tolist() != held.rows.tolist() or not np.array_equal(asked.names, held.names):
            raise InputError(
                f"{label!r} and {first_label!r} read different rows from the query: {asked} and "
                f"{held}"
            )
    return held


def _more(
    prediction: Prediction, joint: np.ndarray, of_reference: np.ndarray, tasks: Tasks
) -> dict[str, float]:
    """What a fit's row says beside densities row by row; joint densities are (J,)."""
    of_rows, of_tasks = root_mean_square(prediction), score(joint, tasks, "task", "task")
    with np.errstate(invalid="ignore"):  # −∞ of both
        gap = score(joint - of_reference, tasks, "task", "task")
    return {
        "rmse": of_rows.get("rmse", np.nan), "rmse_se": of_rows.get("rmse_se", np.nan),
        "joint": of_tasks.mean, "joint_se": of_tasks.error,
        "joint_difference": gap.mean, "joint_difference_se": gap.error,
        "left_out": int(prediction.unidentified.sum()),
    }  # fmt: skip


def joint_log_density(fit: Fit, support: Tasks, query: Tasks, prediction: Prediction) -> np.ndarray:
    """log p(D_j^query | D_j^support) of every task (J,), NaN where the fit has none.

    ``support`` and ``query`` hold the same tasks in the same order; ``prediction`` is that of the
    query rows, whose product it is at a point θ̂_j.
    """
    if isinstance(fit.adaptation, PointAdaptation):
        return np.bincount(query.task_of_row, prediction.log_density(), query.num_tasks)
    if "tau" not in fit.phi:
        return np.full(query.num_tasks, np.nan)
    whole = logsumexp(evidence_of(fit, joined(support, query)), axis=0)
    return np.asarray(whole) - np.asarray(logsumexp(evidence_of(fit, support), axis=0))


def _matched(fit: Fit, support: Any, query: Any, *, say: bool) -> tuple[Tasks, Tasks]:
    """Both parts of the tasks that have query rows, in the same order; refused in words."""
    given, asked = fit.model.tasks(support), fit.model.tasks(query)
    for what, tasks in {"support": given, "query": asked}.items():
        check_columns(tasks, fit.tasks)
        fit.model.likelihood.check(tasks)
        if tasks.outcome is None:
            raise InputError(f"the {what} holds no outcome {tasks.labels.outcome!r}")
    asked = asked.take(np.flatnonzero(asked.sizes > 0))
    if not asked.num_tasks:
        raise InputError(
            "no task has a query row: there is nothing to score. Pass rows that the support does "
            "not hold, support, query = tasks.split(query=0.5)"
        )
    known = set(asked.names.tolist())
    idle = [n for n, size in zip(given.names.tolist(), given.sizes, strict=True)
            if size and n not in known]  # fmt: skip
    if given.num_rows and not known & set(given.names.tolist()):
        raise InputError(
            f"no task of the query has a support row: the query holds {listing(sorted(known))}, "
            f"the support {listing(given.names.tolist())}; name the tasks alike in both"
        )
    if idle and say:
        announce(
            [f"{len(idle)} task(s) of the support have no query row and are not scored: "
             f"{listing(idle)}"],
        )  # fmt: skip
    return _aligned(given, asked), asked


def _aligned(support: Tasks, query: Tasks) -> Tasks:
    """The support of the query's tasks, in their order; without rows where there is none."""
    found = [support.labels.position(name) for name in query.names.tolist()]
    there = [j for j in found if j is not None]
    some = support.take(there)
    sizes = np.zeros(query.num_tasks, int)
    present = np.array([j is not None for j in found])
    sizes[present] = some.sizes
    if not np.array_equal(some.task_predictors, query.task_predictors[present]):
        raise InputError(
            f"task predictors {listing(list(query.labels.task_predictors))} differ between the "
            "support and the query of the same tasks"
        )
    return replace(
        some, task_predictors=query.task_predictors, labels=query.labels,
        starts=np.concatenate([[0], np.cumsum(sizes)]),
    )  # fmt: skip
