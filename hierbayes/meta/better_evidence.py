r"""How far an approximate evidence has moved φ̂ from where a better one would put it.

.. math::

    \Delta = I(\hat\varphi)^{-1}\, \nabla \Big[\sum_j \log \tilde p(D_j \mid \hat\varphi)
        + \log p(\hat\varphi)\Big], \qquad \Delta_i / \sqrt{(I^{-1})_{ii}}

.. math::

    \log \tilde p = R \log \bar p - \tfrac{R - 1}{R} \textstyle\sum_r \log \bar p_{(-r)}

One Newton step on the better evidence p̃, with the curvature I of the one that φ̂ maximises: in
posterior standard deviations, coordinate by coordinate. p̃ is adaptive Gauss–Hermite quadrature for
up to three coefficients and scrambled Sobol nodes beyond
(:func:`~hierbayes.meta.better_evidence.student_nodes`), whose replicates give Δ a standard error.

Nodes of equal standing in any number of dimensions: scrambled Sobol points under a Student-t.

.. math::

    \int f(t)\, dt \approx \frac1Q \sum_q \frac{f(t_q)}{q(t_q)}, \qquad
    t_q = \Phi^{-1}(u_q) \sqrt{\nu / F_{\chi^2_\nu}^{-1}(v_q)}

with (u_q, v_q) the points of a scrambled Sobol sequence in d + 1 dimensions and q the density of
the multivariate t with ν degrees of freedom, whose tails are wider than those of any posterior
under a normal prior. Where :func:`~hierbayes.adaptation.quadrature.grid` has Q^d nodes this rule
has Q, and independent scrambles tell its error. Every run of Q points of the sequence is such a
rule by itself; tasks that take different runs have errors that hardly add up, and the sum over many
tasks is as good as one rule of very many nodes. Reference: Owen (1997), Scrambled net variance for
integrals of smooth functions, Annals of Statistics 25(4).

The observed information of a φ̂ that is known already, and the tasks around it.

.. math:: I(\hat\varphi) = -\nabla^2 \Big[\sum_j \log \hat p(D_j \mid \hat\varphi)
          \left[+ \log p(\hat\varphi)\right]\Big]

in the coordinates of φ's vector (:mod:`hierbayes.phi.space`) that lie inside their bounds:
τ = 0 and correlations of ±1 are held.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.draws_of_theta import DEGREES_OF_FREEDOM
from hierbayes.adaptation.mode import LogJoint, Mode, mode_near
from hierbayes.adaptation.quadrature import ByNodes, grid
from hierbayes.evidence.integrated import by_nodes
from hierbayes.meta.criterion import Criterion
from hierbayes.meta.optimum import HELD, curvature, held_entries
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import solve_upper
from hierbayes.phi.space import FLAT, Space
from hierbayes.rows import Rows, Whole
from hierbayes.tasks import Tasks

INSIDE = 1e-12
"""Distance that points keep from the ends of (0, 1), where a quantile is not finite."""


@functools.lru_cache(maxsize=8)
def student_nodes(
    num_nodes: int, dimensions: int, num_replicates: int = 1, num_runs: int = 1, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    r"""Nodes t and log weights, for integrals against whatever stands beside ½ |t|².

    Parameters
    ----------
    num_nodes : int
        Q of one replicate, a power of two.
    dimensions : int
        d.
    num_replicates : int
        R independent scrambles.
    num_runs : int
        K, runs of Q points that follow one another in each scramble, a power of two.
    seed : int
        Of the scrambles.

    Returns
    -------
    nodes : array (R, Q, K, d)
    log_weights : array (R, Q, K)
        log w̄ + ½ |t|² in the convention of :func:`~hierbayes.adaptation.quadrature.grid`: minus
        log Q, minus log q(t), minus ½ d log 2π, so that Σ_q w̄_q = 1 but for the rule's own error.

    Examples
    --------
    The variance of a standard normal, ∫ t² N(t; 0, 1) dt = 1:

    >>> import numpy as np
    >>> t, log_weights = student_nodes(1024, 1)
    >>> weights = np.exp(log_weights - 0.5 * (t**2).sum(-1))
    >>> round(float((weights * t[..., 0] ** 2).sum()), 2)
    1.0
    """
    from scipy import special, stats

    nu, size = DEGREES_OF_FREEDOM, num_nodes * num_runs
    children = np.random.SeedSequence(seed).spawn(num_replicates)
    nodes = np.empty((num_replicates, num_nodes, num_runs, dimensions))
    for r, child in enumerate(children):
        engine = stats.qmc.Sobol(dimensions + 1, rng=np.random.default_rng(child))
        u = np.clip(engine.random(size), INSIDE, 1 - INSIDE)
        stretch = np.sqrt(nu / (2 * special.gammaincinv(nu / 2, u[:, -1])))
        points = special.ndtri(u[:, :-1]) * stretch[:, None]
        nodes[r] = points.reshape(num_runs, num_nodes, dimensions).swapaxes(0, 1)
    d = dimensions
    log_density = (
        special.gammaln((nu + d) / 2) - special.gammaln(nu / 2) - 0.5 * d * np.log(np.pi * nu)
        - 0.5 * (nu + d) * np.log1p((nodes**2).sum(-1) / nu)
    )  # fmt: skip
    return nodes, -np.log(num_nodes) - log_density - 0.5 * d * np.log(2 * np.pi)


NODES = {1: 7, 2: 7, 3: 5}
"""Gauss–Hermite nodes a dimension of the better evidence, by the number of coefficients."""

SOBOL_NODES, REPLICATES, MOST_RUNS = 32, 4, 256
"""Nodes of a scramble, and scrambles, where there are more coefficients; runs of nodes at most."""


class Runs(NamedTuple):
    """Nodes (R, Q, K, d) and log w̄ + ½ |t|² (R, Q, K), of which the tasks take K runs in turn."""

    nodes: np.ndarray
    log_weights: np.ndarray


class Run(NamedTuple):
    """One replicate: nodes (Q, K, d) and their log weights (Q, K); task j takes the run j mod K."""

    places: Any
    log_weights: Any
    count: Any

    def node(self, stand: Mode, q: Any) -> tuple[jax.Array, jax.Array]:
        """The q-th node z (d, J) of every task and its log weight (J,)."""
        run = jnp.arange(stand.z.shape[1]) % self.places.shape[1]
        moved = solve_upper(stand.factor, jnp.asarray(self.places)[q].T[:, run])
        return stand.z + moved, jnp.asarray(self.log_weights)[q][run]


def by_replicate(tasks: LogJoint, held: Mode, rule: Runs) -> jax.Array:
    """log p̂_r(D_j | φ) (R, J), the nodes held."""

    def of_one(run: Any) -> jax.Array:
        return ByNodes(tasks, held, Run(run[0], run[1], len(run[0]))).log_normaliser

    return jax.lax.map(of_one, jax.tree.map(jnp.asarray, tuple(rule)))


def pooled(logs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p̃ (J,) from replicates (R, J) by the jackknife, and its R leave-one-out values (R, J).

    The jackknife takes away the logarithm's bias, of order 1/Q. Of a single replicate: itself, and
    no values (0, J).
    """
    size = len(logs)
    if size == 1:
        return logs[0], logs[:0]
    base = logs.max(0)
    parts = jnp.exp(logs - base)
    whole = jnp.log(parts.mean(0))
    without = jnp.log((parts.sum(0) - parts) / (size - 1))
    return base + size * whole - (size - 1) * without.mean(0), base + without


def jackknife_error(without: Any) -> Any:
    """Standard error from leave-one-out values (R, …) of a statistic; NaN where there are none."""
    size = len(without)
    if not size:
        return jnp.full(without.shape[1:], jnp.nan)
    return jnp.sqrt((size - 1) / size * ((without - without.mean(0)) ** 2).sum(0))


def better_rule(dimensions: int, num_tasks: int) -> Runs:
    """The nodes of the better evidence in so many dimensions."""
    if dimensions in NODES:
        return gauss_hermite(NODES[dimensions], dimensions)
    return scrambled_sobol(SOBOL_NODES, dimensions, REPLICATES, num_tasks)


def scrambled_sobol(
    num_nodes: int, dimensions: int, num_replicates: int, num_tasks: int, seed: int = 0
) -> Runs:
    """Sobol nodes under a Student-t, as many runs of them as there are tasks, within reason."""
    runs = min(MOST_RUNS, 2 ** int(np.ceil(np.log2(max(num_tasks, 1)))))
    return Runs(*student_nodes(num_nodes, dimensions, num_replicates, runs, seed))


def gauss_hermite(num_nodes: int, dimensions: int) -> Runs:
    """A product grid as a rule of one replicate."""
    places, log_weights, count = grid(num_nodes, dimensions)
    return Runs(places[None, :count, None], log_weights[None, :count, None])


class AroundPhi(NamedTuple):
    """φ's vector around φ̂: ``rows`` of the tasks, ``vector`` (P,) of φ̂, ``modes`` (d, J) in z."""

    rows: Rows | Whole
    space: Space
    vector: Any
    modes: Any

    def tasks(self, model: HierarchicalModel, vector: Any) -> LogJoint:
        """Every Ψ_j at φ."""
        return LogJoint.at(model, self.space.phi(vector), self.rows)


@functools.partial(jax.jit, static_argnums=0)
def held_at(model: HierarchicalModel, around: AroundPhi) -> Mode:
    """Where nodes stand: at the modes of every task at φ̂, followed to rounding."""
    return mode_near(around.tasks(model, around.vector), jnp.asarray(around.modes))


@functools.partial(jax.jit, static_argnums=0)
def log_evidences(model: HierarchicalModel, around: AroundPhi, held: Mode, rule: Runs) -> Any:
    """log p̂_r(D_j | φ̂) of every replicate and task, (R, J)."""
    return by_replicate(around.tasks(model, around.vector), held, rule)


@functools.partial(jax.jit, static_argnums=0)
def _slopes(model: HierarchicalModel, around: AroundPhi, held: Mode, rule: Runs) -> jax.Array:
    """∇ Σ_j log p̃(D_j | φ̂) and the same without each replicate, (1 + R, P)."""

    def totals(v: jax.Array) -> jax.Array:
        best, without = pooled(by_replicate(around.tasks(model, v), held, rule))
        return jnp.concatenate([best.sum()[None], without.sum(1)])

    found, back = jax.vjp(totals, around.vector)
    # one at a time: each goes over all rows again, and memory is that of one of them
    return jax.lax.map(lambda c: back(c)[0], jnp.eye(len(found)))


class Shift(NamedTuple):
    """Δ (P,) in standard errors and the Monte Carlo error of Δ (P,); NaN outside ``inside``."""

    step: np.ndarray
    error: np.ndarray

    @property
    def farthest(self) -> float:
        """The largest |Δ_i|; NaN where no Δ_i is known."""
        return _largest(np.abs(self.step))

    @property
    def surely(self) -> float:
        """The largest |Δ_i| less two of its Monte Carlo errors; NaN where no Δ_i is known."""
        return _largest(np.abs(self.step) - 2 * np.nan_to_num(self.error))


def _largest(values: np.ndarray) -> float:
    return float(np.nanmax(values)) if np.isfinite(values).any() else float("nan")


def newton_shift(
    model: HierarchicalModel,
    around: AroundPhi,
    inside: np.ndarray,
    hessian: np.ndarray,
    tilt: Any = 0.0,
    rule: Runs | None = None,
    held: Mode | None = None,
) -> Shift:
    """One Newton step from φ̂ on the better evidence; use it inside ``numerics.float64()``.

    Parameters
    ----------
    model : HierarchicalModel
        Without its encoder.
    around : AroundPhi
    inside : array (P,) of bool
        Coordinates that φ̂ may move along.
    hessian : array (p, p)
        Of minus the criterion, in those coordinates.
    tilt : array (P,)
        ∇ log p(φ̂), where the criterion holds it.
    rule : Runs, optional
        The nodes; :func:`better_rule` by default.
    held : Mode, optional
        Where the nodes stand, if it is known already.

    Returns
    -------
    Shift
        All NaN where the criterion is not concave at φ̂.
    """
    rule = better_rule(*np.shape(around.modes)) if rule is None else rule
    size = len(np.asarray(around.vector))
    step, error = np.full(size, np.nan), np.full(size, np.nan)
    values, vectors = np.linalg.eigh(hessian)
    if not (values.size and values[0] > FLAT * values[-1]):
        return Shift(step, error)
    held = held_at(model, around) if held is None else held
    slopes = np.asarray(_slopes(model, around, held, rule)) + tilt
    inverse = (vectors / values) @ vectors.T
    moved = slopes[:, inside] @ inverse / np.sqrt(np.diag(inverse))
    step[inside] = moved[0]
    error[inside] = np.asarray(jackknife_error(moved[1:]))
    return Shift(step, error)


HARDLY = 1e-10
"""Share of the identity that correlations at their boundary are given, for them to have a place in
φ's vector, where ±1 has none."""


class Information(NamedTuple):
    """φ̂'s surroundings, which coordinates are ``inside`` (P,), minus the ``hessian`` there (p, p).

    ``tilt`` (P,) is ∇ log p(φ̂), zero where the criterion leaves it out.
    """

    around: AroundPhi
    inside: np.ndarray
    hessian: np.ndarray
    tilt: np.ndarray


def x_of(space: Space, phi: Mapping[str, np.ndarray]) -> np.ndarray:
    """x of φ, where correlations at their boundary stand by 1e-10 inside it."""
    return space.x(phi, shrunk=HARDLY if HELD in held_entries(space, phi)[1] else 0.0)


def observed_information(
    model: HierarchicalModel,
    tasks: Tasks,
    phi: Mapping[str, np.ndarray],
    num_nodes: int,
    *,
    with_hyperprior: bool,
) -> Information:
    """I(φ̂) by differences of exact slopes; use it inside ``numerics.float64()``.

    Parameters
    ----------
    model : HierarchicalModel
        Resolved, as a fit keeps it.
    tasks : Tasks
    phi : mapping
        φ̂ by name.
    num_nodes : int
        Nodes a dimension of the evidence that φ̂ maximises; one is Laplace's approximation, which
        of Gaussian tasks is exact.
    with_hyperprior : bool
        Whether log p(φ) is part of the criterion.

    Returns
    -------
    Information
    """
    phi = {name: np.asarray(value, float) for name, value in phi.items()}
    how = by_nodes(num_nodes)
    criterion = Criterion(model, tasks, how, with_hyperprior=with_hyperprior)
    space, x = criterion.space, x_of(criterion.space, phi)
    inside = space.inside(x) & ~held_entries(space, phi)[0]
    hessian = curvature(criterion, x, inside)
    criterion(x)  # leaves the modes where phi has them
    around = AroundPhi(criterion.rows, space, x, criterion.start)
    return Information(around, inside, hessian, criterion.hyperprior(x)[1])
