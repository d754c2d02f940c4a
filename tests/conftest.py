"""Fits that many tests share, each made once, and seeds that a rerun repeats."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import warnings
import zlib
from dataclasses import dataclass
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

if not {"PYTEST_XDIST_WORKER", "JAX_COMPILATION_CACHE_DIR"} & set(os.environ):
    # most of the time goes into compiling the same programs again: for another test, in another
    # worker; a folder of this run alone keeps them, read by JAX when it is imported
    _compiled = tempfile.mkdtemp(prefix="hierbayes-tests-")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": _compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

# OpenBLAS's threads, no help with small matrices, spin on after every call and take the other
# worker's core; NumPy reads this when it is imported, which a plugin may have done here already,
# but not in the workers
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# and the rest of it into making them fast, which tests of a few numbers do not need; the docs, the
# examples and one more run of .ci/run have programs as users get them
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    # a third less again, where it is known to work: later versions of XLA die of it
    if metadata.version("jaxlib").startswith("0.10.") and "XLA_FLAGS" not in os.environ:
        os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"

import jax
import numpy as np
import pytest
from hypothesis import settings

import hierbayes as hb

sys.path.insert(0, str(Path(__file__).parent))  # `from assertions import …` from any folder

# deadline=None: the first example of a property pays for JAX's compilation.
settings.register_profile("hierbayes", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("hierbayes")

SLOW_EXAMPLES = {
    "hierbayes.checks.laplace_check.laplace_check",
    "hierbayes.comparison.equivalence.equivalence_report",
    "hierbayes.likelihoods.program.from_numpyro",
    "hierbayes.meta.abml.abml",
    "hierbayes.meta.implied.implied_posterior",
    "hierbayes.meta.llama.llama",
    "hierbayes.meta.theta_errors.theta_standard_errors",
    "hierbayes.meta.weights_posterior.nuts",
    "hierbayes.plots.shrinkage_filters.shrinkage_filters",
}
"""Docstrings whose example compiles for seconds: they run with the slow tests."""

RADON = "log_radon ~ 1 + floor + log_uranium + (1 + floor | county)"
SCHOOLS = "y ~ 1 + (1 | school)"
QUICK = dict(num_draws=100, num_warmup=100, num_chains=2, seed=1, progress=False)
"""Short chains: these tests ask for shapes and repeatability, not for precision."""


@dataclass(frozen=True)
class Problem:
    """A model with its tasks and the DataFrame that they were read from."""

    model: hb.HierarchicalModel
    tasks: hb.Tasks
    data: Any = None


@pytest.hookimpl(tryfirst=True)  # before pytest's own hook leaves the slow ones out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.rpartition("::")[2] in SLOW_EXAMPLES:
            item.add_marker(pytest.mark.slow)


MOST_MAPPINGS = 30_000
"""Every compiled program holds memory mappings; Linux grants a process 65,530, then it dies."""

_tests = count(1)


@pytest.fixture(autouse=True)
def room_for_programs() -> Any:
    """Programs compiled for earlier tests are dropped before they are too many."""
    yield
    if next(_tests) % 16:  # counting takes as long as a quick test
        return
    mappings = Path("/proc/self/maps")
    if mappings.exists():
        with mappings.open("rb") as lines:
            if sum(1 for _ in lines) > MOST_MAPPINGS:
                jax.clear_caches()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A hash of the test's name: the same in every run, another in every test."""
    value = zlib.crc32(request.node.nodeid.rpartition("/")[2].encode())
    print(f"seed = {value}")  # shown by pytest when the test fails
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with reference answers: HIERBAYES_SHARED, or ``shared`` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("HIERBAYES_SHARED", beside))
    if not (folder / "reference").is_dir():
        pytest.skip(f"reference answers are not here: {folder} has no folder 'reference'")
    return folder


# ------------------------------------------------------------------------ tasks


@pytest.fixture(scope="session")
def radon() -> Problem:
    """919 houses in 85 counties (25 of them with a rank-deficient design), shared log_uranium."""
    data = hb.datasets.radon()
    return Problem(*hb.from_formula(RADON, data), data)


@pytest.fixture(scope="session")
def schools() -> Problem:
    """Eight one-row tasks with known standard errors."""
    data = hb.datasets.eight_schools()
    return Problem(*hb.from_formula(SCHOOLS, data, known_se="se"), data)


@pytest.fixture(scope="session")
def small() -> Problem:
    """Nine ragged simulated tasks, among them one without rows, one of one row, two of two."""
    rng = np.random.default_rng(20)
    sizes = [4, 0, 7, 1, 2, 12, 2, 5, 9]
    arrays = []
    for n in sizes:
        x = np.column_stack([np.ones(n), rng.normal(size=n)])
        theta = np.array([1.0, -0.5]) + rng.normal(size=2) * [0.8, 0.4]
        arrays.append((x, x @ theta + 0.6 * rng.normal(size=n)))
    tasks = hb.Tasks.from_arrays(arrays, names=list("abcdefghi"), coef=["Intercept", "x"])
    return Problem(hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian()), tasks)


# ------------------------------------------------------------------------- fits


def quietly(method: Any, problem: Problem, **arguments: Any) -> hb.Fit:
    """A fit whose remarks about the data are not what the test is about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        return method(problem.model, problem.tasks, **arguments)


@pytest.fixture(scope="session")
def radon_full(radon: Problem) -> hb.Fit:
    return quietly(hb.full_bayes, radon, **QUICK)


@pytest.fixture(scope="session")
def schools_full(schools: Problem) -> hb.Fit:
    return quietly(hb.full_bayes, schools, **QUICK)


@pytest.fixture(scope="session")
def radon_ml(radon: Problem) -> hb.Fit:
    return quietly(hb.empirical_bayes, radon, criterion="ml")


@pytest.fixture(scope="session")
def radon_reml(radon: Problem) -> hb.Fit:
    return quietly(hb.empirical_bayes, radon, criterion="reml")


@pytest.fixture(scope="session")
def radon_map(radon: Problem) -> hb.Fit:
    return quietly(hb.empirical_bayes, radon, criterion="map")


@pytest.fixture(scope="session")
def radon_maml(radon: Problem) -> hb.Fit:
    return quietly(hb.maml, radon, num_steps=5)


@pytest.fixture(scope="session")
def radon_imaml(radon: Problem) -> hb.Fit:
    return quietly(hb.imaml, radon)


@pytest.fixture(scope="session")
def radon_reptile(radon: Problem) -> hb.Fit:
    return quietly(hb.reptile, radon)


@pytest.fixture(scope="session")
def radon_no_pooling(radon: Problem) -> hb.Fit:
    return quietly(hb.no_pooling, radon)


@pytest.fixture(scope="session")
def radon_complete_pooling(radon: Problem) -> hb.Fit:
    return quietly(hb.complete_pooling, radon)
