"""Correlations at the end of their range, ±1, where no standard error can be had of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from hierbayes.phi.space import Space

SINGULAR = 1e-4
"""Relative size of a direction's standard deviation below which it counts as zero, as in lme4."""

HELD = (
    "the estimated correlations are at their boundary (±1): the standard errors of tau "
    "and sigma hold them fixed there, and the data may not support correlated effects"
)


def at_the_boundary(corr: np.ndarray, blocks: Iterable[Sequence[int]]) -> bool:
    """Whether some direction within a block of correlated coefficients has no variance left.

    ``corr`` (d, d): the smallest eigenvalue of a block is the squared relative standard deviation
    of a direction, and counts as zero below :data:`SINGULAR` squared.
    """
    return any(
        len(b) > 1 and np.linalg.eigvalsh(corr[np.ix_(b, b)])[0] < SINGULAR**2 for b in blocks
    )


def held_entries(space: Space, phi: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[str]]:
    """Entries of φ's vector (P,) of bool that stand for correlations to be held, and why.

    All of them where a correlation lies at its boundary; of a pair with τ = 0 in it, the pair's,
    which nothing depends on.
    """
    held = np.zeros(space.size, bool)
    if "corr" not in phi or not space.blocks:
        return held, []
    spread = phi["tau"] > 0
    if at_the_boundary(phi["corr"], [[i for i in b if spread[i]] for b in space.blocks]):
        held[space.at["corr"]] = True
        return held, [HELD]
    start = space.at["corr"].start
    for b in space.blocks:
        size = len(b) * (len(b) - 1) // 2
        held[start : start + size] = len(b) == 2 and not spread[list(b)].all()
        start += size
    return held, []
