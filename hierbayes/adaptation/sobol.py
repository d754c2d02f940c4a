r"""Nodes of equal standing in any number of dimensions: scrambled Sobol points under a Student-t.

.. math::

    \int f(t)\, dt \approx \frac1Q \sum_q \frac{f(t_q)}{q(t_q)}, \qquad
    t_q = \Phi^{-1}(u_q) \sqrt{\nu / F_{\chi^2_\nu}^{-1}(v_q)}

with (u_q, v_q) the points of a scrambled Sobol sequence in d + 1 dimensions and q the density of
the multivariate t with ν degrees of freedom, whose tails are wider than those of any posterior
under a normal prior. Where :func:`~hierbayes.adaptation.quadrature.grid` has Q^d nodes this rule
has Q, and independent scrambles tell its error. Every run of Q points of the sequence is such a
rule by itself; tasks that take different runs have errors that hardly add up, and the sum over many
tasks is as good as one rule of very many nodes. Reference: Owen (1997), Scrambled net variance for
integrals of smooth functions, Annals of Statistics 25(4).
"""

from __future__ import annotations

import functools

import numpy as np

from hierbayes.adaptation.draws_of_theta import DEGREES_OF_FREEDOM

INSIDE = 1e-12
"""Distance that points keep from the ends of (0, 1), where a quantile is not finite."""


@functools.lru_cache(maxsize=8)
def student_nodes(
    num_nodes: int, dimensions: int, num_replicates: int = 1, num_runs: int = 1, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    r"""Nodes t and log weights, for integrals against whatever stands beside ½ |t|².

    Parameters
    ----------
    num_nodes : int
        Q of one replicate, a power of two.
    dimensions : int
        d.
    num_replicates : int
        R independent scrambles.
    num_runs : int
        K, runs of Q points that follow one another in each scramble, a power of two.
    seed : int
        Of the scrambles.

    Returns
    -------
    nodes : array (R, Q, K, d)
    log_weights : array (R, Q, K)
        log w̄ + ½ |t|² in the convention of :func:`~hierbayes.adaptation.quadrature.grid`: minus
        log Q, minus log q(t), minus ½ d log 2π, so that Σ_q w̄_q = 1 but for the rule's own error.

    Examples
    --------
    The variance of a standard normal, ∫ t² N(t; 0, 1) dt = 1:

    >>> import numpy as np
    >>> t, log_weights = student_nodes(1024, 1)
    >>> weights = np.exp(log_weights - 0.5 * (t**2).sum(-1))
    >>> round(float((weights * t[..., 0] ** 2).sum()), 2)
    1.0
    """
    from scipy import special, stats

    nu, size = DEGREES_OF_FREEDOM, num_nodes * num_runs
    children = np.random.SeedSequence(seed).spawn(num_replicates)
    nodes = np.empty((num_replicates, num_nodes, num_runs, dimensions))
    for r, child in enumerate(children):
        engine = stats.qmc.Sobol(dimensions + 1, rng=np.random.default_rng(child))
        u = np.clip(engine.random(size), INSIDE, 1 - INSIDE)
        stretch = np.sqrt(nu / (2 * special.gammaincinv(nu / 2, u[:, -1])))
        points = special.ndtri(u[:, :-1]) * stretch[:, None]
        nodes[r] = points.reshape(num_runs, num_nodes, dimensions).swapaxes(0, 1)
    d = dimensions
    log_density = (
        special.gammaln((nu + d) / 2) - special.gammaln(nu / 2) - 0.5 * d * np.log(np.pi * nu)
        - 0.5 * (nu + d) * np.log1p((nodes**2).sum(-1) / nu)
    )  # fmt: skip
    return nodes, -np.log(num_nodes) - log_density - 0.5 * d * np.log(2 * np.pi)
