r"""The observed information of a φ̂ that is known already, and the tasks around it.

.. math:: I(\hat\varphi) = -\nabla^2 \Big[\sum_j \log \hat p(D_j \mid \hat\varphi)
          \left[+ \log p(\hat\varphi)\right]\Big]

in the coordinates of φ's vector (:mod:`hierbayes.meta.layout_of_phi`) that lie inside their bounds:
τ = 0 and correlations of ±1 are held.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpyro.distributions.transforms import CorrCholeskyTransform

from hierbayes.meta.approximate_evidence import ApproximateEvidence
from hierbayes.meta.better_evidence import AroundPhi
from hierbayes.meta.correlations import HELD, held_entries
from hierbayes.meta.layout_of_phi import Layout, belief_in
from hierbayes.meta.optimum import curvature
from hierbayes.meta.supports import LINES
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Tasks

HARDLY = 1e-10
"""Share of the identity that correlations at their boundary are given, for them to have a place in
φ's vector, where ±1 has none."""


class Information(NamedTuple):
    """φ̂'s surroundings, which coordinates are ``inside`` (P,), minus the ``hessian`` there (p, p).

    ``tilt`` (P,) is ∇ log p(φ̂), zero where the criterion leaves it out.
    """

    around: AroundPhi
    inside: np.ndarray
    hessian: np.ndarray
    tilt: np.ndarray


def vector_of(layout: Layout, phi: Mapping[str, np.ndarray]) -> np.ndarray:
    """The vector whose φ this is: the inverse of :meth:`Layout.phi`.

    Correlations at their boundary have no entries without bounds; they stand by 1e-10 inside.
    """
    v = np.zeros(layout.size)
    v[layout.at["mu"]] = np.asarray(phi["mu"])[layout.free]
    for name in ("tau", "gamma", "beta"):
        if name in phi:
            v[layout.at[name]] = np.ravel(phi[name])
    v = v / layout.units
    for name, kind in layout.lines:
        line = LINES[kind]
        v[layout.at[name]] = line.inverse(phi[name]) - line.inverse(layout.own[name])
    if layout.blocks and "corr" in phi:
        share = HARDLY if HELD in held_entries(layout, phi)[1] else 0.0
        parts = []
        for b in layout.blocks:
            corr = (1 - share) * phi["corr"][np.ix_(b, b)] + share * np.eye(len(b))
            parts.append(CorrCholeskyTransform()._inverse(jnp.linalg.cholesky(corr)))
        v[layout.at["corr"]] = np.concatenate(parts)
    return v


def observed_information(
    model: HierarchicalModel,
    tasks: Tasks,
    phi: Mapping[str, np.ndarray],
    num_nodes: int,
    *,
    with_belief: bool,
) -> Information:
    """I(φ̂) by differences of exact slopes; use it inside ``numerics.float64()``.

    Parameters
    ----------
    model : HierarchicalModel
        Resolved, as a fit keeps it.
    tasks : Tasks
    phi : mapping
        φ̂ by name.
    num_nodes : int
        Nodes a dimension of the evidence that φ̂ maximises; one is Laplace's approximation, which
        of Gaussian tasks is exact.
    with_belief : bool
        Whether log p(φ) is part of the criterion.

    Returns
    -------
    Information
    """
    phi = {name: np.asarray(value, float) for name, value in phi.items()}
    evidence = ApproximateEvidence(model, tasks, num_nodes)
    layout, vector = evidence.layout, vector_of(evidence.layout, phi)
    held, _ = held_entries(layout, phi)
    belief = belief_in(layout, model.phi_distributions(tasks)) if with_belief else None

    def value_and_slope(v: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = evidence.value_and_slope(v)
        if belief is not None:
            more, tilt = belief(v)
            value, slope = value - float(more), slope - np.asarray(tilt)
        return value, slope

    inside = (vector > layout.lower) & ~held
    hessian = curvature(value_and_slope, vector, inside)
    value_and_slope(vector)  # leaves the modes where phi has them
    tilt = np.zeros(layout.size) if belief is None else np.asarray(belief(vector)[1])
    return Information(AroundPhi(evidence.rows, layout, vector, evidence.start), inside, hessian,
                       tilt)  # fmt: skip
