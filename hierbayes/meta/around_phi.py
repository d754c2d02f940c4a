r"""The evidence around a φ̂ that is known already: its curvature, and a step to a better one.

.. math::

    I(\hat\varphi) = -\nabla^2 \Big[\sum_j \log \hat p(D_j \mid \hat\varphi)
        + \log p(\hat\varphi)\Big], \qquad
    \Delta = I^{-1}\, \nabla \sum_j \log \tilde p(D_j \mid \hat\varphi), \qquad
    \Delta_i / \sqrt{(I^{-1})_{ii}}

in the coordinates of φ's vector that lie inside their bounds. Δ in standard errors says how far a
rougher evidence p̂ has moved φ̂ from where a better one p̃ would put it; p̃ is quadrature for up to
three coefficients, and scrambled Sobol nodes beyond.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.quadrature import Whitened, grid
from hierbayes.adaptation.sobol import student_nodes
from hierbayes.evidence.nodes import AtMode, at_mode, by_replicate, jackknife_error, pooled
from hierbayes.meta.approximate_evidence import ApproximateEvidence
from hierbayes.meta.layout_of_phi import FLAT, Layout
from hierbayes.model import HierarchicalModel
from hierbayes.rows import Rows, Whole
