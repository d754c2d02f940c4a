r"""Draws of φ that learn from new tasks by weights, each row once.

.. math:: w_s \propto \prod_{j\ \text{new}} p(D_j \mid \varphi_s)
          \prod_{j\ \text{continued}} \frac{p(D_j, D_j^+ \mid \varphi_s)}{p(D_j \mid \varphi_s)}

A task is continued where the rows given for it hold all those that φ has learned from, and more;
rows that φ has learned from already weigh nothing.

Draws of φ given some data, as draws given more: Pareto-smoothed importance resampling.

.. math:: w_s \propto p(D_{\text{new}} \mid \varphi_s), \qquad
          \varphi_s \sim p(\varphi \mid D_{1..J})

Reference: Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling,
Journal of Machine Learning Research 25(72).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hierbayes.adaptation import Laplace, Quadrature
from hierbayes.errors import announce, listing
from hierbayes.evidence import Integrated
from hierbayes.fit.learned import Learned
from hierbayes.tasks import Tasks
from hierbayes.tasks.joining import not_among

EVEN = 1e-10
"""Log weights that differ by less than this weigh nothing."""

HOPELESS = 6.0
"""Standard deviation of log weights from which on no draws that there could be would do."""


class Weighed(NamedTuple):
    """Positions of the draws to keep (S,), Pareto's k̂, NaN where the weights are even."""

    chosen: np.ndarray
    pareto_k: float
    even: bool = False

    @property
    def sound(self) -> bool:
        """True where the weights are even, or their tail is one that draws can carry."""
        return self.even or bool(self.pareto_k <= largest_k(len(self.chosen)))


FEWEST = 25
"""Draws below which their weights have too few in the tail for Pareto's k̂."""


def largest_k(num_draws: int) -> float:
    """Pareto's k̂ up to which so many draws can be weighed, ArviZ's ``good_k``."""
    return min(1 - 1 / np.log10(num_draws), 0.7) if num_draws > 1 else 0.7


def weigh(log_weights: np.ndarray, rng: np.random.Generator) -> Weighed:
    """Systematic resampling by smoothed weights, in random order."""
    size = len(log_weights)
    if np.isnan(log_weights).any() or np.isposinf(log_weights).any():
        return Weighed(np.arange(size), np.inf)
    if np.ptp(log_weights) < EVEN:
        return Weighed(np.arange(size), np.nan, even=True)
    if size < FEWEST:  # no tail to judge
        return Weighed(np.arange(size), np.inf)
    from arviz_stats.base import array_stats

    smoothed, k = array_stats.psislw(-log_weights)
    weights = np.exp(smoothed - smoothed.max())
    upto = np.cumsum(weights) / weights.sum()
    chosen = np.searchsorted(upto, (np.arange(size) + rng.random()) / size)
    return Weighed(rng.permutation(np.minimum(chosen, size - 1)), float(k))


FIRST_LOOK = 100
"""Draws of φ on which weights are tried before they are asked of all."""

UPDATED = "phi has learned from the rows of the new tasks too (Pareto k = {k:.2f})"
KNOWN_ROWS = (
    "phi stays as it is: going by their numbers, it has learned from all of these rows before"
)
NAMESAKES = (
    "task(s) {names} have names of tasks that the fit knows, but other rows: they are taken for "
    "new tasks. If they are new rows of the same ones, say after=fit.adapted"
)
LEFT_FAR = (
    "the new tasks say more about phi than weights on its draws can carry (Pareto k {k}, at most "
    "{most:.2f} is sound): phi stays as learned from {num_tasks} tasks. For a phi that has learned "
    "from them too, fit all tasks together; update_phi=False says that this is as wanted"
)


class Updated(NamedTuple):
    """Draws of φ, Pareto's k̂ of their weights, what to say, and whether they have learned."""

    phis: dict[str, np.ndarray]
    pareto_k: float
    remarks: tuple[str, ...]
    learned: bool


def updated(
    fit: Learned, tasks: Tasks, phis: dict[str, np.ndarray], rng: np.random.Generator
) -> Updated:
    """Draws of φ given the new rows too, where weights can carry them."""
    size = len(next(iter(phis.values())))
    known = fit.learned_from
    fresh = not_among(tasks, known)
    if not fresh.sizes.any():
        return Updated(phis, np.nan, (KNOWN_ROWS,) if tasks.num_rows else (), False)
    parts, namesakes = _to_be_weighed(tasks, fresh, known)
    evidence, said = evidence_of(fit), []
    if namesakes:
        said.append(NAMESAKES.format(names=listing(namesakes, 3)))

    def log_weights(positions: np.ndarray) -> np.ndarray:
        some = {name: value[positions] for name, value in phis.items()}
        total = np.zeros(len(positions))
        for part, sign in parts:
            total += sign * evidence.over(fit.model, part, some).sum(1)
        return total

    def left(k: float) -> Updated:
        shown = f"= {k:.2f}" if np.isfinite(k) else "not to be had"
        message = LEFT_FAR.format(k=shown, most=largest_k(size), num_tasks=known.num_tasks)
        announce([message])
        return Updated(phis, k, (*said, message), False)

    first = log_weights(np.unique(np.linspace(0, size - 1, FIRST_LOOK).astype(int)))
    if not np.isfinite(first).all() or first.std() > HOPELESS:
        return left(np.inf)
    found = weigh(log_weights(np.arange(size)), rng)
    if not found.sound:
        return left(found.pareto_k)
    if not found.even:
        said.append(UPDATED.format(k=found.pareto_k))
    chosen = {name: value[found.chosen] for name, value in phis.items()}
    return Updated(chosen, found.pareto_k, tuple(said), True)


def _to_be_weighed(
    tasks: Tasks, fresh: Tasks, known: Tasks
) -> tuple[list[tuple[Tasks, float]], list[Any]]:
    """Rows whose evidence weighs, with its sign; names of new tasks that known ones have too."""
    news = np.flatnonzero(fresh.sizes > 0)
    found_at = [known.labels.position(name) for name in tasks.names[news].tolist()]
    places = np.array([-1 if at is None else at for at in found_at], int)
    seen = tasks.sizes[news] - fresh.sizes[news]
    old = np.where(places >= 0, known.sizes[places], 0)
    continued = (old > 0) & (seen == old)
    # of a continued task all rows are weighed, less the old ones; of any other its new rows
    parts = [
        (tasks.take(news[continued]), 1.0),
        (fresh.take(news[~continued]), 1.0),
        (known.take(places[continued]), -1.0),
    ]
    namesakes = tasks.names[news[(old > 0) & ~continued]].tolist()
    return [(part, sign) for part, sign in parts if part.num_tasks], namesakes


def evidence_of(fit: Learned) -> Integrated:
    """The evidence that the fit itself used; as good as it can be where it used none."""
    how = fit.adaptation
    if isinstance(how, Quadrature) or (isinstance(how, Laplace) and "evidence" in fit.info):
        return Integrated(how)
    return Integrated()
