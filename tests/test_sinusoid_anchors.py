"""T19: what can be known of the sinusoids before any learning, by three independent ways.

Closed forms, with A ~ U(0.1, 5), b ~ U(0, π), x ~ U(−5, 5), y = A sin(x − b):

    E A² = (5³ − 0.1³) / (3 · 4.9),   E[sin²(x − b) | x] = 1/2   ⇒   E y² = E A² / 2 = 4.2517
    E[y | x] = E A · (1/π) ∫₀^π sin(x − b) db = −(2 · 2.55 / π) cos x
    E cos² x = 1/2 + sin(10) / 20
    E (y − E[y | x])² = E A² / 2 − (2 · 2.55 / π)² E cos² x = 3.0057
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import hierbayes as hb

sys.path.insert(0, str(Path(__file__).parents[1]))
anchors = pytest.importorskip("benchmarks.sinusoid_anchors")
scoring = pytest.importorskip("benchmarks.sinusoid_scores")

ZERO = (5**3 - 0.1**3) / (3 * 4.9) / 2
UNADAPTED = ZERO - (2 * 2.55 / math.pi) ** 2 * (0.5 + math.sin(10) / 20)


def test_the_closed_forms_are_the_published_anchors():
    assert round(ZERO, 3) == 4.252
    assert round(UNADAPTED, 3) == 3.006


def test_integration_gives_the_closed_forms():
    assert anchors.zero_error() == pytest.approx(ZERO, abs=1e-7)
    assert anchors.unadapted_mean(0.7) == pytest.approx(-5.1 / math.pi * math.cos(0.7), abs=1e-9)
    assert anchors.unadapted_error() == pytest.approx(UNADAPTED, abs=1e-7)


@pytest.mark.slow
def test_the_sinusoids_of_the_package_have_these_errors():
    # 20,000 tasks of 20 rows: within four standard errors over tasks, which are near 1 %
    _, query = hb.datasets.sinusoids(1, 20).batch(20_000, seed=3)
    y, x = np.float64(query.outcome), np.float64(query.predictors[..., 0])
    best = -5.1 / math.pi * np.cos(x)
    for error, truth in ((y**2, ZERO), ((y - best) ** 2, UNADAPTED)):
        found = scoring.Mean.over(error.mean(1))
        assert found.se < 0.02 * truth
        assert abs(found.mean - truth) < 4 * found.se
    # the same check refuses the other phase range that ports use, b ~ U(−π, π)
    other = hb.datasets.sinusoids(1, 20, phase=(-math.pi, math.pi)).batch(20_000, seed=3)[1]
    x, y = np.float64(other.predictors[..., 0]), np.float64(other.outcome)
    found = scoring.Mean.over(((y + 5.1 / math.pi * np.cos(x)) ** 2).mean(1))
    assert abs(found.mean - UNADAPTED) > 4 * found.se


def test_a_leak_is_seen_and_an_honest_error_is_not():
    assert not anchors.leaks(UNADAPTED, 0.01, UNADAPTED)
    assert not anchors.leaks(UNADAPTED - 0.039, 0.01, UNADAPTED)
    assert anchors.leaks(UNADAPTED - 0.041, 0.01, UNADAPTED)
    # negative control: a "step 0" that has seen its own rows, once through the default floor
    support, query = scoring.fresh_tasks(5, 50, 300, seed=1)
    said = anchors.oracle(*_xy(support), np.float64(query.predictors[..., 0]))
    cheating = 0.5 * said - 0.5 * 5.1 / math.pi * np.cos(np.float64(query.predictors[..., 0]))
    found = scoring.Mean.over(((cheating - query.outcome) ** 2).mean(1))
    assert anchors.leaks(found.mean, found.se)


@pytest.mark.slow
def test_the_oracle_is_exact_from_two_rows_on():
    for shots in (2, 5):
        support, query = scoring.fresh_tasks(shots, 50, 300, seed=2)
        x_query = np.float64(query.predictors[..., 0])
        said = anchors.oracle(*_xy(support), x_query)
        # rows are float32, and two rows at nearly equal sin and cos magnify their rounding
        assert np.median(np.abs(said - query.outcome)) < 1e-5
    one, query = scoring.fresh_tasks(1, 50, 300, seed=2)
    said = anchors.oracle(*_xy(one), np.float64(query.predictors[..., 0]))
    assert np.median(np.abs(said - query.outcome)) > 0.1


@pytest.mark.slow
def test_errors_after_steps_are_those_of_steps_by_hand():
    """One weight, f = θ x: θ_k = θ_{k−1} + 2 η mean(x (y − θ_{k−1} x)) at σ² = 1/2."""
    line = hb.likelihoods.Network(lambda p, x: x @ p["w"], {"w": np.ones(1)}, dtype="float64")
    model = hb.HierarchicalModel(line, hb.priors.Gaussian(correlated=False))
    fit = hb.maml(model, hb.datasets.sinusoids(5), 1, 0.01, num_meta_steps=5, batch_size=3)
    support, query = scoring.fresh_tasks(5, 7, 4, seed=0)
    found = scoring.errors(fit, support, query, most=3)
    assert found.shape == (4, 4)
    (x, y), (x_query, y_query) = _xy(support), _xy(query)
    theta = np.full((4, 1), fit.phi["mu"][0])
    for k in range(4):
        expected = ((y_query - theta * x_query) ** 2).mean(1)
        np.testing.assert_allclose(found[k], expected, rtol=1e-9)
        theta = theta + 0.02 * (x * (y - theta * x)).mean(1, keepdims=True)
    # the plug-in deviation and the steps are those with the smallest error on the same tasks
    best = scoring.tuned(fit, support, query, most=3)
    assert best.phi["sigma_query"] ** 2 == pytest.approx(found[1:].mean(1).min())
    assert best.adaptation.num_steps == 1 + found[1:].mean(1).argmin()


@pytest.mark.slow
def test_scores_of_a_known_normal():
    """At f = 0 and deviation s: log density −½ log(2π s²) − y²/(2 s²), coverage by |y| ≤ z s."""
    flat = hb.likelihoods.Network(lambda p, x: 0 * x @ p["w"], {"w": np.ones(1)}, dtype="float64")
    model = hb.HierarchicalModel(flat, hb.priors.Gaussian(correlated=False))
    fit = hb.maml(model, hb.datasets.sinusoids(5), 1, 0.01, num_meta_steps=2, batch_size=3)
    fit = replace(fit, phi={**fit.phi, "sigma_query": np.asarray(2.0)})
    support, query = scoring.fresh_tasks(5, 40, 30, seed=0)
    found, y = scoring.scores(fit, support, query), np.float64(query.outcome)
    expected = -0.5 * np.log(8 * np.pi) - y**2 / 8
    assert found["log_score"] == pytest.approx(expected.mean())
    assert found["rmse"] == pytest.approx(np.sqrt((y**2).mean()))
    assert found["coverage_50"] == pytest.approx((np.abs(y) <= 2 * 0.6744897501960817).mean())
    assert found["log_score_se"] == pytest.approx(expected.mean(1).std(ddof=1) / np.sqrt(30))


def _xy(part):
    return np.float64(part.predictors[..., 0]), np.float64(part.outcome)
