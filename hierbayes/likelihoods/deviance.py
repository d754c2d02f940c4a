r"""Log densities by what they fall short of their largest value: large counts lose no digits.

.. math:: y f - e^f = y \log y - y - y\,(e^d - 1 - d), \qquad d = f - \log y

Of counts of 10⁹ the left side is a difference of numbers of 10¹⁰, right to 10⁻⁶, which is more than
what a search for a maximum has to see; the last term is right to 10⁻¹¹ near its maximum.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.scipy.special import gammaln

FROM = 32.0
"""Where Stirling's series, with four terms, is right to rounding."""


NEAR_ZERO = 1 / 32
"""Where eight terms of the exponential's series are right to rounding."""


def less_one(d: Any) -> Any:
    """e^d − 1, right to rounding near zero, for the price of one exponential; expm1 takes two."""
    near = jnp.abs(d) < NEAR_ZERO
    small = jnp.where(near, d, 0.0)
    series: Any = 1.0
    for k in range(8, 1, -1):
        series = 1.0 + small * series / k
    return jnp.where(near, small * series, jnp.exp(d) - 1.0)


def shortfall(d: Any) -> Any:
    """e^d − 1 − d."""
    return jnp.expm1(d) - d


def stirling(x: Any) -> Any:
    """x log x − x − log Γ(x), whose terms all but cancel where x is large; x > 0."""
    large = jnp.maximum(x, FROM)
    square = 1.0 / large**2
    series = (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680))) / large
    small = jnp.minimum(x, FROM)
    plain = small * jnp.log(small) - small - gammaln(small)
    return jnp.where(x >= FROM, 0.5 * jnp.log(large / (2 * jnp.pi)) - series, plain)


def count_peak(y: Any) -> Any:
    """y log y − y − log y!, the largest log density of a Poisson count; 0 of none."""
    some = jnp.where(y > 0, y, 1.0)
    return jnp.where(y > 0, stirling(some) - jnp.log(some), 0.0)
