r"""equivalence_report: the four rungs as fits, and distances recomputed from their moments.

Sleepstudy with days held out, more of them for some subjects, so that curvatures differ by task:

.. math:: N(\theta_K, \Sigma_K) \to N(\text{MAP under } T) \to p(\theta_j \mid D_j, \hat\varphi)
          \to p(\theta_j \mid D_{1..J})

Distances are written out here with inverses and determinants; the posterior's own row has none.
"""

import functools
import itertools

import jax
import matplotlib
import numpy as np
import pytest
from assertions import close, monte_carlo, refuses
from conftest import quietly
from matplotlib.path import Path
from references import assert_said
from scipy import special, stats

import hierbayes as hb
from hierbayes.adaptation import Conjugate
from hierbayes.comparison.equivalence import FLOOR, FULL, MODE, POINT, STEPS, density_error
from hierbayes.fit import Prediction

matplotlib.use("Agg")

RUNGS = [STEPS, MODE, POINT, FULL]
FORMULA = "reaction ~ 1 + days + (1 + days | subject)"


class Study:
    """Sleepstudy in two parts, and the fits that reports below start from."""

    def __init__(self, sampled=False):
        frame = hb.datasets.sleepstudy()
        order = frame.groupby("subject", sort=False).ngroup()
        kept = frame["days"] < 8 - order % 4
        self.test = frame[~kept]
        self.model, self.tasks = hb.from_formula(FORMULA, frame[kept])
        self.eb = quietly(hb.empirical_bayes, self, num_draws=50, num_chains=2)
        sigma = float(hb.no_pooling(self.model, self.tasks).phi["sigma"])
        self.curvature = np.array([
            np.linalg.eigvalsh(x.T @ x)[-1] / sigma**2
            for x in np.split(self.tasks.predictors, self.tasks.starts[1:-1])
        ])  # fmt: skip
        self.maml = quietly(hb.maml, self, num_steps=3, step_size=1 / self.curvature.max())
        close(self.maml.phi["sigma"], sigma, rtol=1e-12)  # curvatures are those of its steps
        self.full = self.posterior()
        if sampled:
            settings = dict(num_draws=200, num_warmup=200, num_chains=2, progress=False)
            self.full = quietly(hb.full_bayes, self, **settings)

    @functools.cached_property
    def scaled(self):
        """Its steps are of scaled columns."""
        return quietly(hb.maml, self, num_steps=3)

    def posterior(self):
        """θ drawn exactly under 400 independent φ around φ̂: a posterior, and no minute of NUTS."""
        rng, phi = np.random.default_rng(9), self.eb.phi
        white = rng.standard_normal((400, 6))
        rho = np.tanh(np.arctanh(phi["corr"][0, 1]) + 0.3 * white[:, 5])
        phis = {
            "mu": phi["mu"] + [6.8, 1.5] * white[:, :2],  # lme4's standard errors
            "tau": phi["tau"] * np.exp(0.25 * white[:, 2:4]),
            "corr": np.eye(2) + rho[:, None, None] * (1 - np.eye(2)),
            "sigma": phi["sigma"] * np.exp(0.06 * white[:, 4]),
        }
        theta = Conjugate().draws(self.model, self.tasks, phis, jax.random.key(0))
        draws = {name: v.reshape(2, 200, *v.shape[1:]) for name, v in phis.items()}
        means = {name: v.mean(0) for name, v in phis.items()}
        return hb.Fit(
            hb.meta.FullBayes(), self.eb.model, self.tasks, means, Conjugate(), phi_draws=draws,
            theta_draws=theta.reshape(2, 200, *theta.shape[1:]),
        )  # fmt: skip

    def report(self, start, **more):
        arguments = {"empirical_bayes": self.eb, "num_draws": 250, "num_chains": 2} | more
        return hb.equivalence_report(start, self.full, **arguments)


@pytest.fixture(scope="module")
def study():
    return Study()


@pytest.fixture(scope="module")
def report(study):
    """From MAML, with what is held out."""
    return study.report(study.maml, num_steps=4, test=study.test, truth=study.eb.theta.values)


@pytest.fixture(scope="module")
def overshooting(study):
    """Three steps longer than 1/λ_max in some subjects but not in all."""
    eta = 1.0 / np.median(study.curvature)
    assert eta * study.curvature.max() < 2
    return study.report(study.maml, num_steps=3, step_size=eta, test=study.test)


def moments(fit):
    return fit.adapted.posterior.mean, fit.adapted.posterior.covariance


def written_out(here, there):
    """KL, distance, shift and ratio of every task, one at a time."""
    rows = []
    for mean, covariance, to_mean, to_covariance in zip(*here, *there, strict=True):
        inverse, gap = np.linalg.inv(to_covariance), to_mean - mean
        kl = np.trace(inverse @ covariance) + gap @ inverse @ gap - len(mean)
        kl += np.log(np.linalg.det(to_covariance) / np.linalg.det(covariance))
        sd, own = np.sqrt(np.diag(to_covariance)), np.sqrt(np.diag(covariance))
        unit, to_unit = covariance / np.outer(sd, sd), to_covariance / np.outer(sd, sd)
        # tr (AB)^½ is the sum of the roots of the eigenvalues of AB
        cross = np.sqrt(np.linalg.eigvals(unit @ to_unit).real).sum()
        square = ((gap / sd) ** 2).sum() + np.trace(unit + to_unit) - 2 * cross
        shift, ratio = (np.abs(gap) / sd).mean(), np.prod(own / sd) ** (1 / len(sd))
        rows.append((0.5 * kl, np.sqrt(square), shift, ratio))
    return dict(zip(("kl", "wasserstein", "mean_shift", "sd_ratio"), np.array(rows).T, strict=True))


# -------------------------------------------------------------------------- the rungs


@pytest.mark.slow
def test_rungs_are_fits_that_arviz_reads(report, study):
    import arviz_stats

    assert list(report.fits) == RUNGS
    for rung, fit in report.fits.items():
        assert isinstance(fit, hb.Fit)
        theta = fit.datatree.posterior["theta"]
        assert theta.dims == ("chain", "draw", "task", "coef")
        assert theta["task"].values.tolist() == study.tasks.names.tolist()
        if rung in (STEPS, MODE):
            assert theta.shape == (2, 250, 18, 2)
        # draws of one shape for one task: what ArviZ compiles and prints is small
        one = fit.datatree.posterior.to_dataset()[["theta"]].isel(task=[0])
        summary = arviz_stats.summary(one, round_to="none")
        assert len(summary) == 2
        close(summary["mean"], theta.values[:, :, 0].mean((0, 1)), rtol=1e-9)
    assert report.fits[FULL] is study.full
    assert report.fits[POINT] is study.eb


def test_draws_are_of_the_normals_that_are_compared(report):
    for rung in (STEPS, MODE):
        mean, covariance = moments(report.fits[rung])
        draws = report.fits[rung].theta_draws
        for j in (0, 7):
            for i in range(2):
                monte_carlo(draws[:, :, j, i], mean[j, i], np.sqrt(covariance[j, i, i]), share=0.15)


def test_rungs_are_what_they_are_called(report, study):
    steps = report.fits[STEPS]
    eta = study.maml.info["step_size"]
    assert steps.info == {"num_steps": 4, "step_size": eta}
    implied = hb.equivalent_prior(study.model, study.tasks, study.maml.phi, 4, eta)
    close(moments(steps)[0], implied.posterior_mean, rtol=1e-12)
    close(moments(steps)[1], implied.posterior_covariance, rtol=1e-12)
    close(report.implied.precision, implied.precision, rtol=1e-12)
    # the second takes μ and σ from the start and τ and ρ from empirical Bayes
    phi = {k: study.maml.phi[k] for k in ("mu", "sigma")}
    phi |= {k: study.eb.phi[k] for k in ("tau", "corr")}
    exact = Conjugate()(study.model, study.tasks, phi)
    close(moments(report.fits[MODE])[0], exact.mean, rtol=1e-12)
    close(moments(report.fits[MODE])[1], exact.covariance, rtol=1e-12)
    assert set(report.fits[MODE].phi) == {"mu", "sigma", "tau", "corr"}


def test_from_empirical_bayes_own_phi_nothing_moves_but_the_prior(study):
    found = study.report(study.eb, num_steps=20, step_size="auto")
    gap = found.gaps.loc[f"{MODE} → {POINT}"]
    assert gap["kl"] == pytest.approx(0, abs=1e-12)  # log determinants of the same matrices
    assert gap["wasserstein"] == pytest.approx(0, abs=1e-6)  # the root of rounding
    assert gap["mean_shift"] == pytest.approx(0, abs=1e-12)  # rounding: one was carried back
    assert gap["sd_ratio"] == pytest.approx(1, abs=1e-12)
    assert (found.gaps["kl"].drop(f"{MODE} → {POINT}") > 1e-3).all()
    assert not any("plug-in" in rung for rung in found.table.index)
    sigma = float(study.eb.phi["sigma"])
    largest = study.curvature.max() * float(study.maml.phi["sigma"]) ** 2 / sigma**2
    assert found.fits[STEPS].info["step_size"] == pytest.approx(1 / largest, rel=1e-10)


# ------------------------------------------------------------------------ the numbers


def test_distances_are_those_of_the_moments(report, study):
    """Inverses and determinants, one task at a time: relative rounding of 1e-9."""
    there = moments(study.full)
    draws = study.full.theta_draws.reshape(-1, 18, 2)
    close(there[0], draws.mean(0), rtol=1e-12)
    close(there[1][3], np.cov(draws[:, 3].T), rtol=1e-10)
    for rung in RUNGS[:3]:
        found, row = written_out(moments(report.fits[rung]), there), report.table.loc[rung]
        by_task = report.by_task.loc[rung]
        for name, values in found.items():
            close(by_task[name], values, rtol=1e-7)
        assert row["kl"] == pytest.approx(np.median(found["kl"]), rel=1e-8)
        assert row["kl_worst"] == pytest.approx(found["kl"].max(), rel=1e-8)
        assert row["wasserstein"] == pytest.approx(np.median(found["wasserstein"]), rel=1e-7)
        assert row["mean_shift"] == pytest.approx(found["mean_shift"].mean(), rel=1e-8)
        ratio = np.exp(np.log(found["sd_ratio"]).mean())
        assert row["sd_ratio"] == pytest.approx(ratio, rel=1e-8)
        mean, covariance = moments(report.fits[rung])
        sd = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
        tail = 2 * stats.norm.sf(np.abs(draws - mean) / sd)
        for level in (0.5, 0.8, 0.95):
            share = (tail >= 1 - level).mean()
            assert row[f"coverage_{round(100 * level)}"] == pytest.approx(share, abs=1e-12)


def test_gaps_are_between_neighbours(report):
    for low, high in itertools.pairwise(RUNGS):
        found = written_out(moments(report.fits[low]), moments(report.fits[high]))
        row = report.gaps.loc[f"{low} → {high}"]
        assert row["kl"] == pytest.approx(np.median(found["kl"]), rel=1e-8)
        assert row["mean_shift"] == pytest.approx(found["mean_shift"].mean(), rel=1e-8)
    assert len(report.gaps) == 3
    assert (report.gaps["what changes"].str.len() > 10).all()


def test_the_posterior_is_at_no_distance_from_itself(report):
    """Its draws lie in the intervals of a normal of its moments nearly as often as they say.

    400 draws of 36 coefficients that share φ: 0.03 is between the 0.025 of one coefficient and
    the 0.004 of all, were they independent.
    """
    row = report.table.loc[FULL]
    assert row["kl"] == pytest.approx(0, abs=1e-12)
    assert row["kl_worst"] == pytest.approx(0, abs=1e-12)
    assert row["wasserstein"] == pytest.approx(0, abs=1e-6)
    assert row["mean_shift"] == 0
    assert row["sd_ratio"] == 1
    for level in (50, 80, 95):
        assert row[f"coverage_{level}"] == pytest.approx(level / 100, abs=0.03)
    # which the first rung's do not
    assert abs(report.table.loc[STEPS, "coverage_50"] - 0.5) > 0.03


def test_the_floor_is_of_the_draws_that_there_are(report, study):
    """d = 2: KL 10 / (4 ESS), distance √(3.5 / ESS), with ArviZ's ESS of each task's worst."""
    import arviz_stats

    ess = arviz_stats.ess(study.full.datatree.posterior.to_dataset()[["theta"]])["theta"]
    worst = ess.values.min(1)
    floor = report.table.loc[FLOOR]
    assert floor["kl"] == pytest.approx(np.median(2.5 / worst), rel=1e-9)
    assert np.isnan(floor["kl_worst"])  # the largest of many has another floor than each
    assert floor["wasserstein"] == pytest.approx(np.median(np.sqrt(3.5 / worst)), rel=1e-9)
    share = np.sqrt(0.25 / np.median(worst))
    assert floor["coverage_50"] == pytest.approx(share, rel=1e-9)
    rough = int((worst < 400).sum())
    assert rough > 0
    assert_said(report.notes, f"{rough} task(s) have fewer than 400 effective draws")


def test_held_out_density_is_what_the_fits_predict(report, study):
    for rung, fit in [*report.fits.items(), ("MAML, plug-in", study.maml)]:
        prediction = fit.predict(study.test, target="known")
        density, row = prediction.log_density(), report.table.loc[rung]
        assert row["log_density"] == pytest.approx(density.mean(), rel=1e-12)
        # tasks are the units of sampling: a ratio estimator over 18 of them
        sums = np.bincount(prediction.tasks.task_of_row, density - density.mean())
        se = np.sqrt(18 / 17 * (sums**2).sum()) / len(density)
        assert row["log_density_se"] == pytest.approx(se, rel=1e-10)
    assert report.table.index.tolist() == [*RUNGS, "MAML, plug-in", FLOOR]
    assert np.isnan(report.table.loc["MAML, plug-in", "kl"])
    # the plug-in's own deviation of the query rows tells it from the steps' posterior
    plain, steps = (report.table.loc[r, "log_density"] for r in ("MAML, plug-in", STEPS))
    assert abs(plain - steps) > 1e-4
    assert 0 < report.table.loc[FLOOR, "log_density"] < 0.05


def test_the_error_of_a_mixtures_density_is_that_of_repetitions(rng):
    """200 mixtures of 300 normals at 5 rows: their mean log densities spread as each says, ±15 %.

    Two hundred sds are known to 5 %; the claimed error of a mixture varies by as much.
    """
    tasks = hb.Tasks.from_arrays([(np.ones((5, 1)), np.array([-2.0, -0.5, 0.0, 1.0, 2.5]))])
    values, errors = [], []
    for _ in range(200):
        means = rng.standard_normal((300, 1)) + np.zeros(5)
        found = Prediction("known task", tasks, stats.norm(means, 0.7), np.zeros(5, bool))
        values.append(found.log_density().mean())
        errors.append(density_error(found, 300.0))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)
    one = Prediction("known task", tasks, stats.norm(means[:1], 0.7), np.zeros(5, bool))
    assert density_error(one, 1.0) == 0


def test_true_values_are_counted_inside_the_intervals(report, study):
    truth = study.eb.theta.values
    for rung in RUNGS:
        mean, covariance = moments(report.fits[rung])
        sd = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
        tail = 2 * stats.norm.sf(np.abs(truth - mean) / sd)
        for level in (0.5, 0.8, 0.95):
            found = report.table.loc[rung, f"truth_{round(100 * level)}"]
            assert found == pytest.approx((tail >= 1 - level).mean(), abs=1e-12)
    assert report.table.loc[POINT, "truth_50"] == 1  # its own means
    assert report.table.loc[STEPS, "truth_95"] < 1
    with refuses("truth has shape (18,)", "(18, 2)"):
        study.report(study.eb, num_steps=2, truth=truth[:, 0])


# ------------------------------------------------------------------ steps without a prior


def test_tasks_without_a_prior_are_left_out_of_the_first_rung(overshooting, study):
    eta = overshooting.fits[STEPS].info["step_size"]
    without = eta * study.curvature > 1
    assert 4 <= without.sum() <= 14
    rows = overshooting.by_task.loc[STEPS]
    assert (rows["status"] == "no prior").tolist() == without.tolist()
    numbers = rows.drop(columns=["rows", "status"])
    assert numbers.isna().all(axis=1).tolist() == without.tolist()
    assert not overshooting.by_task.drop(STEPS, level="rung")["kl"].isna().any()
    found = written_out(moments(overshooting.fits[STEPS]), moments(study.full))
    row = overshooting.table.loc[STEPS]
    assert row["kl"] == pytest.approx(np.median(found["kl"][~without]), rel=1e-8)
    assert row["kl_worst"] == pytest.approx(found["kl"][~without].max(), rel=1e-8)
    assert row["mean_shift"] == pytest.approx(found["mean_shift"][~without].mean(), rel=1e-8)
    assert row["kl"] != pytest.approx(np.median(found["kl"]), rel=1e-3)  # it matters
    gap = written_out(moments(overshooting.fits[STEPS]), moments(overshooting.fits[MODE]))
    first = overshooting.gaps.loc[f"{STEPS} → {MODE}"]
    assert first["kl"] == pytest.approx(np.median(gap["kl"][~without]), rel=1e-8)
    count = int(without.sum())
    assert_said(overshooting.notes, f"{count} task(s) have no Gaussian prior", "left out")
    assert_said(overshooting.notes, "no Gaussian prior makes these steps a MAP", f"{count} of 18")
    # held-out rows are all scored: rungs are compared on the same rows
    density = overshooting.fits[STEPS].predict(study.test, target="known").log_density()
    assert row["log_density"] == pytest.approx(density.mean(), rel=1e-12)


def test_the_picture_says_so_too(overshooting):
    import matplotlib.pyplot as plt

    rows = overshooting.by_task.loc[STEPS]
    none = rows["status"] == "no prior"
    left, right = overshooting.plot(task=rows.index[none][0])
    assert any(f"{none.sum()} task(s) without" in text.get_text() for text in left.texts)
    labels = [text.get_text() for text in right.get_legend().get_texts()]
    assert labels == [f"{STEPS}: no Gaussian prior", *RUNGS[1:]]
    # a cross in the place of the first rung's ellipse
    corners = [len(line.get_xdata()) for line in right.lines if line.get_label() in labels]
    assert corners[0] == 1
    assert min(corners[1:]) > 100
    drawn = [len(points.get_offsets()) for points in left.collections[:3]]
    assert drawn == [(~none).sum(), 18, 18]
    plt.close(left.figure)


def test_steps_without_any_prior_have_no_numbers(study):
    found = study.report(study.maml, num_steps=1, step_size=1.99 / study.curvature.max(),
                         truth=study.eb.theta.values)  # fmt: skip
    if (found.implied.status == "no prior").all():
        assert found.table.loc[STEPS].isna().all()
        found.plot()[0].figure.clear()
    assert not found.table.loc[[MODE, POINT, FULL]].isna().any(axis=None)


# ---------------------------------------------------------------------- which steps


def test_steps_are_those_of_the_fit_unless_others_are_asked_for(study):
    own = study.report(study.maml).fits[STEPS].info
    eta = study.maml.info["step_size"]
    assert own == {"num_steps": 3, "step_size": eta}
    assert study.report(study.maml, num_steps=7).fits[STEPS].info == own | {"num_steps": 7}
    shorter = study.report(study.maml, step_size=eta / 2).fits[STEPS].info
    assert shorter == {"num_steps": 3, "step_size": eta / 2}
    auto = study.report(study.maml, step_size="auto").fits[STEPS].info["step_size"]
    assert auto == pytest.approx(1 / study.curvature.max(), rel=1e-10)


@pytest.mark.slow
def test_steps_in_scaled_columns_are_a_preconditioner_in_the_users(study):
    """θ = P θ' makes θ' + η ∇' the step θ + η P Pᵀ ∇, so the rung stands where the fit has θ."""
    found = study.report(study.scaled).fits[STEPS]
    close(found.adapted.posterior.mean, study.scaled.theta.values, rtol=1e-9)
    implied = hb.equivalent_prior(study.model, study.tasks, study.scaled)
    close(implied.posterior_mean, study.scaled.theta.values, rtol=1e-9)
    inside = study.scaled.inside
    there = hb.equivalent_prior(inside.model, inside.tasks, inside)
    expected = study.scaled.at.covariance(there.posterior_covariance)
    close(implied.posterior_covariance, expected, rtol=1e-9)
    with refuses("scaled columns", "preconditioner"):
        hb.equivalent_prior(study.model, study.tasks, study.scaled, preconditioner=np.ones(2))


@pytest.mark.slow
def test_from_a_fit_with_a_prior_the_steps_are_those_that_match_it_best(study):
    table = hb.equivalent_steps(study.model, study.tasks, study.eb.phi).table
    best = table.drop(np.inf)["risk_ratio"].idxmin()
    info = study.report(study.eb).fits[STEPS].info
    assert info["num_steps"] == best
    assert info["step_size"] == pytest.approx(table.loc[best, "step_size"], rel=1e-12)
    # equivalent_steps takes the φ of full Bayes as it is: its means
    means = hb.equivalent_steps(study.model, study.tasks, study.full.phi)
    close(means.table["risk_ratio"], table["risk_ratio"], rtol=0.3)
    assert (means.table["risk_ratio"] >= 1).all()


def test_the_same_seed_gives_the_same_draws(study, report):
    again = study.report(study.maml, num_steps=4)
    other = study.report(study.maml, num_steps=4, seed=1)
    for rung in (STEPS, MODE):
        draws = report.fits[rung].theta_draws
        assert np.array_equal(again.fits[rung].theta_draws, draws)
        assert not np.array_equal(other.fits[rung].theta_draws, draws)


# -------------------------------------------------------------------------- refusals


def test_what_cannot_be_compared_is_refused(study):
    frame = hb.datasets.sleepstudy()
    model, tasks = hb.from_formula(FORMULA, frame[frame["days"] < 7])
    with refuses("start", "different tasks"):
        study.report(hb.complete_pooling(model, tasks), num_steps=2)
    changed = study.tasks.outcome.copy()
    changed[0] += 1.0
    cuts = study.tasks.starts[1:-1]
    other = hb.Tasks.from_arrays(
        list(zip(np.split(study.tasks.predictors, cuts), np.split(changed, cuts), strict=True)),
        names=study.tasks.names.tolist(), coef=study.tasks.coef,
    )  # fmt: skip
    moved = hb.complete_pooling(
        hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian()), other
    )
    with refuses("start", "different tasks"):  # of the same sizes, with one outcome changed
        study.report(moved, num_steps=2)
    pooled = hb.complete_pooling(study.model, study.tasks)
    assert study.report(pooled, num_steps=2).fits[STEPS].info["num_steps"] == 2
    with refuses("empirical_bayes", "different tasks"):
        study.report(study.maml, empirical_bayes=moved)
    with refuses("posterior must be a fit of full_bayes", "empirical Bayes"):
        hb.equivalence_report(study.maml, study.eb)
    with refuses("posterior must be a fit", "str"):
        hb.equivalence_report(study.maml, "posterior")
    with refuses("start must be a fit", "NoneType"):
        study.report(None)
    with refuses("takes no gradient steps", "num_steps"):
        study.report(pooled)
    with refuses("pass num_steps with step_size"):
        study.report(study.eb, step_size=0.1)
    with refuses("no mu"):
        study.report(quietly(hb.no_pooling, study), num_steps=2)
    with refuses("step_size must be a number or", "'long'"):
        study.report(study.maml, step_size="long")
    with refuses("one number for all steps"):
        study.report(study.maml, num_steps=2, step_size=[0.1, 0.1])
    with refuses("step_size must be positive"):
        study.report(study.maml, step_size=-1.0)
    with refuses("diverge"):
        study.report(study.maml, step_size=2.1 / study.curvature.max())


# ----------------------------------------------------------------------------- files


@pytest.mark.parametrize("rung", [STEPS, MODE])
def test_rungs_come_back_from_files(rung, report, study, tmp_path):
    fit = report.fits[rung]
    fit.save(tmp_path / "rung.nc")
    again = hb.load(tmp_path / "rung.nc")
    assert again.adaptation == fit.adaptation
    assert again.method.name == rung
    assert again.info == fit.info
    close(again.theta_draws, fit.theta_draws, rtol=0)
    for mine, theirs in zip(moments(again), moments(fit), strict=True):
        close(mine, theirs, rtol=1e-12)
    found, expected = (f.predict(study.test).log_density() for f in (again, fit))
    close(found, expected, rtol=1e-12)


# -------------------------------------------------------------------------- pictures


def test_the_picture_holds_ninety_per_cent_ellipses(report, rng):
    """Of 20,000 draws from each rung's normal, within four binomial standard errors.

    The ellipse is a polygon, of less area than the curve by (2π/corners)²/6: 2e-4 with 180.
    """
    import matplotlib.pyplot as plt

    axes = report.plot(task=310)
    assert axes.shape == (2,)
    right = axes[1]
    j = report.fits[FULL].tasks.names.tolist().index(310)
    curves = {line.get_label(): line for line in right.lines if line.get_label() in RUNGS}
    assert list(curves) == RUNGS
    for rung, line in curves.items():
        mean, covariance = (m[j] for m in moments(report.fits[rung]))
        draws = rng.multivariate_normal(mean, covariance, 20_000)
        share = Path(line.get_xydata()).contains_points(draws).mean()
        assert abs(share - 0.9) < 4 * np.sqrt(0.09 / 20_000) + 2e-4
    plt.close(right.figure)
    with refuses("no task is named 'Jim'"):
        report.plot(task="Jim")
    plt.close("all")
    text = str(report)
    assert all(rung in text for rung in RUNGS)
    assert all(note in text for note in report.notes)
    assert report._repr_html_().count("<table") == 2


@pytest.mark.slow
def test_posteriors_without_width_are_infinitely_far(schools, schools_full):
    """Eight schools, τ̂_ML = 0: the learned prior and the posterior at φ̂ are one point."""
    import matplotlib.pyplot as plt

    eb = quietly(hb.empirical_bayes, schools, num_draws=50)
    assert eb.phi["tau"].tolist() == [0.0]
    found = hb.equivalence_report(
        eb, schools_full, empirical_bayes=eb, num_steps=2, step_size="auto", num_draws=50
    )
    assert found.table.loc[[MODE, POINT], "kl"].tolist() == [np.inf] * 2
    assert (found.table.loc[[MODE, POINT], "sd_ratio"] == 0).all()
    assert np.isfinite(found.table.loc[[MODE, POINT], ["wasserstein", "mean_shift"]]).all(axis=None)
    assert np.isfinite(found.table.loc[STEPS]).all()
    gap = found.gaps.loc[f"{MODE} → {POINT}", ["kl", "wasserstein", "mean_shift", "sd_ratio"]]
    assert gap.tolist() == [0, 0, 0, 1]
    assert_said(found.notes, "empirical Bayes", "8 task(s) is a point", "infinite")
    left, right = found.plot()
    assert sum("infinite in\n8 task(s)" in text.get_text() for text in left.texts) == 2
    labels = [text.get_text() for text in right.get_legend().get_texts()]
    assert labels == [STEPS, f"{MODE}: a point", f"{POINT}: a point", FULL]
    plt.close(left.figure)
    with refuses("empirical Bayes takes no gradient steps", "num_steps"):
        hb.equivalence_report(eb, schools_full, empirical_bayes=eb)


# ------------------------------------------------------------------------- by sampling


@pytest.mark.slow
def test_ladder_to_a_sampled_posterior():
    """The same with full_bayes itself, 400 draws: the checks above that mean something there."""
    study = Study(sampled=True)
    report = study.report(study.maml, num_steps=4, test=study.test, truth=study.eb.theta.values)
    test_distances_are_those_of_the_moments(report, study)
    test_gaps_are_between_neighbours(report)
    test_the_posterior_is_at_no_distance_from_itself(report)
    test_the_floor_is_of_the_draws_that_there_are(report, study)
    test_held_out_density_is_what_the_fits_predict(report, study)
    test_true_values_are_counted_inside_the_intervals(report, study)
    test_from_empirical_bayes_own_phi_nothing_moves_but_the_prior(study)
    # 18 subjects: φ̂ is not far from the posterior of φ, nor the steps' prior from nothing
    assert report.table.loc[POINT, "kl"] < 0.1
    assert report.table.loc[POINT, "sd_ratio"] < 1  # what is not known of φ widens θ


# ------------------------------------------------------------------- binary outcomes


@pytest.mark.slow
def test_ladder_of_binary_outcomes(tmp_path):
    """Random intercepts: every rung at its φ against quadrature on a grid of 4,001 points.

    θ_j ~ N(μ, τ²), p(D_j | θ) = σ(θ)^s (1 − σ(θ))^(n − s). The third rung is drawn by NUTS at the
    full posterior's mean of φ, the second is the Laplace normal there but for μ.
    """
    rng = np.random.default_rng(12)
    sizes = rng.integers(4, 25, 20)
    theta = rng.normal(-0.4, 1.0, 20)
    arrays = [
        (np.ones((n, 1)), (rng.random(n) < special.expit(t)).astype(float))
        for n, t in zip(sizes.tolist(), theta, strict=True)
    ]
    tasks = hb.Tasks.from_arrays(arrays)
    model = hb.HierarchicalModel(hb.likelihoods.Bernoulli(), hb.priors.Gaussian())
    full = hb.full_bayes(model, tasks, num_draws=500, num_warmup=500, num_chains=2, progress=False)
    start = hb.maml(model, tasks, num_steps=2)
    found = hb.equivalence_report(
        start,
        full,
        num_steps=3,
        step_size="auto",
        num_draws=1000,
        num_chains=2,
        truth=theta[:, None],
    )
    assert_said(found.notes, "not Gaussian", "drawn by NUTS")
    successes = np.array([y.sum() for _, y in arrays])
    grid = np.linspace(-9, 8, 4_001)

    def exact(mu, tau):
        log = stats.norm.logpdf(grid, mu, tau) + successes[:, None] * special.log_expit(grid)
        log = log + (sizes - successes)[:, None] * special.log_expit(-grid)
        weight = np.exp(log - log.max(1, keepdims=True))
        weight /= weight.sum(1, keepdims=True)
        mean = weight @ grid
        return mean, np.sqrt(weight @ grid**2 - mean**2), grid[log.argmax(1)]

    point = found.fits[POINT]
    mu, tau = (float(point.phi[name][0]) for name in ("mu", "tau"))
    close([mu, tau], [float(full.phi[name][0]) for name in ("mu", "tau")], rtol=1e-12)
    mean, sd, _ = exact(mu, tau)
    for j in range(20):
        monte_carlo(point.theta_draws[:, :, j, 0], mean[j], sd[j], k=4.5)
    mode = found.fits[MODE]
    close([mode.phi["mu"][0], mode.phi["tau"][0]], [start.phi["mu"][0], tau], rtol=1e-12)
    _, _, peak = exact(float(start.phi["mu"][0]), tau)
    close(moments(mode)[0][:, 0], peak, atol=grid[1] - grid[0], rtol=0)
    p = special.expit(moments(mode)[0][:, 0])
    close(moments(mode)[1].ravel(), 1 / (sizes * p * (1 - p) + tau**-2), rtol=1e-8)
    # the ladder descends: each change brings the posterior nearer
    assert found.table.loc[STEPS, "kl"] > found.table.loc[POINT, "kl"]
    assert found.table.loc[FULL, "kl"] == pytest.approx(0, abs=1e-12)
    assert found.table.loc[FULL, "truth_95"] >= 0.8
    for rung in RUNGS:
        found.fits[rung].save(tmp_path / "rung.nc")
        close(hb.load(tmp_path / "rung.nc").theta.values, found.fits[rung].theta.values, rtol=1e-12)
