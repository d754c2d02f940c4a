"""Pictures of the equivalence: what is drawn is right, and where it breaks the picture says so."""

import warnings

import matplotlib
import numpy as np
import pytest
from assertions import close, refuses
from numpy.ma import MaskedArray

import hierbayes as hb
from hierbayes.plots.labels import Label, place

matplotlib.use("Agg")
import matplotlib.pyplot as plt

X = np.column_stack([np.ones(6), np.arange(6.0)])
Y = np.array([1.0, 2.5, 2.0, 4.5, 4.0, 7.0])
PHI = np.array([3.0, -0.5])
LARGEST = float(np.linalg.eigvalsh(X.T @ X)[-1])  # curvature at sigma = 1
OPTIMUM = np.linalg.lstsq(X, Y, rcond=None)[0]


@pytest.fixture(scope="module")
def gaussian() -> hb.HierarchicalModel:
    return hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a label with a missing glyph, a layout that fails
        figure.canvas.draw()
    plt.close(figure)


def path(model, num_steps, step_size, *, task=(X, Y), phi=PHI, **arguments):
    if model.likelihood.parameters():
        arguments = {"sigma": 1.0} | arguments
    return hb.plots.adaptation_path(model, task, phi, num_steps, step_size, **arguments)


def curve(ax, gid):
    (found,) = [line for line in ax.lines if line.get_gid() == gid]
    return found.get_xydata()


def marks(ax, gid):
    return [line.get_xydata()[0] for line in ax.lines if line.get_gid() == gid]


def texts(ax):
    return "\n".join(text.get_text() for text in ax.texts)


# --------------------------------------------------------------- adaptation path


def test_the_path_is_that_of_the_steps_and_map_estimates_lead_from_phi_to_the_optimum(gaussian, ax):
    eta = 0.5 / LARGEST
    assert path(gaussian, 30, eta, ax=ax) is ax
    steps, maps = curve(ax, "gradient steps"), curve(ax, "MAP estimates")
    theta = PHI
    for k in range(30):
        close(steps[k], theta)
        theta = theta + eta * X.T @ (Y - X @ theta)
    close(steps[30], theta)
    close(maps[0], PHI)
    close(maps[-1], OPTIMUM, rtol=1e-7)
    assert len(marks(ax, "mark")) == 6  # 1, 2, 5, 10, 20, 30
    close(marks(ax, "mark")[3], steps[10])
    assert "K = 30" in texts(ax)
    assert "no Gaussian prior" not in texts(ax)


def test_each_mark_is_joined_to_the_map_estimate_of_its_precision(gaussian, ax):
    eta = 0.5 / LARGEST
    path(gaussian, 10, eta, ax=ax)
    joins = [
        line.get_xydata() for line in ax.lines if len(line.get_xydata()) == 2 and not line.get_gid()
    ]
    for join, k in zip(joins, (1, 2, 5, 10), strict=True):
        precision = np.eye(2) / (k * eta)
        close(join[1], np.linalg.solve(X.T @ X + precision, X.T @ Y + precision @ PHI), rtol=1e-7)


def test_odd_numbers_of_long_steps_are_hollow_and_the_picture_says_why(gaussian, ax):
    path(gaussian, 20, 1.6 / LARGEST, ax=ax)
    assert len(marks(ax, "no prior")) == 2  # K = 1 and 5
    assert len(marks(ax, "mark")) == 3  # K = 2, 10 and 20
    assert "hollow: no Gaussian prior (K = 1, 5)" in texts(ax)
    close(marks(ax, "no prior")[1], curve(ax, "gradient steps")[5])


def test_a_task_without_a_single_optimum_says_so(gaussian, ax):
    path(gaussian, 5, 0.1, task=(X[:1], Y[:1]), ax=ax)
    assert "the task alone has no single optimum" in texts(ax)
    # one row moves the intercept alone, to the outcome
    close(curve(ax, "MAP estimates")[-1], [Y[0], PHI[1]], rtol=1e-6)


@pytest.mark.slow
def test_the_posterior_is_drawn_as_ellipses_of_its_moments(radon, radon_ml, ax):
    task, names = radon.tasks["ST LOUIS"], ("floor", "Intercept")
    hb.plots.adaptation_path(
        radon.model, task, radon_ml.phi, 10, 0.004, posterior=radon_ml, coef=names, ax=ax
    )
    j, order = radon.tasks.labels.position("ST LOUIS"), [1, 0]
    mean = radon_ml.theta.values[j, order]
    covariance = radon_ml.adapted.posterior.covariance[j][np.ix_(order, order)]
    curves = [line.get_xydata() for line in ax.lines if len(line.get_xydata()) == 181]
    for found, share in zip(curves, (0.5, 0.9), strict=True):
        away = found - mean
        squares = np.einsum("ik,kl,il->i", away, np.linalg.inv(covariance), away)
        close(squares, np.full(181, -2 * np.log(1 - share)))
    assert ax.get_xlabel() == "θ, floor"
    assert "posterior,\nempirical Bayes" in texts(ax)


@pytest.mark.slow
def test_binary_outcomes_are_drawn_and_steps_that_are_no_map_estimate_are_named(ax):
    model = hb.HierarchicalModel(hb.likelihoods.Bernoulli(), hb.priors.Gaussian())
    x = np.column_stack([np.ones(30), np.random.default_rng(4).normal(size=30)])
    y = (np.random.default_rng(5).random(30) < 1 / (1 + np.exp(-x @ [0.5, 1.5]))).astype(float)
    path(model, 20, 0.2, task=(x, y), phi=[-3.0, 0.0], ax=ax)
    optimum = curve(ax, "MAP estimates")[-1]
    close(x.T @ (y - 1 / (1 + np.exp(-x @ optimum))), np.zeros(2), atol=1e-8)
    prior = hb.equivalent_prior(model, (x, y), [-3.0, 0.0], 20, 0.2)
    assert prior.validity.missed < 0.5
    close(curve(ax, "gradient steps")[-1], prior.posterior_mean)
    (note,) = [line for line in texts(ax).splitlines() if line.startswith("squares")]
    named = note[note.index("K = ") + 4 : -1].split(", ")
    assert "2" in named
    assert "20" not in named


def test_a_path_that_cannot_be_drawn_is_refused(gaussian, radon, radon_ml, radon_maml):
    with refuses("'Itercept'"):
        path(gaussian, 5, 0.01, coef=("x1", "Itercept"))
    with refuses("two different coefficients"):
        path(gaussian, 5, 0.01, coef=("x0", "x0"))
    with refuses("two coefficients", "'x0'"):
        path(gaussian, 5, 0.01, task=(X[:, :1], Y), phi=[0.0])
    with refuses("one task", "85"):
        path(radon.model, 5, 0.001, task=radon.tasks, phi=radon_ml.phi)
    with refuses("no task", "AITKIN"):
        path(gaussian, 5, 0.01, posterior=radon_ml)
    aitkin = {"task": radon.tasks["AITKIN"], "phi": radon_ml.phi}
    with refuses("MAML", "no posterior"):
        path(radon.model, 5, 0.001, **aitkin, posterior=radon_maml)
    with refuses("Fit", "float"):
        path(radon.model, 5, 0.001, **aitkin, posterior=3.0)
    with refuses("diverge"):
        path(gaussian, 5, 2.1 / LARGEST)


# ---------------------------------------------------------------- prior strength


def test_the_mesh_holds_implied_precisions_and_nothing_where_there_is_no_prior(gaussian, ax):
    assert hb.plots.prior_strength(num_steps=12, ax=ax) is ax
    (mesh,) = [c for c in ax.collections if isinstance(c.get_array(), MaskedArray)]
    values = mesh.get_array().reshape(-1, 12)
    edges = mesh.get_coordinates()[:, 0, 1]
    centres = np.sqrt(edges[1:] * edges[:-1])
    task = np.ones((1, 1)), np.ones(1)  # λ = 1 at sigma = 1
    for row, k in [(100, 1), (200, 1), (250, 12), (330, 2), (355, 2)]:
        prior = hb.equivalent_prior(gaussian, task, [0.0], k, centres[row], sigma=1.0)
        close(values[row, k - 1], np.clip(prior.precision[0, 0], 1e-3, 1e3))
    odd = np.arange(1, 13) % 2 == 1
    assert np.array_equal(values.mask, (centres > 1)[:, None] & odd)
    assert "odd K (hatched): no Gaussian prior" in texts(ax)


def test_lines_stand_where_they_say(ax):
    hb.plots.prior_strength(num_steps=12, ax=ax)
    for text, level in [("p = 10 λ", 10), ("p = λ", 1), ("p = 0.01 λ", 0.01)]:
        k, x = curve(ax, text).T
        close((1 - x) ** k / (1 - (1 - x) ** k), np.full(len(k), level), rtol=1e-8)


def test_tasks_stand_at_their_own_heights(gaussian, ax):
    arrays = [(np.ones((n, 1)), np.arange(float(n))) for n in (1, 2, 5, 20)] + [
        (np.zeros((2, 1)), np.ones(2))
    ]
    prior = hb.equivalent_prior(gaussian, hb.Tasks.from_arrays(arrays), [0.0], 5, 0.03, sigma=1.0)
    hb.plots.prior_strength(prior, num_steps=3, ax=ax)
    close(curve(ax, "tasks")[:, 1], [0.03, 0.06, 0.15, 0.6])
    assert ax.get_xlim()[1] > 5  # K of the prior is shown
    assert "1 direction below" in texts(ax)
    assert "5 tasks, 5 steps of 0.03" in ax.get_title("left")


def test_priors_of_other_steps_are_refused(gaussian):
    momentum = hb.equivalent_prior(gaussian, (X, Y), PHI, 5, 0.001, sigma=1.0, momentum=0.3)
    flow = hb.equivalent_prior(gaussian, (X, Y), PHI, time=0.1, sigma=1.0)
    with refuses("momentum"):
        hb.plots.prior_strength(momentum)
    with refuses("gradient flow"):
        hb.plots.prior_strength(flow)
    with refuses("EquivalentPrior", "float"):
        hb.plots.prior_strength(3.0)
    with refuses("num_steps", "0"):
        hb.plots.prior_strength(num_steps=0)


# ------------------------------------------------------------- shrinkage filters


def test_filters_are_what_they_say(ax):
    assert hb.plots.shrinkage_filters((1, 2, 5), ax=ax) is ax
    for k in (1, 2, 5):
        for gid in (f"K = {k}", f"K = {k}, overshooting"):
            u, share = curve(ax, gid).T
            close(share, 1 - (1 - u / k) ** k, atol=1e-12)
            assert (u.min() >= k) == gid.endswith("overshooting")
    u, share = curve(ax, "flow").T
    close(share, 1 - np.exp(-u))
    u, share = curve(ax, "ridge").T
    close(share, u / (1 + u))
    assert "1.298" in texts(ax)
    assert "u = 1.793" in texts(ax)
    assert "no Gaussian prior" in texts(ax)


def test_filters_of_no_steps_are_refused():
    with refuses("num_steps", "0"):
        hb.plots.shrinkage_filters((1, 0))
    with refuses("num_steps", "1.5"):
        hb.plots.shrinkage_filters((1.5,))
    with refuses("at most 5"):
        hb.plots.shrinkage_filters(range(1, 8))


# ------------------------------------------------------------------------ labels


def test_labels_stand_clear_of_each_other_and_of_curves(ax):
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    line = np.array([[0.0, 0.5], [1.0, 0.5]])
    spots = [(0.5, 0.5), (0.52, 0.5), (0.99, 0.5)]
    written = place(ax, [Label(f"mark {i}", [at]) for i, at in enumerate(spots)], [line], spots)
    boxes = [text.get_window_extent() for text in written]
    level = ax.transData.transform((0, 0.5))[1]
    for i, box in enumerate(boxes):
        assert box.y0 > level or box.y1 < level
        assert box.x1 < ax.bbox.x1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_labels_that_are_not_needed_give_way(ax):
    field = np.stack(np.meshgrid(np.linspace(0, 1, 200), np.linspace(0, 1, 200)), -1).reshape(-1, 2)
    labels = [Label("must", [(0.5, 0.5)]), Label("may", [(0.3, 0.3)], needed=False)]
    assert [text.get_text() for text in place(ax, labels, [field])] == ["must"]
