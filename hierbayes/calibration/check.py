r"""Simulation-based calibration: whether a method finds what data were simulated from.

.. math::

    \tilde\varphi \sim p(\varphi), \quad \tilde\theta, \tilde D \sim p(\theta, D \mid
    \tilde\varphi), \quad (\varphi, \theta)_{1..L} \sim p(\varphi, \theta \mid \tilde D)
    \;\Rightarrow\; \#\{l : g_l < \tilde g\} \text{ uniform on } 0, \dots, L

for every quantity g of parameters and data, if and only if the draws are from the posterior.

Ranks and coverage of one simulated data set after another.

Posterior draws of φ and θ as simulation-based calibration takes them.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from hierbayes import inputs
from hierbayes.calibration.result import Calibration
from hierbayes.checks.coverage import covered_by_draws, covered_by_normal, normal_posterior
from hierbayes.checks.quantities import quantities, rank
from hierbayes.errors import InputError, announce, listing, overhearing, suggestion
from hierbayes.fit import Fit
from hierbayes.fit.method import Method, named_methods
from hierbayes.meta import full_bayes
from hierbayes.meta.diagnostics import ess
from hierbayes.meta.full_bayes import LONG_STAY, SURE
from hierbayes.model import HierarchicalModel, check_model
from hierbayes.numerics import as_rng
from hierbayes.simulation import draw_outcomes, draw_phi, draw_theta, refuse_without_outcomes
from hierbayes.tasks import Tasks

Sampler = Callable[[HierarchicalModel, Tasks, int], Any]
"""``sampler(model, tasks, seed)``: a Fit, or draws by name."""

AT_FIRST, PILOTS = 10, 3
"""Draws in the place of one in the first fits, and fits whose autocorrelation is looked at."""

SPARE = 0.1
"""Of the thinning that pilots ask for, which they know no better."""


class Draws(NamedTuple):
    """``phis`` by name, each (S, …), and ``thetas`` (S, J, d)."""

    phis: dict[str, np.ndarray]
    thetas: np.ndarray

    @classmethod
    def of(cls, found: Any, phi: dict[str, np.ndarray], theta: np.ndarray) -> Draws:
        """What a sampler returned; ``phi`` and ``theta`` (1, …) say which names and shapes."""
        if isinstance(found, Fit):
            found = _of_fit(found)
        if not isinstance(found, Mapping):
            raise InputError(
                "a sampler returns a Fit or a mapping of draws by name, found "
                f"{type(found).__name__}"
            )
        wanted = {**phi, "theta": theta}
        if missing := [name for name in wanted if name not in found]:
            raise InputError(f"the sampler's draws lack {listing(missing)}")
        arrays = {name: np.asarray(found[name], dtype=float) for name in wanted}
        size = len(arrays["theta"])
        for name, value in arrays.items():
            expected = (size, *wanted[name].shape[1:])
            if value.shape != expected:
                raise InputError(
                    f"the sampler's draws of {name} have shape {value.shape}, expected {expected}"
                )
        return cls({name: arrays[name] for name in phi}, arrays["theta"])


def _of_fit(fit: Fit) -> dict[str, np.ndarray]:
    """Draws of a fit, chain after chain; a point φ̂ as draws that are all the same."""
    if fit.theta_draws is None:
        raise InputError(f"{fit.method} holds no draws of theta to rank the truth among")
    thetas = np.asarray(fit.theta_draws)
    thetas = thetas.reshape(-1, *thetas.shape[2:])
    phis = {}
    for name, value in fit.phi.items():
        if fit.phi_draws is None:
            phis[name] = np.broadcast_to(value, (len(thetas), *np.shape(value)))
        else:
            drawn = fit.phi_draws[name]
            phis[name] = drawn.reshape(-1, *drawn.shape[2:])
    return {**phis, "theta": thetas}


def thinned(draws: Draws, num_draws: int) -> Draws:
    """So many draws at even distances."""
    size = len(draws.thetas)
    if size < num_draws:
        raise InputError(
            f"the sampler returned {size} draws, at least num_draws={num_draws} are needed"
        )
    kept = ((np.arange(num_draws) + 0.5) * size / num_draws).astype(int)
    return Draws({name: value[kept] for name, value in draws.phis.items()}, draws.thetas[kept])


def full_bayes_sampler(num_draws: int) -> Sampler:
    """:func:`hierbayes.full_bayes` with one chain of so many draws."""

    def sampler(model: HierarchicalModel, tasks: Tasks, seed: int) -> Fit:
        return full_bayes(
            model, tasks, num_draws=num_draws, num_chains=1, seed=seed, progress=False
        )

    return sampler


def surely_independent(fit: Fit) -> bool:
    """Whether independent proposals were accepted so often that draws need no judging."""
    sure = fit.info.get("acceptance", 0.0) >= SURE
    return sure and fit.info.get("longest_stay", LONG_STAY + 1) <= LONG_STAY


def needed_thinning(model: HierarchicalModel, tasks: Tasks, draws: Draws) -> float:
    """Draws of one chain that are worth an independent one, of the worst quantity."""
    found = quantities(model, tasks, draws.phis, draws.thetas)
    sizes = [float(ess(values[None], "mean")) for values in found.values() if np.ptp(values) > 0]
    return len(draws.thetas) / min(sizes, default=1.0) - SPARE


FULL_BAYES, SAMPLER = "full Bayes", "sampler"

HOPELESS = 20
"""Data sets that may be refused before any was accepted."""

MANY = 0.1
"""Share of refused data sets from which on the hyperprior is spoken of."""


class Gathered:
    """Ranks and coverage, data set after data set, and what was refused on the way."""

    def __init__(
        self, model: HierarchicalModel, num_draws: int, rng: np.random.Generator,
        sampler: Sampler | None, by_interval: Mapping[str, Sampler],
    ):  # fmt: skip
        self.model, self.num_draws, self.rng = model, num_draws, rng
        self.sampler, self.by_interval = sampler, by_interval
        self.label = FULL_BAYES if sampler is None else SAMPLER
        self.thinning = 1 if sampler is not None else AT_FIRST
        self.ranks: dict[str, list[int]] = {}
        self.covered: dict[str, list[np.ndarray]] = {}
        self.refused: dict[str, list[str]] = {}
        self.warned: dict[str, list[str]] = {}
        self.accepted = 0
        self._needed: list[float] = []

    def on(
        self, tasks: Tasks, phi: dict[str, np.ndarray], theta: np.ndarray, *, ranked: bool
    ) -> None:
        """One data set, by every method; ``phi`` and ``theta`` with a leading axis of one."""
        seed = int(self.rng.integers(2**31))
        if not np.isfinite(tasks.outcome).all():
            names = [self.label] * ranked + list(self.by_interval)
            for name in names:
                self._refuse(name, "counts whose rate lies beyond 1e15")
            return
        if ranked:
            self._rank(tasks, phi, theta, seed)
        for name, method in self.by_interval.items():
            fit = self._fitted(name, method, tasks, seed)
            if fit is not None:
                self._note(name, fit)
                covered = covered_by_normal(theta[0], *normal_posterior(fit))
                self.covered.setdefault(name, []).append(covered)

    def _rank(self, tasks: Tasks, phi: dict[str, np.ndarray], theta: np.ndarray, seed: int) -> None:
        own = self.sampler is None
        sampler = self.sampler or full_bayes_sampler(self.num_draws * self.thinning)
        found = self._fitted(self.label, sampler, tasks, seed)
        if found is None:
            return
        draws = Draws.of(found, phi, theta)
        if own and self.thinning < AT_FIRST and not surely_independent(found):
            # these data make a harder posterior than the pilots': more draws for those that remain
            more = full_bayes_sampler(self.num_draws * AT_FIRST)
            found = self._fitted(self.label, more, tasks, seed)
            if found is None:
                return
            draws = Draws.of(found, phi, theta)
        self._note(self.label, found)
        if own and len(self._needed) < PILOTS:
            self._needed.append(needed_thinning(self.model, tasks, draws))
            if len(self._needed) == PILOTS:
                self.thinning = int(np.clip(np.ceil(np.median(self._needed)), 1, AT_FIRST))
        draws = thinned(draws, self.num_draws)
        together = {name: np.concatenate([phi[name], draws.phis[name]]) for name in phi}
        values = quantities(self.model, tasks, together, np.concatenate([theta, draws.thetas]))
        for label, v in values.items():
            if np.isnan(v).any():
                raise InputError(f"{label} is not a number in {np.isnan(v).sum()} draw(s)")
        truth = {label: float(v[0]) for label, v in values.items()}
        for label, r in rank({n: v[1:] for n, v in values.items()}, truth, self.rng).items():
            self.ranks.setdefault(label, []).append(r)
        covered = covered_by_draws(theta[0], draws.thetas, self.rng)
        self.covered.setdefault(self.label, []).append(covered)

    def _fitted(self, name: str, method: Sampler, tasks: Tasks, seed: int) -> Any:
        """What the method makes of the tasks; None where it refuses them."""
        try:
            found = method(self.model, tasks, seed)
        except InputError as error:
            self._refuse(name, str(error))
            return None
        self.accepted += 1
        return found

    def _note(self, name: str, found: Any) -> None:
        """Keep what a fit warned of."""
        if isinstance(found, Fit) and found.warnings:
            self.warned.setdefault(name, []).append(found.warnings[0])

    def _refuse(self, name: str, why: str) -> None:
        self.refused.setdefault(name, []).append(why)

    def refuse_hopeless(self, num: int) -> None:
        """Stop where nothing has been accepted."""
        if not self.accepted and num >= HOPELESS:
            self._refuse_all(num)

    def _refuse_all(self, num: int) -> None:
        why = next(iter(self.refused.values()))[0]
        raise InputError(f"the model refused each of the first {num} simulated data sets: {why}")

    def remarks(self, num: int) -> list[str]:
        """What to know, in sentences."""
        if not self.accepted:
            self._refuse_all(num)
        remarks = []
        for name, why in self.refused.items():
            more = (
                "; tighter priors make the simulated data more like real ones"
                if len(why) > MANY * num else ""
            )  # fmt: skip
            remarks.append(
                f"{name} refused {len(why)} of {num} simulated data sets, which are left out (the "
                f'first: "{why[0]}"). What it does with such data has not been checked{more}'
            )
        for name, said in self.warned.items():
            remarks.append(
                f"{len(said)} of {num} fits by {name} came with warnings, the first: {said[0]}"
            )
        return remarks


def _with_bar(num_simulations: int, progress: bool | None) -> Iterable[int]:
    from tqdm.auto import tqdm

    shown = sys.stderr.isatty() if progress is None else progress
    return tqdm(
        range(num_simulations), desc="calibration", disable=not shown, leave=False, delay=2.0
    )


def check_calibration(
    model: HierarchicalModel,
    tasks_like: Any,
    num_simulations: int = 500,
    methods: str | Method | Sequence[str | Method] | Mapping[str, Sampler] = FULL_BAYES,
    *,
    sampler: Sampler | None = None,
    num_draws: int = 99,
    level: float = 0.01,
    seed: int | jax.Array = 0,
    progress: bool | None = None,
) -> Calibration:
    r"""Simulate from the model, fit what was simulated, and see whether the truth is found.

    Parameters
    ----------
    model : HierarchicalModel
        Its hyperprior must be proper. What it leaves open is scaled to ``tasks_like`` once, and
        is the same for every simulated data set.
    tasks_like : Tasks or DataFrame
        Simulated data sets have its rows with other outcomes.
    num_simulations : int
        Data sets, N. 200 tell large errors, 1,000 small ones.
    methods : str, Method, a sequence of these, or mapping
        "full Bayes" ranks the truth among posterior draws. Other methods, by name or as values
        ("empirical Bayes", ``fit.method``), have no posterior of φ to rank in; of them the coverage
        of intervals of θ_j is found: of posteriors at φ̂, and of those that gradient steps imply
        (:func:`equivalent_prior`). A mapping from label to ``function(model, tasks, seed) -> Fit``
        checks intervals of what else there is.
    sampler : callable, optional
        ``sampler(model, tasks, seed)`` in the place of :func:`full_bayes`: a Fit, or a mapping of
        draws by name, ``mu`` (S, d), ``tau`` (S, d), …, ``theta`` (S, J, d), S at least
        ``num_draws``; of more, so many are taken at even distances. A point φ̂ counts as draws that
        are all the same.
    num_draws : int
        L, draws that are kept of each fit; :func:`full_bayes` is thinned as its autocorrelation
        asks.
    level : float
        Chance that a right sampler is said to fail, over all quantities together.
    seed : int or JAX key
    progress : bool, optional
        Show a progress bar; by default where stderr is a terminal.

    Returns
    -------
    Calibration
        ``verdict`` in words, ``table``, ``failed``, ``plot()``, ``coverage``.

    Raises
    ------
    InputError
        Under an improper hyperprior, naming the parameter; for a network's likelihood; where the
        model refuses every simulated data set.

    Notes
    -----
    Simulated data that the model refuses (an outcome that is constant, say) are left out and
    counted in ``warnings``. Whether data are refused depends on the data alone, so that the ranks
    of the others are uniform all the same.

    References
    ----------
    Talts et al. (2018), Validating Bayesian inference algorithms with simulation-based calibration,
    arXiv 1804.06788. Modrák et al. (2023), Simulation-based calibration checking for Bayesian
    computation: the choice of test quantities shapes sensitivity, Bayesian Analysis.

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
    ...                                known_se="se")
    >>> check = hb.check_calibration(model, tasks, num_simulations=20)
    >>> check.failed, check.ranks["mu[Intercept]"].shape
    ((), (20,))
    """
    started = time.perf_counter()
    check_model(model)
    num_simulations, num_draws = inputs.counts(num_simulations=num_simulations, num_draws=num_draws)
    level = inputs.share("level", level)
    progress, seed = inputs.optional_flag("progress", progress), inputs.seed(seed)
    ranked, by_interval = _read_methods(methods, sampler)
    tasks = model.tasks(tasks_like)
    refuse_without_outcomes(model, tasks)
    model = model.resolve(tasks)
    rng = as_rng(seed)
    phis = draw_phi(model, tasks, num_simulations, rng)
    thetas = draw_theta(model, tasks, phis, rng)
    run = Gathered(model, num_draws, rng, sampler if ranked else None, by_interval)
    with overhearing():  # of each fit; counted instead
        for k in _with_bar(num_simulations, progress):
            phi = {name: value[k : k + 1] for name, value in phis.items()}
            outcome = draw_outcomes(model, tasks, phi, thetas[k : k + 1], rng)[0]
            run.on(replace(tasks, outcome=outcome), phi, thetas[k : k + 1], ranked=ranked)
            run.refuse_hopeless(k + 1)
    remarks = run.remarks(num_simulations)
    return Calibration(
        {label: np.array(found) for label, found in run.ranks.items()}, num_draws,
        num_simulations, level, {name: np.array(found) for name, found in run.covered.items()},
        announce(remarks),
        {"thinning": run.thinning, "refused": {n: len(why) for n, why in run.refused.items()},
         "seed": seed, "seconds": time.perf_counter() - started},
    )  # fmt: skip


def _read_methods(methods: Any, sampler: Sampler | None) -> tuple[bool, dict[str, Sampler]]:
    """Whether draws are ranked, and the methods whose intervals are checked."""
    if sampler is not None and not callable(sampler):
        raise InputError(
            f"sampler is a function of (model, tasks, seed), found {type(sampler).__name__}"
        )
    if isinstance(methods, Mapping):
        for name, method in methods.items():
            if not callable(method):
                raise InputError(f"methods[{name!r}] is no function of (model, tasks, seed)")
        if sampler is not None and SAMPLER in methods:
            raise InputError(
                f"methods holds {SAMPLER!r}, which sampler= is called: name it otherwise"
            )
        return sampler is not None, dict(methods)
    one = isinstance(methods, (str, Method))
    if not (one or np.iterable(methods)):
        found = inputs.shown(methods)
        raise InputError(f"methods must be names, or a mapping of functions, found {found}")
    found = [_method(asked) for asked in ([methods] if one else methods)]
    if not found:
        raise InputError("name at least one method to check")
    ranked = sampler is not None or any(method.draws_phi for method in found)
    quiet = {m.name: functools.partial(m, progress=False) for m in found if not m.draws_phi}
    return ranked, quiet


def _method(asked: Any) -> Method:
    """A method from its name, or as it is."""
    if isinstance(asked, Method) and asked.draws_phi:
        raise InputError(f"{asked} draws phi: pass it as sampler=, whose draws are ranked")
    if isinstance(asked, Method):
        return asked
    known = {_plain(name): kind for name, kind in named_methods().items()}
    if _plain(str(asked)) not in known:
        raise InputError(
            f"check_calibration knows no method {asked!r}; "
            f"{suggestion(str(asked), list(named_methods()))}"
        )
    return known[_plain(str(asked))]()


def _plain(name: str) -> str:
    return name.lower().replace("_", " ")
