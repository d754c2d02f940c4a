r"""The LKJ prior on correlations, with its normaliser worked out once, in NumPy.

.. math:: p(R) = |R|^{\eta - 1} / Z(\eta), \qquad
          Z = \prod_{k=1}^{d-1} \pi^{k/2}\,
          \frac{\Gamma(\eta + \tfrac{d-1-k}{2})}{\Gamma(\eta + \tfrac{d-1}{2})}

NumPyro's own makes its sampler when it is made, and its log Γ enters every program that reads a
density: to compile both takes longer than to compile all the rest of a small one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints
from scipy.special import gammaln


class LKJ(dist.Distribution):
    """p(R) ∝ |R|^(η − 1) over correlation matrices (d, d), as NumPyro's LKJ.

    Parameters
    ----------
    dimension : int
        d, at least 2.
    concentration : float
        η > 0: 1 is uniform, more favours small correlations.

    Examples
    --------
    >>> import numpy as np
    >>> round(float(LKJ(2, 1.0).log_prob(np.eye(2))), 4)  # uniform on (−1, 1): log ½
    -0.6931
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"concentration": constraints.positive}
    pytree_data_fields = ("concentration", "log_normaliser")
    pytree_aux_fields = ("dimension",)

    def __init__(self, dimension: int, concentration: float):
        self.dimension, self.concentration = dimension, np.asarray(concentration, float)
        k = np.arange(1, dimension)
        beside = 0.5 * k * np.log(np.pi) + gammaln(concentration + 0.5 * (dimension - 1 - k))
        whole = gammaln(concentration + 0.5 * (dimension - 1))
        self.log_normaliser = np.asarray((beside - whole).sum())
        super().__init__((), (dimension, dimension), validate_args=False)

    @property
    def support(self) -> Any:
        """Correlation matrices."""
        return constraints.corr_matrix

    def of_root(self, root: Any) -> Any:
        """log p(R) of R = C Cᵀ, by its lower root C (d, d): no factorisation is needed."""
        log_det = 2 * jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)).sum(-1)
        return (self.concentration - 1) * log_det - self.log_normaliser

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        """log p(R)."""
        del intermediates
        root: Any = jnp.linalg.cholesky(jnp.asarray(value))
        return self.of_root(root)

    def sample(self, key: jax.Array | None, sample_shape: tuple[int, ...] = ()) -> Any:
        """By NumPyro's onion method."""
        return dist.LKJ(self.dimension, self.concentration).sample(key, sample_shape)
