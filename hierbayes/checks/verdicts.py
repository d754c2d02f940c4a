"""What the shape of ranks says of a posterior, in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CLEAR = 3.0
"""Standard errors from which on a mean or a spread of ranks is spoken of."""

TAIL = 0.1
"""Share of the ranks at either end that is looked at."""

EXPLAINS = ("log likelihood", "prediction error")
"""Quantities that look at the data: what lies too low there fits too badly, or too well."""


def shape_of(label: str, ranks: np.ndarray, num_draws: int) -> str:
    """What ranks (N,) on 0, …, L look like, for a quantity whose ranks are not uniform.

    Examples
    --------
    >>> import numpy as np
    >>> from hierbayes.checks.verdicts import shape_of
    >>> shape_of("sigma", np.array([0, 99] * 100), 99)
    '∪: the truth lies too often in the tails of the draws; their posterior is too narrow'
    """
    at = (np.asarray(ranks) + 0.5) / (num_draws + 1)
    size = len(at)
    shift = (at.mean() - 0.5) * np.sqrt(12.0 * size)
    spread = (((at - 0.5) ** 2).mean() - 1 / 12) * np.sqrt(180.0 * size)
    # ranks that pile up at one end spread out too: ∪ needs both ends, and ∩ lacks both
    fuller = [share > TAIL for share in ((at < TAIL).mean(), (at > 1 - TAIL).mean())]
    found = []
    if abs(shift) >= CLEAR:
        found.append(_shifted(label, low=bool(shift > 0)))
    if spread >= CLEAR and all(fuller):
        found.append(
            "∪: the truth lies too often in the tails of the draws; their posterior is too narrow"
        )
    if spread <= -CLEAR and not any(fuller):
        found.append(
            "∩: the truth lies too often in the middle of the draws; their posterior is too wide"
        )
    return " and ".join(found) or "neither shifted nor too narrow or wide as a whole: see the plot"


def _shifted(label: str, *, low: bool) -> str:
    side = "too low" if low else "too high"
    slope = "slope up" if low else "slope down"
    if not label.startswith(EXPLAINS):
        return f"{slope}: draws lie {side}"
    worse = low != label.startswith("prediction error")
    meaning = "explain the data worse" if worse else "explain the data better"
    return f"{slope}: draws lie {side}; they {meaning} than the truth does"


def verdict(
    failed: Sequence[str], shapes: dict[str, str], p_values: dict[str, float],
    num_simulations: int, level: float,
) -> str:  # fmt: skip
    """The whole check in sentences; p-values are corrected for their number already."""
    share = f"{level:.3g}"
    if not failed:
        least = min(p_values, key=p_values.__getitem__)
        return (
            f"Calibrated, as far as {num_simulations} simulated data sets can tell: the ranks of "
            f"all {len(p_values)} quantities are uniform (smallest p-value {p_values[least]:.2g}, "
            f"of {least}, corrected for the number of quantities; {share} would have failed)."
        )
    lines = [
        f"Not calibrated: the ranks of {len(failed)} of {len(p_values)} quantities are not uniform "
        f"over {num_simulations} simulated data sets (corrected p-values below {share})."
    ]
    for shape in dict.fromkeys(shapes[label] for label in failed):
        alike = [f"{n} (p {_small(p_values[n])})" for n in failed if shapes[n] == shape]
        lines.append(f"- {', '.join(alike)}. {shape[0].upper()}{shape[1:]}.")
    if all(label.startswith(EXPLAINS) for label in failed):
        lines.append(
            "Parameters pass and what looks at the data does not: the draws use the data wrongly, "
            "in part, or not at all."
        )
    return "\n".join(lines)


def _small(p: float) -> str:
    return "< 1e-12" if p < 1e-12 else f"= {p:.2g}"
