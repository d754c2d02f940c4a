"""What a learned prior says of a new task: its distribution at φ̂, or the mixture over draws."""

from __future__ import annotations

import numpy as np
import numpyro.distributions as dist

from hierbayes.priors.assembled import Assembled
from hierbayes.priors.base import Prior
from hierbayes.priors.singular import SingularNormal
from hierbayes.priors.student_mixture import student_mixture
from hierbayes.priors.student_t import StudentT


def mixture(prior: Prior, locations: np.ndarray, roots: np.ndarray) -> dist.Distribution:
    """Of the prior's own kind, around m (S, d) with roots L (S, d, d), equally weighted."""
    if isinstance(prior, StudentT):
        return student_mixture(prior.df, locations, roots)
    return normal_mixture(locations, roots)


def normal_mixture(locations: np.ndarray, roots: np.ndarray) -> dist.Distribution:
    """Normals N(m_s, L_s L_sᵀ), equally weighted; a point in directions without variance."""
    if len(roots) == 1:
        spread = np.flatnonzero(np.any(roots[0] != 0, axis=1))
        if not spread.size:
            return dist.Delta(locations[0], event_dim=1)
        root = roots[0][np.ix_(spread, spread)]
        if np.linalg.matrix_rank(root) < len(spread):
            return SingularNormal(locations[0], roots[0])
        normal = dist.MultivariateNormal(locations[0][spread], scale_tril=root)
        return normal if len(spread) == len(locations[0]) else Assembled(
            [(normal, (spread,))], locations[0]
        )  # fmt: skip
    weights = dist.Categorical(probs=np.full(len(roots), 1 / len(roots)))
    return dist.MixtureSameFamily(weights, dist.MultivariateNormal(locations, scale_tril=roots))
