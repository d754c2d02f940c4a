r"""The Laplace posterior: exact for Gaussian tasks, else against SciPy and integration on a grid.

For logistic tasks the log posterior of θ is written out here,

.. math:: \sum_i \left[y_i f_i - \log(1 + e^{f_i})\right]
          - \tfrac12 (\theta - m)^\top \Sigma^{-1} (\theta - m), \qquad f = X\theta + Z\beta
"""

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from assertions import close
from references import assert_said, hessian
from scipy import optimize, special
from simulated import by_task

import hierbayes as hb
from hierbayes.adaptation import Conjugate, Laplace, base, mode

BERNOULLI = hb.HierarchicalModel(hb.likelihoods.Bernoulli(), hb.priors.Gaussian())
PHI = {
    "mu": np.array([0.8, -0.3]), "tau": np.array([0.9, 0.5]),
    "corr": np.array([[1.0, -0.4], [-0.4, 1.0]]),
}  # fmt: skip


def logistic_tasks(sizes, seed=3, shared=False):
    """Tasks of these sizes under PHI, with one shared column if wanted."""
    rng = np.random.default_rng(seed)
    arrays, columns = [], []
    for n in sizes:
        x = np.column_stack([np.ones(n), rng.normal(size=n)])
        z = rng.normal(size=(n, 1))
        theta = PHI["mu"] + PHI["tau"] * rng.standard_normal(2)
        f = x @ theta + 0.7 * z[:, 0] * shared
        arrays.append((x, (rng.random(n) < special.expit(f)).astype(float)))
        columns.append(z)
    return hb.Tasks.from_arrays(arrays, shared=columns if shared else None)


def log_posterior(theta, x, y, offset, location, covariance):
    f = x @ theta + offset
    away = theta - location
    penalty = 0.5 * away @ np.linalg.solve(covariance, away)
    return float((y * f - np.logaddexp(0, f)).sum() - penalty)


def slope(theta, x, y, offset, location, covariance):
    residual = y - special.expit(x @ theta + offset)
    return x.T @ residual - np.linalg.solve(covariance, theta - location)


def prior_covariance(phi):
    return phi["tau"][:, None] * phi["corr"] * phi["tau"]


# ------------------------------------------------------------------------ Gaussian tasks


@pytest.mark.parametrize("tau", [[0.8, 0.4], [0.8, 0.0], [0.0, 0.0], [80.0, 40.0]])
def test_gaussian_tasks_have_their_exact_posterior(small, tau):
    """Both are the same closed form; 1e-9 leaves room for a condition number of 1e6 at τ = 80."""
    phi = PHI | {"tau": np.array(tau), "sigma": np.array(0.6)}
    found, exact = (a(small.model, small.tasks, phi) for a in (Laplace(), Conjugate()))
    close(found.mean, exact.mean, rtol=1e-9, atol=1e-12)
    close(found.covariance, exact.covariance, rtol=1e-9, atol=1e-12)
    assert found.remarks == ()
    if tau[1] == 0:
        close(found.mean[:, 1], np.full(9, -0.3), rtol=1e-12)
        close(found.covariance[:, 1], np.zeros((9, 2)), atol=1e-15)


def test_known_standard_errors_too(schools):
    phi = {"mu": np.array([5.0]), "tau": np.array([6.0])}
    found, exact = (a(schools.model, schools.tasks, phi) for a in (Laplace(), Conjugate()))
    close(found.mean, exact.mean)
    close(found.covariance, exact.covariance)


def values_of_phi(size):
    """Values of φ around PHI, stacked."""
    rng = np.random.default_rng(0)
    return {
        "mu": PHI["mu"] + 0.2 * rng.standard_normal((size, 2)),
        "tau": rng.uniform(0.3, 1.0, (size, 2)),
        "corr": np.broadcast_to(PHI["corr"], (size, 2, 2)),
        "sigma": rng.uniform(0.4, 0.9, size),
    }


@pytest.mark.slow
def test_moments_over_phi(small):
    phis = values_of_phi(50)
    mean, covariance = Laplace().moments(small.model, small.tasks, phis)
    exact_mean, exact_covariance = Conjugate().moments(small.model, small.tasks, phis)
    close(mean, exact_mean)
    close(covariance, exact_covariance, atol=1e-10)


@pytest.mark.slow
def test_one_draw_for_each_phi(small):
    """2,000 draws have their mean within five standard errors.

    The sample covariance of S normal draws has standard error √(2/S) of a variance, 3.2 %: 16 %
    is allowed.
    """
    phis = values_of_phi(2000)
    mean, covariance = Conjugate().moments(small.model, small.tasks, phis)
    draws = Laplace().draws(small.model, small.tasks, phis, jax.random.key(1))
    assert draws.shape == (2000, 9, 2)
    assert draws.dtype == np.float64
    sd = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
    assert (np.abs(draws.mean(0) - mean) < 5 * sd / np.sqrt(2000)).all()
    spread = np.einsum("sji,sjk->jik", draws - mean, draws - mean) / 2000
    assert (np.abs(spread - covariance) < 0.16 * sd[:, :, None] * sd[:, None]).all()


# ------------------------------------------------------------------------ logistic tasks


def test_logistic_tasks_against_scipy():
    """SciPy's mode stops at slopes below 1e-9; the Hessian is by differences, right to 1e-7."""
    tasks = logistic_tasks([12, 0, 5, 1, 40, 3], shared=True)
    phi = PHI | {"beta": np.array([0.7])}
    found = Laplace()(BERNOULLI, tasks, phi)
    assert found.remarks == ()
    covariance = prior_covariance(PHI)
    for j, (x, z, y) in enumerate(by_task(tasks)):
        arguments = (x, y, z @ phi["beta"], phi["mu"], covariance)
        best = optimize.minimize(
            lambda t, a=arguments: -log_posterior(t, *a), phi["mu"],
            jac=lambda t, a=arguments: -slope(t, *a), method="BFGS", options={"gtol": 1e-9},
        ).x  # fmt: skip
        close(found.mean[j], best, rtol=1e-7, atol=1e-8)
        bend = -hessian(lambda t, a=arguments: log_posterior(t, *a), best, 1e-2)
        close(found.covariance[j], np.linalg.inv(bend), rtol=1e-6, atol=1e-7)
    # the task without rows has the prior
    close(found.mean[1], phi["mu"], rtol=1e-14)
    close(found.covariance[1], covariance, rtol=1e-13)


@pytest.mark.slow
def test_the_posterior_becomes_normal_with_more_rows():
    """On a grid: the mean's distance to the mode falls as 1/√n, the sd's error as 1/n.

    A third of n rows are ones. With v = npq the log density's third and fourth derivatives at the
    mode, in units of sd, are a = −(q − p)/√v and b = −(1 − 6pq)/v; to first order the mean lies
    |a|/2 = 1/√(8n) sd from the mode and the sd is larger by b/4 + a²/2 = 5/(8n). The prior, N(0,
    2²), and what is left out are of order 1/n relative to this. Sums with steps of sd/50 over ±12
    sd integrate functions this smooth to rounding.
    """
    sizes = np.array([60, 600])
    phi = {"mu": np.zeros(1), "tau": np.array([2.0])}
    arrays = [(np.ones((n, 1)), 1.0 * (np.arange(n) % 3 == 0)) for n in sizes.tolist()]
    found = Laplace()(BERNOULLI, hb.Tasks.from_arrays(arrays), phi)
    errors = []
    for j, (x, y) in enumerate(arrays):
        mode, sd = found.mean[j, 0], np.sqrt(found.covariance[j, 0, 0])
        grid = mode + sd * np.arange(-600, 601) / 50
        logs = [log_posterior(np.array([t]), x, y, 0.0, 0.0, np.array([[4.0]])) for t in grid]
        weight = np.exp(logs - np.max(logs))
        weight /= weight.sum()
        mean = weight @ grid
        exact = np.sqrt(weight @ (grid - mean) ** 2)
        errors.append([abs(mean - mode) / exact, abs(sd / exact - 1)])
    errors = np.array(errors) * np.column_stack([np.sqrt(sizes), sizes])
    off = np.abs(errors / [np.sqrt(1 / 8), 5 / 8] - 1)
    assert (off < 5 / sizes[:, None]).all()


@pytest.mark.slow
def test_separable_tasks_and_rare_events_reach_their_mode():
    """All ones, ones split perfectly by x, and 30 to 200 ones of 200 where the prior says 2 %.

    From μ = −4 undamped Newton steps diverge for 30 ones and more. At the mode the slope g
    vanishes: the climb ends where g²/2A < 1e-20 (1 + |Ψ|) with A ≤ 51 and |Ψ| < 150, so below
    2e-8.
    """
    split = np.column_stack([np.ones(8), np.linspace(-1, 1, 8)])
    tasks = hb.Tasks.from_arrays([(split, np.ones(8)), (split, (split[:, 1] > 0).astype(float))])
    phi = PHI | {"tau": np.array([50.0, 50.0])}
    found = Laplace()(BERNOULLI, tasks, phi)
    assert found.remarks == ()
    for j, (x, _, y) in enumerate(by_task(tasks)):
        close(slope(found.mean[j], x, y, 0.0, phi["mu"], prior_covariance(phi)), [0, 0], atol=2e-8)
    counts = [0, 1, 29, 30, 60, 120, 199, 200]
    rare = [(np.ones((200, 1)), (np.arange(200) < k).astype(float)) for k in counts]
    phi = {"mu": np.array([-4.0]), "tau": np.array([1.0])}
    found = Laplace()(BERNOULLI, hb.Tasks.from_arrays(rare), phi)
    assert found.remarks == ()
    assert (np.diff(found.mean[:, 0]) > 0).all()
    for j, (x, y) in enumerate(rare):
        close(slope(found.mean[j], x, y, 0.0, -4.0, np.eye(1)), [0], atol=2e-8)


# ------------------------------------------------------------------------------- trouble


class Cauchy(hb.likelihoods.Gaussian):
    """A likelihood whose log density is not concave."""

    gaussian_in_theta = False

    def family(self, location, phi, slots):
        del phi, slots
        return dist.Cauchy(location, 1.0)


def test_a_family_of_ones_own_is_not_taken_for_concave():
    """Whoever gives a family says so, as the package's own do; a network's θ never is."""
    assert not Cauchy().log_concave
    assert hb.likelihoods.Gaussian().concave_in_theta
    assert not hb.likelihoods.Network.mlp([1, 4, 1]).concave_in_theta


@pytest.mark.slow
def test_a_task_without_a_maximum_is_named():
    """Rows at ±10 under a Cauchy: at the prior's mean, 0, the slope is 0.

    The log density bends upwards there, by 2 · 2(10² − 1)/(1 + 10²)² = 0.0388 against 1/τ² =
    0.0001.
    """
    model = hb.HierarchicalModel(Cauchy(), hb.priors.Gaussian())
    both = np.array([[1.0], [1.0]])
    tasks = hb.Tasks.from_arrays(
        [(both, [-10.0, 10.0]), (both, [3.0, 3.1])], names=["torn", "sure"]
    )
    phi = {"mu": np.zeros(1), "tau": np.array([100.0])}
    found = Laplace()(model, tasks, phi)
    assert len(found.remarks) == 1
    assert_said(found.remarks, "1 of 2 tasks", "'torn'", "not concave")
    assert np.isnan(found.covariance[0]).all()
    assert np.isfinite(found.covariance[1]).all()
    close(found.mean[1], [3.05], rtol=1e-4)
    phis = {name: np.stack([value] * 3) for name, value in phi.items()}
    with pytest.warns(hb.FitWarning, match="'torn'"):
        draws = Laplace().draws(model, tasks, phis, jax.random.key(0))
    assert np.isnan(draws[:, 0]).all()
    assert np.isfinite(draws[:, 1]).all()


def test_a_climb_that_stops_early_is_said(monkeypatch):
    tasks = logistic_tasks([12, 0, 5])
    monkeypatch.setattr(mode, "MAX_STEPS", 0)  # the two last steps alone
    base.moments_of.clear_cache()
    found = Laplace()(BERNOULLI, tasks, PHI)
    base.moments_of.clear_cache()
    assert_said(found.remarks, "has not converged in 2 of 3 tasks", "(0, 2)")
    assert len(found.remarks) == 1
