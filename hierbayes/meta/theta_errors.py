r"""Standard errors of θ_j that count what is not known of φ̂, by Kass and Steffey.

.. math::

    \operatorname{Var}(\theta_j \mid D) \approx V_j(\hat\varphi)
        + G_j\, I(\hat\varphi)^{-1} G_j^\top, \qquad
    G_j = \frac{\partial\, E[\theta_j \mid D_j, \varphi]}{\partial \varphi}

The first term is what the posterior at a fixed φ̂ knows, the second what φ̂ adds to second order.
Reference: Kass and Steffey (1989), Journal of the American Statistical Association 84(407).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation import Conjugate, Laplace, Posterior, Quadrature, WithShared
from hierbayes.adaptation.mode import after_newton, mode_near
from hierbayes.adaptation.quadrature import ByNodes, nodes_of
from hierbayes.errors import InputError, NotApplicable
from hierbayes.fit import Fit
from hierbayes.fit.adapted import label
from hierbayes.fit.fit import check_fit
from hierbayes.meta.better_evidence import AroundPhi, observed_information
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.phi.space import FLAT
from hierbayes.tasks import Tasks

REML_HAS_NONE = (
    'criterion="reml" integrates mu and beta out: what their estimates add to theta is '
    'in no information matrix here; fit with criterion="ml" or "map", or by full_bayes'
)


def theta_standard_errors(fit: Fit) -> Any:
    r"""Kass–Steffey standard errors of every task's parameters under empirical Bayes.

    .. math:: \operatorname{se}(\theta_j)^2 = \operatorname{diag}\!\left[V_j
              + G_j I^{-1} G_j^\top\right]

    ``fit.adapted.sd`` is the square root of the first term alone, which takes φ̂ for the truth,
    unless the fit was asked for wider ``intervals``; with ``"kass-steffey"`` it is this.
    I is the observed information of φ̂ in coordinates inside their bounds, so that the second term
    leaves out what lies at τ̂ = 0 or at correlations of ±1: there, and with few tasks in any case,
    full Bayes is wider still.

    Parameters
    ----------
    fit : Fit
        By :func:`~hierbayes.empirical_bayes`, with ``criterion`` "ml" or "map".

    Returns
    -------
    DataArray (task, coef)
        NaN where the evidence is not concave at φ̂. As ``fit.summary("theta", errors={"theta": …})``
        they stand in the summary in the place of posterior standard deviations.

    Raises
    ------
    InputError
        Of a fit by another method, or under REML.

    References
    ----------
    Kass and Steffey (1989), Approximate Bayesian inference in conditionally independent
    hierarchical models (parametric empirical Bayes models), JASA 84(407).

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
    ...                                known_se="se", hyperprior=None)
    >>> fit = hb.empirical_bayes(model, tasks, "map")
    >>> wider = hb.checks.theta_standard_errors(fit)
    >>> bool((wider > fit.adapted.sd).all())
    True
    """
    check_fit(fit)
    num_nodes, tasks, at, fit = _nodes(fit), fit.tasks, fit.at, fit.inside
    phi = {name: np.asarray(value) for name, value in fit.phi.items()}
    more = covariance_by_phi(
        fit.model, fit.tasks, phi, num_nodes, with_hyperprior=fit.info["criterion"] == "map"
    )
    plain = fit.adapted.posterior
    if fit.info.get("intervals", "plain") != "plain":  # which count it already, or otherwise
        plain = fit.adaptation(fit.model, fit.tasks, phi)
    found = more.added_to(plain)
    beta = phi.get("beta")
    found = found if at is None else found.outward(at, None if beta is None else beta[None])
    variance = np.diagonal(np.asarray(found.covariance), axis1=1, axis2=2)
    variance = np.where(plain.identified, np.maximum(variance, 0.0), np.nan)
    return label(np.sqrt(variance), tasks, ("task", "coef"), "theta_se")


class ByPhi(NamedTuple):
    """What φ̂ adds to the covariances: of θ_j (J, d, d), of θ_j with β (J, d, p), of β (p, p)."""

    theta: np.ndarray
    cross: np.ndarray
    shared: np.ndarray

    def added_to(self, plain: Posterior) -> WithShared:
        """A posterior that takes φ̂ for known, with this."""
        spread = np.asarray(plain.covariance) + self.theta
        more = {"log_normaliser": plain.log_normaliser, "remarks": plain.remarks}
        return WithShared(plain.mean, spread, self.cross, self.shared, **more)


def covariance_by_phi(
    model: HierarchicalModel,
    tasks: Tasks,
    phi: Mapping[str, np.ndarray],
    num_nodes: int,
    *,
    with_hyperprior: bool,
) -> ByPhi:
    """G_j I⁻¹ G_jᵀ of every task; NaN where the evidence is not concave at φ̂.

    ``num_nodes`` and ``with_hyperprior`` as in :func:`~.information.observed_information`.
    """
    with float64():
        known = observed_information(model, tasks, phi, num_nodes, with_hyperprior=with_hyperprior)
        plain = model.without_encoder()
        slopes = np.asarray(_slopes(plain, known.around, num_nodes))[known.inside]
        slopes = slopes[..., : tasks.num_tasks]  # the tasks beyond only fill up
    values, vectors = np.linalg.eigh(known.hessian)
    if values.size and not values[0] > FLAT * values[-1]:
        d, p = len(tasks.coef), len(tasks.labels.shared)
        num = tasks.num_tasks
        return ByPhi(*(np.full(s, np.nan) for s in ((num, d, d), (num, d, p), (p, p))))
    # (p, d, J) by the information's root, one sum of squares a task
    root, space = vectors / np.sqrt(values), known.around.space
    white = np.einsum("pq,pkj->qkj", root, slopes)
    moves = np.zeros((space.size, len(values)))
    moves[known.inside] = root
    beta = (moves * np.asarray(space.units)[:, None])[space.at["beta"]]
    return ByPhi(
        np.einsum("qkj,qlj->jkl", white, white), np.einsum("qkj,pq->jkp", white, beta),
        beta @ beta.T,
    )  # fmt: skip


def _nodes(fit: Fit) -> int:
    """Nodes a dimension of the fit's evidence; one where it is Laplace's, or exact."""
    if "criterion" not in fit.info:
        raise NotApplicable(
            f"{fit.method} has no estimate of phi with an observed information: these standard "
            "errors are those of empirical_bayes; under full Bayes the posterior standard "
            "deviations, fit.adapted.sd, hold what is not known of phi already"
        )
    if fit.evidence is None:
        raise NotApplicable("phi was learned from other tasks: ask the fit that learned it")
    fit.model.require_gaussian_prior(
        "theta_standard_errors", "its derivatives are those of a normal posterior",
        "full_bayes counts what is not known of phi",
    )  # fmt: skip
    if not isinstance(fit.adaptation, Conjugate | Laplace | Quadrature):
        raise NotApplicable("features that are learned have no observed information")
    if fit.info["criterion"] == "reml":
        raise InputError(REML_HAS_NONE)
    return fit.adaptation.num_nodes if isinstance(fit.adaptation, Quadrature) else 1


@functools.partial(jax.jit, static_argnums=(0, 2))
def _slopes(model: HierarchicalModel, around: AroundPhi, num_nodes: int) -> jax.Array:
    """∂E[θ_j | D_j, φ] / ∂φ's vector, (P, d, J), forward and one coordinate at a time."""
    mean = _mean(model, around, num_nodes)
    vector = jnp.asarray(around.vector)
    return jax.lax.map(lambda e: jax.jvp(mean, (vector,), (e,))[1], jnp.eye(len(vector)))


def _mean(model: HierarchicalModel, around: AroundPhi, num_nodes: int) -> Any:
    """E[θ_j | D_j, φ] (d, J) as a function of φ's vector, right to first order around φ̂.

    By quadrature with the nodes held where φ̂ has them. By Laplace the mode, which two Newton
    steps follow.
    """
    here, near = around.tasks(model, around.vector), jnp.asarray(around.modes)
    if num_nodes == 1:
        held = mode_near(here, near).z

        def mode(v: Any) -> jax.Array:
            tasks = around.tasks(model, v)
            return tasks.theta(after_newton(tasks, held))

        return mode
    rule = nodes_of(num_nodes, len(around.modes))
    stand = rule.around(here, near)

    def posterior_mean(v: Any) -> jax.Array:
        tasks = around.tasks(model, v)
        return tasks.theta(stand.z + ByNodes(tasks, stand, rule).around_mode()[1])

    return posterior_mean
