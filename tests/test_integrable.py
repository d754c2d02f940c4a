"""A posterior carries its normaliser: log p(D | φ) = log p(D | θ) + log p(θ | φ) − log p(θ | D, φ).

Rung (a): the identity holds at every θ, with SciPy's densities on its right (Chib 1995); the
likelihood of a Gaussian task is summed row by row. Rung (c): of Gaussian tasks Laplace's normaliser
and quadrature's are the exact one, and a Student-t prior of many degrees of freedom is a normal.
"""

from __future__ import annotations

import numpy as np
import pytest
from assertions import close
from scipy import stats
from simulated import by_task

import hierbayes as hb
from hierbayes.adaptation import Conjugate, Laplace, Quadrature, ScaleMixture
from hierbayes.evidence import Exact, Integrated

PHI = {
    "mu": np.array([0.8, -0.3]), "tau": np.array([0.9, 0.5]),
    "corr": np.array([[1.0, -0.4], [-0.4, 1.0]]), "sigma": np.array(0.6),
}  # fmt: skip


def by_the_identity(tasks, posterior, theta):
    """The right-hand side at θ (2,), the same for every task, with SciPy's densities."""
    covariance = PHI["tau"][:, None] * PHI["corr"] * PHI["tau"]
    found = []
    for j, (x, _, y) in enumerate(by_task(tasks)):
        likelihood = stats.norm(x @ theta, PHI["sigma"]).logpdf(y).sum()
        prior = stats.multivariate_normal(PHI["mu"], covariance).logpdf(theta)
        after = stats.multivariate_normal(posterior.mean[j], posterior.covariance[j]).logpdf(theta)
        found.append(likelihood + prior - after)
    return np.array(found)


@pytest.mark.parametrize("theta", [[0.0, 0.0], [2.0, -1.5]])
def test_the_normaliser_is_joint_over_posterior_wherever_it_is_asked(small, theta):
    """Three terms of up to some hundreds cancel: 1e-9 of them."""
    posterior = Conjugate()(small.model, small.tasks, PHI)
    found = Integrated(Conjugate())(small.model, small.tasks, PHI)
    close(found, by_the_identity(small.tasks, posterior, np.array(theta)), rtol=1e-9, atol=1e-9)


def test_a_wrong_posterior_breaks_the_identity(small):
    """Negative control: the prior's normal in the posterior's place."""
    posterior = Conjugate()(small.model, small.tasks, PHI | {"sigma": np.array(60.0)})
    found = Integrated(Conjugate())(small.model, small.tasks, PHI)
    assert np.abs(found - by_the_identity(small.tasks, posterior, PHI["mu"])).max() > 1


@pytest.mark.parametrize("adaptation", [Laplace(), Quadrature(3), Quadrature(6)])
def test_of_gaussian_tasks_every_normaliser_is_the_exact_one(small, adaptation):
    """Exact but for rays, an even number, whose six along each are right to about 1e-3."""
    atol = 1e-2 if adaptation == Quadrature(6) else 1e-9
    found = Integrated(adaptation)(small.model, small.tasks, PHI)
    close(found, Integrated()(small.model, small.tasks, PHI), rtol=0, atol=atol)


def test_heavy_tails_of_many_degrees_of_freedom_are_a_normals(small):
    """t with ν = 1e8 differs from a normal by 1/ν: 1e-6 leaves room for its nodes."""
    model = hb.HierarchicalModel(small.model.likelihood, hb.priors.StudentT(1e8))
    found = Integrated(ScaleMixture())(model, small.tasks, PHI)
    close(found, Integrated()(small.model, small.tasks, PHI), rtol=0, atol=1e-6)


def test_evidence_over_draws_is_that_of_each(small):
    """The same programs but for a loop."""
    phis = {name: np.stack([value, 1.1 * value]) for name, value in PHI.items()}
    phis["corr"] = np.stack([PHI["corr"]] * 2)
    found = Integrated().over(small.model, small.tasks, phis)
    for s in range(2):
        at = {name: value[s] for name, value in phis.items()}
        close(found[s], Exact()(small.model, small.tasks, at), rtol=1e-12)


def test_a_fits_evidence_is_the_sum_of_its_tasks_normalisers(radon):
    """The same number from the search's end and from the posteriors: 1e-9 of 1,000 nats."""
    fit = hb.empirical_bayes(radon.model, radon.tasks)
    close(fit.adapted.posterior.log_normaliser.sum(), fit.log_evidence, rtol=1e-10)
