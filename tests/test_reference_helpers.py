"""The helpers of ``references.py`` give known values, and its assertions reject wrong ones."""

import numpy as np
import pytest
import xarray as xr
from references import (
    Rows,
    agreement,
    assert_agreement,
    assert_said,
    dense_log_evidence,
    gradient,
    hessian,
    load,
    profiled_log_evidence,
)
from scipy import stats

NORMAL = {"x": {"mean": 2.0, "sd": 3.0}}


def draws(mean: float = 2.0, sd: float = 3.0, size: int = 6000) -> xr.Dataset:
    white = np.random.default_rng(0).standard_normal((4, size))
    return xr.Dataset({"x": (("chain", "draw"), mean + sd * white)})


def test_right_draws_pass():
    found = assert_agreement(draws(), NORMAL)
    # 24,000 independent draws: the sd is known to 1 / sqrt(2 · 24000) = 0.456 %, which its
    # estimate reaches within the few per cent that an effective sample size is known to
    assert found.sd_precision == pytest.approx([1 / np.sqrt(48_000)], rel=0.1)


def test_a_shifted_mean_is_rejected():
    # 0.12 is 6 standard errors (3 / sqrt(24000) = 0.019); the sd is right
    with pytest.raises(AssertionError, match=r"mean, in Monte-Carlo errors.*x\[0\]"):
        assert_agreement(draws(mean=2.12), NORMAL)


@pytest.mark.parametrize("sd", [2.8, 3.2])
def test_a_wrong_sd_is_rejected(sd):
    with pytest.raises(AssertionError, match="sd against the reference"):
        assert_agreement(draws(sd=sd), NORMAL)
    assert_agreement(draws(sd=sd), NORMAL, sds=False)  # the means alone are right


def test_too_few_draws_are_rejected():
    with pytest.raises(AssertionError, match="Monte-Carlo error of the sd"):
        assert_agreement(draws(size=200), NORMAL)


def test_not_a_number_is_rejected():
    broken = draws()
    broken["x"][0, 0] = np.nan
    with pytest.raises(AssertionError):
        assert_agreement(broken, NORMAL)


def test_another_number_of_parameters_is_rejected():
    with pytest.raises(ValueError, match="1 entries, 2 in the reference"):
        agreement(draws(), {"x": {"mean": [2.0, 2.0], "sd": [3.0, 3.0]}})


def test_the_sds_own_error_counts_the_squares():
    """Antithetic draws x, −x know their mean exactly and their sd no better than half as many.

    With pairs (x, −x) the squares come in equal pairs: n/2 independent ones.
    """
    white = np.random.default_rng(1).standard_normal((4, 3000))
    pairs = np.stack([white, -white], axis=-1).reshape(4, 6000)
    data = xr.Dataset({"x": (("chain", "draw"), pairs)})
    found = agreement(data, {"x": {"mean": 0.0, "sd": 1.0}})
    assert found.sd_precision == pytest.approx([1 / np.sqrt(2 * 12_000)], rel=0.1)


def test_a_missing_warning_is_noticed():
    assert_said(["tau is 0", "few tasks"], "tau", "0")
    with pytest.raises(AssertionError, match="no warning says"):
        assert_said(["tau is 0", "few tasks"], "tau", "few")  # both words, but in two sentences
    with pytest.raises(AssertionError, match="no warning says"):
        assert_said([], "tau")


def test_dense_evidence_is_scipys_multivariate_normal():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(4, 2)), rng.normal(size=4)
    se = np.array([0.5, 1.0, 2.0, 1.5])
    corr = np.array([[1.0, -0.4], [-0.4, 1.0]])
    root = np.diag([0.7, 1.3])
    covariance = x @ root @ corr @ root @ x.T + np.diag((0.9 * se) ** 2)
    expected = stats.multivariate_normal(x @ [0.3, -0.2], covariance).logpdf(y)
    found = dense_log_evidence([Rows(x, x, y, se)], [0.3, -0.2], [0.7, 1.3], corr, 0.9)
    assert found == pytest.approx(expected, rel=1e-12)


def test_profiled_evidence_is_at_the_maximum_and_reml_is_the_integral():
    """One fixed effect: maximise and integrate over it numerically."""
    rng = np.random.default_rng(3)
    tasks = [
        Rows(np.ones((n, 1)), np.ones((n, 1)), rng.normal(1, 1, n), np.ones(n)) for n in (2, 3, 5)
    ]

    def value(b: float) -> float:
        return dense_log_evidence(tasks, [b], [0.8], None, 1.1)

    ml = profiled_log_evidence(tasks, [0.8], None, 1.1)
    assert ml.value == pytest.approx(value(ml.effects[0]), rel=1e-12)
    assert max(value(ml.effects[0] + 1e-3), value(ml.effects[0] - 1e-3)) < ml.value
    grid = ml.effects[0] + np.sqrt(ml.covariance[0, 0]) * np.linspace(-9, 9, 2001)
    integral = np.trapezoid(np.exp([value(b) - ml.value for b in grid]), grid)
    reml = profiled_log_evidence(tasks, [0.8], None, 1.1, reml=True).value
    assert reml == pytest.approx(ml.value + np.log(integral), rel=1e-10)


def test_differences_of_a_known_function():
    def function(v: np.ndarray) -> float:
        return float(np.exp(0.5 * v[0]) * np.sin(v[1]) + v[0] ** 2 * v[1])

    a, b = 0.3, 0.7
    e = np.exp(0.5 * a)
    slope = [0.5 * e * np.sin(b) + 2 * a * b, e * np.cos(b) + a**2]
    mixed = 0.5 * e * np.cos(b) + 2 * a
    curvature = [[0.25 * e * np.sin(b) + 2 * b, mixed], [mixed, -e * np.sin(b)]]
    # step⁴ = 1e-8 times fifth derivatives below one, over 30
    assert gradient(function, [a, b], 0.01) == pytest.approx(np.array(slope), rel=1e-8)
    assert hessian(function, [a, b], 0.01) == pytest.approx(np.array(curvature), rel=1e-8)


@pytest.mark.parametrize("name", ["radon_partially_pooled", "radon_hierarchical_intercept"])
def test_radon_references_have_every_county(name):
    reference = load(name)
    assert len(reference["alpha"]["mean"]) == len(reference["alpha"]["sd"]) == 85
    assert len(reference.get("log_uppm", range(85))) == 85
