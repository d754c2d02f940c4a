r"""The single definition that every method reads.

.. math::

    \log p(\varphi, \theta_{1..J}, D) = \log p(\varphi)
        + \sum_j \left[\log p(\theta_j \mid \varphi) + \log p(D_j \mid \theta_j, \varphi)\right]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from hierbayes import inputs
from hierbayes.errors import InputError, NotApplicable, listing, suggestion
from hierbayes.likelihoods import Likelihood
from hierbayes.likelihoods.generalised import GeneralisedLinear
from hierbayes.likelihoods.neural import Neural
from hierbayes.numerics import float64, triangle
from hierbayes.phi import Part, Space
from hierbayes.priors import HyperPrior, Prior
from hierbayes.priors.checked import refuse_negative
from hierbayes.priors.column_map import ColumnMap
from hierbayes.priors.columns import Columns, Reads
from hierbayes.priors.elliptical import Elliptical
from hierbayes.priors.hyperprior import Scales, Shape
from hierbayes.tasks import Encoder, Task, Tasks
from hierbayes.tasks.container import kept


@dataclass(frozen=True)
class HierarchicalModel:
    """A likelihood, a prior that tasks share, and a hyperprior on its parameters.

    Parameters
    ----------
    likelihood : Likelihood
        p(D_j | θ_j, φ), for example ``hb.likelihoods.Gaussian()``.
    prior : Prior
        p(θ_j | φ), for example ``hb.priors.Gaussian(correlated=True)``, or
        ``hb.priors.StudentT(4)`` where some tasks may be unlike the rest.
    hyperprior : HyperPrior
        p(φ); what is left open gets weakly informative defaults, scaled to the data once.
    encoder : Encoder, optional
        How DataFrames become Tasks; :func:`~hierbayes.from_formula` gives it.
    columns : Columns, optional
        Where the predictors lie, noted when the model is first resolved: methods compute in centred
        and scaled columns, and answer in the user's (docs/notation.md says in which columns a
        default prior is).

    Examples
    --------
    >>> import hierbayes as hb
    >>> model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    >>> model, tasks = hb.from_formula(
    ...     "log_radon ~ 1 + floor + (1 + floor | county)", hb.datasets.radon()
    ... )
    """

    likelihood: Likelihood
    prior: Prior
    hyperprior: HyperPrior = field(default_factory=HyperPrior, hash=False)
    encoder: Encoder | None = field(default=None, repr=False, compare=False)
    columns: Columns | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        kinds = {
            "likelihood": (Likelihood, "a likelihood, for example hb.likelihoods.Gaussian()"),
            "prior": (Prior, "a prior of tasks, for example hb.priors.Gaussian()"),
            "hyperprior": (HyperPrior, "a HyperPrior"),
        }
        for name, (kind, what) in kinds.items():
            inputs.instance(name, getattr(self, name), kind, what)
        stated = [*self.hyperprior.extra, *(["sigma"] if self.hyperprior.sigma else [])]
        likelihood = self.likelihood.bound(stated)
        _refuse_extra(self.hyperprior, likelihood)
        object.__setattr__(self, "likelihood", likelihood)

    def tasks(self, data: Any) -> Tasks:
        """``data`` as Tasks: as it is, or a DataFrame through the model's formula."""
        if isinstance(data, Tasks):
            return self.likelihood.named(data)
        if self.encoder is None:
            raise InputError(
                f"expected Tasks, found {type(data).__name__}; only a model made by from_formula "
                "reads DataFrames"
            )
        return self.encoder.encode(data)

    def without_encoder(self) -> HierarchicalModel:
        """The model alone, hashable for compilation: its numbers stand in φ and the tasks."""
        return HierarchicalModel(self.likelihood, self.prior, _NOTHING)

    def shape(self, tasks: Tasks) -> Shape:
        """Names along φ's dimensions and the structure of the prior."""
        prior = self._elliptical
        return Shape(
            tasks.coef, tasks.labels.shared, tasks.labels.task_predictors,
            prior.blocks(tasks.coef), tuple(prior.free_mean(tasks.coef).tolist()),
            self.likelihood.parameters(),
        )  # fmt: skip

    def scales(self, tasks: Tasks) -> Scales:
        """Natural units of f and of every coefficient in these tasks."""
        return Scales.of(tasks, self.likelihood)

    def parts(self, tasks: Tasks) -> list[Part]:
        """What the prior and the likelihood own of φ."""
        labels = tasks.labels
        of_prior = self._elliptical.parts(tasks.coef, labels.task_predictors)
        return of_prior + self.likelihood.parts(labels.shared)

    @property
    def _elliptical(self) -> Elliptical:
        if not isinstance(self.prior, Elliptical):
            raise InputError(f"unknown prior {type(self.prior).__name__}")
        return self.prior

    def space(self, tasks: Tasks, *names: str, likelihood_alone: bool = False) -> Space:
        """φ as an object, in these tasks' units.

        ``names``: of some parts alone. ``likelihood_alone``: no prior says where the likelihood's
        own parameters lie; they are positive.
        """
        scales = self.scales(tasks)
        parts = [p for p in self.parts(tasks) if not names or p.name in names]
        if likelihood_alone:
            parts = [replace(p, support="positive") if p.moved else p for p in parts]
        own = [p.name for p in parts if p.support == "hyperprior"]
        units = {
            "mu": scales.mu, "gamma": scales.coef[:, None] / scales.task_predictors,
            "tau": scales.coef, "beta": scales.shared,
        }  # fmt: skip
        hyperpriors = self.resolve(tasks).hyperprior.of_parameters(own) if own else {}
        starts = {"sigma": float(scales.spread)}
        return Space.of(parts, units=units, hyperpriors=hyperpriors, starts=starts)

    def fixed(self, tasks: Tasks) -> Space:
        """b = (μ, Γ, β), as it is."""
        return Space.of([p for p in self.parts(tasks) if p.name in ("mu", "gamma", "beta")])

    def resolve(self, tasks: Any) -> HierarchicalModel:
        """The model with every default of its hyperprior filled in, scaled to these tasks.

        Resolving twice changes nothing: defaults are never recomputed.
        """
        tasks = self.tasks(tasks)
        shape, columns = self.shape(tasks), self.columns
        if columns is None:
            columns = Columns()
            if self.likelihood.linear and not isinstance(self.likelihood, Neural):
                columns = Columns.of(tasks, self.hyperprior)
        elif self.hyperprior.is_resolved(shape):
            return self
        believed = columns.map(shape, "hyperpriors", scaled=False).tasks(tasks)
        hyperprior = self.hyperprior.resolve(shape, believed, self.likelihood)
        return replace(self, hyperprior=hyperprior, columns=columns)

    def column_map(self, tasks: Tasks, reads: Reads, *, scaled: bool = True) -> ColumnMap:
        """From the columns that a method computes with to the user's; of a resolved model.

        Where p(φ) is read the units of a column change only if p(φ) can follow. "hyperpriors", not
        ``scaled``, are the columns that p(φ) is stated in.
        """
        assert self.columns is not None
        shape = self.shape(tasks)
        if scaled and reads == "hyperpriors":
            return self.columns.map(shape, reads, self.hyperprior.scalable(shape))
        return self.columns.map(shape, reads, scaled)

    def seen_through(self, at: ColumnMap, tasks: Tasks, reads: Reads) -> HierarchicalModel:
        """The model of the tasks in the map's columns: the same one, with priors in their units.

        Where a method does not read p(φ), its defaults there.
        """
        own = HyperPrior(sigma=self.hyperprior.sigma, extra=self.hyperprior.extra)
        if reads == "hyperpriors":
            own = self.hyperprior.scaled(
                self.shape(tasks), *([c.sd for c in part] for part in
                                     (at.varying, at.shared, at.task_predictors))
            )  # fmt: skip
        inner = replace(self, hyperprior=own, columns=Columns(), encoder=None)
        return inner.resolve(at.tasks(tasks))

    def require_gaussian(
        self, method: str, needs: str, instead: str = "use full_bayes or maml"
    ) -> None:
        """Refuse a method that needs what only a Gaussian likelihood gives."""
        if not self.likelihood.gaussian_in_theta:
            kind = type(self.likelihood).__name__
            raise NotApplicable(
                f"{method} needs {needs}, which is not to be had under a {kind} likelihood; "
                f"{instead}"
            )

    @property
    def conjugate(self) -> bool:
        """Whether likelihood and prior are both Gaussian in θ: everything has a closed form."""
        return self.likelihood.gaussian_in_theta and self.prior.gaussian

    def require_gaussian_prior(self, what: str, because: str, instead: str) -> None:
        """Refuse what is only defined, or only offered, under a Gaussian prior of tasks."""
        if not self.prior.gaussian:
            kind = type(self.prior).__name__
            raise NotApplicable(f"{what} takes no {kind} prior: {because}; {instead}")

    def check(self, tasks: Tasks, *, learns_prior: bool) -> None:
        """Refuse tasks that the model cannot be fitted to, before any computation."""
        self.likelihood.check(tasks)
        if isinstance(self.likelihood, Neural):
            raise NotApplicable(
                f"{type(self.likelihood).__name__} learns its network from many tasks: use "
                "hb.maml, hb.imaml, hb.reptile, hb.meta.llama or hb.meta.abml, or "
                "hb.empirical_bayes with a LastLayer"
            )
        self.shape(tasks)
        if tasks.outcome is None:
            raise InputError(f"the data hold no outcome {tasks.labels.outcome!r} to fit")
        if tasks.num_rows == 0:
            raise InputError("the tasks hold no rows")
        if (what := _constant(tasks, self.likelihood)) is not None:
            raise InputError(
                f"the outcome {tasks.labels.outcome!r} is {what} in every row: there is nothing to "
                "learn from a constant"
            )
        if learns_prior and int((tasks.sizes > 0).sum()) < 2:
            raise InputError(
                f"a prior cannot be learned from one task: found {tasks.num_tasks} task(s), "
                f"{int((tasks.sizes > 0).sum())} with rows; give more tasks, or use no_pooling"
            )
        if self.likelihood.linear:
            shape = self.shape(tasks)
            columns = self.columns
            if columns is None and not isinstance(self.likelihood, Neural):
                columns = Columns.of(tasks, self.hyperprior)
            if columns is not None:  # a mean far from zero hides what a column is made of
                tasks = columns.map(shape, "rows").tasks(tasks)
            _check_independent(tasks, shape.free_mean)

    # ----------------------------------------------------------------- density

    def phi_distributions(self, tasks: Any) -> dict[str, dist.Distribution]:
        """p(φ) by name, each over the whole array; the hyperprior is resolved first.

        Of φ in the columns that default priors are stated in, centred where that changes no model:
        docs/notation.md says when; ``numpyro_program`` has the same sites.
        """
        tasks = self.tasks(tasks)
        return self.resolve(tasks).hyperprior.distributions(self.shape(tasks))

    def log_joint(self, phi: dict[str, Any], theta: Any, tasks: Any) -> float:
        r"""log p(φ, θ, D) at constrained (mu, tau, corr, beta, gamma, sigma, theta).

        .. math::

            \log p(\varphi) + \sum_j
                [\log p(\theta_j \mid \varphi) + \log p(D_j \mid \theta_j, \varphi)]

        φ and θ are given in the user's columns. The density is one over φ and θ in the columns of
        :meth:`phi_distributions`, which where Σ is centred has another volume.

        Parameters
        ----------
        phi : dict
            ``mu`` (d,), ``tau`` (d,), ``corr`` (d, d), ``beta`` (p,), ``gamma`` (d, q), ``sigma``.
        theta : array (J, d)
        tasks : Tasks
        """
        tasks = self.tasks(tasks)
        with float64():
            density = jax.jit(lambda p, t: self._log_joint(p, t, tasks))
            return float(
                density({name: np.asarray(v) for name, v in phi.items()}, np.asarray(theta))
            )

    def _log_joint(self, phi: dict[str, Any], theta: Any, tasks: Tasks) -> jax.Array:
        resolved = self.resolve(tasks)
        at = resolved.column_map(tasks, "hyperpriors", scaled=False)
        if "beta" in phi or not at.trivial:
            theta = at.theta_inward(theta, phi.get("beta"))
        phi, tasks = at.phi_inward(phi), at.tasks(tasks)
        w = jnp.asarray(tasks.task_predictors)
        total = jax.vmap(lambda t, w_j: self.prior.log_prob(t, phi, w_j))(theta, w).sum()
        for name, hyperprior in resolved.hyperprior.distributions(self.shape(tasks)).items():
            total = total + jnp.sum(hyperprior.log_prob(phi[name]))
        rows = self.likelihood.log_likelihood_of_rows(theta, phi, *self.likelihood.arrange(tasks))
        return total + rows.sum()

    # ----------------------------------------------------------------- program

    def numpyro_program(self, tasks: Any, *, centred: bool = True) -> Callable[[], None]:
        """The same model as an ordinary NumPyro program, for NumPyro's MCMC, SVI and Predictive.

        Its sites are ``mu``, ``tau``, ``corr``, ``beta``, ``gamma``, ``sigma``, ``theta`` and
        the observed ``y``; its log density is :meth:`log_joint`. Where columns are centred for the
        default priors (see :meth:`phi_distributions`), what that changes is sampled in the centred
        columns, as ``mu_centred`` and the like, and ``mu`` is deterministic. With ``centred=False``
        θ is written as μ + L z and the site ``z`` is sampled in its place, a reparametrisation for
        samplers; ``theta`` is then deterministic.

        Examples
        --------
        >>> import jax, hierbayes as hb
        >>> from numpyro.infer import Predictive
        >>> model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
        ...                                known_se="se")
        >>> draws = Predictive(model.numpyro_program(tasks), num_samples=2)(jax.random.key(0))
        >>> draws["theta"].shape
        (2, 8, 1)
        """
        tasks = self.tasks(tasks)
        resolved = self.resolve(tasks)
        at = resolved.column_map(tasks, "hyperpriors", scaled=False)
        sites = resolved.hyperprior.distributions(self.shape(tasks))
        moved, tasks = at.changed(), at.tasks(tasks)
        data = self._arranged(tasks)

        def named(name: str) -> str:
            return f"{name}_centred" if name in moved else name

        def program() -> None:
            theta, phi = _sites(self, sites, data, named, centred=centred)
            if moved:
                told = at.phi(phi) | {"theta": at.theta(theta, phi.get("beta"))}
                for name in moved & {*told}:
                    numpyro.deterministic(name, jnp.asarray(told[name]))
            if not centred and "theta" not in moved:
                numpyro.deterministic("theta", theta)
            _observed(self.likelihood, theta, phi, data)

        return program

    def _arranged(self, tasks: Tasks) -> tuple[Task, Any]:
        """Rows and the task of each, flat where f is told row by row."""
        if self.likelihood.has_location:
            return tasks.flat(), tasks.task_of_row
        return self.likelihood.arrange(tasks)

    def program_of_data(self, tasks: Tasks) -> tuple[Joint, Any]:
        """The non-centred program as a function of its numbers, and these, for samplers.

        For models whose priors on φ are about the columns as they lie; :meth:`numpyro_program` is
        for others too.
        """
        assert not self.column_map(tasks, "hyperpriors", scaled=False).changed()
        leaves, how = jax.tree.flatten(self.phi_distributions(tasks))
        return Joint(self.without_encoder(), how), (leaves, *self._arranged(tasks))


def _sites(
    model: HierarchicalModel, sites: dict[str, dist.Distribution], data: tuple[Task, Any],
    named: Callable[[str], str], *, centred: bool,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """φ and every θ_j as sites of a program; (θ (J, d), φ)."""
    phi, w = sample_phi(sites, named), jnp.asarray(data[0].task_predictors)
    with numpyro.plate("task", len(w), dim=-1):
        if centred:
            theta = jnp.asarray(numpyro.sample(named("theta"), model.prior.distribution(phi, w)))
        else:
            z = numpyro.sample("z", model.prior.noncentred(jnp.shape(phi["tau"])[-1]))
            theta = model.prior.location(phi, w) + z @ model.prior.scale_tril(phi).T
    return theta, phi


def _observed(
    likelihood: Likelihood, theta: Any, phi: dict[str, Any], data: tuple[Task, Any]
) -> None:
    """The outcomes as a site of a program."""
    rows, of_row = data
    if likelihood.has_location:
        outcome = likelihood.distribution(theta[of_row], phi, rows)
        with numpyro.plate("row", len(rows.outcome), dim=-1):
            numpyro.sample("y", outcome, obs=rows.outcome)
    else:
        arranged = jax.tree.map(jnp.asarray, (rows, of_row))
        each = likelihood.log_likelihood_of_rows(theta, phi, *arranged)
        numpyro.factor("y", each.sum())


class Joint(NamedTuple):
    """The joint density as a program of numbers: priors' leaves, rows, the task of each."""

    model: HierarchicalModel
    how: Any

    def __call__(self, data: Any) -> Callable[[], None]:
        """The non-centred program."""
        leaves, *arranged = data
        sites = jax.tree.unflatten(self.how, leaves)

        def program() -> None:
            rows: tuple[Task, Any] = (arranged[0], arranged[1])
            theta, phi = _sites(self.model, sites, rows, str, centred=False)
            numpyro.deterministic("theta", theta)
            _observed(self.model.likelihood, theta, phi, rows)

        return program


def _refuse_extra(hyperprior: HyperPrior, likelihood: Likelihood) -> None:
    """Refuse priors of parameters that the likelihood has not, and negative ones of its own."""
    own, kind = likelihood.parameters(), type(likelihood).__name__
    for name, given in hyperprior.extra.items():
        if name not in own:
            others = [n for n in own if n != "sigma"]
            has = suggestion(name, others) if others else "it has no others"
            raise InputError(
                f"HyperPrior(extra=…) names {name!r}, which is no parameter of the {kind} "
                f"likelihood; {has}"
            )
        if isinstance(likelihood, GeneralisedLinear):
            refuse_negative(f"extra={{{name!r}: …}}", given, "a positive parameter")


def check_model(model: Any) -> None:
    """Refuse what is no model, before anything is asked of it."""
    inputs.instance("model", model, HierarchicalModel, "a HierarchicalModel")


_NOTHING = HyperPrior()


def sample_phi(
    sites: dict[str, dist.Distribution], named: Callable[[str], str] = str
) -> dict[str, Any]:
    """Inside a NumPyro program: one sample site a name of φ, ``named`` as it says."""
    phi = {}
    for name, hyperprior in sites.items():
        try:
            phi[name] = numpyro.sample(named(name), hyperprior)
        except NotImplementedError as error:
            raise InputError(
                f"the hyperprior on {name} is improper: nothing can be drawn from it. Give a "
                f"proper one, HyperPrior({name}=…), to draw from the prior"
            ) from error
    return phi


def _constant(tasks: Tasks, likelihood: Likelihood) -> str | None:
    """What every outcome is, where all are so alike that nothing can be learned from them.

    The same count in every row is not: it says how large the rate is, none at all does not.
    """
    y, same = tasks.outcome, f"{tasks.outcome[0]:g}"
    if isinstance(likelihood, GeneralisedLinear) and likelihood.discrete:
        up, down = likelihood.endless(tasks)
        if down.all():
            return same
        return (same if np.ptp(y) == 0 else "all of its trials") if up.all() else None
    return same if likelihood.parameters() and np.ptp(y) == 0 else None


@kept
def _check_independent(tasks: Tasks, free_mean: tuple[bool, ...]) -> None:
    """Refuse a column that over all tasks together depends linearly on the others."""
    free = np.array(free_mean)
    names = [c for c, is_free in zip(tasks.coef, free_mean, strict=True) if is_free]
    names += tasks.labels.shared
    names += [f"{w} on {c}" for w in tasks.labels.task_predictors for c in tasks.coef]

    def columns() -> np.ndarray:
        level = tasks.task_predictors[tasks.task_of_row]
        moved = [tasks.predictors * level[:, [k]] for k in range(level.shape[1])]
        return np.column_stack([tasks.predictors[:, free], tasks.shared, *moved])

    _refuse_dependent(tasks.predictors, list(tasks.coef))
    if names != list(tasks.coef):
        _refuse_dependent(columns(), names)


def _refuse_dependent(columns: np.ndarray, names: list[str]) -> None:
    factor = triangle(columns)
    norms = np.linalg.norm(factor, axis=0)
    for name, norm in zip(names, norms, strict=True):
        if norm == 0:
            raise InputError(f"predictor {name!r} is zero in every row; leave it out")
    if len(columns) < len(names):
        raise InputError(f"{len(columns)} rows cannot tell {len(names)} predictors apart")
    residual = np.abs(np.diag(factor)) / norms
    if not (dependent := np.flatnonzero(residual < 1e-10)).size:
        return
    last = int(dependent[0])
    weights = np.linalg.lstsq(columns[:, :last] / norms[:last], columns[:, last], rcond=None)[0]
    partners = [names[i] for i in np.flatnonzero(np.abs(weights) > 1e-8 * np.abs(weights).max())]
    constant = "constant, like " if np.ptp(columns[:, last]) == 0 else "a linear combination of "
    raise InputError(
        f"predictor {names[last]!r} is {constant}{listing(partners)} over all tasks together; "
        "leave one of them out"
    )
