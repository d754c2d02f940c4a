"""Whether contestants found the same posterior, judged before any time is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MEANS = 0.1
"""Means may differ by this many posterior standard deviations, or by ``ERRORS`` of their errors."""
DEVIATIONS = 0.1
"""Standard deviations may differ by this share, or by ``ERRORS`` of their errors."""
ERRORS = 5.0
"""Monte Carlo standard errors: some hundred quantities are compared at once."""
ESTIMATES = 1e-4
"""Maximum likelihood estimates may differ by this share; correlations, on [-1, 1], by this much."""

SUMMIT = 1e-3
"""Log likelihoods that differ by no more belong to the same maximum."""


class Summary(NamedTuple):
    """Of every scalar quantity, by its name."""

    names: list[str]
    mean: np.ndarray
    sd: np.ndarray
    mean_error: np.ndarray
    sd_error: np.ndarray
    ess: np.ndarray
    rhat: np.ndarray


def quantities(draws: Mapping[str, Any]) -> tuple[list[str], np.ndarray]:
    """Names, and draws of (chain, draw, quantity): every scalar of φ and of θ."""
    names, parts = [], []
    for name in sorted(draws):
        values = np.asarray(draws[name], float)
        flat = values.reshape(*values.shape[:2], -1)
        shape = values.shape[2:] or (1,)
        for index in np.ndindex(*shape):
            names.append(f"{name}[{', '.join(map(str, index))}]")
        parts.append(flat)
    return names, np.concatenate(parts, axis=-1)


def summarise(draws: Mapping[str, Any]) -> Summary:
    """Moments with their Monte Carlo errors, bulk ESS and R̂, all by ArviZ."""
    from arviz_stats.base import array_stats

    names, values = quantities(draws)
    axes = {"chain_axis": 0, "draw_axis": 1}
    return Summary(
        names, values.mean(axis=(0, 1)), values.std(axis=(0, 1), ddof=1),
        np.asarray(array_stats.mcse(values, method="mean", **axes)),
        np.asarray(array_stats.mcse(values, method="sd", **axes)),
        np.asarray(array_stats.ess(values, method="bulk", **axes)),
        np.asarray(array_stats.rhat(values, method="rank", **axes)),
    )  # fmt: skip


def smallest_ess(draws: Mapping[str, Any]) -> tuple[float, str]:
    """The smallest bulk ESS over φ and θ, and whose it is."""
    found = summarise(draws)
    if not np.isfinite(found.ess).all():
        return 0.0, found.names[int(np.flatnonzero(~np.isfinite(found.ess))[0])]
    worst = int(np.argmin(found.ess))
    return float(found.ess[worst]), found.names[worst]


def same_posterior(a: Summary, b: Summary) -> str | None:
    """None where they agree; else what differs most, in words."""
    if a.names != b.names:
        return "other quantities"
    if not all(np.isfinite(part).all() for s in (a, b) for part in (s.mean, s.sd)):
        return "draws that are not finite"
    sd = np.minimum(a.sd, b.sd)
    allowed = np.maximum(MEANS * sd, ERRORS * np.hypot(a.mean_error, b.mean_error))
    excess = np.abs(a.mean - b.mean) / allowed
    if (excess > 1).any():
        worst = int(np.argmax(excess))
        off = (a.mean - b.mean)[worst] / sd[worst]
        return f"the mean of {a.names[worst]} by {off:+.2f} posterior sd"
    error = np.hypot(a.sd_error / a.sd, b.sd_error / b.sd)
    ratio = np.log(a.sd / b.sd)
    excess = np.abs(ratio) / np.maximum(DEVIATIONS, ERRORS * error)
    if (excess > 1).any():
        worst = int(np.argmax(excess))
        return f"the sd of {a.names[worst]} by a factor {np.exp(ratio[worst]):.2f}"
    return None


def same_estimates(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """None where maximum likelihood estimates agree; else what differs most, in words."""
    for name in sorted({*a} & {*b}):
        first, second = np.ravel(a[name]), np.ravel(b[name])
        # a mean near zero has no relative error of its own
        size = np.maximum(np.maximum(np.abs(first), np.abs(second)), 0.01)
        size = np.ones_like(size) if name == "corr" else size
        share = np.abs(first - second) / size
        if not (share <= ESTIMATES).all():
            return f"{name} by {np.max(share):.1e} of its size"
    return None


def stopped_early(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """In words, where the estimates differ but both are at the maximum to ``SUMMIT``; else None.

    A search stops where the likelihood is flat to its own tolerance; that is not another answer.
    """
    short = float(np.ravel(b["log_likelihood"])[0] - np.ravel(a["log_likelihood"])[0])
    differs = same_estimates(a, b)
    if differs is None or not abs(short) <= SUMMIT:
        return None
    return f"off by its own tolerance: {differs}, log likelihood lower by {short:.0e}"


def verdicts(found: Mapping[str, Any], same: Any) -> dict[str, str | None]:
    """By contestant None, or how it differs from the one that most others agree with.

    hierbayes, which is listed first, gets no trust that the others do not: where most of them
    agree with each other and not with it, it is hierbayes that is refused.
    """
    names: Sequence[str] = list(found)
    agree = {a: sum(same(found[a], found[b]) is None for b in names) for a in names}
    if not names:
        return {}
    reference = max(names, key=lambda name: agree[name])
    told = {}
    for name in names:
        differs = same(found[name], found[reference])
        told[name] = differs and f"differs from {reference}: {differs}"
    return told
