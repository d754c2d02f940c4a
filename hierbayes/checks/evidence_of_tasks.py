r"""log p(D_j | φ) of any tasks under the φ that a fit has learned, θ_j integrated out.

Exact of Gaussian tasks; of others it is that of the fit: quadrature with its nodes, else with nodes
enough for up to three coefficients, and Laplace's approximation beyond.
"""

from __future__ import annotations

import numpy as np

from hierbayes.errors import NotApplicable
from hierbayes.fit import Fit, updating
from hierbayes.fit.adapted import phis_of
from hierbayes.tasks import Tasks


def evidence_of(fit: Fit, tasks: Tasks) -> np.ndarray:
    """log p(D_j | φ_s) of every φ of the fit and every task, (S, J); zero of tasks without rows."""
    tasks, fit = fit.seen_inside(tasks), fit.inside
    phis = phis_of(fit.phi, fit.phi_draws)
    if not tasks.num_rows:
        return np.zeros((len(next(iter(phis.values()))), tasks.num_tasks))
    if fit.phi_draws is None:
        tasks = fit.model.likelihood.design(tasks, {k: np.asarray(v) for k, v in fit.phi.items()})
    found = updating.evidence_of(fit).over(fit.model, tasks, phis)
    return np.where(tasks.sizes > 0, found, 0.0)


def refuse_carried(fit: Fit, what: str) -> None:
    """Refuse a fit whose φ was learned from other tasks than its own: nothing can be left out."""
    if fit.learned is not None:
        raise NotApplicable(
            f"{what} asks of the tasks that phi was learned from, and this fit was carried to "
            "others: ask it of the fit itself, or use new_task_scores"
        )
