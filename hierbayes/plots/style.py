"""One colour and one marker a method, in every picture.

Ellipses of normal distributions in two dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hierbayes.errors import InputError, suggestion
from hierbayes.fit import Fit
from hierbayes.fit.method import named_methods


def ellipse(mean: np.ndarray, covariance: np.ndarray, probability: float) -> np.ndarray:
    """A closed curve (181, 2) that holds this share of the normal distribution."""
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    angle = np.linspace(0, 2 * np.pi, 181)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    # the squared radius is χ² with two degrees of freedom: exponential
    return mean + np.sqrt(-2 * np.log1p(-probability)) * circle @ root.T


_MORE = ("#56B4E9", "#F0E442")
"""What methods have left of Okabe and Ito's palette, which colour-blind readers can tell apart."""


def looks(fits: Mapping[str, Fit]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each fit: by its method, further ones of a method in other colours."""
    used: set[str] = set()
    styles = {}
    own = {fit.method.colour for fit in fits.values()}
    taken = [kind.colour for kind in named_methods().values() if kind.colour]
    free = [colour for colour in (*_MORE, *taken) if colour not in own]
    spare = iter(free * (1 + len(fits)))
    for label, fit in fits.items():
        colour = fit.method.colour
        if colour is None or colour in used:
            colour = next(spare)
        used.add(colour)
        styles[label] = {"color": colour, "marker": fit.method.marker or "^"}
    return styles


def as_fits(fits: Fit | Mapping[str, Fit] | Sequence[Fit]) -> dict[str, Fit]:
    """Fits by label: a mapping as it is, a sequence by the methods' names."""
    if isinstance(fits, Fit):
        return {fits.method.name: fits}
    if isinstance(fits, Mapping):
        named = dict(fits)
    else:
        named = {fit.method.name: fit for fit in fits}
    if not named or not all(isinstance(fit, Fit) for fit in named.values()):
        raise InputError("expected a fit, or a mapping from label to fit")
    return named


def pick_coef(fits: Mapping[str, Fit], coef: str | None) -> str:
    """The coefficient asked for, or the first."""
    return pick_name(next(iter(fits.values())).tasks.coef, coef)


def pick_name(known: Sequence[str], coef: str | None) -> str:
    """The coefficient asked for, or the first of those that are known."""
    if coef is not None and coef not in known:
        raise InputError(f"no coefficient is named {coef!r}; {suggestion(coef, known)}")
    return known[0] if coef is None else coef


def axes_or_new(ax: Any, figsize: tuple[float, float]) -> Any:
    """``ax``, or the axes of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=figsize, layout="constrained")[1]
