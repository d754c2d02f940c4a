r"""Draws from the collapsed posterior: independence Metropolis, or NUTS where that is poor.

Independence Metropolis in two stages: a cheap density moves, the dear one decides.

.. math::

    x \to y \text{ by } k \text{ steps that leave } \tilde p \text{ as it is}, \qquad
    \Pr(\text{accept}) = \min\left(1, \frac{p(y) / \tilde p(y)}{p(x) / \tilde p(x)}\right)

which leaves p as it is, whatever p̃. The dear density is needed where a chain has come to rest only,
once a draw in place of once a proposal. Reference: Liu (2001), Monte Carlo Strategies in Scientific
Computing, section 9.4.3, the surrogate transition method.

Independence Metropolis on a proposal that has been fitted to the target.

All proposals are drawn and weighed at once, so a chain costs no more than a batch of densities:

.. math::

    w = \frac{p(x)}{q(x)}, \qquad
    \Pr(x \to x') = \min\left(1, \frac{w(x')}{w(x)}\right)

The proposal q is a Student t, started at the mode with the inverse Hessian, then fitted in rounds
to weighted draws of its own. The chain leaves p as it is whatever q is; how far q is from p shows
in the acceptance rate, and in the tail of w, whose shape is Pareto's k̂: where w has no bound, a
chain of finite length misses the tails of p although it accepts nearly all. A part of q with the
tails of a Cauchy bounds it. References: Tierney (1994), Markov chains for exploring posterior
distributions, section 2.3.3; Cappé et al. (2008), Adaptive importance sampling in general mixture
classes, Statistics and Computing 18; Hesterberg (1995), Weighted average importance sampling and
defensive mixture distributions, Technometrics 37; Zhang and Stephens (2009), A new and efficient
estimation method for the generalized Pareto distribution, Technometrics 51.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import gammaln, logsumexp

from hierbayes.meta.collapsed import Point
from hierbayes.meta.optimum import curvature
from hierbayes.meta.sampling import run_potential
from hierbayes.numerics import as_key
from hierbayes.phi.space import inverse_softplus

DEGREES_OF_FREEDOM = (5.0, 8.0)
"""Of the proposal: tails heavier than the target's; the heaviest until its draws say otherwise."""

FAR_DF, FAR_SCALE = 1.0, 2.0
"""Of the part of a proposal that reaches far: a Cauchy, so many times as wide as the rest."""

PILOT = 1024
"""Draws of one round of fitting."""

MOST_ROUNDS = 10

GOOD_SHARE, ENOUGH_SHARE, LEAST_GAIN = 0.7, 0.4, 1.1
"""Effective share of a round's draws from which on fitting ends; the same for a round that was not
better than the best before by the factor ``LEAST_GAIN``."""

HEAVIEST = 2.0
"""Log of the largest weight, beside their mean, that a proposal with lighter tails may show."""

EVEN = np.log(3.0)
"""Log of the largest weight, beside their mean, up to which no tail is to be feared."""

LEFT_BEHIND = 0.01
"""Part of the draws that may be the draw before, roughly."""

MOST_THINNING = 5
"""Proposals a draw at most: beyond, chains may hang together instead, and say so."""

WARMUP = 64
"""First proposals of a chain that are dropped; it starts at a weighted draw."""

Weigh = Callable[[np.ndarray], tuple[np.ndarray, dict[str, np.ndarray]]]
"""Log densities (n,) of n points, and whatever else is wanted of the points that are kept."""


@dataclass(frozen=True)
class Proposal:
    """A multivariate t, ``location`` (k,) and ``root`` (k, k), beside standard normal entries.

    Those ``num_noncentred`` are so under target and proposal alike, so that neither density
    counts them. ``far`` is the part of the draws that a Cauchy of the same place is to make.
    ``share`` is what part of its draws is expected to be effective.
    """

    location: np.ndarray
    root: np.ndarray
    num_noncentred: int = 0
    df: float = DEGREES_OF_FREEDOM[0]
    share: float = 0.0
    far: float = 0.0

    def sample(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Draws (size, k + num_noncentred)."""
        normal = rng.standard_normal((size, len(self.location)))
        stretch = np.sqrt(self.df / rng.chisquare(self.df, size))
        if self.far:
            heavy = FAR_SCALE * np.sqrt(FAR_DF / rng.chisquare(FAR_DF, size))
            stretch = np.where(rng.random(size) < self.far, heavy, stretch)
        white = rng.standard_normal((size, self.num_noncentred))
        # einsum, not BLAS: OpenBLAS's threads spin on after a call and hold XLA's up
        moved = np.einsum("nk,lk->nl", normal * stretch[:, None], self.root)
        return np.column_stack([self.location + moved, white])

    def log_prob(self, points: np.ndarray) -> np.ndarray:
        """Log densities (n,) of the t, or the mixture, at (n, k + num_noncentred) points."""
        k = len(self.location)
        white = np.einsum("lk,nk->ln", np.linalg.inv(self.root), points[:, :k] - self.location)
        squares = (white**2).sum(0)
        log_det = np.log(np.diag(self.root)).sum()
        near = _log_t(squares, self.df, k) - log_det
        if not self.far:
            return near
        beyond = _log_t(squares / FAR_SCALE**2, FAR_DF, k) - log_det - k * np.log(FAR_SCALE)
        return np.logaddexp(np.log1p(-self.far) + near, np.log(self.far) + beyond)


def _log_t(squares: np.ndarray, df: float, size: int) -> np.ndarray:
    """Log density of a standard t in so many dimensions, from squared distances."""
    constant = gammaln((df + size) / 2) - gammaln(df / 2) - 0.5 * size * np.log(df * np.pi)
    return constant - 0.5 * (df + size) * np.log1p(squares / df)


class Fitted(NamedTuple):
    """A proposal, weighted draws to start chains from, and the share of those that is effective."""

    proposal: Proposal
    draws: np.ndarray
    log_density: np.ndarray
    beside: dict[str, np.ndarray]
    log_weights: np.ndarray
    share: float


@dataclass(frozen=True)
class Chains:
    """``points`` (chain, draw, …) and what is ``beside`` them.

    ``accepted`` is the share of proposals since the last draw, ``longest_stay`` the most proposals
    in a row that were not; ``log_normaliser`` is the target's, with its standard error, from the
    same proposals, and ``pareto_k`` the shape of the tail of their weights.
    """

    points: np.ndarray
    beside: dict[str, np.ndarray]
    log_density: np.ndarray
    accepted: np.ndarray
    longest_stay: int
    log_normaliser: float
    log_normaliser_se: float
    pareto_k: float

    @property
    def acceptance(self) -> float:
        """The share of all proposals that were accepted."""
        return float(self.accepted.mean())


def fit_proposal(weigh: Weigh, start: Proposal, rng: np.random.Generator) -> Fitted:
    """Rounds of weighted draws, until most of a round is effective or nothing is gained."""
    proposal, best = start, None
    for _ in range(MOST_ROUNDS):
        draws = proposal.sample(rng, PILOT)
        values, beside = weigh(draws)
        log_weights = values - proposal.log_prob(draws)
        if not np.isfinite(log_weights).any():
            break
        fitted = Fitted(
            _refitted(proposal, draws, log_weights),
            draws,
            values,
            beside,
            log_weights,
            _share(log_weights),
        )
        gained = best is None or fitted.share > LEAST_GAIN * best.share
        if best is None or fitted.share > best.share:
            best = fitted
        if fitted.share > GOOD_SHARE or (not gained and fitted.share > ENOUGH_SHARE):
            break
        proposal = fitted.proposal
    if best is None:
        nowhere = np.append(start.location, np.zeros(start.num_noncentred))[None]
        return Fitted(start, nowhere, np.zeros(1), {}, np.zeros(1), 0.0)
    return best


def _share(log_weights: np.ndarray, elsewhere: np.ndarray | None = None) -> float:
    """(Σ w)² / (n Σ w²), or Σ w w' for Σ w²: of another proposal with weights w' at these draws."""
    other = log_weights if elsewhere is None else elsewhere
    sums: Any = logsumexp(np.stack([log_weights, log_weights + other]), axis=1)
    return float(np.exp(2 * sums[0] - sums[1])) / len(log_weights)


def _refitted(proposal: Proposal, draws: np.ndarray, log_weights: np.ndarray) -> Proposal:
    """A t with the mean and covariance of weighted draws, flattened where few weights dominate."""
    size = len(proposal.location)
    draws = draws[:, :size]
    least = min(0.5, 10.0 * (size + 1) / len(draws))
    temper = 1.0
    while _share(temper * log_weights) < least and temper > 1e-3:
        temper *= 0.8
    weights = np.exp(temper * (log_weights - log_weights.max()))
    weights /= weights.sum()
    location = np.einsum("n,nk->k", weights, draws)
    centred = draws - location
    covariance = np.einsum("n,nk,nl->kl", weights, centred, centred)
    covariance += 1e-9 * np.diag(np.diag(covariance)) + 1e-300 * np.eye(size)
    moved = replace(proposal, location=location, root=np.linalg.cholesky(covariance))
    candidates = [replace(moved, df=df) for df in DEGREES_OF_FREEDOM]
    before = proposal.log_prob(draws)
    elsewhere = [log_weights + before - c.log_prob(draws) for c in candidates]
    shares = [_share(log_weights, w) for w in elsewhere]
    log_sum: Any = logsumexp(log_weights)
    log_mean = log_sum - np.log(len(log_weights))
    # lighter tails only where no draw shows them to be too light: a chain would stay there for long
    safe = [i for i, w in enumerate(elsewhere) if i == 0 or w.max() - log_mean < HEAVIEST]
    best = max(safe, key=shares.__getitem__) if temper == 1.0 else 0
    return replace(candidates[best], share=shares[best])


def run_chains(
    weigh: Weigh,
    fitted: Fitted,
    rng: np.random.Generator,
    *,
    num_draws: int,
    num_chains: int,
    every: int,
) -> Chains:
    """Independence Metropolis from the fitted proposal, each ``every``-th state kept."""
    length = 1 + WARMUP + num_draws * every
    points = _proposed(fitted, rng, num_chains, length)
    values, beside = weigh(points)
    log_weights = values - fitted.proposal.log_prob(points)
    log_uniform = np.log(rng.random(len(points)))
    states = np.empty((num_chains, length), int)
    for chain in range(num_chains):
        states[chain] = chain * length + _metropolis(
            log_weights[chain * length : (chain + 1) * length],
            log_uniform[chain * length : (chain + 1) * length],
        )
    moves = (np.diff(states, axis=1) != 0)[:, WARMUP:]
    accepted = moves.reshape(num_chains, num_draws, every).mean(-1)
    places = states[:, 1 + WARMUP :][:, every - 1 :: every]
    fair = np.delete(log_weights, np.arange(num_chains) * length)
    log_mean = float(logsumexp(fair) - np.log(len(fair)))
    relative = np.exp(fair - log_mean)
    return Chains(
        points[places], {name: value[places] for name, value in beside.items()}, values[places],
        accepted, longest_stay(moves), log_mean,
        float(relative.std(ddof=1) / np.sqrt(len(fair))), pareto_k(fair),
    )  # fmt: skip


def pareto_k(log_weights: np.ndarray) -> float:
    """k̂ of the largest weights: below zero they have a bound, from ½ on no variance.

    −1 where they are too few, or too even, to have a tail.
    """
    some = log_weights[np.isfinite(log_weights)]
    size = int(min(0.2 * len(some), 3 * np.sqrt(len(some))))
    if size < 20:
        return -1.0
    some = np.exp(some - some.max())
    if some.mean() * np.exp(EVEN) > 1:
        return -1.0
    over = np.sort(np.partition(some, -size - 1)[-size - 1 :])
    over = over[1:] - over[0]
    if not over[size // 4] > 1e-12:
        return np.inf
    # Zhang and Stephens: the posterior mean of b = −k / scale over their grid of quantiles
    grid = np.arange(1, 31 + int(np.sqrt(size))) - 0.5
    b = 1 / over[-1] + (1 - np.sqrt((len(grid)) / grid)) / (3 * over[int(size / 4 + 0.5) - 1])
    shapes = np.log1p(-b[:, None] * over).mean(1)
    log_likelihood = size * (np.log(-b / shapes) - shapes - 1)
    weights = np.exp(log_likelihood - logsumexp(log_likelihood))
    k = np.log1p(-(weights @ b) * over).mean()
    return float((size * k + 10 * 0.5) / (size + 10))  # a little towards ½, as in PSIS


def tail_share(draws: np.ndarray) -> float:
    """Effective draws over draws (chain, draw, k) beyond the quantiles 5 % and 95 %, the least.

    By Geyer's initial positive sequence, of indicators.
    """
    chains, size = draws.shape[:2]
    if size < 20:
        return 1.0
    places = [int(share * (chains * size - 1)) for share in (0.05, 0.95)]
    low, high = np.partition(draws.reshape(chains * size, -1), places, axis=0)[places]
    beyond = np.concatenate([draws <= low, draws >= high], axis=-1).astype(float)
    centred = np.moveaxis(beyond - beyond.mean((0, 1)), 1, -1).copy()  # (chain, 2k, draw)
    spectrum = np.abs(np.fft.rfft(centred, 2 ** (2 * size - 1).bit_length())) ** 2
    covariance = np.fft.irfft(spectrum)[..., :size].mean(0).T
    moving = covariance[0] > 0
    pairs = covariance[: size - size % 2, moving].reshape(size // 2, 2, -1).sum(1)
    positive = np.cumprod(pairs > 0, axis=0)
    times = 2 * (pairs * positive).sum(0) / covariance[0, moving] - 1
    return float(1 / max(times.max(initial=1.0), 1 / (chains * size)))


def longest_stay(moves: np.ndarray) -> int:
    """The longest run of False in any row."""
    ends = np.pad(moves, ((0, 0), (1, 1)), constant_values=True)
    return int(max(np.diff(np.flatnonzero(row)).max() for row in ends)) - 1


def thinning(share: float) -> int:
    """Proposals a draw, so that hardly a chain stays where it was between two draws."""
    stays = 1.0 - np.clip(share, 0.01, 0.99)
    return int(np.clip(np.ceil(np.log(LEFT_BEHIND) / np.log(stays)), 1, MOST_THINNING))


def _proposed(fitted: Fitted, rng: np.random.Generator, num_chains: int, length: int) -> np.ndarray:
    """Every chain's proposals, chain after chain, from a start among the weighted draws."""
    points = fitted.proposal.sample(rng, num_chains * length)
    weights = np.exp(fitted.log_weights - logsumexp(fitted.log_weights))
    points[::length] = fitted.draws[rng.choice(len(weights), num_chains, p=weights)]
    return points


def _metropolis(log_weights: np.ndarray, log_uniform: np.ndarray) -> np.ndarray:
    """The state's place after every proposal; plain Python, since each step hangs on the last."""
    weights, uniforms = log_weights.tolist(), log_uniform.tolist()
    states, at, current = [0] * len(weights), 0, weights[0]
    for i in range(1, len(weights)):
        if uniforms[i] < weights[i] - current:
            at, current = i, weights[i]
        states[i] = at
    return np.array(states)


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
    points = _proposed(fitted, rng, num_chains, length)
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
        states, wanted = _walks(log_weights, gain, inner, outer, every)
    moves = states[:, 1:] != states[:, :-1]
    places = states[:, before + 1 :]
    fair = np.delete(log_weights, np.arange(num_chains) * length)
    log_normaliser, error = _normaliser(fair, gain[places])
    # chains rest on draws of p̃, which the dear density weighs by p / p̃
    dearer = gain[~np.isnan(gain)]
    return Chains(
        points[places], {name: value[places] for name, value in beside.items()},
        (values + gain)[places], moves[:, before:].astype(float), longest_stay(moves[:, before:]),
        log_normaliser, error, max(pareto_k(fair), pareto_k(dearer)),
    )  # fmt: skip


def _normaliser(fair: np.ndarray, gain: np.ndarray) -> tuple[float, float]:
    """log ∫ p and its standard error, from proposals weighed by p̃ and the gain of draws from p."""
    # E over p of p̃ / p is the ratio of their integrals; p̃'s own comes from all proposals
    log_mean = float(logsumexp(fair) - np.log(len(fair)))
    inverse = np.exp(-(gain - gain.mean())).ravel()
    log_ratio = float(gain.mean() - np.log(inverse.mean()))
    variance = np.exp(fair - log_mean).var(ddof=1) / len(fair)
    variance += inverse.var(ddof=1) / inverse.mean() ** 2 / max(len(inverse) - 1, 1)
    return log_mean + log_ratio, float(np.sqrt(variance))


def _walks(
    log_weights: np.ndarray, gain: np.ndarray, inner: np.ndarray, outer: np.ndarray, every: int
) -> tuple[np.ndarray, np.ndarray]:
    """Places (chain, step) of all chains in the points, and the points whose gain is wanted."""
    states, wanted = [], []
    for chain, start in enumerate(range(0, inner.size, inner.shape[1])):
        own = slice(start, start + inner.shape[1])
        places, more = _walk(log_weights[own], gain[own], inner[chain], outer[chain], every)
        states.append(start + places)
        wanted.append(start + np.array(sorted(more), int))
    return np.stack(states), np.concatenate(wanted)


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
    are those of τ. ``e`` has ``num_noncentred`` entries, on which the density does not depend where
    ``exact`` is True. ``has_rough`` says whether ``points(rough=True)`` is a cheaper density.
    """

    num_tasks: int
    num_coef: int
    num_noncentred: int
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

    start, why = Proposal(located.mode, located.root, target.num_noncentred), ""
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
    num_noncentred = 0 if target.exact else target.num_noncentred
    density, data = target.log_density(units)
    key = as_key(int(rng.integers(2**31)))
    start = jax.device_put(rng.uniform(-1.0, 1.0, (num_chains, size + num_noncentred)))
    found, stats = run_potential(
        Rounded(density, size, target.num_noncentred - num_noncentred),
        (data, located.mode, located.root),
        key,
        start,
        dense=True,
        num_draws=num_draws,
        num_chains=num_chains,
        **settings,
    )
    z = np.asarray(found).reshape(num_chains * num_draws, -1)
    white = z[:, size:] if num_noncentred else rng.standard_normal((len(z), target.num_noncentred))
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
