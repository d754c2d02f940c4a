r"""equivalent_steps: the steps closest to a prior, against matrices written out and SciPy.

Task j has curvature H_j = X_jᵀX_j/σ², θ_j ~ N(μ, T). K steps from μ reach μ + Σ_K g, with

.. math:: \Sigma_K = \eta \sum_{k<K} (I - \eta H_j)^k, \quad R = I - \Sigma_K H_j, \quad
          M_j = E(\theta_K - \theta_j)(\theta_K - \theta_j)^\top
              = R T R^\top + \Sigma_K H_j \Sigma_K

and the exact posterior has covariance B_j = (H_j + T⁻¹)⁻¹, whose mean has the error B_j. The risk
is Σ_j tr S M_j with S = Σ_j H_j, its ratio the same over Σ_j tr S B_j, and the expected divergence

.. math:: E\,\text{KL} = \tfrac12 \left[\operatorname{tr} B_j^{-1} (\Sigma_K + M_j) - 2d
          + \log |B_j| / |\Sigma_K|\right]

With d = 1, s² = σ² and w = 1 − (1 − ηn/s²)^K the error is (1 − w)²τ² + w² s²/n: one task of n rows
reaches the Bayes shrinkage w* = τ²/(τ² + s²/n) with η = (s²/n)[1 − (1 − w*)^{1/K}] for every K;
tasks of different sizes cannot all reach theirs. methods.md, section 2.8, has the table of ratios.
"""

import functools
import warnings

import numpy as np
import pytest
from assertions import close, refuses
from scipy import linalg, optimize
from simulated import by_task, explicit_steps

import hierbayes as hb
from hierbayes.adaptation import Conjugate, Proximal

GAUSSIAN = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
FLOW = np.inf


def means(sizes, scale=1.0):
    """Tasks of n rows of one constant column, with outcomes that do not matter."""
    return hb.Tasks.from_arrays([(np.full((n, 1), scale), np.arange(n) % 3.0) for n in sizes])


def designs():
    """Six tasks in two dimensions: without rows, of one row, of rank one, and well determined.

    Six tasks throughout this file, and these numbers of steps: what has been compiled serves again.
    """
    rng = np.random.default_rng(5)
    arrays = []
    for n in (0, 1, 3, 2, 7, 12):
        x = rng.normal(size=(n, 2)) * [1.0, 1.6]
        arrays.append((x, x @ [0.4, -0.9] + rng.normal(size=n)))
    arrays[2][0][:, 1] = 2.0 * arrays[2][0][:, 0]
    return hb.Tasks.from_arrays(arrays, names=list("abcdef"))


TASKS, SIGMA = designs(), 0.8
TAU, RHO = np.array([0.7, 0.3]), -0.4
PHI = {
    "mu": np.array([0.3, -0.5]), "tau": TAU, "corr": np.array([[1.0, RHO], [RHO, 1.0]]),
    "sigma": np.array(SIGMA),
}  # fmt: skip
T = np.outer(TAU, TAU) * PHI["corr"]
H = np.array([x.T @ x / SIGMA**2 for x, _, _ in by_task(TASKS)])
STEPS = [1, 5]


def filtered(curvature, num_steps, eta):
    """Σ_K, by its sum; of flow by the exponential of [[−H, I], [0, 0]] t."""
    d = len(curvature)
    if num_steps == FLOW:
        block = np.zeros((2 * d, 2 * d))
        block[:d, :d], block[:d, d:] = -curvature, np.eye(d)
        return linalg.expm(eta * block)[:d, d:]
    contraction = np.eye(d) - eta * curvature
    return eta * sum(np.linalg.matrix_power(contraction, k) for k in range(num_steps))


def explicit(num_steps, eta, curvatures=H, prior=T):
    """(risk, Bayes risk, expected KL) of every task, by the docstring's formulas."""
    weight, eye = curvatures.sum(0), np.eye(len(prior))
    rows = []
    for h in curvatures:
        moved = filtered(h, num_steps, eta)
        left = eye - moved @ h
        error = left @ prior @ left.T + moved @ h @ moved
        bayes = prior @ np.linalg.inv(eye + h @ prior)  # T may be singular
        kl = np.inf
        if np.linalg.matrix_rank(prior) == len(prior):
            kl = np.trace(np.linalg.solve(bayes, moved + error)) - 2 * len(eye)
            kl = 0.5 * (kl + np.linalg.slogdet(bayes)[1] - np.linalg.slogdet(moved)[1])
        rows.append((np.trace(weight @ error), np.trace(weight @ bayes), kl))
    return np.array(rows).T


def asked(tasks=TASKS, phi=PHI, num_steps=STEPS, **more):
    return hb.equivalent_steps(GAUSSIAN, tasks, phi, num_steps=num_steps, **more)


@pytest.fixture(scope="module")
def found():
    return asked()


# ----------------------------------------------------------- one dimension: the table


def best_ratio(sizes, num_steps, longest):
    """The least Σ_j (1 − w)²τ² + w² s²/n over η, over the Bayes risk; s² = τ² = 1."""
    n = np.array(sizes, dtype=float)

    def risk(log_eta):
        eta = np.exp(log_eta)
        left = np.exp(-eta * n) if num_steps == FLOW else (1 - eta * n) ** num_steps
        return (left**2 + (1 - left) ** 2 / n).sum()

    top = np.log(longest / n.max()) if np.isfinite(longest) else np.log(20.0)
    grid = np.linspace(top - 12, top, 4_000)
    k = int(np.argmin([risk(g) for g in grid]))
    inner = optimize.minimize_scalar(
        risk, bounds=(grid[max(k - 1, 0)], grid[min(k + 1, 3_999)]), method="bounded",
        options={"xatol": 1e-12},
    )  # fmt: skip
    return min(inner.fun, risk(top)) / (1 / (n + 1)).sum()


RATIOS = {
    (5, 10, 20): "2.66 1.30 1.030 1.023 1.021 1.020",
    (1, 2, 5, 10, 20, 50): "3.04 2.25 1.47 1.032 1.030 1.029",
    (1, 100): "1.94 1.89 1.71 1.14 1.000 1.000",
}
"""methods.md, section 2.8: the best η within 0 < ηλ_max < 2, for these K."""

COUNTS = [1, 2, 5, 20, 100]


@pytest.mark.parametrize("sizes", RATIOS, ids=str)
def test_tasks_of_unequal_sizes_cannot_all_be_matched(sizes):
    """To the digits of the table, and to 1e-8 of a search by SciPy.

    A set of tasks taken twice has the same ratio; six tasks each, to compile once.
    """
    repeated = sizes * (6 // len(sizes))
    table = hb.equivalent_steps(
        GAUSSIAN, means(repeated), [0.0], precision=[1.0], sigma=1.0, num_steps=COUNTS,
        overshoot=True,
    ).table  # fmt: skip
    assert table.index.tolist() == [*COUNTS, FLOW]
    for k, printed in zip(table.index, RATIOS[sizes].split(), strict=True):
        half_a_digit = 0.5 * 10.0 ** -len(printed.partition(".")[2])
        assert abs(table.loc[k, "risk_ratio"] - float(printed)) <= half_a_digit * (1 + 1e-9)
        longest = np.inf if k == FLOW else 2.0
        assert table.loc[k, "risk_ratio"] == pytest.approx(
            best_ratio(sizes, int(k) if np.isfinite(k) else k, longest), rel=1e-8
        )


def test_steps_that_may_not_overshoot():
    """The table's first row where ηλ_max ≤ 1: 2.949, 1.715, 1.040 and 1.023 for K = 1, 2, 5, 20."""
    table = hb.equivalent_steps(
        GAUSSIAN, means((5, 10, 20) * 2), [0.0], precision=[1.0], sigma=1.0, num_steps=COUNTS
    ).table
    close(table.loc[[1, 2, 5, 20], "risk_ratio"], [2.949, 1.715, 1.040, 1.023], atol=5e-4, rtol=0)
    close(
        table["risk_ratio"],
        [best_ratio((5, 10, 20), k, 1.0) for k in COUNTS] + [best_ratio((5, 10, 20), FLOW, np.inf)],
        rtol=1e-8,
    )
    # where one step would rather overshoot, the cap itself is best
    assert table.loc[1, "largest_product"] == pytest.approx(1.0, rel=1e-12)
    assert (table["without_prior"] == 0).all()


def test_tasks_without_a_prior_are_those_of_equivalent_prior():
    """At the best overshooting η of one step on 5, 10 and 20 rows: the tasks of 20, twice."""
    tasks = means((5, 10, 20) * 2)
    steps = hb.equivalent_steps(
        GAUSSIAN, tasks, [0.0], precision=[1.0], sigma=1.0, num_steps=COUNTS, overshoot=True
    )
    for k in (1, 2, 5):
        row = steps.table.loc[k]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hb.FitWarning)
            implied = hb.equivalent_prior(GAUSSIAN, tasks, [0.0], k, row["step_size"], sigma=1.0)
        assert row["without_prior"] == (implied.status == "no prior").sum()
        assert row["largest_product"] == pytest.approx(row["step_size"] * 20, rel=1e-12)
    assert steps.table["without_prior"].tolist() == [2, 0, 2, 0, 0, 0]


@pytest.mark.parametrize("num_steps", COUNTS)
def test_one_size_is_matched_by_any_number_of_steps(num_steps):
    """η = (s²/n)[1 − (1 − w*)^{1/K}], the ridge; a minimum is found to the root of 1e-16."""
    n, s, tau = 7, 1.3, 0.6
    steps = hb.equivalent_steps(
        GAUSSIAN, means([n] * 6), {"mu": [0.0], "tau": [tau], "sigma": s}, num_steps=[num_steps]
    )
    best = tau**2 / (tau**2 + s**2 / n)
    eta = s**2 / n * (1 - (1 - best) ** (1 / num_steps))
    assert steps.num_steps == num_steps  # and not flow, which is as good: the fewest are named
    assert steps.step_size == pytest.approx(eta, rel=1e-6)
    assert steps.risk_ratio == pytest.approx(1, abs=1e-12)
    assert steps.table.loc[num_steps, "kl"] == pytest.approx(0, abs=1e-10)
    time = steps.table.loc[FLOW, "step_size"]
    assert time == pytest.approx(s**2 / n * np.log1p(n * tau**2 / s**2), rel=1e-6)


def test_each_task_by_itself_is_matched_by_any_number_of_steps():
    """The same ridge, task by task, where no η serves all: sizes 1, 2, 5, 10, 20 and 50."""
    n = np.array([1, 2, 5, 10, 20, 50])
    for k in (2, 5):
        steps = hb.equivalent_steps(
            GAUSSIAN, means(n.tolist()), [0.0], precision=[1.0], sigma=1.0, num_steps=[k]
        )
        close(steps.by_task["risk_ratio"], np.ones(6), rtol=1e-12)
        close(steps.by_task["step_size"], (1 - (n + 1.0) ** (-1 / k)) / n, rtol=1e-6)
        assert (steps.by_task["num_steps"] == k).all()
        assert (steps.by_task["risk_ratio_shared"] > 1).any()


def test_the_map_estimate_under_the_prior_itself_is_the_bayes_estimate():
    """iMAML with λ = 1/τ² shrinks by n/(n + λ s²): the ratio is 1 where steps reach 1.020."""
    sizes, tau, s = np.array([5, 10, 20] * 2), 0.9, 1.1
    tasks = means(sizes.tolist())
    phi = {"mu": np.array([0.4]), "tau": np.array([tau]), "sigma": np.array(s)}
    mode = Proximal()(GAUSSIAN, tasks, phi).mean[:, 0]
    y_bar = np.array([y.mean() for _, _, y in by_task(tasks)])
    w = (mode - 0.4) / (y_bar - 0.4)
    risk = ((1 - w) ** 2 * tau**2 + w**2 * s**2 / sizes).sum()
    bayes = (1 / (sizes / s**2 + tau**-2)).sum()
    assert risk / bayes == pytest.approx(1, abs=1e-12)
    steps = hb.equivalent_steps(GAUSSIAN, tasks, phi, num_steps=COUNTS)
    assert steps.table["risk_ratio"].min() > 1.01


# -------------------------------------------------------------------- many dimensions


@pytest.mark.parametrize("criterion", ["risk", "kl"])
def test_risk_and_divergence_are_those_of_the_matrices(criterion):
    """Σ_K by its sum, the rest by inverses: rounding of 1e-10 at most."""
    steps = asked(criterion=criterion)
    for k, row in steps.table.iterrows():
        risk, bayes, kl = explicit(int(k) if np.isfinite(k) else k, row["step_size"])
        assert row["risk_ratio"] == pytest.approx(risk.sum() / bayes.sum(), rel=1e-10)
        assert row["kl"] == pytest.approx(kl.mean(), rel=1e-9)
        if np.isfinite(k):
            largest = row["step_size"] * np.linalg.eigvalsh(H).max()
            assert row["largest_product"] == pytest.approx(largest, rel=1e-12)
    risk, bayes, kl = explicit(steps.num_steps, steps.step_size)
    close(steps.by_task["risk_ratio_shared"], risk / bayes, rtol=1e-9)
    close(steps.by_task["kl_shared"], kl, rtol=1e-8, atol=1e-10)
    assert steps.by_task["rows"].tolist() == [0, 1, 3, 2, 7, 12]


@pytest.mark.parametrize("criterion", ["risk", pytest.param("kl", marks=pytest.mark.slow)])
def test_no_other_step_size_is_better(criterion):
    """A search by SciPy over 0 < ηλ_max ≤ 1 finds nothing lower, nor flow at any time."""
    steps = asked(criterion=criterion)
    column = {"risk": "risk_ratio", "kl": "kl"}[criterion]
    top = np.linalg.eigvalsh(H).max()

    def loss(k, eta):
        risk, bayes, kl = explicit(k, eta)
        return risk.sum() / bayes.sum() if criterion == "risk" else kl.mean()

    for k in (1, 5, FLOW):
        etas = np.geomspace(1e-2, 50.0 if k == FLOW else 1.0, 25) / top
        start = int(np.argmin([loss(k, eta) for eta in etas]))
        around = etas[max(start - 1, 0)], etas[min(start + 1, 24)]
        best = optimize.minimize_scalar(
            functools.partial(loss, k), bounds=around, method="bounded", options={"xatol": 1e-9}
        )
        least = min(best.fun, loss(k, etas[start]))
        assert steps.table.loc[k, column] == pytest.approx(least, rel=1e-8)


def test_each_task_by_itself_is_no_worse_than_with_the_others(found):
    table = found.by_task
    assert (table["risk_ratio"] <= table["risk_ratio_shared"] + 1e-12).all()
    assert (table["risk_ratio"] >= 1 - 1e-12).all()
    for name, row in table.iterrows():
        j = TASKS.names.tolist().index(name)
        k = row["num_steps"]
        risk, bayes, _ = explicit(int(k) if np.isfinite(k) else k, row["step_size"])
        assert row["risk_ratio"] == pytest.approx(risk[j] / bayes[j], rel=1e-9)
    # nothing is lost on one row, whose steps move along it alone; on none, nothing can be
    close(table.loc[["a"], "risk_ratio"], [1.0], rtol=1e-12)
    assert table.loc["f", "risk_ratio"] > 1 + 1e-6


def test_the_tables_agree_with_each_other(found):
    _, bayes, _ = explicit(1, 0.1)
    best = found.table.loc[found.num_steps]
    assert best["risk_ratio"] == found.risk_ratio == found.table["risk_ratio"].min()
    assert best["step_size"] == found.step_size
    shared = found.by_task["risk_ratio_shared"]
    assert (shared * bayes).sum() / bayes.sum() == pytest.approx(found.risk_ratio, rel=1e-10)
    assert found.by_task["kl_shared"].mean() == pytest.approx(best["kl"], rel=1e-10)


def test_risk_and_divergence_are_those_of_simulated_tasks(found):
    """40,000 tasks from the prior: means within four of their own standard errors, task by task."""
    rng = np.random.default_rng(8)
    k, eta = 5, found.table.loc[5, "step_size"]
    risk, _, kl = explicit(k, eta)
    weight, root, size = H.sum(0), np.linalg.cholesky(T), 40_000
    for j, (x, _, _) in enumerate(by_task(TASKS)):
        theta = PHI["mu"] + rng.standard_normal((size, 2)) @ root.T
        y = theta @ x.T + SIGMA * rng.standard_normal((size, len(x)))
        bayes = np.linalg.inv(H[j] + np.linalg.inv(T))
        slope = (y - PHI["mu"] @ x.T) @ x / SIGMA**2
        exact, steps = PHI["mu"] + slope @ bayes, np.tile(PHI["mu"], (size, 1))
        for _ in range(k):
            steps = steps + eta * (y - steps @ x.T) @ x / SIGMA**2
        away = steps - theta
        squares = np.einsum("si,ij,sj->s", away, weight, away)
        gap = steps - exact
        moved = filtered(H[j], k, eta)
        fixed = np.trace(np.linalg.solve(bayes, moved)) - 2
        fixed += np.linalg.slogdet(bayes)[1] - np.linalg.slogdet(moved)[1]
        divergences = 0.5 * (fixed + np.einsum("si,ij,sj->s", gap, np.linalg.inv(bayes), gap))
        for values, expected in ((squares, risk[j]), (divergences, kl[j])):
            error = values.std() / np.sqrt(size)
            assert abs(values.mean() - expected) <= 4 * error + 1e-12
            assert error < 0.02 * expected  # and these are narrow


# -------------------------------------------------------------- exact by a preconditioner


@pytest.mark.parametrize("num_steps", [1, 3])
def test_preconditioned_steps_are_the_exact_posterior(num_steps, found):
    """P = T⁻¹ in tasks of any rank, without rows too; θ_K and Σ_K those of the exact posterior."""
    scaling = found.preconditioner(num_steps)
    implied = hb.equivalent_prior(
        GAUSSIAN, TASKS, PHI, num_steps, step_size=1.0, preconditioner=scaling
    )
    exact = Conjugate()(GAUSSIAN, TASKS, PHI)
    inverse = np.linalg.inv(T)
    close(implied.precision, np.broadcast_to(inverse, (6, 2, 2)), rtol=1e-9, atol=1e-9)
    close(implied.posterior_mean, exact.mean, rtol=1e-10, atol=1e-12)
    close(implied.posterior_covariance, exact.covariance, rtol=1e-10, atol=1e-12)
    assert (implied.status == "proper").all()
    for j, (x, _, y) in enumerate(by_task(TASKS)):  # and by the steps themselves
        theta = PHI["mu"]
        for _ in range(num_steps):
            theta = theta + scaling[j] @ x.T @ (y - x @ theta) / SIGMA**2
        close(theta, exact.mean[j], rtol=1e-10, atol=1e-12)
    if num_steps == 1:
        close(scaling, exact.covariance, rtol=1e-10, atol=1e-12)  # (H + T⁻¹)⁻¹
    # plain steps of the best size are not: the comparison would notice
    x, _, y = list(by_task(TASKS))[5]
    plain = explicit_steps(PHI["mu"], x, y, SIGMA, found.table.loc[5, "step_size"], 5)
    assert np.abs(plain - exact.mean[5]).max() > 1e-3


def test_a_common_preconditioner_is_a_change_of_coordinates():
    """With B = C Cᵀ steps in C⁻¹θ are plain: designs X C, prior precision Cᵀ T⁻¹ C."""
    root = np.array([[0.8, 0.0], [0.5, 1.3]])
    steps = asked(preconditioner=root @ root.T)
    moved = hb.Tasks.from_arrays([(x @ root, y) for x, _, y in by_task(TASKS)])
    by_hand = hb.equivalent_steps(
        GAUSSIAN, moved, np.zeros(2), precision=root.T @ np.linalg.inv(T) @ root, sigma=SIGMA,
        num_steps=STEPS,
    )  # fmt: skip
    close(steps.table["step_size"], by_hand.table["step_size"], rtol=1e-6)
    close(steps.table["risk_ratio"], by_hand.table["risk_ratio"], rtol=1e-9)
    close(steps.table["kl"], by_hand.table["kl"], rtol=1e-6)  # not at its own minimum
    close(steps.by_task["risk_ratio"], by_hand.by_task["risk_ratio"], rtol=1e-9)
    # a diagonal may be given as its entries; B matters; and what it returns is in θ's own units
    diagonal = asked(preconditioner=[0.2, 3.0])
    assert diagonal.table.equals(asked(preconditioner=np.diag([0.2, 3.0])).table)
    assert np.abs(diagonal.table["risk_ratio"] / steps.table["risk_ratio"] - 1).max() > 1e-3
    close(steps.preconditioner(1), asked().preconditioner(1), rtol=1e-12, atol=1e-14)


def test_the_precision_may_be_given_in_the_place_of_tau_and_corr(found):
    given = asked(phi=PHI["mu"], precision=np.linalg.inv(T), sigma=SIGMA)
    close(given.table["risk_ratio"], found.table["risk_ratio"], rtol=1e-10)
    close(given.preconditioner(), found.preconditioner(), rtol=1e-10, atol=1e-14)


# ------------------------------------------------------------------- extreme priors


@pytest.mark.parametrize("criterion", ["risk", "kl"])
def test_a_prior_however_tight_is_matched(criterion):
    """τ from 1e-1 to 1e-6: the best η falls as τ²/K.

    η (1 + δ) has a risk of 1 + w* δ², so that rounding leaves it uncertain by 1e-8/√w*; the
    divergence, of order δ², tells it to 1e-8 whatever the prior.
    """
    for tau in (1e-1, 1e-3, 1e-6):
        steps = hb.equivalent_steps(
            GAUSSIAN, means([7] * 6), {"mu": [0.0], "tau": [tau], "sigma": 1.0}, num_steps=[5],
            criterion=criterion,
        )  # fmt: skip
        best = tau**2 / (tau**2 + 1 / 7)
        eta = -np.expm1(np.log1p(-best) / 5) / 7
        flat = 5e-8 * (1 if criterion == "kl" else 1 / np.sqrt(best))
        assert steps.table.loc[5, "step_size"] == pytest.approx(eta, rel=flat, abs=0)
        close(steps.table["risk_ratio"], [1.0, 1.0], rtol=1e-12)
        close(steps.table["kl"], [0.0, 0.0], atol=flat**2 + 1e-13)


def test_flow_is_searched_as_long_as_the_prior_is_wide():
    """Curvatures of 1 and 1e8, τ = 1: the small tasks want t = log 2, 7e7 times 1/λ_max."""
    arrays = [(np.ones((1, 1)), np.zeros(1))] * 5 + [(np.full((1, 1), 1e4), np.zeros(1))]
    steps = hb.equivalent_steps(
        GAUSSIAN, hb.Tasks.from_arrays(arrays), [0.0], precision=[1.0], sigma=1.0, num_steps=[5]
    )
    # the last task's own risk is 1e-8 of the others', at any such time
    assert steps.table.loc[FLOW, "step_size"] == pytest.approx(np.log(2), rel=1e-6)
    assert steps.table.loc[FLOW, "risk_ratio"] == pytest.approx(1, abs=1e-7)


def test_a_singular_prior_has_a_risk_and_an_infinite_divergence():
    """τ = 0 in one coefficient, or a correlation of 1: no steps have such a posterior."""
    for tau, rho in ((np.array([0.7, 0.0]), 0.3), (TAU, 1.0), (TAU, -1.0)):
        prior = np.outer(tau, tau) * np.array([[1.0, rho], [rho, 1.0]])
        phi = PHI | {"tau": tau, "corr": np.array([[1.0, rho], [rho, 1.0]])}
        steps = asked(phi=phi)
        for k, row in steps.table.iterrows():
            risk, bayes, _ = explicit(
                int(k) if np.isfinite(k) else k, row["step_size"], prior=prior
            )
            assert row["risk_ratio"] == pytest.approx(risk.sum() / bayes.sum(), rel=1e-9)
        assert (steps.table["kl"] == np.inf).all()
        assert (steps.by_task["kl_shared"] == np.inf).all()
        with refuses("singular", 'criterion="risk"'):
            asked(phi=phi, criterion="kl")
        scaling = steps.preconditioner(1)  # (H + P)⁻¹ in the directions that are left
        close(scaling, [prior @ np.linalg.inv(np.eye(2) + h @ prior) for h in H], atol=1e-12)
        with refuses("preconditioner is not positive definite"):
            hb.equivalent_prior(GAUSSIAN, TASKS, phi, 1, 1.0, preconditioner=scaling)


def test_a_prior_that_is_all_but_singular_has_a_large_divergence():
    """τ = (0.7, 1e-6): tr B⁻¹Σ_K of 1e12 or so, and never less than nothing."""
    tau = np.array([0.7, 1e-6])
    steps = asked(phi=PHI | {"tau": tau})
    prior = np.outer(tau, tau) * PHI["corr"]
    for k, row in steps.table.iterrows():
        _, _, kl = explicit(int(k) if np.isfinite(k) else k, row["step_size"], prior=prior)
        assert row["kl"] == pytest.approx(kl.mean(), rel=1e-4)
        assert row["kl"] > 1e6


# ------------------------------------------------------------------------- bad input

BAD = {
    "criterion": (dict(criterion="mse"), ("criterion must be", "'mse'")),
    "curvature": (dict(curvature="fisher"), ("curvature must be", "'fisher'")),
    "no steps": (dict(num_steps=[]), ("num_steps must be a list of positive integers",)),
    "zero steps": (dict(num_steps=[0, 1]), ("num_steps must be a list of positive", "[0, 1]")),
    "half a step": (dict(num_steps=[1.5]), ("num_steps must be a list", "1.5")),
    "one number of steps": (dict(num_steps=5), ("num_steps must be a list", "5")),
    "no tau": (dict(phi={"mu": PHI["mu"], "sigma": 1.0}), ("no tau to match", "precision=")),
    "no prior": (dict(phi=PHI["mu"], sigma=1.0), ("no tau to match",)),
    "all tau zero": (dict(phi=PHI | {"tau": np.zeros(2)}), ("tasks do not differ", "tau is 0")),
    "tau not finite": (dict(phi=PHI | {"tau": np.array([1.0, np.nan])}), ("tau is not finite",)),
    "tau too long": (dict(phi=PHI | {"tau": np.ones(3)}), ("tau has shape (3,)", "(2,)")),
    "precision in words": (dict(precision="tight"), ("precision is not an array of numbers",)),
    "precision of the wrong shape": (dict(precision=np.eye(3)), ("precision has shape (3, 3)",)),
    "precision indefinite": (dict(precision=[1.0, -1.0]), ("symmetric and positive definite",)),
    "precision asymmetric": (
        dict(precision=[[2.0, 1.0], [0.0, 2.0]]), ("symmetric and positive definite",)),
    "precision not finite": (dict(precision=[1.0, np.nan]), ("symmetric and positive definite",)),
    "one preconditioner a task": (dict(preconditioner=H + np.eye(2)), ("one preconditioner",)),
    "preconditioner indefinite": (dict(preconditioner=[1.0, -1.0]), ("not positive definite",)),
    "nothing to adapt to": (dict(tasks=means([0] * 6), phi=[0.0], precision=[1.0], sigma=1.0),
                            ("rows say nothing",)),
    "φ too short": (dict(phi=PHI | {"mu": np.zeros(1)}), ("mu has shape (1,)",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case):
    arguments, words = BAD[case]
    with refuses(*words):
        asked(**arguments)


@pytest.mark.parametrize("num_steps", [0, 1.5, -1, "one"])
def test_a_preconditioner_is_for_a_whole_number_of_steps(num_steps, found):
    with refuses("num_steps must be a positive integer", repr(num_steps)):
        found.preconditioner(num_steps)
