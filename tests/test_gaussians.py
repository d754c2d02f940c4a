r"""Distances between normals, and what Monte-Carlo error alone would give, against other routes.

KL(q ‖ p) against NumPyro's and against quadrature; W₂ against SciPy's matrix square root. The
floors are expectations over n independent draws from N(μ, Σ), with m and V their mean and
covariance (divisor n − 1). V Σ⁻¹ is Wishart, so that for KL the expectation is known exactly,

.. math:: 2\,E\,\text{KL} = \frac{d(n-1)}{n-d-2}\Bigl(1 + \frac1n\Bigr) - d
          + \sum_{i=1}^d \psi\Bigl(\frac{n-i}2\Bigr) + d \log\frac{2}{n-1}

of which d(d + 3)/(4n) · 2 is the leading term; the next is of relative order (d + 3)/n.
"""

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from assertions import close
from scipy import integrate, linalg, special, stats

from hierbayes.comparison.equivalence import (
    LEVELS,
    between,
    coverage,
    kl_divergence,
    kl_floor,
    wasserstein,
    wasserstein_floor,
)
from hierbayes.numerics import float64


def normals(rng, d, num_tasks=6):
    """Means (J, d) and covariances (J, d, d) of sds from a tenth to ten."""
    root = rng.normal(size=(num_tasks, d, d)) + np.eye(d)
    root *= 10.0 ** rng.uniform(-1, 1, (num_tasks, d, 1))
    return rng.normal(size=(num_tasks, d)), root @ np.swapaxes(root, 1, 2)


# ------------------------------------------------------------------------- divergence


def test_divergence_is_that_of_numpyro(rng):
    """Condition numbers up to 1e5 leave eleven of the sixteen digits."""
    (mean, covariance), (to_mean, to_covariance) = normals(rng, 3), normals(rng, 3)
    found = kl_divergence(mean, covariance, to_mean, to_covariance)
    with float64():
        expected = np.asarray(
            jax.jit(
                lambda m, c, to_m, to_c: dist.kl_divergence(
                    dist.MultivariateNormal(m, c), dist.MultivariateNormal(to_m, to_c)
                )
            )(mean, covariance, to_mean, to_covariance)
        )
    close(found, expected, rtol=1e-9)
    # the other direction is another number: the order of the arguments matters, and is held
    assert np.abs(found / kl_divergence(to_mean, to_covariance, mean, covariance) - 1).min() > 1e-3


def test_divergence_is_the_integral():
    """∫ q log(q / p), by adaptive quadrature over ten sds, to its 1e-10."""
    q, p = stats.norm(0.4, 0.7), stats.norm(-0.3, 1.9)
    value, _ = integrate.quad(
        lambda t: q.pdf(t) * (q.logpdf(t) - p.logpdf(t)), 0.4 - 7, 0.4 + 7, epsabs=1e-12
    )
    mean, variance = np.array([[0.4]]), np.array([[[0.7**2]]])
    found = kl_divergence(mean, variance, np.array([[-0.3]]), np.array([[[1.9**2]]]))
    close(found, [value], rtol=1e-10)


def test_divergence_does_not_know_the_units(rng):
    """Coefficients in units of 1e-6, 1 and 1e6: condition numbers of 1e24 before scaling."""
    (mean, covariance), (to_mean, to_covariance) = normals(rng, 3), normals(rng, 3)
    unit = np.array([1e-6, 1.0, 1e6])
    outer = unit[:, None] * unit
    plain = kl_divergence(mean, covariance, to_mean, to_covariance)
    scaled = kl_divergence(mean * unit, covariance * outer, to_mean * unit, to_covariance * outer)
    close(scaled, plain, rtol=1e-9)


@pytest.mark.parametrize("distance", [kl_divergence, wasserstein])
def test_a_normal_is_at_no_distance_from_itself(distance, rng):
    """KL is rounding, 1e-13; the distance is the root of rounding."""
    one = normals(rng, 3)
    close(distance(*one, *one), np.zeros(6), atol=1e-12 if distance is kl_divergence else 1e-6)


def test_a_point_is_at_an_infinite_divergence_from_a_normal():
    mean, zero = np.zeros((1, 2)), np.zeros((1, 2, 2))
    wide = np.array([[[1.0, 0.3], [0.3, 2.0]]])
    line = np.array([[[1.0, 2.0], [2.0, 4.0]]])  # of rank one
    partly = np.array([[[1.0, 0.0], [0.0, 0.0]]])
    for singular in (zero, line, partly):
        assert kl_divergence(mean, singular, mean, wide).tolist() == [np.inf]
        assert kl_divergence(mean, wide, mean, singular).tolist() == [np.inf]
    assert kl_divergence(mean, line, mean, partly).tolist() == [np.inf]
    assert kl_divergence(mean, zero, mean, partly).tolist() == [np.inf]


def test_rounding_is_not_taken_for_width(rng):
    """Rank one or two in three rotated dimensions: eigenvalues of 1e-17, not zeros."""
    for rank in (1, 2):
        root = rng.normal(size=(50, 3, rank))
        thin = root @ np.swapaxes(root, 1, 2)
        mean, (_, wide) = np.zeros((50, 3)), normals(rng, 3, 50)
        assert (kl_divergence(mean, thin, mean, wide) == np.inf).all()
        assert (kl_divergence(mean, wide, mean, thin) == np.inf).all()
        # a plane is known up to rounding too: seen from itself it is at a finite distance
        assert kl_divergence(mean, thin, mean, 4 * thin) == pytest.approx(
            0.5 * rank * (1 / 4 - 1 + np.log(4)), rel=1e-9
        )


def test_what_two_normals_share_as_a_point_is_left_out():
    """N(0, s²) on a line in the plane against N(m, t²) on the same line: KL of one dimension."""
    along = np.array([[1.0, 2.0]]) / np.sqrt(5)
    outer = along[0][:, None] * along[0]
    mean = np.array([[0.3, -1.1]])
    found = kl_divergence(mean, [0.49 * outer], mean + 0.8 * along, [2.25 * outer])
    expected = 0.5 * (0.49 / 2.25 + 0.64 / 2.25 - 1 + np.log(2.25 / 0.49))
    close(found, [expected], rtol=1e-9)
    # the same without the line's help: another point in the second coefficient is infinitely far
    flat = np.array([[[0.49, 0.0], [0.0, 0.0]]])
    wider = np.array([[[2.25, 0.0], [0.0, 0.0]]])
    close(kl_divergence(mean, flat, mean + np.array([0.8, 0.0]), wider), [expected], rtol=1e-12)
    assert kl_divergence(mean, flat, mean + np.array([0.8, 0.01]), wider).tolist() == [np.inf]
    # and two equal points are the same
    point = np.zeros((1, 2, 2))
    assert kl_divergence(mean, point, mean, point).tolist() == [0.0]
    assert kl_divergence(mean, point, mean + 0.1, point).tolist() == [np.inf]


def test_one_task_at_infinity_leaves_the_others():
    covariance = np.array([np.eye(2), np.zeros((2, 2)), 4 * np.eye(2)])
    found = kl_divergence(np.zeros((3, 2)), covariance, np.zeros((3, 2)), np.array([np.eye(2)] * 3))
    close(found[[0, 2]], [0.0, 3 - np.log(4)], rtol=1e-12, atol=1e-14)
    assert found[1] == np.inf


# --------------------------------------------------------------------------- distance


@pytest.mark.parametrize("d", [1, 2, 3])
def test_distance_is_that_of_scipys_matrix_root(d, rng):
    """In sds of the second normal; sqrtm is good to about 1e-8 where matrices are near singular."""
    (mean, covariance), (to_mean, to_covariance) = normals(rng, d), normals(rng, d)
    found = wasserstein(mean, covariance, to_mean, to_covariance)
    for j in range(len(mean)):
        sd = np.sqrt(np.diag(to_covariance[j]))
        here, there = (c[j] / np.outer(sd, sd) for c in (covariance, to_covariance))
        root = linalg.sqrtm(there)
        cross = np.trace(linalg.sqrtm(root @ here @ root)).real
        square = (((mean[j] - to_mean[j]) / sd) ** 2).sum()
        square += np.trace(here + there) - 2 * cross
        assert found[j] == pytest.approx(np.sqrt(square), rel=1e-7)


def test_distance_of_independent_normals_adds_means_and_sds(rng):
    sd, to_sd = rng.uniform(0.2, 3, (2, 5, 3))
    gap = rng.normal(size=(5, 3))
    eye = np.eye(3)
    found = wasserstein(gap, eye * sd[:, None] ** 2, 0 * gap, eye * to_sd[:, None] ** 2)
    close(found, np.sqrt(((gap / to_sd) ** 2 + (sd / to_sd - 1) ** 2).sum(1)), rtol=1e-9)


def test_distance_to_and_from_a_point():
    """Finite from a point, √d of a unit normal; to a point there are no sds to count in."""
    mean, point, unit = np.zeros((1, 2)), np.zeros((1, 2, 2)), np.eye(2)[None]
    close(wasserstein(mean, point, mean, unit), [np.sqrt(2)], rtol=1e-12)
    assert wasserstein(mean, unit, mean, point).tolist() == [np.inf]
    assert wasserstein(mean, point, mean, point).tolist() == [0.0]
    assert wasserstein(mean, point, mean + 1, point).tolist() == [np.inf]


def test_shifts_and_ratios_of_points():
    """The row of distances of an estimate with τ̂ = 0: no NaN where both are the same point."""
    mean, point, unit = np.zeros((1, 2)), np.zeros((1, 2, 2)), np.eye(2)[None]
    same = between((mean, point), (mean, point))
    assert {k: v.tolist() for k, v in same.items()} == {
        "kl": [0.0], "wasserstein": [0.0], "mean_shift": [0.0], "sd_ratio": [1.0],
    }  # fmt: skip
    narrower = between((mean + 0.5, point), (mean, unit))
    assert narrower["kl"] == np.inf
    assert narrower["mean_shift"] == pytest.approx(0.5)
    assert narrower["sd_ratio"] == 0.0
    wider = between((mean, unit), (mean + 0.5, point))
    assert [v.item() for v in wider.values()] == [np.inf] * 4


# ----------------------------------------------------------------------------- floors


def simulated(rng, d, n, count):
    """Means and covariances of ``count`` samples of ``n`` draws from one correlated normal."""
    root = np.tril(np.full((d, d), 0.5)) + np.eye(d)
    draws = rng.standard_normal((count, n, d)) @ root.T
    mean = draws.mean(1)
    centred = draws - mean[:, None]
    return np.einsum("sni,snj->sij", centred, centred) / (n - 1), mean, root @ root.T


def expected_divergence(d, n):
    """The closed form of this file's docstring."""
    scatter = special.digamma((n - np.arange(1, d + 1)) / 2).sum() + d * np.log(2 / (n - 1))
    return 0.5 * (d * (n - 1) / (n - d - 2) * (1 + 1 / n) - d + scatter)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_divergence_of_a_normal_from_its_own_draws(d, rng):
    """3,000 samples of 100 draws: the mean divergence within four of its standard errors."""
    covariance, mean, truth = simulated(rng, d, 100, 3_000)
    found = kl_divergence(
        np.zeros_like(mean), np.broadcast_to(truth, covariance.shape), mean, covariance
    )
    error = found.std() / np.sqrt(len(found))
    assert abs(found.mean() - expected_divergence(d, 100)) < 4 * error
    # narrow enough to tell the closed form from one with a wrong constant, d (d + 2) / 4n
    assert 8 * error < expected_divergence(d, 100) * (1 - (d + 2) / (d + 3))


@pytest.mark.parametrize("d", [1, 2, 3, 10])
def test_floor_is_the_leading_term_of_the_expected_divergence(d):
    """What is left is of relative order (d + 3) / n, and falls as 1 / n."""
    left = [expected_divergence(d, n) / float(kl_floor(d, np.array(n))) - 1 for n in (400, 4_000)]
    assert 0 < left[0] < 1.5 * (d + 3) / 400
    assert left[1] == pytest.approx(left[0] / 10, rel=0.1)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_floor_of_the_distance_is_its_root_mean_square(d, rng):
    """Uncorrelated normals, 3,000 samples of 200 draws; what is left out is of order 1 / n."""
    draws = rng.standard_normal((3_000, 200, d)) * np.array([1.0, 30.0, 0.2])[:d]
    mean = draws.mean(1)
    centred = draws - mean[:, None]
    covariance = np.einsum("sni,snj->sij", centred, centred) / 199
    truth = np.diag(np.array([1.0, 900.0, 0.04])[:d])
    square = (
        wasserstein(np.zeros_like(mean), np.broadcast_to(truth, covariance.shape), mean, covariance)
        ** 2
    )
    error = square.std() / np.sqrt(len(square))
    floor = float(wasserstein_floor(d, np.array(200))) ** 2
    assert abs(square.mean() - floor) < 4 * error + 3 / 200 * floor
    # narrow enough to miss the covariances' share, a third of it where d = 1
    assert 4 * error + 3 / 200 * floor < 0.5 * (d * (d + 1) / 4 / 200)


# --------------------------------------------------------------------------- coverage


def test_coverage_of_exact_draws(rng):
    """Shares by level and task within four binomial standard errors of 20,000 draws."""
    sd, size = np.array([[0.5, 2.0], [3.0, 0.1]]), 20_000
    mean = np.array([[1.0, -2.0], [0.0, 5.0]])
    draws = mean + sd * rng.standard_normal((size, 2, 2))
    found = coverage(mean, np.eye(2) * sd[:, None] ** 2, draws)
    assert found.shape == (len(LEVELS), 2)
    level = np.array(LEVELS)[:, None]
    error = np.sqrt(level * (1 - level) / (2 * size))  # two coefficients a task
    assert (np.abs(found - level) < 4 * error).all()
    # too narrow by half, and moved by one sd: what the normal's own distribution function says
    for scale, shift in ((0.5, 0.0), (1.0, 1.0)):
        found = coverage(mean + shift * sd, np.eye(2) * (scale * sd[:, None]) ** 2, draws)
        reach = scale * stats.norm.ppf(0.5 + level / 2)
        expected = stats.norm.cdf(shift + reach) - stats.norm.cdf(shift - reach)
        assert (np.abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / size)).all()
        assert (level - expected > 8 * error).all()  # and far from nominal


def test_coverage_of_a_point_is_none():
    draws = np.array([[[0.1]], [[0.2]], [[0.3]]])
    assert coverage(np.array([[0.15]]), np.zeros((1, 1, 1)), draws).tolist() == [[0.0]] * 3
