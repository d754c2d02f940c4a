r"""The observed information of a φ̂ that is known already, and the tasks around it.

.. math:: I(\hat\varphi) = -\nabla^2 \Big[\sum_j \log \hat p(D_j \mid \hat\varphi)
          \left[+ \log p(\hat\varphi)\right]\Big]

in the coordinates of φ's vector (:mod:`hierbayes.meta.layout_of_phi`) that lie inside their bounds:
τ = 0 and correlations of ±1 are held.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions.transforms import CorrCholeskyTransform

from hierbayes.evidence.quadrature import log_evidence
from hierbayes.meta.better_evidence import AroundPhi
from hierbayes.meta.correlations import HELD, held_entries
from hierbayes.meta.layout_of_phi import Layout, belief_in
from hierbayes.meta.optimum import curvature
from hierbayes.meta.supports import LINES
from hierbayes.model import HierarchicalModel
from hierbayes.rows import rows_of
from hierbayes.tasks import Tasks

HARDLY = 1e-3
"""Share of the identity that correlations at their boundary are given, for them to have a place in
φ's vector; the vector's φ holds them as they are."""


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

    Correlations at their boundary have no entries without bounds; they stand a little inside.
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


@functools.partial(jax.jit, static_argnums=(0, 3))
def _minus(model: HierarchicalModel, around: AroundPhi, vector: Any, num_nodes: int) -> Any:
    def minus(v: jax.Array) -> jax.Array:
        found = log_evidence(
            model.likelihood, model.prior, around.rows, around.phi(v), around.start, num_nodes
        )
        return -found.log_evidence.sum()

    return jax.value_and_grad(minus)(vector)


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
    beliefs = model.phi_distributions(tasks)
    layout = Layout.of(model.shape(tasks), model.scales(tasks), beliefs)
    held, remarks = held_entries(layout, phi)
    plain = model.without_encoder()
    rows = jax.tree.map(jnp.asarray, rows_of(tasks, model.likelihood))
    start = jnp.zeros((len(tasks.coef), tasks.num_tasks))
    corr = jnp.asarray(phi["corr"]) if HELD in remarks else None
    around = AroundPhi(rows, layout, vector_of(layout, phi), start, corr)
    belief = belief_in(layout, beliefs) if with_belief else None

    def value_and_slope(v: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = _minus(plain, around, v, num_nodes)
        if belief is not None:
            more, tilt = belief(v)
            value, slope = value - more, slope - tilt
        return float(value), np.asarray(slope)

    inside = (around.vector > layout.lower) & ~held
    tilt = np.zeros(layout.size) if belief is None else np.asarray(belief(around.vector)[1])
    return Information(around, inside, curvature(value_and_slope, around.vector, inside), tilt)
