"""No pooling and complete pooling against least squares, and as limits of the exact posterior.

Least squares by two routes agrees to rounding times the condition of the design, hence 1e-9.
"""

import numpy as np
import pandas as pd
import pytest
from references import assert_said
from scipy import stats

import hierbayes as hb
from hierbayes.adaptation import Conjugate
from hierbayes.evidence import Exact

RADON = "log_radon ~ 1 + floor + (1 + floor | county)"


def by_task(tasks):
    """The slice of rows of every task."""
    return [slice(a, b) for a, b in zip(tasks.starts[:-1], tasks.starts[1:], strict=True)]


@pytest.fixture(scope="module")
def radon_alone():
    model, tasks = hb.from_formula(RADON, hb.datasets.radon())
    return hb.no_pooling(model, tasks)


# ----------------------------------------------------------------------------- no pooling


def test_no_pooling_is_least_squares_of_minimum_norm(radon_alone):
    tasks = radon_alone.tasks
    squares, rank = 0.0, 0
    for j, own in enumerate(by_task(tasks)):
        x, y = tasks.predictors[own], tasks.outcome[own]
        theta, _, r, _ = np.linalg.lstsq(x, y, rcond=1e-10)
        squares, rank = squares + ((y - x @ theta) ** 2).sum(), rank + r
        assert radon_alone.theta.values[j] == pytest.approx(theta, rel=1e-9, abs=1e-12)
    sigma = np.sqrt(squares / (tasks.num_rows - rank))
    assert float(radon_alone.phi["sigma"]) == pytest.approx(sigma, rel=1e-10)
    assert set(radon_alone.phi) == {"sigma"}


def test_no_pooling_marks_what_radon_does_not_determine(radon_alone):
    """25 counties have one floor only: there the minimum norm is a guess, and is said to be.

    Where all rows have floor 0 the intercept is known; where all have floor 1 only the sum is.
    """
    tasks = radon_alone.tasks
    floors = [tasks.predictors[own, 1] for own in by_task(tasks)]
    one_floor = np.array([len(set(f)) == 1 for f in floors])
    upstairs = np.array([f.min() == 1 for f in floors])
    assert one_floor.sum() == 25
    identified = radon_alone.datatree["point_estimate"]["theta_identified"]
    assert identified.sel(coef="floor").values.tolist() == (~one_floor).tolist()
    assert identified.sel(coef="Intercept").values.tolist() == (~upstairs).tolist()
    assert np.isnan(radon_alone.adapted.sd.values).tolist() == (~identified.values).tolist()
    assert_said(radon_alone.warnings, "25 of 85 tasks", "minimum-norm", "unidentified")
    # sd: σ √(XᵀX)⁻¹
    j = int(np.flatnonzero(~one_floor)[0])
    x = tasks.predictors[by_task(tasks)[j]]
    expected = float(radon_alone.phi["sigma"]) * np.sqrt(np.diag(np.linalg.inv(x.T @ x)))
    assert radon_alone.adapted.sd.values[j] == pytest.approx(expected, rel=1e-9)


def test_predictions_leave_unidentified_rows_out(radon_alone):
    """A row on the other floor of a one-floor county cannot be predicted by that county alone."""
    tasks = radon_alone.tasks
    names = tasks.names.tolist()
    new = pd.DataFrame({"county": names * 2, "floor": [0] * 85 + [1] * 85, "log_radon": 1.0})
    seen = [set(tasks.predictors[own, 1]) for own in by_task(tasks)]
    blind = [floor not in seen[j] for floor in (0.0, 1.0) for j in range(85)]
    assert sum(blind) == 25
    prediction = radon_alone.predict(new)
    order = [int(i) for i in np.argsort(prediction.tasks.rows)]
    assert prediction.unidentified[order].tolist() == blind
    assert np.isnan(prediction.mean[order]).tolist() == blind
    assert np.isnan(prediction.log_density()[order]).tolist() == blind
    # an identified row: mean x θ̂, variance σ² (1 + x (XᵀX)⁺ xᵀ)
    county, floor = names[2], 0
    x = tasks.predictors[by_task(tasks)[2]]
    at, row = order[2], np.array([1.0, floor])
    sigma = float(radon_alone.phi["sigma"])
    sd = sigma * np.sqrt(1 + row @ np.linalg.pinv(x.T @ x) @ row)
    assert prediction.tasks.names[prediction.tasks.task_of_row][at] == county
    assert prediction.mean[at] == pytest.approx(row @ radon_alone.theta.values[2], rel=1e-10)
    assert prediction.sd[at] == pytest.approx(sd, rel=1e-9)
    assert prediction.log_density()[at] == pytest.approx(
        stats.norm.logpdf(1.0, prediction.mean[at], sd), rel=1e-9
    )
    # no training row needs what its own county does not tell
    assert not radon_alone.predict().unidentified.any()


def test_no_pooling_estimates_shared_effects_within_tasks():
    """One least-squares problem with a block of columns a task and the shared columns."""
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(12), rng.integers(1, 8, 12))
    x, z = rng.normal(size=task.size), rng.normal(size=(task.size, 2))
    y = task + x + z @ [0.5, -2.0] + rng.normal(size=task.size)
    frame = pd.DataFrame({"g": task, "x": x, "u": z[:, 0], "v": z[:, 1], "y": y})
    model, tasks = hb.from_formula("y ~ 1 + x + u + v + (1 + x | g)", frame)
    blocks = np.zeros((len(y), 24 + 2))
    for j, own in enumerate(by_task(tasks)):
        blocks[own, 2 * j : 2 * j + 2] = tasks.predictors[own]
    blocks[:, 24:] = tasks.shared
    best, _, rank, _ = np.linalg.lstsq(blocks, tasks.outcome, rcond=1e-10)
    assert rank < 26  # a task of one row is there
    fit = hb.no_pooling(model, tasks)
    assert fit.phi["beta"] == pytest.approx(best[24:], rel=1e-8)
    assert fit.theta.values.ravel() == pytest.approx(best[:24], rel=1e-8, abs=1e-9)
    residual = tasks.outcome - blocks @ best
    sigma = np.sqrt(residual @ residual / (len(y) - rank))
    assert float(fit.phi["sigma"]) == pytest.approx(sigma, rel=1e-9)


def test_a_task_level_effect_is_not_identified_without_pooling():
    """The county's uranium is one number a county, and each has its own intercept."""
    frame = hb.datasets.radon()
    model, tasks = hb.from_formula("log_radon ~ 1 + floor + log_uranium + (1 | county)", frame)
    fit = hb.no_pooling(model, tasks)
    assert_said(fit.warnings, "'log_uranium'", "not identified")
    assert not any("'floor'" in w for w in fit.warnings)
    columns = frame[["log_radon", "floor"]]
    within = columns - columns.groupby(frame["county"]).transform("mean")
    slope = (within["floor"] @ within["log_radon"]) / (within["floor"] @ within["floor"])
    assert fit.phi["beta"] == pytest.approx([slope, 0.0], rel=1e-9, abs=1e-9)


def test_no_pooling_refuses_what_it_cannot_know(radon_alone):
    with pytest.raises(AttributeError, match="the prior is flat"):
        _ = radon_alone.log_evidence
    with pytest.raises(hb.InputError, match="learns nothing about tasks"):
        radon_alone.predict(hb.datasets.radon(), target="new")
    single = hb.Tasks.from_arrays([(np.ones((1, 1)), [float(j)]) for j in range(5)])
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    with pytest.raises(hb.InputError, match="sigma cannot be estimated within tasks"):
        hb.no_pooling(model, single)
    given = hb.no_pooling(model, single, sigma=2.0)
    assert given.theta.values[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert given.adapted.sd.values[:, 0] == pytest.approx([2.0] * 5)


# ----------------------------------------------------------------------- complete pooling


def test_complete_pooling_is_ordinary_least_squares():
    frame = hb.datasets.radon()
    model, tasks = hb.from_formula(RADON, frame)
    fit = hb.complete_pooling(model, tasks)
    x = np.column_stack([np.ones(919), frame["floor"]])
    y = frame["log_radon"].to_numpy()
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    sigma = np.sqrt(np.mean((y - x @ best) ** 2))  # maximum likelihood: over N
    assert fit.phi["mu"] == pytest.approx(best, rel=1e-10)
    assert float(fit.phi["sigma"]) == pytest.approx(sigma, rel=1e-10)
    se = sigma * np.sqrt(np.diag(np.linalg.inv(x.T @ x)))
    assert fit.standard_errors["mu"] == pytest.approx(se, rel=1e-9)
    assert fit.log_evidence == pytest.approx(stats.norm.logpdf(y, x @ best, sigma).sum(), rel=1e-12)
    assert fit.phi["tau"].tolist() == [0.0, 0.0]
    assert np.ptp(fit.theta.values, axis=0).tolist() == [0.0, 0.0]
    assert (fit.adapted.covariance.values == 0).all()


def test_complete_pooling_weighs_rows_by_what_is_known_of_them():
    """Weights scale the noise to σ/√w, offsets are subtracted, β stands beside μ."""
    rng = np.random.default_rng(1)
    n = 60
    frame = pd.DataFrame(
        {
            "g": rng.integers(0, 9, n), "x": rng.normal(2, 1, n), "z": rng.normal(size=n),
            "w": rng.uniform(0.2, 5, n), "o": rng.normal(size=n),
        }
    )  # fmt: skip
    frame["y"] = 1 + frame["x"] - frame["z"] + frame["o"] + rng.normal(size=n) / np.sqrt(frame["w"])
    model, tasks = hb.from_formula("y ~ 1 + x + z + (1 + x | g)", frame, weight="w", offset="o")
    fit = hb.complete_pooling(model, tasks)
    x = np.column_stack([np.ones(n), frame["x"], frame["z"]])
    w, y = frame["w"].to_numpy(), (frame["y"] - frame["o"]).to_numpy()
    gram = x.T @ (w[:, None] * x)
    best = np.linalg.solve(gram, x.T @ (w * y))
    sigma = np.sqrt(w @ (y - x @ best) ** 2 / n)
    assert [*fit.phi["mu"], *fit.phi["beta"]] == pytest.approx(best, rel=1e-9)
    assert float(fit.phi["sigma"]) == pytest.approx(sigma, rel=1e-9)
    errors = [*fit.standard_errors["mu"], *fit.standard_errors["beta"]]
    assert errors == pytest.approx(sigma * np.sqrt(np.diag(np.linalg.inv(gram))), rel=1e-9)
    expected = stats.norm.logpdf(y, x @ best, sigma / np.sqrt(w)).sum()
    assert fit.log_evidence == pytest.approx(expected, rel=1e-12)


def test_complete_pooling_with_known_errors():
    """Σ y/se² / Σ 1/se², its standard error (Σ 1/se²)^−½; no σ."""
    frame = hb.datasets.eight_schools()
    fit = hb.complete_pooling(*hb.from_formula("y ~ 1 + (1 | school)", frame, known_se="se"))
    y, se = frame["y"].to_numpy(), frame["se"].to_numpy()
    mu = (y / se**2).sum() / (se**-2).sum()
    assert fit.phi["mu"] == pytest.approx([mu], rel=1e-12)
    assert fit.standard_errors["mu"] == pytest.approx([(se**-2).sum() ** -0.5], rel=1e-12)
    assert fit.log_evidence == pytest.approx(stats.norm.logpdf(y, mu, se).sum(), rel=1e-12)
    assert "sigma" not in fit.phi


# --------------------------------------------------------------------------------- limits


def test_no_pooling_is_the_limit_of_a_wide_prior(radon_alone):
    """θ_j → least squares as τ grows, at the rate 1/τ²; what a task cannot tell stays at μ."""
    tasks, model = radon_alone.tasks, radon_alone.model
    identified = np.array(
        [np.linalg.matrix_rank(tasks.predictors[own]) == 2 for own in by_task(tasks)]
    )
    mu = np.array([1.5, -0.7])

    def posterior(tau):
        phi = {
            "mu": mu,
            "tau": np.full(2, tau),
            "corr": np.eye(2),
            "sigma": radon_alone.phi["sigma"],
        }
        return Conjugate()(model, tasks, phi)

    def error(tau):
        return np.abs(posterior(tau).mean - radon_alone.theta.values)[identified].max()

    assert error(1e2) == pytest.approx(error(1e1) / 100, rel=0.02)
    assert error(1e3) == pytest.approx(error(1e2) / 100, rel=0.02)
    wide = posterior(1e4)
    assert wide.mean[identified] == pytest.approx(radon_alone.theta.values[identified], abs=1e-6)
    assert wide.covariance[identified] == pytest.approx(
        radon_alone.adapted.covariance.values[identified], rel=1e-5, abs=1e-7
    )
    # one floor only: the direction orthogonal to the rows keeps its prior mean
    for j in np.flatnonzero(~identified):
        row = tasks.predictors[tasks.starts[j]]
        blind = np.array([-row[1], row[0]]) / np.hypot(*row)
        assert blind @ wide.mean[j] == pytest.approx(blind @ mu, abs=1e-6)
        assert row @ wide.mean[j] == pytest.approx(row @ radon_alone.theta.values[j], abs=1e-6)


def test_complete_pooling_is_the_limit_of_a_point_prior():
    """At τ = 0 the evidence is the likelihood of one regression, θ_j = μ without variance."""
    model, tasks = hb.from_formula(
        "log_radon ~ 1 + floor + log_uranium + (1 + floor | county)", hb.datasets.radon()
    )
    fit = hb.complete_pooling(model, tasks)
    at_zero = {**fit.phi, "corr": np.eye(2)}
    assert Exact()(model, tasks, at_zero).sum() == pytest.approx(fit.log_evidence, rel=1e-12)
    conclusion = Conjugate()(model, tasks, at_zero)
    assert (conclusion.mean == fit.phi["mu"]).all()
    assert (conclusion.covariance == 0).all()
    near = Conjugate()(model, tasks, at_zero | {"tau": np.full(2, 1e-4)})
    nearer = Conjugate()(model, tasks, at_zero | {"tau": np.full(2, 1e-5)})
    assert np.abs(near.mean - fit.phi["mu"]).max() > 0
    assert np.abs(nearer.mean - fit.phi["mu"]).max() == pytest.approx(
        np.abs(near.mean - fit.phi["mu"]).max() / 100, rel=1e-3
    )


def test_a_shared_effect_that_tasks_absorb_is_marked():
    # uranium is constant within counties: without pooling each intercept holds its effect
    model, tasks = hb.from_formula(
        "log_radon ~ 1 + floor + log_uranium + (1 | county)", hb.datasets.radon()
    )
    fit = hb.no_pooling(model, tasks)
    assert not fit.adapted.posterior.identified.any()
    assert np.isnan(fit.adapted.sd.values).all()
    # its predictions of the counties' own houses stand all the same
    assert np.isfinite(fit.predict().mean).all()
