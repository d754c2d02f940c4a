r"""Independence Metropolis on a proposal that has been fitted to the target.

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

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy.special import gammaln, logsumexp

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
    """A multivariate t, ``location`` (k,) and ``root`` (k, k), beside ``num_white`` white entries.

    The white entries are standard normal under target and proposal alike, so that neither density
    counts them. ``far`` is the part of the draws that a Cauchy of the same place is to make.
    ``share`` is what part of its draws is expected to be effective.
    """

    location: np.ndarray
    root: np.ndarray
    num_white: int = 0
    df: float = DEGREES_OF_FREEDOM[0]
    share: float = 0.0
    far: float = 0.0

    def sample(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Draws (size, k + num_white)."""
        normal = rng.standard_normal((size, len(self.location)))
        stretch = np.sqrt(self.df / rng.chisquare(self.df, size))
        if self.far:
            heavy = FAR_SCALE * np.sqrt(FAR_DF / rng.chisquare(FAR_DF, size))
            stretch = np.where(rng.random(size) < self.far, heavy, stretch)
        white = rng.standard_normal((size, self.num_white))
        # einsum, not BLAS: OpenBLAS's threads spin on after a call and hold XLA's up
        moved = np.einsum("nk,lk->nl", normal * stretch[:, None], self.root)
        return np.column_stack([self.location + moved, white])

    def log_prob(self, points: np.ndarray) -> np.ndarray:
        """Log densities (n,) of the t, or the mixture, at (n, k + num_white) points."""
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
        nowhere = np.append(start.location, np.zeros(start.num_white))[None]
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
    points = fitted.proposal.sample(rng, num_chains * length)
    weights = np.exp(fitted.log_weights - logsumexp(fitted.log_weights))
    first = rng.choice(len(weights), num_chains, p=weights)
    points[::length] = fitted.draws[first]
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


def _metropolis(log_weights: np.ndarray, log_uniform: np.ndarray) -> np.ndarray:
    """The state's place after every proposal; plain Python, since each step hangs on the last."""
    weights, uniforms = log_weights.tolist(), log_uniform.tolist()
    states, at, current = [0] * len(weights), 0, weights[0]
    for i in range(1, len(weights)):
        if uniforms[i] < weights[i] - current:
            at, current = i, weights[i]
        states[i] = at
    return np.array(states)
