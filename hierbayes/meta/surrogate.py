r"""Independence Metropolis in two stages: a cheap density moves, the dear one decides.

.. math::

    x \to y \text{ by } k \text{ steps that leave } \tilde p \text{ as it is}, \qquad
    \Pr(\text{accept}) = \min\left(1, \frac{p(y) / \tilde p(y)}{p(x) / \tilde p(x)}\right)

which leaves p as it is, whatever p̃. The dear density is needed where a chain has come to rest only,
once a draw in place of once a proposal. Reference: Liu (2001), Monte Carlo Strategies in Scientific
Computing, section 9.4.3, the surrogate transition method.
"""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

from hierbayes.meta.independence import (
    WARMUP,
    Chains,
    Fitted,
    Weigh,
    longest_stay,
    pareto_k,
)


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
