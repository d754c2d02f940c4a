r"""Any NumPyro program for one task as a likelihood.

.. math:: \log p(D_j \mid \theta_j, \varphi) = \sum_{\text{observed sites}}
          \log p(\text{site} \mid \theta_j, \varphi)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro import handlers

from hierbayes.errors import InputError, NotApplicable, listing
from hierbayes.likelihoods.base import Likelihood
from hierbayes.likelihoods.outcomes_of_programs import ProgramOutcomes
from hierbayes.numerics import float64
from hierbayes.tasks import Task, Tasks

OneTask = Callable[[Any, dict[str, Any], Task], Any]
"""``program(theta, phi, task)`` with observed sample sites."""


def from_numpyro(
    program: OneTask,
    *,
    theta: Sequence[str] | None = None,
    parameters: Sequence[str] | None = None,
) -> Program:
    r"""A NumPyro program for one task, p(D_j | θ_j, φ), as a likelihood.

    .. math:: \log p(D_j \mid \theta_j, \varphi) = \sum_{\text{observed sites}}
              \log p(\text{site} \mid \theta_j, \varphi)

    Every method takes it but ``no_pooling`` and ``complete_pooling``. Derivatives in θ are
    automatic; evidence is by Laplace's approximation or, up to three coefficients, quadrature
    around the mode, which is for posteriors with one mode. ``full_bayes`` samples jointly by NUTS
    unless asked to collapse.

    Parameters
    ----------
    program : callable
        A function of (theta, phi, task), written for one task: ``theta`` (d,), ``phi`` by name,
        and ``task`` with ``predictors`` (n, k), ``shared`` (n, p), ``outcome`` (n,) and ``slots``.
        Its sample sites are observed, ``numpyro.sample("y", …, obs=task.outcome)``, with a log
        density a row; then shorter tasks are filled up and what fills up is not counted. A site
        with one log density for a whole task (a time series, a multivariate outcome) needs tasks
        of equal length. JAX traces it: no Python branches on values.
    theta : sequence of str, optional
        Of θ's entries; by default θ has one entry a column of the tasks, named like it.
    parameters : sequence of str, optional
        The program's own scalars in φ; by default those that the model's HyperPrior states in
        ``extra`` (and ``sigma``, if it states one). Their priors decide their support: real,
        positive or between 0 and 1.

    Returns
    -------
    Program
        Default priors know nothing of θ's units here: μ ~ N(0, 2.5²), τ ~ HalfNormal(1). State
        your own in HyperPrior where θ has others.

    Examples
    --------
    Drug concentrations that fall exponentially, each patient at a rate of their own:

    >>> import jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist
    >>> import hierbayes as hb
    >>> def decay(theta, phi, task):
    ...     level = jnp.exp(theta[0] - jnp.exp(theta[1]) * task.predictors[:, 0])
    ...     numpyro.sample("y", dist.LogNormal(jnp.log(level), phi["noise"]), obs=task.outcome)
    >>> rng, hours = np.random.default_rng(0), np.arange(1.0, 7.0)
    >>> rates = np.exp(rng.normal(-1.0, 0.3, 20))
    >>> patients = [(hours[:, None], 5 * np.exp(-k * hours + 0.1 * rng.normal(size=6)))
    ...             for k in rates]
    >>> tasks = hb.Tasks.from_arrays(patients, coef=["hours"])
    >>> model = hb.HierarchicalModel(
    ...     hb.likelihoods.from_numpyro(decay, theta=["log_level", "log_rate"]),
    ...     hb.priors.Gaussian(correlated=False),
    ...     hb.HyperPrior(extra={"noise": dist.HalfNormal(1.0)}),
    ... )
    >>> fit = hb.empirical_bayes(model, tasks)
    >>> bool(abs(fit.phi["noise"] - 0.1) < 0.03), fit.theta.coef.values.tolist()
    (True, ['log_level', 'log_rate'])
    """
    if not callable(program):
        raise InputError(
            f"from_numpyro takes a function of (theta, phi, task), found {type(program).__name__}"
        )
    names = None if theta is None else tuple(map(str, theta))
    if names is not None and (not names or len(set(names)) < len(names)):
        raise InputError(f"theta names every entry of θ once, found {names}")
    own = None if parameters is None else tuple(map(str, parameters))
    return Program(program, names, own)


@dataclass(frozen=True)
class Program(Likelihood):
    """What :func:`from_numpyro` gives."""

    program: OneTask
    theta: tuple[str, ...] | None = None
    own: tuple[str, ...] | None = None
    seen: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    linear, log_concave, has_location = False, False, False

    @property
    def discrete(self) -> bool:  # type: ignore[override]
        """True where outcomes are counts or categories."""
        return bool(self.seen.get("discrete", False))

    @property
    def by_row(self) -> bool:
        """True where every site has a log density a row."""
        return bool(self.seen.get("by_row", True))

    def bound(self, stated: Sequence[str]) -> Program:
        """The program with the names of its own parameters, as the hyperprior states them."""
        if self.own is not None:
            return self
        return replace(self, own=tuple(stated))

    def parameters(self) -> tuple[str, ...]:
        """Names of the program's own parameters in φ."""
        return self.own or ()

    def named(self, tasks: Tasks) -> Tasks:
        """The tasks with θ's entries named as :func:`from_numpyro` was told."""
        if self.theta is None or tasks.labels.coef == self.theta:
            return tasks
        return replace(tasks, labels=replace(tasks.labels, coef=self.theta))

    def units(self, tasks: Tasks) -> tuple[float, float]:
        """Nothing is known of a program's units."""
        del tasks
        return 0.0, 1.0

    # ----------------------------------------------------------------- density

    def sites(self, theta: Any, phi: dict[str, Any], task: Task) -> dict[str, Any]:
        """The sample sites of one run of the program."""
        if task.outcome is None:  # rows to predict: any value will do in the outcome's place
            task = replace(task, outcome=jnp.zeros(len(task.mask)))
        seeded = handlers.seed(self.program, rng_seed=0)
        with handlers.block():
            trace = handlers.trace(seeded).get_trace(theta, phi, task)
        return {name: site for name, site in trace.items() if site["type"] == "sample"}

    def log_likelihood(self, theta: Any, phi: dict[str, Any], task: Task) -> jax.Array:
        """The sites' log densities of each row (n,); of a whole task in its first row."""
        size, total = len(task.mask), 0.0
        for site in self.sites(theta, phi, task).values():
            found = site["fn"].log_prob(site["value"])
            found = found if site["scale"] is None else site["scale"] * found
            if self.by_row:
                total = total + jnp.reshape(found, (size, -1)).sum(-1)
            else:
                total = total + jnp.zeros(size).at[0].set(jnp.sum(found))
        return jnp.where(task.mask, total, 0.0)

    def distribution(self, theta: Any, phi: dict[str, Any], task: Task) -> dist.Distribution:
        """The distribution of the outcomes (n,) under one θ (d,)."""
        sites = list(self.sites(theta, phi, task).values())
        if len(sites) != 1 or not self.by_row:
            raise NotApplicable(
                "predictions of rows need a program with one sample site that has a distribution a "
                f"row; this one has {len(sites)} site(s)"
                + ("" if self.by_row else " and one log density for a whole task")
            )
        return sites[0]["fn"]

    def divergence_of_rows(
        self, thetas: Any, others: Any, phi: dict[str, Any], rows: Task, task_of_row: Any
    ) -> jax.Array:
        """KL(p(y | θ_j) ‖ p(y | θ′_j)) of each row (J, n); NaN where NumPyro knows none."""

        def one(theta: Any, other: Any, task: Task) -> jax.Array:
            here, there = (self.distribution(t, phi, task) for t in (theta, other))
            return jnp.where(task.mask, jnp.asarray(dist.kl_divergence(here, there)), 0.0)

        try:
            return jax.vmap(one)(thetas, others, rows)
        except (NotImplementedError, NotApplicable):
            return jnp.full(rows.mask.shape, jnp.nan)

    def outcomes(self, thetas: Any, phis: dict[str, Any], rows: Tasks) -> ProgramOutcomes:
        """The outcomes' distributions under S values of θ (S, J, d) and φ, for predictions."""
        return ProgramOutcomes(self, thetas, phis, rows)

    # ------------------------------------------------------- many tasks at once

    def arrange(self, tasks: Tasks) -> tuple[Task, None]:
        """Tasks side by side, filled up to the longest by copies of rows of their own."""
        width = int(tasks.sizes.max(initial=1))
        return self.side_by_side(tasks, np.arange(tasks.num_tasks), width), None

    def aggregate(self, tasks: Tasks) -> list[tuple[Any, tuple[Task, Any]]]:
        """In power-of-two buckets; tasks without rows are in none."""
        return [
            (positions, (self.side_by_side(tasks, positions, block.mask.shape[1]), None))
            for positions, block in tasks.blocks()
        ]

    def side_by_side(self, tasks: Tasks, positions: np.ndarray, width: int) -> Task:
        """Tasks on a leading axis; a copy of a row that exists never leaves a family's support."""
        sizes = tasks.sizes[positions]
        place = np.minimum(np.arange(width), np.maximum(sizes, 1)[:, None] - 1)
        rows = np.minimum(tasks.starts[:-1][positions][:, None] + place, max(tasks.num_rows - 1, 0))
        rows = np.where(sizes[:, None] > 0, rows, 0)
        return Task(
            tasks.predictors[rows], tasks.shared[rows], tasks.task_predictors[positions],
            None if tasks.outcome is None else tasks.outcome[rows],
            {name: values[rows] for name, values in tasks.slots.items()},
            np.arange(width) < sizes[:, None],
        )  # fmt: skip

    # ---------------------------------------------------------------- boundary

    def check(self, tasks: Tasks) -> None:
        """Run the program once, without numbers, and refuse what is no likelihood of one task."""
        if tasks.outcome is None or tasks.num_rows == 0:
            return
        size = int(tasks.sizes.max())
        found, shapes = self._traced(tasks)
        latent = [name for name, site in found.items() if not site["is_observed"]]
        if latent:
            raise InputError(
                f"site(s) {listing(latent)} of the program are not observed: what a task does not "
                "observe belongs into theta, or is summed out in the program"
            )
        if not found:
            raise InputError(
                "the program has no observed site: end it with "
                'numpyro.sample("y", …, obs=task.outcome)'
            )
        by_row = all(s.shape[:1] == (size,) for s in shapes)
        if not by_row and np.ptp(tasks.sizes) > 0:
            raise InputError(
                f"site(s) {listing(list(found))} have a log density of shape "
                f"{listing([str(s.shape) for s in shapes])} for a task of {size} rows: tasks of "
                "different lengths need one a row, which plates and batch dimensions give; tasks "
                "of equal length may have one for the whole task"
            )
        discrete = any(site["fn"].is_discrete for site in found.values())
        self.seen.update(by_row=by_row, discrete=discrete)

    def _traced(self, tasks: Tasks) -> tuple[dict[str, Any], list[Any]]:
        """The sites of the longest task by name, and the shapes of their log densities."""
        longest = int(np.argmax(tasks.sizes))
        width = int(tasks.sizes.max())
        task = jax.tree.map(lambda v: v[0], self.side_by_side(tasks, np.array([longest]), width))
        found: dict[str, Any] = {}

        def run(theta: jax.Array) -> Any:
            phi: dict[str, Any] = dict.fromkeys(self.parameters(), 0.5 + 0.0 * theta.sum())
            phi |= {"mu": theta, "beta": jnp.zeros(tasks.shared.shape[1])}
            found.update(self.sites(theta, phi, task))
            return [jnp.asarray(s["fn"].log_prob(s["value"])) for s in found.values()]

        try:
            with float64():
                return found, jax.eval_shape(run, jnp.zeros(len(tasks.coef)))
        except KeyError as error:
            raise InputError(
                f"the program asks phi for {error.args[0]!r}, but phi holds "
                f"{listing([*self.parameters(), 'mu', 'beta'])}; state its prior in "
                f"HyperPrior(extra={{{error.args[0]!r}: …}})"
            ) from error
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            raise InputError(
                f"the program does not run on task {listing([tasks.names[longest]])}: "
                f"{type(error).__name__}: {line}"
            ) from error

    # ------------------------------------------------- what a program does not have

    def family(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> dist.Distribution:
        """None: outcomes do not depend on θ through one number a row."""
        raise NotApplicable(NO_PREDICTOR)

    def predictive(
        self, location: Any, variance: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> Any:
        """None: outcomes do not depend on θ through one number a row."""
        raise NotApplicable(NO_PREDICTOR)

    def curvature_bound(self, phi: dict[str, Any], slots: dict[str, Any]) -> Any:
        """None is known."""
        return np.inf


NO_PREDICTOR = (
    "a likelihood from a NumPyro program has no linear predictor that a family stands around; use "
    "fit.predict, or run the program"
)
