"""The outer loop on episodes: where it ends, that it repeats, that it can be cut and resumed."""

import functools
import io
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from assertions import refuses

import hierbayes as hb
from hierbayes.meta import training
from hierbayes.tasks import episodes as sources

SINUSOIDS = hb.datasets.sinusoids(shots=5)
QUICK = dict(
    num_steps=1, num_meta_steps=60, batch_size=4, held_out=10, evaluate_every=20, progress=False
)
"""Few steps of a tiny network, in several compiled calls: the first takes 10 meta-steps."""


@functools.cache
def network(hidden=8):
    net = hb.likelihoods.Network.mlp([1, hidden, 1], activation=jnp.tanh)
    return hb.HierarchicalModel(net, hb.priors.Gaussian())


def fitted(source=SINUSOIDS, model=None, **arguments):
    return hb.maml(model or network(), source, **QUICK | arguments)


def assert_equal_fits(one, other):
    """φ bit for bit, and the same scores along the way."""
    assert set(one.phi) == set(other.phi)
    for name, value in one.phi.items():
        assert np.array_equal(value, other.phi[name]), f"{name} differs"
    for name, values in one.info["history"].items():
        # the first score of all is NaN: no meta-step has been taken
        assert np.array_equal(values, other.info["history"][name], equal_nan=True), name


def waves(count, seed, *, num_tasks=4, rows=5, at=None, spoil=None):
    """Batches of sinusoids; ``spoil`` is called with the batch numbered ``at``."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        x = rng.uniform(-2, 2, (num_tasks, 2 * rows, 1))
        y = np.sin(x[..., 0] + rng.uniform(0, 3, (num_tasks, 1)))
        if k == at:
            spoil(x, y)
        yield (x[:, :rows], y[:, :rows]), (x[:, rows:], y[:, rows:])


@pytest.fixture(scope="module")
def whole():
    """A run that nothing interrupts."""
    return fitted()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """What a short run keeps in its file."""
    path = tmp_path_factory.mktemp("kept") / "run"
    fitted(checkpoint=path, num_meta_steps=1)
    return path.read_bytes()


@pytest.mark.slow
def test_equal_fits_are_told_from_others(whole):
    """The control: one bit of one weight, and one score."""
    import copy

    other = copy.deepcopy(whole)
    assert_equal_fits(whole, other)
    other.phi["mu"][3] = np.nextafter(other.phi["mu"][3], 9)
    with pytest.raises(AssertionError, match="mu differs"):
        assert_equal_fits(whole, other)
    other = copy.deepcopy(whole)
    other.info["history"]["held_out"][1] += 1e-12
    with pytest.raises(AssertionError, match="held_out"):
        assert_equal_fits(whole, other)


# -------------------------------------------------------------------- where it ends


def scaled_regressions(key, num_rows):
    """x of the task's own scale s, and θ around (1, −2) s: which tasks weigh more matters."""
    of_s, of_x, of_theta, of_y = jax.random.split(key, 4)
    s = jax.random.uniform(of_s, (), minval=0.3, maxval=1.5)
    x = s * jax.random.normal(of_x, (num_rows, 2))
    theta = s * jnp.array([1.0, -2.0]) + 0.3 * jax.random.normal(of_theta, (2,))
    return x, x @ theta + 0.4 * jax.random.normal(of_y, (num_rows,))


def least_squares(source, num_tasks, eta, num_steps, seed):
    """μ that predicts the query rows of these tasks best, its covariance, and the rms left.

    θ_K = A μ + (I − A) θ_LS with A = (I − η X'X / (n σ²))^K, σ² = ½, is linear in μ.
    """
    support, query = source.draw(num_tasks, seed=seed)
    xs, xq = (part.predictors.reshape(num_tasks, -1, 2) for part in (support, query))
    ys, yq = (part.outcome.reshape(num_tasks, -1) for part in (support, query))
    theta, left = np.zeros((num_tasks, 2)), np.broadcast_to(np.eye(2), (num_tasks, 2, 2))
    bend = 2 * eta / xs.shape[1] * np.einsum("jni,jnk->jik", xs, xs)
    slope = 2 * eta / xs.shape[1] * np.einsum("jni,jn->ji", xs, ys)
    for _ in range(num_steps):
        theta = theta + slope - np.einsum("jik,jk->ji", bend, theta)
        left = left - bend @ left
    columns = np.einsum("jni,jik->jnk", xq, left)
    outcomes = yq - np.einsum("jni,ji->jn", xq, theta)
    gram = np.einsum("jni,jnk->ik", columns, columns)
    mu = np.linalg.solve(gram, np.einsum("jni,jn->i", columns, outcomes))
    residual = outcomes - columns @ mu
    scores = np.einsum("jni,jn->ji", columns, residual)
    root = np.linalg.solve(gram, scores.T)
    return mu, root @ root.T, np.sqrt(np.mean(residual**2))


@pytest.mark.slow
def test_maml_on_a_linear_gaussian_sampler_reaches_its_closed_form():
    """Within four standard errors, of either: least squares on 20,000 tasks has its own.

    Adam's rate falls to zero as a cosine over 1,500 batches of 50. What is left of the noise is at
    most that of least squares on the last tenth of the tasks, 7,500.
    """
    source = hb.Episodes.from_sampler(scaled_regressions, 6)
    expected, covariance, rms = least_squares(source, 20_000, 0.1, 1, seed=11)
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    found = hb.maml(
        model, source, 1, 0.1, num_meta_steps=1500, batch_size=50, held_out=50,
        optimiser=optax.adam(optax.cosine_decay_schedule(0.05, 1500)), progress=False,
    )  # fmt: skip
    error = np.sqrt(np.diag(covariance) * (1 + 20_000 / 7_500))
    assert (np.abs(found.phi["mu"] - expected) <= 4 * error).all(), (found.phi["mu"], expected)
    assert (error < 0.02).all(), "four standard errors say something"
    mean = 0.9 * np.array([1.0, -2.0])  # of θ, where all tasks would weigh the same
    assert (np.abs(expected - mean) > 10 * error).all(), "scales weigh"
    # 500 tasks of 6 rows: a standard error of 1.3 %, more where a task's rows go together
    assert found.phi["sigma_query"] == pytest.approx(rms, rel=0.08)
    assert found.phi["sigma"] == np.sqrt(0.5)
    assert found.warnings == ()


@pytest.mark.slow
def test_the_score_is_the_mean_log_density_of_query_rows_and_improves(whole):
    held_out = fitted(num_meta_steps=400, optimiser=optax.adam(0.3)).info["history"]["held_out"]
    assert held_out[-1] > held_out[0] + 0.1
    history = whole.info["history"]
    assert history["step"] == [0, 20, 40, 60]
    assert np.isnan(history["score"][0])
    assert np.isfinite(history["score"][1:]).all()
    assert whole.info["held_out_score"] == history["held_out"][-1]
    assert whole.info["outer_steps"] == 60


# ----------------------------------------------------------------------- repeatable


@pytest.mark.slow
def test_equal_seeds_end_bit_equal_and_others_do_not(whole):
    assert_equal_fits(whole, fitted())
    assert_equal_fits(whole, fitted(seed=jax.random.key(0)))
    with pytest.raises(AssertionError):
        assert_equal_fits(whole, fitted(seed=1))


@pytest.mark.slow
def test_the_users_flag_for_float64_stays_and_changes_nothing(whole):
    with jax.enable_x64(True):
        assert_equal_fits(whole, fitted())
        assert jax.config.jax_enable_x64 is True
    assert jax.config.jax_enable_x64 is False


@pytest.mark.slow
def test_many_meta_steps_run_in_one_compiled_call(monkeypatch):
    """Calls of 10, 40, 160 and 290 meta-steps find the program of the first of another run.

    The sampler is traced there for the shape of a batch alone.
    """
    monkeypatch.setattr(training, "RESPONSE", 1e9)
    traced, calls = [0], []

    def sample(key, num_rows):
        traced[0] += 1
        return jax.random.normal(key, (num_rows, 1)), jnp.zeros(num_rows)

    chunk = sources._SampledFeed.chunk

    def counted(self, count):
        calls.append(count)
        return chunk(self, count)

    monkeypatch.setattr(sources._SampledFeed, "chunk", counted)
    found = []
    for steps in (10, 500):
        source = hb.Episodes.from_sampler(sample, 3)
        traced[0] = 0
        fitted(source, num_meta_steps=steps, evaluate_every=1000)
        found.append(traced[0])
    assert calls == [10, 10, 40, 160, 290]
    assert found[0] > 1, "the control"
    assert found[1] == 1, "no call is compiled anew"


# ------------------------------------------------------------------ cut and resumed


def cut_at_call(monkeypatch, number):
    """The loop is interrupted when it asks for its chunk of this number."""
    chunk, calls = sources._SampledFeed.chunk, [0]

    def cut(self, count):
        calls[0] += 1
        if calls[0] == number:
            raise KeyboardInterrupt
        return chunk(self, count)

    monkeypatch.setattr(sources._SampledFeed, "chunk", cut)


@pytest.mark.parametrize("number", [1, 5])
def test_a_run_that_was_cut_and_resumed_ends_bit_equal(whole, monkeypatch, tmp_path, number):
    path = tmp_path / "run.npz"
    monkeypatch.setattr(training, "LONGEST", 7)
    cut_at_call(monkeypatch, number)
    with pytest.raises(KeyboardInterrupt):
        fitted(checkpoint=path)
    assert path.is_file()
    assert_equal_fits(whole, fitted(checkpoint=path))
    assert list(tmp_path.iterdir()) == [path], "nothing else is left behind"


@pytest.mark.slow
def test_a_run_with_patience_that_was_cut_ends_bit_equal(monkeypatch, tmp_path):
    arguments = dict(patience=2, num_meta_steps=300, optimiser=optax.adam(0.3))
    straight = fitted(**arguments)
    cut_at_call(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        fitted(checkpoint=tmp_path / "run", **arguments)
    assert_equal_fits(straight, fitted(checkpoint=tmp_path / "run", **arguments))


@pytest.mark.slow
def test_a_run_on_a_generator_that_was_cut_and_resumed_ends_bit_equal(tmp_path):
    interrupt = [False]

    def spoil(x, y):
        if interrupt[0]:
            raise KeyboardInterrupt

    def make(seed):
        return waves(70, seed, at=37, spoil=spoil)

    source = hb.Episodes.from_generator(make)
    straight = fitted(source)
    interrupt[0] = True
    with pytest.raises(KeyboardInterrupt):
        fitted(source, checkpoint=tmp_path / "run")
    interrupt[0] = False
    assert_equal_fits(straight, fitted(source, checkpoint=tmp_path / "run"))


@pytest.mark.slow
def test_a_finished_run_is_read_back_and_can_be_made_longer(whole, monkeypatch, tmp_path):
    path = tmp_path / "run"
    short = fitted(checkpoint=path, num_meta_steps=40)
    cut_at_call(monkeypatch, 1)  # any work would raise
    assert_equal_fits(short, fitted(checkpoint=path, num_meta_steps=40))
    monkeypatch.undo()
    assert_equal_fits(whole, fitted(checkpoint=path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            dict(batch_size=5),
            ("another run", "batch_size=4 there, 5 here", "another path"),
            marks=pytest.mark.slow,
        ),
        (dict(step_size=0.02), ("another run", "step_size=0.01 there, 0.02 here")),
        (dict(seed=3, loss="sum"), ("seed=0 there, 3 here", "loss='mean' there, 'sum' here")),
        (dict(derivative="first-order"), ("derivative='unrolled' there",)),
        pytest.param(dict(model=network(5)), ("other weights",), marks=pytest.mark.slow),
        (dict(optimiser=optax.sgd(0.1)), ("another optimiser's state",)),
    ],
    ids=["batch size", "step size", "two", "derivative", "network", "optimiser"],
)
def test_the_checkpoint_of_another_run_is_refused(kept, tmp_path, change, words):
    path, before = tmp_path / "run", kept
    path.write_bytes(before)
    with refuses(str(path), *words):
        fitted(checkpoint=path, **change)
    assert path.read_bytes() == before


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["cut", "flipped", "empty", "text", "npy", "other", "no counters"])
def test_a_file_that_is_no_checkpoint_is_refused(kept, tmp_path, kind):
    path, data = tmp_path / "run", kept
    array = io.BytesIO()
    np.save(array, np.ones(3))
    damaged = {
        "cut": data[: len(data) // 2],
        "flipped": data[:500] + bytes([data[500] ^ 255]) + data[501:],
        "empty": b"", "text": b"weights", "npy": array.getvalue(), "other": npz(a=np.ones(3)),
        "no counters": npz(described=np.array('{"run": {}}')),
    }[kind]  # fmt: skip
    path.write_bytes(damaged)
    with refuses(str(path), "no checkpoint of hierbayes", "remove it"):
        fitted(checkpoint=path)
    assert path.read_bytes() == damaged, "it may be something else of the user's"


def test_a_checkpoint_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    def never(*arguments):
        raise AssertionError("work was done")

    monkeypatch.setattr(training._Run, "go", never)
    with refuses("checkpoint", "the folder of", "'nowhere/run'", "does not exist"):
        fitted(checkpoint="nowhere/run")
    with refuses("checkpoint", "is a folder"):
        fitted(checkpoint=tmp_path)


def test_a_checkpoint_is_written_whole_or_not_at_all(kept, tmp_path, monkeypatch):
    path, before = tmp_path / "run", kept
    path.write_bytes(before)
    save = np.savez

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space left"):
        fitted(checkpoint=path)
    monkeypatch.setattr(np, "savez", save)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_checkpoint_is_written_along_the_way(tmp_path, monkeypatch):
    """Every minute; here after every call."""
    monkeypatch.setattr("hierbayes.meta.training.EVERY", -1.0)
    path, there = tmp_path / "run", []

    def look(x, y):
        there.append(path.exists())

    source = hb.Episodes.from_generator(lambda seed: waves(70, seed, at=45, spoil=look))
    fitted(source, checkpoint=path)
    assert there == [True]


# ------------------------------------------------------------------- when it stops


@pytest.mark.slow
def test_patience_stops_and_takes_the_best():
    """A rate at which held-out scores soon stop to improve."""
    found = fitted(patience=2, num_meta_steps=5000, optimiser=optax.adam(0.3))
    history = found.info["history"]
    best = int(np.argmax(history["held_out"]))
    assert found.info["outer_steps"] < 5000
    assert len(history["step"]) == best + 3, "two scores in a row have not improved on the best"
    assert found.info["held_out_score"] == max(history["held_out"])
    if history["step"][best]:
        alone = fitted(num_meta_steps=history["step"][best], optimiser=optax.adam(0.3))
        assert np.array_equal(found.phi["mu"], alone.phi["mu"])


def overflowing(at, task=2):
    """A generator one of whose tasks holds a number whose square is no float32."""

    def spoil(x, y):
        y[task, -1] = 1e30

    return hb.Episodes.from_generator(
        lambda seed: waves(70, seed, at=at if seed == 5 else None, spoil=spoil)
    )


@pytest.mark.parametrize("at", [0, 33])
def test_a_score_that_is_not_finite_ends_the_run_where_it_was(at, tmp_path):
    path = tmp_path / "run"
    with pytest.warns(hb.FitWarning, match=f"not finite at meta-step {at}, in task 2 of its batch"):
        found = fitted(overflowing(at), seed=5, checkpoint=path)
    (said,) = found.warnings
    assert f"what {at} meta-steps gave" in said
    assert repr(str(path)) in said
    assert found.info["outer_steps"] == at
    if at:
        before = fitted(overflowing(None), seed=5, num_meta_steps=at)
        assert np.array_equal(found.phi["mu"], before.phi["mu"])
    with pytest.warns(hb.FitWarning, match=f"not finite at meta-step {at}"):
        again = fitted(overflowing(at), seed=5, checkpoint=path)
    assert np.array_equal(found.phi["mu"], again.phi["mu"])


@pytest.mark.slow
def test_weights_that_overflow_end_the_run_with_the_last_that_are_finite():
    """The rate turns infinite at the 25th meta-step; φ is that of 24 before it, or 25."""
    rate = optax.join_schedules(
        [optax.constant_schedule(1e-3), optax.constant_schedule(float("inf"))], [25]
    )
    with pytest.warns(hb.FitWarning, match="not finite at meta-step 25"):
        found = fitted(optimiser=optax.sgd(rate))
    assert np.isfinite(found.phi["mu"]).all()
    before = fitted(optimiser=optax.sgd(1e-3), num_meta_steps=25)
    assert np.array_equal(found.phi["mu"], before.phi["mu"])


def test_steps_that_diverge_at_the_start_are_refused():
    with refuses("MAML", "not finite at the initial weights", "shorter inner steps"):
        fitted(num_steps=5, step_size=1e12)


@pytest.mark.slow
def test_a_generator_that_ends_ends_the_run_with_a_warning():
    source = hb.Episodes.from_generator(lambda seed: waves(33, seed))
    with pytest.warns(hb.FitWarning, match=r"stopped after 33 batches, 60 meta-steps were asked"):
        found = fitted(source)
    assert found.info["outer_steps"] == 33
    assert found.info["history"]["step"] == [0, 20, 33]
    assert np.isfinite(found.phi["mu"]).all()
    assert found.phi["sigma_query"] > 0
    exact = fitted(hb.Episodes.from_generator(lambda seed: waves(70, seed)), num_meta_steps=33)
    assert np.array_equal(found.phi["mu"], exact.phi["mu"])


def test_a_generator_with_too_few_tasks_to_hold_out_is_refused():
    source = hb.Episodes.from_generator(lambda seed: waves(2, seed))
    with refuses("stopped after 8 tasks", "10 were asked for"):
        fitted(source)


@pytest.mark.slow
def test_a_resumed_generator_that_has_grown_shorter_is_refused(tmp_path):
    path = tmp_path / "run"
    fitted(hb.Episodes.from_generator(lambda seed: waves(70, seed)), checkpoint=path)
    short = hb.Episodes.from_generator(lambda seed: waves(30, seed))
    with refuses("stopped after 30 batches", "has seen 60", "same batches"):
        fitted(short, checkpoint=path, num_meta_steps=80)


# ------------------------------------------------------------------- said and refused


@pytest.mark.slow
def test_the_progress_bar_shows_the_score_and_that_of_held_out_tasks(capsys, monkeypatch):
    from tqdm import std

    class Soon(std.tqdm):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named | {"delay": 0, "mininterval": 0})

    monkeypatch.setattr("tqdm.auto.tqdm", Soon)
    found = fitted(progress=True)
    shown = capsys.readouterr().err
    assert "MAML" in shown
    assert "60/60" in shown
    assert f"held out={found.info['history']['held_out'][-1]:.4f}" in shown
    assert f"score={found.info['history']['score'][-1]:.4f}" in shown
    fitted(progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(batch_size=3), ("fixed set of tasks", "batch_size", "hb.Episodes.from_tasks")),
        (dict(patience=1, checkpoint="run"), ("fixed set of tasks", "checkpoint, patience")),
        (dict(held_out=3), ("fixed set of tasks", "held_out")),
    ],
)
def test_settings_for_episodes_are_refused_on_fixed_tasks(small, arguments, words):
    with refuses(*words):
        hb.maml(small.model, small.tasks, **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(batchsize=3), ("MAML takes no argument", "'batchsize'", "batch_size")),
        (dict(num_meta_steps=0), ("num_meta_steps", "positive integer", "0")),
        (dict(held_out=-1), ("held_out", "positive integer", "-1")),
        (dict(held_out=2.5), ("held_out", "positive integer", "2.5")),
        (dict(evaluate_every=0), ("evaluate_every", "positive integer", "0")),
        (dict(patience=0), ("patience", "positive integer", "0")),
        (dict(batch_size="3"), ("batch_size", "positive integer", "'3'")),
        (dict(optimiser="adam"), ("optimiser", "Optax", "'adam'")),
        (dict(num_steps=0), ("num_steps", "0")),
        (dict(step_size=-1.0), ("step_size", "positive", "-1")),
        (dict(sigma=0.0), ("sigma must be positive", "0")),
        (dict(derivative="implicit"), ("implicit", "hb.imaml")),
        (dict(derivative="exact"), ("derivative must be one of", "'exact'")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_are_refused(arguments, words):
    with refuses(*words):
        fitted(**arguments)


def test_what_is_no_source_is_refused(small):
    with refuses("expected Tasks or Episodes", "list", "hb.Episodes"):
        fitted([1, 2])
    one = hb.Tasks.from_arrays([(np.ones((4, 1)), np.arange(4.0))])
    with refuses("cannot be learned from one task"):
        fitted(one)


# ----------------------------------------------------------------- fixed sets of tasks


@pytest.mark.slow
def test_a_network_on_a_fixed_set_of_tasks_keeps_them_and_their_names():
    rng = np.random.default_rng(2)
    arrays = [(x := rng.uniform(-2, 2, (n, 1)), np.sin(x[:, 0] + n)) for n in (4, 7, 2, 5)]
    tasks = hb.Tasks.from_arrays(arrays, names=list("dcba"))
    found = fitted(tasks)
    assert found.tasks.names.tolist() == list("dcba")
    assert found.theta.shape == (4, network().likelihood.weights.size)
    alone = found.adapt(tasks[["b"]]).theta
    assert np.allclose(alone.sel(task="b"), found.theta.sel(task="b"), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_linear_tasks_resplit_in_every_meta_step_keep_their_coefficients(small):
    sizes = small.tasks.sizes
    tasks = small.tasks.take(np.flatnonzero(sizes >= 4))
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = hb.maml(model, hb.Episodes.from_tasks(tasks), **QUICK | {"step_size": 0.05})
    assert found.theta.coords["coef"].values.tolist() == ["Intercept", "x"]
    assert found.adapt(tasks).theta.shape == (tasks.num_tasks, 2)
