"""Roots L of covariances, and the directions in which they have no variance."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

RANK = 1e-12
"""A pivot below this share of its row's length is zero but for rounding."""


class Structure(NamedTuple):
    """Where a mixture of normals varies: it is known before its numbers are, and hashable."""

    free: tuple[int, ...]
    """Entries that vary."""

    fixed: tuple[tuple[int, float], ...]
    """(entry, value) of those that do not."""

    density: bool
    """Whether there is a density in the entries that vary."""


def structure_of(locations: np.ndarray, roots: np.ndarray) -> Structure:
    """The entries that vary between (S, d) locations or within (S, d, d) or (S, d) roots."""
    entries = np.abs(roots) if roots.ndim == 2 else np.abs(roots).sum(-1)
    varies = (entries > 0).any(0) | (locations != locations[0]).any(0)
    free = np.flatnonzero(varies)
    fixed = tuple((int(k), float(locations[0, k])) for k in np.flatnonzero(~varies))
    if roots.ndim == 2:
        density = bool((entries[:, free] > 0).all())
    else:
        triangles = _triangles(roots[:, free])
        pivots = np.abs(np.diagonal(triangles, axis1=1, axis2=2))
        length = np.linalg.norm(roots[:, free], axis=-1)
        density = bool((pivots > RANK * length).all() and (length > 0).all())
    return Structure(tuple(free.tolist()), fixed, density)


def tidy(roots: np.ndarray, structure: Structure) -> np.ndarray:
    """The same covariances by roots with no negative pivots, zero where nothing varies."""
    if roots.ndim == 2:
        return np.abs(roots)
    free = np.array(structure.free, int)
    fixed = np.array([k for k, _ in structure.fixed], int)
    if fixed.size and np.any(roots[:, :, fixed]):  # what the others share with a fixed entry
        whole = np.zeros_like(roots)
        whole[:, free[:, None], free] = _triangles(roots[:, free])
        roots = whole
    signs = np.where(np.diagonal(roots, axis1=1, axis2=2) < 0, -1.0, 1.0)
    return roots * signs[:, None, :]


def sub_root(roots: Any, free: np.ndarray) -> Any:
    """The root of the entries that vary, of tidy ones."""
    return roots if len(free) == roots.shape[-1] else roots[:, free[:, None], free]


def _triangles(rows: np.ndarray) -> np.ndarray:
    """Lower triangular (S, k, k) roots of the covariances of (S, k, d) rows."""
    if rows.shape[1] == rows.shape[2]:
        return rows
    if not rows.shape[1]:
        return np.zeros((len(rows), 0, 0))
    return np.swapaxes(np.linalg.qr(np.swapaxes(rows, 1, 2), mode="r"), 1, 2)
