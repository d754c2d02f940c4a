"""Predictive distributions of the rows of a NumPyro program, one for each value of θ and φ."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from hierbayes.errors import NotApplicable
from hierbayes.numerics import float64
from hierbayes.tasks import Tasks

HALVINGS = 200


@dataclass(frozen=True)
class ProgramOutcomes:
    """Answers what a frozen SciPy distribution over (S, N) answers.

    ``thetas`` (S, J, d) are those of the tasks of ``rows``; ``phis`` have S values each, or one.
    """

    likelihood: Any
    thetas: np.ndarray
    phis: dict[str, Any]
    rows: Tasks

    @property
    def discrete(self) -> bool:
        """True where outcomes are counts or categories."""
        return self.likelihood.discrete

    def _each(self, of: str, outcome: Any = None, key: Any = None) -> np.ndarray:
        """Something of every row's distribution, (S, N)."""
        shape = (len(self.thetas), self.rows.num_rows)
        filled = np.zeros(shape[1]) if outcome is None else np.asarray(outcome, float)
        filled = np.broadcast_to(filled, shape)
        found = np.zeros(shape)
        phis = {
            name: np.broadcast_to(v, (shape[0], *np.shape(v)[1:])) for name, v in self.phis.items()
        }
        rows = replace(self.rows, outcome=np.arange(float(shape[1])))
        keys = jax.random.split(jax.random.key(0) if key is None else key, shape[0])
        with float64():
            for positions, (block, _) in self.likelihood.aggregate(rows):
                place = block.outcome.astype(int)
                try:
                    values = _ask(
                        self.likelihood, of, self.thetas[:, positions], phis, block,
                        filled[:, place], keys,
                    )  # fmt: skip
                except NotImplementedError as error:
                    raise NotApplicable(
                        f"NumPyro does not know the {of} of the program's outcomes"
                    ) from error
                found[:, place[block.mask]] = np.asarray(values)[:, block.mask]
        return found

    def mean(self) -> np.ndarray:
        """E[y]."""
        return self._each("mean")

    def var(self) -> np.ndarray:
        """Var(y)."""
        return self._each("variance")

    def std(self) -> np.ndarray:
        """The root of the variance."""
        return np.sqrt(self.var())

    def cdf(self, y: Any) -> np.ndarray:
        """P(Y ≤ y)."""
        return self._each("cdf", y)

    def logpdf(self, y: Any) -> np.ndarray:
        """The log density or log probability of y."""
        return self._each("log_prob", y)

    logpmf = logpdf

    def ppf(self, probability: float) -> np.ndarray:
        """The smallest y with P(Y ≤ y) ≥ probability, by halving what doubling has enclosed."""
        middle, width = self.mean(), np.maximum(self.std(), 1e-12)
        low, high = middle - width, middle + width
        for _ in range(HALVINGS):
            above, below = self.cdf(low) >= probability, self.cdf(high) < probability
            if not (above | below).any():
                break
            width = np.where(above | below, 2 * width, width)
            low, high = np.where(above, low - width, low), np.where(below, high + width, high)
        if self.discrete:
            low, high = np.floor(low), np.ceil(high)
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            middle = np.floor(middle) if self.discrete else middle
            if not (high - low > (0.0 if self.discrete else 1e-9 * (1 + np.abs(middle)))).any():
                break
            short = self.cdf(middle) < probability
            low = np.where(short, middle + (1.0 if self.discrete else 0.0), low)
            high = np.where(short, high, middle)
        return high

    def drawn(self, component: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draws (n, N), from the components (n,) of the first axis."""
        chosen = replace(
            self, thetas=self.thetas[component],
            phis={n: v if len(v) == 1 else v[component] for n, v in self.phis.items()},
        )  # fmt: skip
        return chosen._each("sample", key=jax.random.key(int(rng.integers(2**31))))


ASKED: dict[str, Callable[[dist.Distribution, Any, Any], Any]] = {
    "mean": lambda found, y, key: found.mean,
    "variance": lambda found, y, key: found.variance,
    "cdf": lambda found, y, key: found.cdf(y),
    "log_prob": lambda found, y, key: found.log_prob(y),
    "sample": lambda found, y, key: found.sample(key),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _ask(
    likelihood: Any, of: str, thetas: Any, phis: Any, rows: Any, outcome: Any, keys: Any
) -> jax.Array:
    def one(at: Any) -> jax.Array:
        theta, phi, y, key = at
        own = jax.random.split(key, len(theta))

        def of_task(t: Any, task: Any, outcome: Any, k: Any) -> jax.Array:
            found = likelihood.distribution(t, phi, task)
            return jnp.broadcast_to(ASKED[of](found, outcome, k), outcome.shape)

        return jax.vmap(of_task)(theta, rows, y, own)

    return jax.lax.map(one, (thetas, phis, outcome, keys))
