"""Ellipses of normal distributions in two dimensions."""

from __future__ import annotations

import numpy as np


def ellipse(mean: np.ndarray, covariance: np.ndarray, probability: float) -> np.ndarray:
    """A closed curve (181, 2) that holds this share of the normal distribution."""
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    angle = np.linspace(0, 2 * np.pi, 181)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    # the squared radius is χ² with two degrees of freedom: exponential
    return mean + np.sqrt(-2 * np.log1p(-probability)) * circle @ root.T
