r"""Predictive distributions of rows, and joint draws of them.

.. math:: p(y \mid x, D) = \frac1S \sum_s p(y \mid x, \varphi_s)

One component for a point φ, one a draw under full Bayes; θ is integrated out of each, or drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from scipy import special

from hierbayes import inputs
from hierbayes.errors import InputError
from hierbayes.likelihoods.categorical import ClassProbabilities
from hierbayes.likelihoods.integral import inverted
from hierbayes.likelihoods.outcomes_of_programs import ProgramOutcomes
from hierbayes.likelihoods.over_normal import OverNormal
from hierbayes.numerics import as_rng
from hierbayes.simulation import draw_classes
from hierbayes.tasks import Tasks


@dataclass(frozen=True)
class Prediction:
    """Predictive distributions of rows, and what they are predictions of.

    **Rows stand task by task**, as in ``tasks``, and not in the order of the DataFrame that was
    given: so does every array (N,) or (…, N) here, ``mean``, ``sd``, ``interval``, ``draws``,
    ``log_density``. Position i belongs to row ``tasks.rows[i]`` of the data.
    :meth:`to_dataframe` returns to the order of the data; an array does by
    ``in_order[prediction.tasks.rows] = prediction.mean``.

    Attributes
    ----------
    target : str
        "known task", "new task" or "population".
    tasks : Tasks
        The rows predicted.
    components : SciPy distribution over (S, N)
        Of which the prediction is the equally weighted mixture over S. Classes have no mean and no
        order: they have ``probabilities`` in the place of ``mean``, ``sd`` and quantiles.
    unidentified : array (N,) of bool
        Rows that need a coefficient which the fit does not know; they are left out of scores.
    joint : callable or None
        ``joint(num_draws, rng)`` gives joint draws of the rows (num_draws, N) where the components
        have θ integrated out of them; None where they do not, or nothing joint is known.

    Examples
    --------
    >>> import numpy as np, pandas as pd, hierbayes as hb
    >>> visits = pd.DataFrame({"who": ["b", "a", "b", "a"], "y": [3.0, 1.0, 3.2, 1.4]})
    >>> fit = hb.no_pooling(*hb.from_formula("y ~ 1 + (1 | who)", visits))
    >>> prediction = fit.predict(visits)
    >>> prediction.tasks.rows, prediction.mean.round(2)  # b's rows stand together
    (array([0, 2, 1, 3]), array([3.1, 3.1, 1.2, 1.2]))
    >>> prediction.to_dataframe()["mean"].round(2).tolist()  # as in visits
    [3.1, 1.2, 3.1, 1.2]
    >>> in_order = np.empty(len(visits))
    >>> in_order[prediction.tasks.rows] = prediction.mean
    >>> in_order.round(2)
    array([3.1, 1.2, 3.1, 1.2])
    """

    target: str
    tasks: Tasks
    components: Any
    unidentified: np.ndarray
    joint: Callable[[int, np.random.Generator], np.ndarray] | None = None

    def __repr__(self) -> str:
        return f"Prediction({self.tasks.num_rows} rows, target={self.target!r})"

    @property
    def discrete(self) -> bool:
        """True where outcomes are counts or categories."""
        if isinstance(self.components, ProgramOutcomes):
            return self.components.discrete
        return self.of_classes or hasattr(self.components.dist, "pmf")

    @property
    def of_classes(self) -> bool:
        """True where outcomes are classes, which have no order."""
        return isinstance(self.components, ClassProbabilities)

    @property
    def probabilities(self) -> np.ndarray:
        """Probability of every class in each row (N, C), task by task; NaN where unidentified."""
        if not self.of_classes:
            raise InputError(
                "probabilities are those of classes, of a Categorical likelihood; of outcomes of "
                "0 and 1 the mean is the probability"
            )
        chances = self.components.probabilities.mean(0)
        return np.where(self.unidentified[:, None], np.nan, chances)

    def _numbers(self, what: str) -> Any:
        """The components, if outcomes are numbers; classes are refused."""
        if self.of_classes:
            raise InputError(
                f"classes have no {what}: read prediction.probabilities, (rows, classes), or "
                "log_density"
            )
        return self.components

    @property
    def means(self) -> np.ndarray:
        """Means of the components (S, N), rows task by task.

        The median where a component has no mean: of Student-t with one degree of freedom or less.
        """
        parts = self._numbers("mean")
        with np.errstate(invalid="ignore"):
            means = parts.mean()
        if np.isfinite(means).all():
            return means
        return np.where(np.isfinite(means), means, parts.ppf(0.5))

    @property
    def sds(self) -> np.ndarray:
        """Standard deviations of the components (S, N), rows task by task."""
        return self._numbers("standard deviation").std()

    @property
    def mean(self) -> np.ndarray:
        """Predictive mean of each row (N,), task by task; NaN where unidentified.

        Not in the order of a DataFrame given to ``predict``: see :class:`Prediction`.
        """
        with np.errstate(over="ignore"):
            return self._known(self.means.mean(0))

    @property
    def sd(self) -> np.ndarray:
        """Predictive standard deviation of each row (N,), task by task; NaN where unidentified.

        Not in the order of a DataFrame given to ``predict``: see :class:`Prediction`.
        """
        parts = self._numbers("standard deviation")
        with np.errstate(invalid="ignore", over="ignore"):
            within = parts.var()
            within = np.where(np.isnan(within), np.inf, within)  # SciPy's, of what has no mean
            between = self.means.var(0)
            total = within.mean(0) + np.where(np.isnan(between), np.inf, between)
        return self._known(np.sqrt(total))

    def _known(self, values: np.ndarray) -> np.ndarray:
        return np.where(self.unidentified, np.nan, values)

    def _outcome(self, outcome: np.ndarray | None) -> np.ndarray:
        outcome = self.tasks.outcome if outcome is None else outcome
        if outcome is None:
            raise InputError("these rows hold no outcome to score")
        return inputs.numbers("outcome", outcome, shape=(self.tasks.num_rows,))

    def log_density(self, outcome: np.ndarray | None = None) -> np.ndarray:
        """Log predictive density of each observed row (N,), task by task; NaN where unidentified.

        Of discrete outcomes the log probability. Weights are not applied. An ``outcome`` that is
        given stands task by task too.
        """
        parts = self.log_density_of_components(outcome)
        return self._known(special.logsumexp(parts, axis=0) - np.log(len(parts)))

    def log_density_of_components(self, outcome: np.ndarray | None = None) -> np.ndarray:
        """Log density of each observed row under each component, (S, N), rows task by task."""
        of = self.components.logpmf if self.discrete else self.components.logpdf
        return of(self._outcome(outcome))

    def pit(self, outcome: np.ndarray | None = None) -> np.ndarray:
        """P(new outcome ≤ the observed one) of each row (N,), task by task."""
        parts = self._numbers("order, and no P(new outcome ≤ the observed one)")
        return self._known(parts.cdf(self._outcome(outcome)).mean(0))

    def quantile(self, probability: float) -> np.ndarray:
        """The smallest y with P(Y ≤ y) ≥ probability of each row (N,), task by task."""
        probability = inputs.share("probability", probability)
        parts = self._numbers("quantiles")
        if isinstance(parts, OverNormal):
            return self._known(parts.quantile(probability))
        low, high = self._between(parts, probability)
        sds = np.where(np.isfinite(sds := parts.std()), sds, np.inf).min(0)
        tight = 1e-8 * np.where(np.isfinite(sds), sds, 1e-3 * (high - low) + 1e-6)

        def cdf(y: np.ndarray) -> np.ndarray:
            return parts.cdf(y).mean(0)

        whole = self.discrete
        low = low - 1.0 if whole else low
        return self._known(inverted(cdf, probability, low, high, whole=whole, tight=tight))

    @staticmethod
    def _between(parts: Any, probability: float) -> tuple[np.ndarray, np.ndarray]:
        """Where a mixture's quantile lies: between the smallest and the largest of its components'.

        Where SciPy finds none, of counts at rates far beyond 1e10, Cantelli's inequality bounds it.
        """
        found = parts.ppf(probability)
        low, high = found, found
        if (lost := ~np.isfinite(found)).any():
            with np.errstate(invalid="ignore"):
                mean, sd = parts.mean(), parts.std()
            odds = np.sqrt(probability / (1 - probability))
            low = np.where(lost, np.floor(mean - sd / odds), found)
            high = np.where(lost, np.ceil(mean + sd * odds), found)
        return low.min(0), high.max(0)

    def interval(self, probability: float = 0.95) -> np.ndarray:
        """Central interval of each row, (2, N), of at least this probability; rows task by task.

        Not in the order of a DataFrame given to ``predict``: see :class:`Prediction`.
        """
        tail = (1 - inputs.share("probability", probability)) / 2
        return np.stack([self.quantile(tail), self.quantile(1 - tail)])

    def draws(self, num_draws: int = 1000, seed: int | jax.Array = 0) -> np.ndarray:
        """Joint predictive draws of the rows (num_draws, N), task by task.

        Not in the order of a DataFrame given to ``predict``: see :class:`Prediction`.
        Every draw is of one φ, and rows of one task share a draw of its θ, so that sums, means and
        differences of a task's rows are spread as they should be. Where θ is a point estimate
        (MAML's, say) rows are independent given it, and where only the variance of f is known
        (``hb.meta.implied_posterior`` of a network) of one another: sums over a task's rows then
        come out too narrow.
        """
        num_draws, rng = inputs.count("num_draws", num_draws), as_rng(seed)
        if self.joint is not None:
            return self._known(self.joint(num_draws, rng))
        if self.of_classes:
            parts = self.components.probabilities
            at = rng.integers(len(parts), size=num_draws)
            return self._known(np.array([draw_classes(parts[s], rng) for s in at]))
        frozen = self._numbers("draws")
        shape = self.means.shape
        component = rng.integers(shape[0], size=num_draws)
        if hasattr(frozen, "drawn"):
            return self._known(frozen.drawn(component, rng))

        def chosen(parameter: Any) -> np.ndarray:
            return np.broadcast_to(parameter, shape)[component]

        drawn = frozen.dist.rvs(
            *map(chosen, frozen.args),
            **{name: chosen(value) for name, value in frozen.kwds.items()},
            size=(num_draws, shape[1]),
            random_state=rng,
        )
        return self._known(drawn)

    def to_dataframe(self) -> Any:
        """Task, mean, sd and 95 % interval of each row, **in the order of the data** it came from.

        The index is the position of the row in the data, ``tasks.rows``.
        Of classes the probability of each, in columns ``class_0``, ``class_1``, ….
        """
        import pandas as pd

        columns = {self.tasks.labels.task: self.tasks.names[self.tasks.task_of_row]}
        if self.of_classes:
            columns |= {f"class_{c}": chance for c, chance in enumerate(self.probabilities.T)}
        else:
            low, high = self.interval(0.95)
            columns |= {"mean": self.mean, "sd": self.sd, "low_95": low, "high_95": high}
        table = pd.DataFrame(columns, index=self.tasks.rows)
        return table.sort_index()
