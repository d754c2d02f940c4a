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

from hierbayes.evidence.integrated import by_nodes
from hierbayes.meta.better_evidence import AroundPhi
from hierbayes.meta.correlations import HELD, held_entries
from hierbayes.meta.criterion import Criterion
from hierbayes.meta.optimum import curvature
from hierbayes.model import HierarchicalModel
from hierbayes.phi.space import Space
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
    how = by_nodes(num_nodes)
    criterion = Criterion(model, tasks, how, with_belief=with_belief)
    space, x = criterion.space, x_of(criterion.space, phi)
    inside = space.inside(x) & ~held_entries(space, phi)[0]
    hessian = curvature(criterion, x, inside)
    criterion(x)  # leaves the modes where phi has them
    around = AroundPhi(criterion.rows, space, x, criterion.start)
    return Information(around, inside, hessian, criterion.belief(x)[1])
