r"""K gradient steps against the MAP estimate under their equivalent prior, in Gaussian tasks.

The reference is a loop in NumPy over one task at a time: θ ← θ + Δ, Δ ← βΔ + ηB Xᵀ W (y − Xθ), W
the rows' precisions. H = XᵀWX, g = XᵀW(y − Xφ) and Σ_K = η Σ_k (I − ηBH)^k B come from the same
arrays. Everything is exact in exact arithmetic; 1e-10 leaves room for the condition of H + P.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from assertions import close, refuses
from hypothesis import given, settings
from hypothesis import strategies as st

import hierbayes as hb
from hierbayes.equivalence import Status

GAUSSIAN = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
SIZES = (6, 1, 0, 2, 3)
NAMES = ["six", "one", "none", "two", "twice"]
SIGMA = 0.7


def ragged(seed, d=3, scale=1.0):
    """Five tasks of d = 3: full rank, one row, no row, two rows, three rows of rank one."""
    rng = np.random.default_rng(seed)
    arrays = []
    for n, name in zip(SIZES, NAMES, strict=True):
        x = scale * rng.normal(size=(n, d))
        if name == "twice":
            x = x[:1] * np.array([[1.0], [-2.0], [0.5]])
        arrays.append((x, rng.normal(size=n)))
    return hb.Tasks.from_arrays(arrays, names=NAMES), rng.normal(size=d)


def parts(tasks, sigma=SIGMA, beta=None):
    """(X, y − offset − Zβ, W) of every task."""
    y = tasks.outcome - tasks.slots.get("offset", 0.0)
    if beta is not None:
        y = y - tasks.shared @ beta
    weight = np.broadcast_to(np.asarray(tasks.slots.get("weight", 1.0)), y.shape)
    noise = tasks.slots["known_se"] if "known_se" in tasks.slots else np.full(y.shape, sigma)
    for low, high in zip(tasks.starts[:-1], tasks.starts[1:], strict=True):
        yield tasks.predictors[low:high], y[low:high], (weight / noise**2)[low:high]


def largest_curvature(tasks, sigma=SIGMA, root=None):
    root = np.eye(len(tasks.coef)) if root is None else root
    return max(
        np.linalg.eigvalsh(root.T @ (x.T * w) @ x @ root)[-1] for x, _, w in parts(tasks, sigma)
    )


def descend(x, y, w, start, etas, scaling=None, beta=0.0, nesterov=False):
    """θ_K of one task, step by step; ``scaling`` is one matrix or one a step."""
    theta, moved = np.array(start, float), np.zeros(len(start))
    for k, eta in enumerate(etas):
        b = np.eye(len(theta)) if scaling is None else scaling
        b = b[k] if np.ndim(b) == 3 else b
        at = theta + beta * moved if nesterov else theta
        moved = beta * moved + eta * b @ (x.T @ (w * (y - x @ at)))
        theta = theta + moved
    return theta


def assert_map(implied, tasks, phi, expected, sigma=SIGMA, beta=None):
    """θ_K as expected; φ + (H + P)⁻¹ g = θ_K; (H + P)⁻¹ = Σ_K; returns the largest error."""
    centres = np.broadcast_to(phi, expected.shape)
    size = max(1.0, np.abs(expected).max())
    close(implied.posterior_mean, expected, rtol=0, atol=1e-10 * size)
    close(implied.location, centres)
    worst = np.abs(implied.posterior_mean - expected).max() / size
    for j, (x, y, w) in enumerate(parts(tasks, sigma, beta)):
        bend, slope = (x.T * w) @ x, x.T @ (w * (y - x @ centres[j]))
        total = bend + implied.precision[j]
        best = centres[j] + np.linalg.solve(total, slope)
        close(best, expected[j], rtol=0, atol=1e-10 * size)
        covariance = np.linalg.inv(total)
        close(implied.posterior_covariance[j], covariance, rtol=0,
              atol=1e-10 * np.abs(covariance).max())  # fmt: skip
        worst = max(worst, np.abs(best - expected[j]).max() / size)
    return worst


# ----------------------------------------------------------------- T1: θ_K is the MAP estimate


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    num_steps=st.sampled_from([1, 4, 5]),
    share=st.floats(0.01, 1.9),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_equal_steps_are_a_map_estimate(seed, num_steps, share, scale):
    """Any data, any ηλ_max in (0, 1.9): beyond 1 too, where odd K has P < 0 but H + P > 0."""
    tasks, phi = ragged(seed, scale=scale)
    eta = share / largest_curvature(tasks)
    implied = hb.equivalent_prior(GAUSSIAN, tasks, phi, num_steps, eta, sigma=SIGMA)
    expected = [descend(*task, phi, [eta] * num_steps) for task in parts(tasks)]
    assert_map(implied, tasks, phi / 1.0, np.array(expected))
    close(implied.posterior_mean[2], phi)  # no rows: no step


def rotated(seed, low, high):
    """A positive definite matrix with eigenvalues between the two."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return axes @ np.diag(rng.uniform(low, high, 3)) @ axes.T


METHODS = {
    "schedule": (dict(step_size=[1.5, 0.2, 0.7, 0.4]), {}),
    "heavy ball": (dict(step_size=0.3, momentum=0.4), dict(beta=0.4)),
    "heavy ball with schedule": (dict(step_size=[0.1, 0.4, 0.2, 0.3], momentum=0.5),
                                 dict(beta=0.5)),
    "Nesterov": (dict(step_size=0.3, momentum=0.6, nesterov=True),
                 dict(beta=0.6, nesterov=True)),
    "diagonal": (dict(step_size=0.4, preconditioner=[2.0, 0.5, 1.0]),
                 dict(scaling=np.diag([2.0, 0.5, 1.0]))),
    "matrix": (dict(step_size=0.6, preconditioner=rotated(1, 0.2, 1.5)),
               dict(scaling=rotated(1, 0.2, 1.5))),
    "matrix with momentum": (
        dict(step_size=0.3, momentum=0.4, preconditioner=rotated(1, 0.2, 1.5)),
        dict(beta=0.4, scaling=rotated(1, 0.2, 1.5))),
    "matrix with schedule": (
        dict(step_size=[0.5, 0.1, 0.3, 0.2], preconditioner=rotated(1, 0.2, 1.5)),
        dict(scaling=rotated(1, 0.2, 1.5))),
}  # fmt: skip


DEARER = {"heavy ball with schedule", "matrix"}


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.slow] * (m in DEARER)) for m in METHODS]
)
def test_other_methods_are_map_estimates(method):
    """Steps in units of 1/λ_max of all tasks (of B^½HB^½ ≤ 2 λ_max)."""
    given_, loop = METHODS[method]
    tasks, phi = ragged(8)
    top = largest_curvature(tasks)
    etas = np.broadcast_to(np.asarray(given_["step_size"]) / top, 4)
    step_size = etas if np.ndim(given_["step_size"]) else etas[0]
    implied = hb.equivalent_prior(
        GAUSSIAN, tasks, phi, 4, sigma=SIGMA, **(given_ | {"step_size": step_size})
    )
    expected = [descend(*task, phi, etas, **loop) for task in parts(tasks)]
    assert_map(implied, tasks, phi, np.array(expected))


def test_a_preconditioner_for_every_task():
    """B_j = (H_j + Q)⁻¹ and one step is Newton's: the MAP estimate under precision Q."""
    tasks, phi = ragged(4)
    wanted = rotated(2, 0.5, 2.0)
    bends = [(x.T * w) @ x for x, _, w in parts(tasks)]
    scaling = np.array([np.linalg.inv(bend + wanted) for bend in bends])
    implied = hb.equivalent_prior(GAUSSIAN, tasks, phi, 1, 1.0, sigma=SIGMA, preconditioner=scaling)
    expected = [descend(*t, phi, [1.0], b) for t, b in zip(parts(tasks), scaling, strict=True)]
    assert_map(implied, tasks, phi, np.array(expected))
    close(implied.precision, np.array([wanted] * 5), rtol=0, atol=1e-10)


def optax_loop(x, y, w, start, eta, beta):
    """Optax's own form, four steps: trace ← g + β trace, and a step of η trace."""
    theta, trace = np.array(start), np.zeros(len(start))
    for _ in range(4):
        trace = x.T @ (w * (y - x @ theta)) + beta * trace
        theta = theta + eta * trace
    return theta


def test_optaxs_form_of_momentum_is_ours():
    """With steps of one length, which stand before Optax's trace and inside our Δ."""
    tasks, phi = ragged(5)
    eta = 0.4 / largest_curvature(tasks)
    implied = hb.equivalent_prior(GAUSSIAN, tasks, phi, 4, eta, momentum=0.5, sigma=SIGMA)
    expected = [optax_loop(*task, phi, eta, 0.5) for task in parts(tasks)]
    assert_map(implied, tasks, phi, np.array(expected))


def test_slots_shared_columns_and_task_predictors():
    """Offsets, weights, β and Γ move g, H and where a task starts; all against the loop."""
    base, _ = ragged(6)
    rng = np.random.default_rng(1)
    frame = base.to_dataframe().assign(
        z=rng.normal(size=12), o=rng.normal(size=12), weight=rng.uniform(0.5, 2.0, 12)
    )
    frame["u"] = frame["task"].map(dict(zip(NAMES, rng.normal(size=5), strict=True)))
    tasks = hb.Tasks.from_dataframe(
        frame, task="task", outcome="y", predictors=["x0", "x1"], shared=["z"],
        task_predictors=["u"], offset="o", weight="weight",
    )  # fmt: skip
    phi = {"mu": np.array([0.3, -0.2, 1.0]), "beta": np.array([0.8]),
           "gamma": np.array([[0.5], [-1.0], [0.1]]), "sigma": SIGMA}  # fmt: skip
    starts = phi["mu"] + tasks.task_predictors @ phi["gamma"].T
    eta = 0.6 / largest_curvature(tasks)
    implied = hb.equivalent_prior(GAUSSIAN, tasks, phi, 5, eta)
    expected = [
        descend(*task, start, [eta] * 5)
        for task, start in zip(parts(tasks, beta=phi["beta"]), starts, strict=True)
    ]
    assert_map(implied, tasks, starts, np.array(expected), beta=phi["beta"])
    again = hb.equivalent_prior(
        GAUSSIAN, tasks, {k: phi[k] for k in ("mu", "gamma")}, 5, eta, sigma=SIGMA, beta=[0.8]
    )
    close(again.precision, implied.precision)


def test_known_standard_errors(schools):
    """Eight one-row tasks: w = 1 − (1 − η/se²)^K of the way; `sigma` has no place."""
    se, y = schools.tasks.slots["known_se"], schools.tasks.outcome
    eta = 0.9 * (se**2).min()
    implied = hb.equivalent_prior(schools.model, schools.data, [5.0], 3, eta)
    share = 1 - (1 - eta / se**2) ** 3
    close(implied.posterior_mean[:, 0], 5.0 + share * (y - 5.0), rtol=1e-12)
    close(implied.precision[:, 0, 0], (1 - share) / share / se**2, rtol=1e-11)


# -------------------------------------------------------- T2, T3: one step, Neumann's series


@pytest.mark.parametrize("scaling", [None, rotated(7, 0.3, 1.0)], ids=["plain", "matrix"])
def test_one_step_has_precision_inverse_step_less_curvature(scaling):
    """P = B⁻¹/η − H."""
    tasks, phi = ragged(9)
    eta = 0.8 / largest_curvature(tasks)
    implied = hb.equivalent_prior(GAUSSIAN, tasks, phi, 1, eta, sigma=SIGMA, preconditioner=scaling)
    inverse = np.linalg.inv(np.eye(3) if scaling is None else scaling) / eta
    expected = [inverse - (x.T * w) @ x for x, _, w in parts(tasks)]
    close(implied.precision, np.array(expected), rtol=0, atol=1e-12 * np.abs(inverse).max())


@pytest.mark.parametrize("num_steps", [2, 5])
def test_posterior_covariance_is_the_neumann_sum(num_steps):
    """Σ_K = η Σ_{k<K} (I − ηBH)^k B, whatever the rank of H."""
    tasks, phi = ragged(10)
    b, eta = rotated(11, 0.3, 1.0), 1.2 / largest_curvature(tasks)
    implied = hb.equivalent_prior(
        GAUSSIAN, tasks, phi, num_steps, eta, sigma=SIGMA, preconditioner=b
    )
    for j, (x, _, w) in enumerate(parts(tasks)):
        step = np.eye(3) - eta * b @ (x.T * w) @ x
        total = eta * sum(np.linalg.matrix_power(step, k) for k in range(num_steps)) @ b
        close(implied.posterior_covariance[j], total, rtol=0, atol=1e-12 * np.abs(total).max())


def test_small_steps_imply_a_prior_covariance_of_k_eta_b():
    """To first order in η: with ηλ = 1e-7 the next term is (K+1)/2 · 1e-7 of it."""
    tasks, phi = ragged(10)
    b, eta = rotated(11, 0.3, 1.0), 1e-7 / largest_curvature(tasks)
    implied = hb.equivalent_prior(GAUSSIAN, tasks, phi, 5, eta, sigma=SIGMA, preconditioner=b)
    close(implied.covariance, np.array([5 * eta * b] * 5), rtol=0, atol=5 * eta * 1e-6)


# ----------------------------------------------------------------- T5: the table of validity


def normal_means(sizes, names=None):
    """One coefficient, σ = 1: the curvature of a task is its number of rows."""
    return hb.Tasks.from_arrays(
        [(np.ones((n, 1)), np.linspace(-1.0, 2.0, n)) for n in sizes], names=names
    )


ROWS = {"empty": 0, "half": 5, "at": 10, "beyond": 15}
"""ηλ = 0, ½, 1 and 1.5 with η = 0.1."""


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_table_of_validity(num_steps):
    tasks = normal_means(ROWS.values(), list(ROWS))
    implied = hb.equivalent_prior(GAUSSIAN, tasks, [0.0], num_steps, 0.1, sigma=1.0)
    odd = num_steps % 2 == 1
    beyond = Status.NO_PRIOR if odd else Status.OVERSHOOTS
    assert implied.status.tolist() == ["proper", "proper", "flat", beyond]
    r = np.array([1.0, 0.5, 0.0, -0.5]) ** num_steps
    close(implied.filter[:, 0], r, rtol=1e-13, atol=1e-15)
    close(implied.shrinkage[:, 0], 1 - r, rtol=1e-13)
    close(implied.effective_parameters, 1 - r, rtol=1e-13)
    lam = np.array([5.0, 10.0, 15.0])
    precision = np.append(1 / (num_steps * 0.1), lam * r[1:] / (1 - r[1:]))
    close(implied.precision[:, 0, 0], precision, rtol=1e-12, atol=1e-13)
    covariance = implied.covariance[:, 0, 0]
    close(covariance[:2], 1 / precision[:2], rtol=1e-12)
    assert covariance[2] == np.inf
    # beyond the optimum the posterior is proper even where no prior is
    close(implied.posterior_covariance[1:, 0, 0], (1 - r[1:]) / lam, rtol=1e-12)
    table = implied.table
    assert table["status"].tolist() == [str(s) for s in implied.status]
    assert table["rows"].tolist() == list(ROWS.values())
    if odd:
        assert precision[3] < 0
        assert np.isnan(covariance[3])
        assert table["weakest_precision"].isna().tolist() == [False, False, False, True]
        said = [m for m in implied.messages if "no Gaussian prior" in m]
        assert len(said) == 1
        assert "'beyond'" in said[0]
        assert "even number of steps" in said[0]
    else:
        close(covariance[3], 1 / precision[3], rtol=1e-12)
        said = [m for m in implied.messages if "overshoot" in m]
        assert len(said) == 1
        assert "'beyond'" in said[0]
    assert sum("flat" in m for m in implied.messages) == 1
    assert len(implied.messages) == 2
    assert all(message in str(implied) for message in implied.messages)


def test_messages_are_issued_as_warnings():
    tasks = normal_means([15], ["beyond"])
    with pytest.warns(hb.FitWarning, match="no Gaussian prior .*'beyond'"):
        hb.equivalent_prior(GAUSSIAN, tasks, [0.0], 3, 0.1, sigma=1.0)


def test_nothing_is_said_where_steps_are_short():
    implied = hb.equivalent_prior(GAUSSIAN, normal_means([0, 1, 5, 9]), [0.0], 3, 0.1, sigma=1.0)
    assert implied.messages == ()
    assert str(implied) == "3 steps of 0.1 as a Gaussian prior: 4 task(s), 4 proper"


@pytest.mark.parametrize(("rows", "num_steps"), [(20, 3), (20, 4), (25, 4)])
def test_divergence_is_refused_naming_task_and_limit(rows, num_steps):
    """x = 2 neither converges nor diverges, and has no posterior of finite precision either."""
    tasks = normal_means([3, rows, 27 - rows, 0], ["few", "many", "some", "none"])
    with refuses("diverge in 1 of 4", "'many'", f"{rows} rows", "2/λ_max", f"{2 / rows:.3g}"):
        hb.equivalent_prior(GAUSSIAN, tasks, [0.0], num_steps, 0.1, sigma=1.0)


@pytest.mark.slow
def test_divergence_of_momentum_and_of_preconditioned_steps():
    tasks = normal_means([5, 50], ["few", "many"])
    with refuses("diverge", "'many'", "momentum"):
        hb.equivalent_prior(GAUSSIAN, tasks, [0.0], 9, 0.1, momentum=0.5, sigma=1.0)
    with refuses("diverge", "'many'", "2/λ_max = 0.08"):  # λ of B^½HB^½ is 25
        hb.equivalent_prior(GAUSSIAN, tasks, [0.0], 3, 0.1, preconditioner=[0.5], sigma=1.0)


@pytest.mark.parametrize(("nesterov", "limit"), [(False, 3.8), (True, 3.8 / 2.8)])
def test_momentum_is_refused_from_where_it_diverges(nesterov, limit):
    """β = 0.9: ηλ < 2 (1 + β), Nesterov's 2 (1 + β) / (1 + 2β), by the roots of the recursion."""
    tasks = normal_means([9], ["a"])
    settings = dict(momentum=0.9, nesterov=nesterov, sigma=1.0)

    def roots(x: float) -> float:
        shrunk = 1 - x
        middle = 1.9 * shrunk if nesterov else shrunk + 0.9
        return np.abs(np.roots([1.0, -middle, 0.9 * (shrunk if nesterov else 1.0)])).max()

    assert roots(0.999 * limit) < 1 < roots(1.001 * limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        near = hb.equivalent_prior(GAUSSIAN, tasks, [0.0], 3, 0.999 * limit / 9, **settings)
    assert np.isfinite(near.posterior_mean).all()
    with refuses("diverge", "'a'"):
        hb.equivalent_prior(GAUSSIAN, tasks, [0.0], 3, 1.001 * limit / 9, **settings)


def test_heavy_ball_beyond_the_optimum_has_no_prior():
    """R = −0.25 at β = ½, ηλ = ½, K = 4 (methods.md 2.5)."""
    implied = hb.equivalent_prior(
        GAUSSIAN, normal_means([5], ["a"]), [0.0], 4, 0.1, momentum=0.5, sigma=1.0
    )
    close(implied.filter, [[-0.25]], rtol=1e-12)
    assert implied.status.tolist() == ["no prior"]
    assert "'a'" in implied.messages[0]
    assert np.isnan(implied.covariance).all()


@pytest.mark.slow
def test_equal_preconditioners_of_every_task_are_one_preconditioner():
    """Short steps in steep units: nothing overshoots, whatever the size of η itself."""
    tasks, phi = ragged(12)
    b = 1e-3 * rotated(1, 0.5, 1.0) / largest_curvature(tasks)
    one, many = (
        hb.equivalent_prior(GAUSSIAN, tasks, phi, 3, 200.0, sigma=SIGMA, preconditioner=given_)
        for given_ in (b, [b] * 5)
    )
    close(many.precision, one.precision, rtol=0, atol=1e-9 * np.abs(one.precision).max())
    close(many.posterior_mean, one.posterior_mean, rtol=1e-11, atol=1e-13)
    assert many.status.tolist() == one.status.tolist() == ["proper"] * 5
    assert many.messages == ()


# ----------------------------------------------------------------------------- null space


def test_pinned_directions():
    """Rank 3, 1, 0, 2, 1: what rows say nothing about has no variance, and θ stays the same."""
    tasks, phi = ragged(14)
    eta = 0.7 / largest_curvature(tasks)
    free = hb.equivalent_prior(GAUSSIAN, tasks, phi, 3, eta, sigma=SIGMA)
    pinned = hb.equivalent_prior(GAUSSIAN, tasks, phi, 3, eta, sigma=SIGMA, null="pinned")
    close(pinned.posterior_mean, free.posterior_mean)
    for j, (x, _, w) in enumerate(parts(tasks)):
        rank = np.linalg.matrix_rank(x) if len(x) else 0
        assert np.isposinf(pinned.strength[j]).sum() == 3 - rank
        bend = (x.T * w) @ x
        within = np.linalg.pinv(bend, rcond=1e-10) @ bend  # projection onto the rows
        expected = within @ free.posterior_covariance[j] @ within
        close(pinned.posterior_covariance[j], expected, rtol=0, atol=1e-12)
        close(pinned.covariance[j], within @ free.covariance[j] @ within, rtol=1e-9, atol=1e-11)
        outside = free.posterior_covariance[j] - expected
        close(np.trace(outside), (3 - rank) * 3 * eta, rtol=0, atol=1e-11)  # Kη a direction
    close(pinned.posterior_covariance[2], np.zeros((3, 3)))
    close(pinned.draws(3)[:, 2], np.tile(phi, (3, 1)))
    assert "4 task(s) say nothing in some direction" in pinned.messages[0]
    assert free.messages == ()


# ---------------------------------------------------------------------------------- units


@pytest.mark.parametrize("convention", ["mean", "squares", "half squares", "mean of squares"])
def test_units_of_the_step_size(convention):
    """The docstring's conversions: a loop on another loss, with its own η, reaches the same θ."""
    rng = np.random.default_rng(3)
    x, y, phi, n = rng.normal(size=(6, 3)), rng.normal(size=6), np.ones(3), 6
    loss_slope = {
        "mean": lambda t: x.T @ (x @ t - y) / SIGMA**2 / n,
        "squares": lambda t: 2 * x.T @ (x @ t - y),
        "half squares": lambda t: x.T @ (x @ t - y),
        "mean of squares": lambda t: 2 * x.T @ (x @ t - y) / n,
    }[convention]
    factor = {"mean": 1 / n, "squares": 2 * SIGMA**2, "half squares": SIGMA**2,
              "mean of squares": 2 * SIGMA**2 / n}[convention]  # fmt: skip
    eta, theta = 0.01, phi
    for _ in range(5):
        theta = theta - eta * loss_slope(theta)
    found = hb.equivalent_prior(GAUSSIAN, (x, y), phi, 5, eta * factor, sigma=SIGMA)
    close(found.posterior_mean, theta, rtol=1e-12)
