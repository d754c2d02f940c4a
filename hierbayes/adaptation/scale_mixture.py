r"""The posterior of Gaussian tasks under a Student-t prior, a mixture over each task's own scale.

.. math::

    p(\theta_j \mid D_j, \varphi) &= \int N\!\left(\theta_j;\; m_j + L Q\, \frac{B_Q^\top a_j}
        {\lambda \sigma^2 + s^2},\; L Q\, \frac{\sigma^2}{\lambda\sigma^2 + s^2}\, Q^\top L^\top
        \right) p(\lambda \mid D_j, \varphi)\, d\lambda \\
    \log p(D_j \mid \varphi) &= \log \int p(D_j \mid \tau / \sqrt\lambda, \varphi)\,
        \operatorname{Gamma}(\lambda;\, \tfrac\nu2, \tfrac\nu2)\, d\lambda

with B_j = R_j L as in :mod:`~hierbayes.adaptation.exact`, Q the directions that make the columns of
B_Q = B_j Q orthogonal, and s their lengths. Both integrals are sums over the nodes λ_k of
:func:`~hierbayes.priors.student_t.mixing`, right to rounding error at every θ and to a relative
1e-10 of the evidence, wherever the task lies; so are draws, with λ drawn from the nodes and θ given
λ from its normal. A task without rows has the evidence one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.base import Integrable, TaskMoments
from hierbayes.adaptation.exact import Collapse, collapse
from hierbayes.adaptation.posterior import Mixture
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import as_rng, float64, matmul, matvec
from hierbayes.priors import StudentT
from hierbayes.priors.student_t import mixing
from hierbayes.sharding import gathered, place
from hierbayes.statistics import Statistics, placed_statistics
from hierbayes.tasks import Tasks

NUMBERS_AT_ONCE = 1_000_000
"""Nodes × tasks × draws that are worked on together."""

STRATA = 64
"""Normals of which a task's posterior is made up in predictions."""


class Directions(NamedTuple):
    """What does not depend on λ; tasks on the last axis.

    ``location`` m (d, J); ``turned`` L Q (d, d, J); ``squares`` s² (d, J); ``pull`` B_Qᵀ a (d, J).
    """

    location: jax.Array
    turned: jax.Array
    squares: jax.Array
    pull: jax.Array


def principal_axes(a: jax.Array) -> jax.Array:
    """Eigenvectors (d, d, J), a column each, of symmetric (d, d, J) matrices; held constant."""
    a, d = jax.lax.stop_gradient(a), len(a)
    if d == 1:
        return jnp.ones_like(a)
    if d == 2:
        angle = 0.5 * jnp.arctan2(2 * a[0, 1], a[0, 0] - a[1, 1])
        c, s = jnp.cos(angle), jnp.sin(angle)
        return jnp.stack([jnp.stack([c, -s]), jnp.stack([s, c])])
    return jnp.moveaxis(jnp.linalg.eigh(jnp.moveaxis(a, -1, 0))[1], 0, -1)


def log_evidence_by_precision(spread: Collapse, precision: Any) -> jax.Array:
    r"""−½ [log |V| + aᵀ V⁻¹ a] of every λ_k and task (K, J), with V = σ² I + B Bᵀ / λ.

    In the axes U of B Bᵀ, with ã = Uᵀ a and W = Uᵀ B Bᵀ U: V is diagonal there, so that nothing
    cancels. U is held constant; what W has off its diagonal is zero but for its derivative, which
    counts to first order, so that slopes are right.
    """
    d = len(spread.moved)
    axes = principal_axes(matmul(spread.design, jnp.swapaxes(spread.design, 0, 1)))
    back = jnp.swapaxes(axes, 0, 1)
    rows, moved = matmul(back, spread.design), matvec(back, spread.moved)
    wide = 1.0 / jnp.asarray(precision)[:, None]
    variances = [spread.noise_variance + (rows[i] ** 2).sum(0) * wide for i in range(d)]
    reduced = [moved[i] / variances[i] for i in range(d)]
    total = sum(
        jnp.log(v) + r * moved[i] for i, (v, r) in enumerate(zip(variances, reduced, strict=True))
    )
    for i in range(d):
        for k in range(i):
            between = (rows[i] * rows[k]).sum(0)
            total = total - 2 * reduced[i] * reduced[k] * between * wide
    return -0.5 * jnp.asarray(total)


class OverScales(NamedTuple):
    """p(θ_j, λ_j | D_j, φ) of every task."""

    spread: Collapse
    prior: StudentT

    @classmethod
    def at(cls, stats: Statistics, prior: StudentT, phi: dict[str, Any]) -> OverScales:
        """Under φ."""
        return cls(collapse(stats, prior, phi), prior)

    @property
    def rule(self) -> Any:
        """The nodes λ_k (K,) and the logs of their weights."""
        return mixing(self.prior.df, len(self.spread.moved))

    @property
    def _logs(self) -> jax.Array:
        """log p(D_j, λ_k | φ) (K, J), up to a constant."""
        logs = log_evidence_by_precision(self.spread, self.rule.precision)
        return logs + jnp.asarray(self.rule.log_weight)[:, None]

    @property
    def log_normaliser(self) -> jax.Array:
        """log p(D_j | φ) (J,), with all constants."""
        at, d = self.spread, len(self.spread.moved)
        noise = at.noise_variance
        rest = (at.num_rows - d) * jnp.log(noise) + (at.left**2).sum(0) / noise
        mixed = jax.nn.logsumexp(self._logs, axis=0)
        return mixed - 0.5 * (at.num_rows * jnp.log(2 * jnp.pi) + rest) + at.log_scale

    @property
    def start(self) -> None:
        """Nothing is searched."""

    @property
    def converged(self) -> jax.Array:
        """Nothing is searched."""
        return self.spread.converged

    @property
    def weights(self) -> jax.Array:
        """p(λ_k | D_j, φ) of every node and task (K, J)."""
        return jax.nn.softmax(self._logs, axis=0)

    @property
    def above(self) -> jax.Array:
        """p(λ_j ≤ λ_k | D_j, φ) (K, J)."""
        total = jnp.cumsum(self.weights, axis=0)
        return total / total[-1]

    @property
    def directions(self) -> Directions:
        """What θ given λ is made of."""
        at = self.spread
        turn = principal_axes(matmul(jnp.swapaxes(at.design, 0, 1), at.design))
        columns = matmul(at.design, turn)
        return Directions(
            at.location, matmul(at.root[:, :, None], turn), (columns**2).sum(0),
            (columns * at.moved[:, None]).sum(0),
        )  # fmt: skip

    def moments(self) -> TaskMoments:
        """Mean and covariance of every θ_j."""
        (mean, covariance) = self._strata(self.weights[None])
        return TaskMoments.exact(mean[0], covariance[0], self.log_normaliser)

    def strata(self, count: int) -> tuple[jax.Array, jax.Array]:
        """Means (S, J, d) and covariances (S, J, d, d) of ``count`` strata of λ, equally likely.

        A node on the border of two counts in both by its share: the moments of all together stay.
        """
        above = self.above
        ends = jnp.arange(1, count + 1)[:, None, None] / count
        low = jnp.concatenate([jnp.zeros_like(above[:1]), above[:-1]])
        share = jnp.minimum(above, ends) - jnp.maximum(low, ends - 1.0 / count)
        return self._strata(count * jnp.maximum(share, 0.0))

    def _strata(self, share: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Moments of the mixtures that take the nodes by their ``share`` (S, K, J)."""
        at, noise = self.directions, self.spread.noise_variance
        wide = jnp.asarray(self.rule.precision)[:, None, None] * noise + at.squares
        means, variances = at.pull / wide, noise / wide  # of θ given λ_k in its own directions
        mean = jnp.einsum("skj,kdj->sdj", share, means)

        def around(part: Any) -> jax.Array:
            shares, centre = part
            away = means - centre
            return jnp.einsum("kj,kdj,kej->dej", shares, away, away)

        within = jnp.einsum("skj,kdj->sdj", share, variances)
        inside = jax.lax.map(around, (share, mean))
        inside = inside + within[:, :, None] * jnp.eye(within.shape[1])[None, :, :, None]
        return (
            jnp.swapaxes(at.location[None] + jnp.einsum("adj,sdj->saj", at.turned, mean), 1, 2),
            jnp.einsum("adj,sdej,bej->sjab", at.turned, inside, at.turned),
        )


@functools.partial(jax.jit, static_argnums=(1, 3))
def _strata(stats: Statistics, prior: StudentT, phi: dict[str, Any], count: int) -> Any:
    return OverScales.at(stats, prior, phi).strata(count)


class _Ready(NamedTuple):
    """What draws at one φ are made from: p(λ ≤ λ_k) (K, J), and θ's directions."""

    above: jax.Array
    at: Directions
    noise_variance: Any


def _ready(stats: Statistics, prior: StudentT, phi: dict[str, Any]) -> _Ready:
    found = OverScales.at(stats, prior, phi)
    return _Ready(found.above, found.directions, found.spread.noise_variance)


def _drawn(ready: _Ready, precision: Any, uniform: Any, white: Any) -> jax.Array:
    """θ (d, J) from a uniform number and d normal ones a task."""
    node = (ready.above[:-1] < uniform).sum(0)
    wide = jnp.asarray(precision)[node] * ready.noise_variance + ready.at.squares
    inside = ready.at.pull / wide + jnp.sqrt(ready.noise_variance / wide) * white
    return ready.at.location + matvec(ready.at.turned, inside)


@functools.partial(jax.jit, static_argnums=(1, 5))
def _draws(
    stats: Statistics, prior: StudentT, phis: dict[str, Any], uniform: Any, white: Any, batch: int
) -> jax.Array:
    """A draw of every θ_j for each of S values of φ, (S, d, J)."""
    precision = mixing(prior.df, stats.num_coef).precision

    def one(given: Any) -> jax.Array:
        phi, u, z = given
        return _drawn(_ready(stats, prior, phi), precision, u, z)

    return jax.lax.map(one, (phis, uniform, white), batch_size=batch)


@functools.partial(jax.jit, static_argnums=1)
def _draws_at(stats: Statistics, prior: StudentT, phi: Any, uniform: Any, white: Any) -> jax.Array:
    """S draws of every θ_j at one φ, (S, d, J)."""
    precision = mixing(prior.df, stats.num_coef).precision
    ready = _ready(stats, prior, phi)
    return jax.lax.map(lambda given: _drawn(ready, precision, *given), (uniform, white))


@dataclass(frozen=True)
class ScaleMixture(Integrable):
    """A(D; φ) = the posterior under a Student-t prior; for Gaussian tasks.

    Means and covariances by quadrature over the task's scale, to rounding error. A task without
    rows, and up to ν = 2 degrees of freedom, has no covariance: what stands there is as wide as the
    rule reaches.
    """

    name = "posterior over mixed scales"

    @staticmethod
    def num_nodes(model: HierarchicalModel, tasks: Tasks) -> int:
        """Nodes of the integral over a task's scale."""
        return len(mixing(_student(model).df, len(tasks.coef)).precision)

    def lay_out(self, model: HierarchicalModel, tasks: Tasks) -> Statistics:
        """Sufficient statistics, where the tasks lie."""
        del model
        return placed_statistics(tasks)

    @staticmethod
    def given(
        model: HierarchicalModel, phi: dict[str, Any], data: Statistics, start: Any = None
    ) -> OverScales:
        """The posterior of every task."""
        del start
        return OverScales.at(data, _student(model), phi)

    def _posterior(
        self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any], found: TaskMoments
    ) -> Mixture:
        """With the normals that predictions take."""
        # a partial, for a function made here could not be pickled
        normals = functools.partial(_some, tasks, _student(model), phi)
        evidence = found.log_normaliser
        return Mixture(
            found.mean, found.covariance, normals, together=False, log_normaliser=evidence
        )

    def draws(
        self, model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray], key: Any
    ) -> np.ndarray:
        """Draws (S, J, d), one for each of the S values of φ."""
        prior, stats = _student(model), placed_statistics(tasks)
        size = len(next(iter(phis.values())))
        nodes = len(mixing(prior.df, stats.num_coef).precision)
        batch = int(np.clip(NUMBERS_AT_ONCE // (nodes * max(tasks.num_tasks, 1)), 1, 256))
        with float64():
            noise = self._noise(tasks, size, key)
            found = gathered(_draws(stats, prior, dict(phis), *noise, batch), tasks.num_tasks, 2)
        return np.swapaxes(found, 1, 2)

    def draws_at(
        self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any], count: int, key: Any
    ) -> np.ndarray:
        """``count`` draws (S, J, d) at one φ."""
        with float64():
            noise = self._noise(tasks, count, key)
            drawn = _draws_at(placed_statistics(tasks), _student(model), dict(phi), *noise)
            found = gathered(drawn, tasks.num_tasks, axis=2)
        return np.swapaxes(found, 1, 2)

    @staticmethod
    def _noise(tasks: Tasks, size: int, key: Any) -> tuple[Any, Any]:
        """A uniform number and d normal ones for every draw and task."""
        rng, d = as_rng(key), len(tasks.coef)
        uniform, white = (
            rng.random((size, tasks.num_tasks)),
            rng.standard_normal((size, d, tasks.num_tasks)),
        )
        return place(uniform, tasks.sharding), place(white, tasks.sharding)


def _student(model: HierarchicalModel) -> StudentT:
    assert isinstance(model.prior, StudentT)
    return model.prior


def _some(
    tasks: Tasks, prior: StudentT, phi: dict[str, Any], positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Equally likely normals of some tasks, of which the posterior is the mixture."""
    some = tasks.take(positions)
    with float64():
        strata = _strata(placed_statistics(some), prior, phi, STRATA)
        return gathered(strata, some.num_tasks, axis=1)
