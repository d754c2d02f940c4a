r"""Draws from the collapsed posterior: independence Metropolis, or NUTS where that is poor.

Independence Metropolis in two stages: a cheap density moves, the dear one decides.

.. math::

    x \to y \text{ by } k \text{ steps that leave } \tilde p \text{ as it is}, \qquad
    \Pr(\text{accept}) = \min\left(1, \frac{p(y) / \tilde p(y)}{p(x) / \tilde p(x)}\right)

which leaves p as it is, whatever p̃. The dear density is needed where a chain has come to rest only,
once a draw in place of once a proposal. Reference: Liu (2001), Monte Carlo Strategies in Scientific
Computing, section 9.4.3, the surrogate transition method.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from hierbayes.meta.collapsed import Point
from hierbayes.meta.independence import (
    WARMUP,
    Chains,
    Fitted,
    Proposal,
    Weigh,
    fit_proposal,
    longest_stay,
    pareto_k,
    run_chains,
    tail_share,
    thinning,
)
from hierbayes.meta.optimum import curvature
from hierbayes.meta.sampling import run_potential
from hierbayes.numerics import as_key
from hierbayes.phi.space import inverse_softplus


def run_two_stages(
    rough: Weigh,
    dear: Weigh,
    fitted: Fitted,
    rng: np.random.Generator,
    *,
    num_draws: int,
    num_chains: int,
    every: int,
) -> Chains:
    """Chains with ``every`` proposals between two draws weighed by ``rough``, draws by ``dear``.

    ``accepted`` says of each draw whether it is another than the draw before, and
    ``longest_stay`` counts draws.
    """
    before = 1 + WARMUP // every
    steps = before + num_draws
    length = 1 + steps * every
    points = fitted.proposal.sample(rng, num_chains * length)
    weights = np.exp(fitted.log_weights - logsumexp(fitted.log_weights))
    points[::length] = fitted.draws[rng.choice(len(weights), num_chains, p=weights)]
    values = rough(points)[0]
    log_weights = values - fitted.proposal.log_prob(points)
    inner = np.log(rng.random((num_chains, length)))
    outer = np.log(rng.random((num_chains, steps)))
    gain = np.full(len(points), np.nan)  # log p − log p̃, where it is known
    beside: dict[str, np.ndarray] = {}
    wanted = np.arange(num_chains) * length
    while wanted.size:
        found, some = dear(points[wanted])
        gain[wanted] = np.where(np.isfinite(found), found - values[wanted], -np.inf)
        for name, value in some.items():
            beside.setdefault(name, np.zeros((len(points), *value.shape[1:])))[wanted] = value
        walks = [
            _walk(
                log_weights[start : start + length], gain[start : start + length],
                inner[chain], outer[chain], every,
            )
            for chain, start in enumerate(range(0, len(points), length))
        ]  # fmt: skip
        wanted = np.concatenate(
            [np.array(sorted(walk[1]), int) + c * length for c, walk in enumerate(walks)]
        )
    states = np.stack([walk[0] for walk in walks]) + np.arange(num_chains)[:, None] * length
    moves = np.diff(states, axis=1) != 0
    places = states[:, before + 1 :]
    # E over p of p̃ / p is the ratio of their integrals; p̃'s own comes from all proposals
    fair = np.delete(log_weights, np.arange(num_chains) * length)
    log_mean = float(logsumexp(fair) - np.log(len(fair)))
    inverse = np.exp(-(gain[places] - gain[places].mean())).ravel()
    log_ratio = float(gain[places].mean() - np.log(inverse.mean()))
    variance = np.exp(fair - log_mean).var(ddof=1) / len(fair)
    variance += inverse.var(ddof=1) / inverse.mean() ** 2 / max(len(inverse) - 1, 1)
    # chains rest on draws of p̃, which the dear density weighs by p / p̃
    dearer = gain[~np.isnan(gain)]
    return Chains(
        points[places], {name: value[places] for name, value in beside.items()},
        (values + gain)[places], moves[:, before:].astype(float), longest_stay(moves[:, before:]),
        log_mean + log_ratio, float(np.sqrt(variance)), max(pareto_k(fair), pareto_k(dearer)),
    )  # fmt: skip


def _walk(
    log_weights: np.ndarray, gain: np.ndarray, inner: np.ndarray, outer: np.ndarray, every: int
) -> tuple[np.ndarray, set[int]]:
    """Places after every outer step, and places whose gain is wanted.

    Where a gain is not known the step is let stand, to be walked again when it is.
    """
    weights, gains = log_weights.tolist(), gain.tolist()
    u, v = inner.tolist(), outer.tolist()
    at, wanted = 0, set()
    states = np.zeros(len(v) + 1, int)
    for step in range(len(v)):
        to = at
        for i in range(1 + step * every, 1 + (step + 1) * every):
            if u[i] < weights[i] - weights[to]:
                to = i
        if to != at:
            if gains[to] != gains[to]:
                wanted.add(to)
                at = to
            elif gains[at] != gains[at] or v[step] < gains[to] - gains[at]:
                at = to
        states[step + 1] = at
    return states, wanted


LEAST_ACCEPTANCE = 0.2
"""Share of accepted proposals below which NUTS takes over."""

FAR = (0.0, 0.1, 0.3)
"""Parts of a proposal that reach far, in the order in which they are tried."""

TOO_LIGHT = 0.7
"""Pareto's k̂ of weights from which on a proposal has tails too light: more of it is to reach far,
or, where no more can, NUTS takes over."""

GOOD_TAIL, LEAST_TAIL = 0.25, 0.1
"""Shares of the draws that are to be effective beyond the quantiles 5 % and 95 %: for proposals to
be left as they are, and for NUTS not to take over."""

MOST_REFINEMENTS = 3
"""Times that draws are made anew where they show the density itself to be too rough."""

CHEAP = 20_000_000
"""Draws × tasks up to which densities are cheap enough to drop proposals between draws."""


REFUSED = (
    "independence Metropolis accepted {share:.0%} of its proposals (at least "
    f"{LEAST_ACCEPTANCE:.0%} wanted)"
)

TAILS = (
    "the proposals of independence Metropolis have tails too light for the posterior (Pareto's k "
    "of their weights is {k:.2f}, " + f"at most {TOO_LIGHT} wanted)"
)

STUCK = (
    "chains of independence Metropolis stay long in the tails (effective draws there are "
    "{share:.0%} of all, " + f"at least {LEAST_TAIL:.0%} wanted)"
)


class Sampled(NamedTuple):
    """Draws of φ (chain, draw, …) and what is known of how they were made."""

    draws: dict[str, np.ndarray]
    sample_stats: dict[str, np.ndarray]
    log_evidence: float | None
    remarks: list[str]
    info: dict[str, Any]


class Doubted(Exception):
    """A density has proved not to be relied on, before chains were run on it."""


class Located(NamedTuple):
    """The mode of the collapsed posterior: units of τ, x, and a root of the inverse Hessian."""

    units: np.ndarray
    mode: np.ndarray
    root: np.ndarray


class Density(Protocol):
    """A posterior of φ as a density of points (x, e), e standard normal, as the sampler sees it.

    ``units`` are rough ones, ``start`` (k,) a first guess of x; the first ``num_coef`` entries of x
    are those of τ. ``e`` has ``num_white`` entries, on which the density does not depend where
    ``exact`` is True. ``has_rough`` says whether ``points(rough=True)`` is a cheaper density.
    """

    num_tasks: int
    num_coef: int
    num_white: int
    exact: bool
    has_rough: bool
    proper: bool
    spread: bool
    units: np.ndarray

    @property
    def start(self) -> np.ndarray:
        """A first guess of x, in ``units``."""
        ...

    @property
    def at_once(self) -> int:
        """Points of one compiled call."""
        ...

    def value_and_slope(self, units: np.ndarray, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the density at (x, 0) and its slope."""
        ...

    def prepare(self, units: np.ndarray, x: np.ndarray) -> None:
        """Take note of where points will lie."""

    def points(
        self, units: np.ndarray, xs: np.ndarray, es: np.ndarray, advance: Callable[[], Any] = ...,
        *, rough: bool = False,
    ) -> Point:  # fmt: skip
        """φ by name and log densities of many points."""
        ...

    def log_density(self, units: np.ndarray) -> tuple[Any, Any]:
        """The log density of (data, x, e), one point, hashable by what it does; and its data."""
        ...

    def refine(self, units: np.ndarray, xs: np.ndarray) -> bool:
        """Judge the density at draws x (n, k); True where it is another, and better, thereafter."""
        ...

    @property
    def doubt(self) -> str | None:
        """Why draws of this density are not to be relied on, if they are not."""
        ...


def sample_collapsed(
    target: Density,
    rng: np.random.Generator,
    *,
    num_draws: int,
    num_chains: int,
    num_warmup: int,
    target_accept: float,
    progress: bool | None,
    give_up: bool = False,
) -> Sampled:
    """Sample φ from its exact posterior; ``give_up``: :class:`Doubted` where that is in doubt."""
    located = locate(target)
    cheap = num_draws * num_chains * target.num_tasks <= CHEAP
    target.prepare(located.units, located.mode)
    counts = dict(num_draws=num_draws, num_chains=num_chains)
    for _ in range(MOST_REFINEMENTS):
        with _bar(progress, "full Bayes") as bar:
            chains, why = _independent(
                target, located, rng, bar, cheap=cheap, give_up=give_up, **counts
            )
        if chains is not None:
            xs, found = chains.points, _from_chains(target, chains)
        else:
            xs, found = _by_nuts(
                target, located, rng, why, **counts, num_warmup=num_warmup,
                target_accept=target_accept, progress=progress,
            )  # fmt: skip
        if not target.refine(located.units, xs.reshape(-1, xs.shape[-1])[:, : len(located.mode)]):
            break
    return found


def _independent(
    target: Density, located: Located, rng: np.random.Generator, bar: Any, *,
    num_draws: int, num_chains: int, cheap: bool, give_up: bool,
) -> tuple[Chains | None, str]:  # fmt: skip
    """Chains whose proposals reach as far as the posterior does; else None, and why."""
    size = len(located.mode)

    def weighing(*, rough: bool) -> Weigh:
        def weigh(points: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
            xs, es = points[:, :size], points[:, size:]
            found = target.points(located.units, xs, es, bar.update, rough=rough)
            # so far out that a parameter overflows there is no density
            known = np.isfinite(found.log_density)
            return np.where(known, found.log_density, -np.inf), found.phi

        return weigh

    start, why = Proposal(located.mode, located.root, target.num_white), ""
    for far in FAR:
        last = far == FAR[-1]
        start = replace(start, far=far)
        fitted = fit_proposal(weighing(rough=target.has_rough), start, rng)
        if fitted.share <= 0.01:
            why = REFUSED.format(share=fitted.share)
            continue
        start = fitted.proposal
        if not last and pareto_k(fitted.log_weights) > TOO_LIGHT:
            continue
        weights = np.exp(fitted.log_weights - fitted.log_weights.max())
        some = rng.choice(len(weights), len(weights), p=weights / weights.sum())
        refined = target.refine(located.units, fitted.draws[some, :size])
        if give_up and target.doubt:
            raise Doubted
        if refined:
            fitted = fit_proposal(weighing(rough=target.has_rough), start, rng)
        every = thinning(fitted.proposal.share) if cheap else 1
        bar.reset(-(-num_chains * num_draws * every // target.at_once))
        counts = dict(num_draws=num_draws, num_chains=num_chains, every=every)
        dear = weighing(rough=False)
        if target.has_rough:
            chains = run_two_stages(weighing(rough=True), dear, fitted, rng, **counts)
        else:
            chains = run_chains(dear, fitted, rng, **counts)
        tails = tail_share(chains.points[..., :size])
        if chains.acceptance < LEAST_ACCEPTANCE:
            why = REFUSED.format(share=chains.acceptance)
        elif chains.pareto_k > TOO_LIGHT:
            why = TAILS.format(k=chains.pareto_k)
        elif tails < (LEAST_TAIL if last else GOOD_TAIL):
            why = STUCK.format(share=tails)
        else:
            return chains, ""
    return None, why


def locate(target: Density) -> Located:
    """The mode, found in the target's rough units and stated in units of τ's own spread."""
    from scipy import optimize  # heavy, so loaded when first used

    d, units, x = target.num_coef, target.units, target.start
    # near is near enough, since the proposal is fitted; L-BFGS-B would leave BLAS threads spinning
    # for fifty milliseconds, and XLA without a core
    run: Any = optimize.minimize(
        lambda v: target.value_and_slope(units, v), x, jac=True, method="BFGS",
        options={"gtol": 0.1},
    )  # fmt: skip
    found = np.asarray(run.x)
    hessian = curvature(lambda v: target.value_and_slope(units, v), found, np.ones(len(x), bool))
    covariance = _inverse(hessian)
    slope = 1.0 / (1.0 + np.exp(-found[:d]))  # of softplus: dτ/dx in units
    spread = units * slope * np.sqrt(np.diag(covariance)[:d])
    own = np.clip(spread, 1e-3 * units, 1e3 * units)
    mode = found.copy()
    mode[:d] = inverse_softplus(units * np.logaddexp(0.0, found[:d]) / own)
    stretch = np.ones(len(x))
    stretch[:d] = units * slope * (1.0 + np.exp(-mode[:d])) / own
    return Located(own, mode, np.linalg.cholesky(covariance * np.outer(stretch, stretch)))


def _inverse(hessian: np.ndarray) -> np.ndarray:
    """The inverse of a Hessian, with directions that hardly curve taken as of unit width."""
    values, vectors = np.linalg.eigh(np.nan_to_num(hessian))
    safe = np.where(values > 1e-2, values, 1.0)
    return (vectors / safe) @ vectors.T


def _from_chains(target: Density, chains: Chains) -> Sampled:
    draws = chains.beside
    stats = {"acceptance_rate": chains.accepted, "lp": chains.log_density}
    info: dict[str, Any] = {
        "sampler": "independence",
        "acceptance": chains.acceptance,
        "longest_stay": chains.longest_stay,
        "pareto_k": chains.pareto_k,
    }
    if not target.proper:
        return Sampled(draws, stats, None, [], info)
    info["log_evidence_se"] = chains.log_normaliser_se
    return Sampled(draws, stats, chains.log_normaliser, [], info)


def _by_nuts(
    target: Density, located: Located, rng: np.random.Generator, why: str, *,
    num_draws: int, num_chains: int, **settings: Any,
) -> tuple[np.ndarray, Sampled]:  # fmt: skip
    """NUTS in the coordinates that the Hessian makes round: draws of x, and of φ."""
    size, units = len(located.mode), located.units
    num_white = 0 if target.exact else target.num_white
    density, data = target.log_density(units)
    key = as_key(int(rng.integers(2**31)))
    start = jnp.asarray(rng.uniform(-1.0, 1.0, (num_chains, size + num_white)))
    found, stats = run_potential(
        Rounded(density, size, target.num_white - num_white),
        (data, located.mode, located.root),
        key,
        start,
        dense=True,
        num_draws=num_draws,
        num_chains=num_chains,
        **settings,
    )
    z = np.asarray(found).reshape(num_chains * num_draws, -1)
    white = z[:, size:] if num_white else rng.standard_normal((len(z), target.num_white))
    xs = located.mode + z[:, :size] @ located.root.T
    phis = target.points(units, xs, white).phi
    draws = {n: v.reshape(num_chains, num_draws, *v.shape[1:]) for n, v in phis.items()}
    remark = (
        f"{why}, so phi was sampled by NUTS on the same collapsed density; the result is as exact, "
        "only slower"
    )
    if target.spread:
        remark += ", and on one device of each process, not on those that the tasks are spread over"
    return xs, Sampled(draws, stats, None, [remark], {"sampler": "nuts"})


class Rounded(NamedTuple):
    """Minus a density in the coordinates that the Hessian makes round, and normal ones beside.

    ``absent``: entries of e on which the density does not depend.
    """

    density: Any
    size: int
    absent: int

    def __call__(self, z: Any, data: Any) -> jax.Array:
        """Minus its logarithm at z; data are the density's, the mode and the root."""
        own, mode, root = data
        x, white = mode + root @ z[: self.size], z[self.size :]
        e = jnp.concatenate([white, jnp.zeros(self.absent)])
        return 0.5 * (white**2).sum() - self.density(own, x, e)


def _bar(progress: bool | None, name: str) -> Any:
    from tqdm.auto import tqdm

    shown = sys.stderr.isatty() if progress is None else progress
    return tqdm(desc=name, disable=not shown, leave=False, delay=1.0)
