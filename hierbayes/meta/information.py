r"""The observed information of a φ̂ that is known already, and the tasks around it.

.. math:: I(\hat\varphi) = -\nabla^2 \Big[\sum_j \log \hat p(D_j \mid \hat\varphi)
          \left[+ \log p(\hat\varphi)\right]\Big]

in the coordinates of φ's vector (:mod:`hierbayes.phi.space`) that lie inside their bounds:
τ = 0 and correlations of ±1 are held.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from hierbayes.meta.approximate_evidence import ApproximateEvidence
from hierbayes.meta.better_evidence import AroundPhi
from hierbayes.meta.correlations import HELD, held_entries
from hierbayes.meta.optimum import curvature
from hierbayes.model import HierarchicalModel
from hierbayes.phi.space import Space, belief_in
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


def x_of(space: Space, phi: Mapping[str, np.ndarray]) -> np.ndarray:
    """x of φ, where correlations at their boundary stand by 1e-10 inside it."""
    return space.x(phi, shrunk=HARDLY if HELD in held_entries(space, phi)[1] else 0.0)


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
    space, vector = evidence.space, x_of(evidence.space, phi)
    held, _ = held_entries(space, phi)
    belief = belief_in(space, model.phi_distributions(tasks)) if with_belief else None

    def value_and_slope(v: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = evidence.value_and_slope(v)
        if belief is not None:
            more, tilt = belief(v)
            value, slope = value - float(more), slope - np.asarray(tilt)
        return value, slope

    inside = space.inside(vector) & ~held
    hessian = curvature(value_and_slope, vector, inside)
    value_and_slope(vector)  # leaves the modes where phi has them
    tilt = np.zeros(space.size) if belief is None else np.asarray(belief(vector)[1])
    return Information(AroundPhi(evidence.rows, space, vector, evidence.start), inside, hessian,
                       tilt)  # fmt: skip
