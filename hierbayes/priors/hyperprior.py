"""p(φ): what is believed of the prior's parameters before any data.

The units in which default priors, starting values and tolerances are stated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpyro.distributions as dist

from hierbayes.errors import InputError
from hierbayes.likelihoods import Likelihood
from hierbayes.numerics import standard_promotion
from hierbayes.phi.assembled import Assembled
from hierbayes.phi.lkj import LKJ
from hierbayes.priors import checked
from hierbayes.tasks import Tasks
from hierbayes.tasks.container import kept


@dataclass(frozen=True)
class Scales:
    """Natural units of what θ says of the rows and of every coefficient, from the data.

    ``spread`` of f; ``mu_location`` (d,) and ``mu`` (d,): where μ may lie; ``coef`` (d,),
    ``shared`` (p,) and ``task_predictors`` (q,): one unit of each.
    """

    spread: float
    mu_location: np.ndarray
    mu: np.ndarray
    coef: np.ndarray
    shared: np.ndarray
    task_predictors: np.ndarray

    @classmethod
    def of(cls, tasks: Tasks, likelihood: Likelihood) -> Scales:
        """The spread of f by the likelihood's units, divided by each predictor's."""
        level, spread = likelihood.units(tasks)
        if not likelihood.linear:  # what θ's entries multiply, if anything, is not known
            ones = np.full(len(tasks.coef), spread)
            shared, w = (
                np.ones(np.shape(part)[1]) for part in (tasks.shared, tasks.task_predictors)
            )
            return cls(spread, np.zeros(len(ones)), ones, ones, shared, w)
        sd, mean = _spread_and_mean(tasks)
        constant = sd <= 1e-12 * np.maximum(np.abs(mean), 1e-300)
        scale = spread / np.where(constant, 1.0, sd)
        at_origin = np.hypot(spread, np.linalg.norm(np.where(constant, 0.0, scale * mean)))
        scale = np.where(constant, at_origin / np.where(mean == 0, 1.0, np.abs(mean)), scale)
        location = np.where(constant & (mean != 0), level / np.where(mean == 0, 1.0, mean), 0.0)
        d = tasks.predictors.shape[1]
        w_sd, w_mean = tasks.task_predictors.std(axis=0), tasks.task_predictors.mean(axis=0)
        w_sd = np.where(w_sd > 0, w_sd, 1.0)
        at_zero = np.sqrt(1 + ((w_mean / w_sd) ** 2).sum())
        return cls(spread, location[:d], scale[:d] * at_zero, scale[:d], scale[d:], w_sd)


@kept
def _spread_and_mean(tasks: Tasks) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviation and mean of every column, (d + p,)."""
    columns = [*tasks.predictors.T, *tasks.shared.T]
    # a copy side by side is summed faster, and more exactly, than a column with gaps
    moments = [(c.std(), c.mean()) for c in map(np.ascontiguousarray, columns)]
    sd, mean = np.array(moments).reshape(-1, 2).T
    return sd, mean


Stated = dist.Distribution | Mapping[str, dist.Distribution] | None


@dataclass(frozen=True)
class Shape:
    """The names along φ's dimensions and the structure of the prior: what a prior is about."""

    coef: tuple[str, ...]
    shared: tuple[str, ...]
    task_predictors: tuple[str, ...]
    blocks: tuple[tuple[int, ...], ...]
    free_mean: tuple[bool, ...]
    parameters: tuple[str, ...]

    @property
    def correlated(self) -> bool:
        """True where at least two coefficients may be correlated."""
        return any(len(block) > 1 for block in self.blocks)


@dataclass(frozen=True)
class HyperPrior:
    r"""Priors on μ, τ, R, β, Γ and the likelihood's parameters.

    Every field is a NumPyro distribution (of one entry, applied to each), a mapping from
    coefficient name to distribution, or None for the default. Defaults are weakly informative,
    scaled to the data once, and stated in columns that are centred where that changes no model
    (docs/notation.md says where). With s_y the outcome's standard deviation over all rows (one on
    the scale of a logit or log link, with the logit of the overall share or the log of the overall
    mean for the mean outcome; the spread by quartiles, and the median, under Student-t; one, and
    zero, of a NumPyro program) and s_c = s_y / sd(x_c) for a predictor x_c,

    ========  ==========================================================================
    mu        Normal(0, 2.5 s_c); for a constant column (the intercept) around the mean
              outcome, with s_c = s_y where predictors are centred; where they cannot be
              (``||``, priors of the user's) with s_c² = s_y² + Σ_k (s_k mean x_k)², and
              wider by the root of 1 + Σ (mean w / sd w)² over task predictors
    tau       HalfNormal(s_c), with the same s_c
    corr      LKJ(2) over each correlated group
    beta      Normal(0, 2.5 s_c) with s_c of the shared column
    gamma     Normal(0, 2.5 s_c / sd(w))
    sigma     HalfNormal(s_y)
    ========  ==========================================================================

    Parameters
    ----------
    mu, tau, beta, gamma : distribution, mapping or None
        ``tau`` is a prior on standard deviations; for a prior on a variance transform it by
        ``PowerTransform(0.5)``.
    corr : distribution, float or None
        An LKJ distribution over the correlation matrix, or its concentration.
    sigma : distribution or None
        Prior on the residual standard deviation.
    extra : mapping
        Priors on a likelihood's own parameters by name, other than these; by default
        InverseGamma(0.4, 0.3) for ``concentration`` and ``shape``, Gamma(2, 0.1) for ``df``.

    Examples
    --------
    >>> import hierbayes as hb, numpyro.distributions as dist
    >>> rubin = hb.HyperPrior(mu=dist.Normal(0, 5), tau=dist.HalfCauchy(5))
    >>> hb.HyperPrior(mu={"Intercept": dist.Normal(0, 10)}).tau is None
    True
    """

    mu: Stated = None
    tau: Stated = None
    corr: dist.Distribution | float | None = None
    beta: Stated = None
    gamma: Stated = None
    sigma: dist.Distribution | None = None
    extra: Mapping[str, dist.Distribution] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, checked.read(f.name, getattr(self, f.name)))

    def check(self, shape: Shape) -> None:
        """Refuse priors by names that these tasks have not, and vectors of the wrong size."""
        free = [c for c, is_free in zip(shape.coef, shape.free_mean, strict=True) if is_free]
        checked.check_size("mu", self.mu, free)
        checked.check_size("tau", self.tau, shape.coef)
        checked.check_size("beta", self.beta, shape.shared)
        width = len(shape.task_predictors)
        rows = shape.coef if width else ()
        checked.check_size("gamma", self.gamma, rows, width)
        if isinstance(self.corr, dist.Distribution):
            for size in {len(block) for block in shape.blocks if len(block) > 1}:
                if self.corr.event_shape != (size, size):
                    raise InputError(
                        f"HyperPrior(corr=…) is over {self.corr.event_shape} matrices, but {size} "
                        "coefficients are correlated; pass the LKJ concentration instead"
                    )

    @standard_promotion()
    def resolve(self, shape: Shape, tasks: Tasks, likelihood: Likelihood) -> HyperPrior:
        """Every None replaced by its default, scaled to ``tasks``."""
        self.check(shape)
        if self.is_resolved(shape):
            return self
        if tasks.outcome is None:
            raise InputError(
                "default priors are scaled to the outcome, which these tasks do not hold: resolve "
                "the model on the training tasks first, model.resolve(tasks)"
            )
        scales = Scales.of(tasks, likelihood)
        resolved: dict[str, Any] = {
            name: _filled(name, getattr(self, name), default)
            for name, default in _defaults(shape, scales).items()
        }
        if shape.correlated and self.corr is None:
            resolved["corr"] = 2.0
        open_ = likelihood.default_priors(scales.spread)
        if "sigma" in shape.parameters and self.sigma is None:
            resolved["sigma"] = open_["sigma"]
        resolved["extra"] = {
            **{n: open_[n] for n in shape.parameters if n != "sigma" and n in open_},
            **self.extra,
        }
        return replace(self, **resolved)

    def is_resolved(self, shape: Shape) -> bool:
        """Whether no prior is left open."""
        needed: dict[str, Sequence[str]] = {
            "mu": [c for c, free in zip(shape.coef, shape.free_mean, strict=True) if free],
            "tau": shape.coef,
            "beta": shape.shared,
            "gamma": shape.coef if shape.task_predictors else (),
        }
        for name, labels in needed.items():
            prior = getattr(self, name)
            if labels and (
                prior is None or (isinstance(prior, Mapping) and not {*labels} <= {*prior})
            ):
                return False
        corr_open = shape.correlated and self.corr is None
        own = {n for n in shape.parameters if n != "sigma"}
        return not (
            corr_open
            or ("sigma" in shape.parameters and self.sigma is None)
            or own - set(self.extra)
        )

    @standard_promotion()
    def distributions(self, shape: Shape) -> dict[str, dist.Distribution]:
        """One NumPyro distribution a name of φ, over its whole array; all must be resolved."""
        free = [i for i, f in enumerate(shape.free_mean) if f]
        d, p, q = len(shape.coef), len(shape.shared), len(shape.task_predictors)
        sites = {
            "mu": _vector("mu", self.mu, shape.coef, free),
            "tau": _vector("tau", self.tau, shape.coef, list(range(d))),
        }
        if shape.correlated:
            sites["corr"] = self._correlation(shape)
        if p:
            sites["beta"] = _vector("beta", self.beta, shape.shared, list(range(p)))
        if q:
            rows = [_vector("gamma", _row(self.gamma, c), shape.task_predictors, list(range(q)))
                    for c in shape.coef]  # fmt: skip
            sites["gamma"] = Assembled(
                [(row, (np.array(i), slice(None))) for i, row in enumerate(rows)],
                np.zeros((d, q)),
            )
        return sites | self.of_parameters(shape.parameters)

    def of_parameters(self, names: Sequence[str]) -> dict[str, dist.Distribution]:
        """The priors on parameters of the likelihood's own, by name."""
        found = {}
        for name in names:
            prior = self.sigma if name == "sigma" else self.extra.get(name)
            if prior is None:
                raise InputError(f"HyperPrior(extra=…) needs a prior for {name!r}")
            found[name] = prior
        return found

    def scalable(self, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which coefficients, shared columns and task predictors have priors in any units.

        (d,), (p,) and (q,) of bool, of a resolved hyperprior: a normal of twice the width is one.
        """

        def known(prior: Stated, names: Sequence[str]) -> np.ndarray:
            if isinstance(prior, Mapping):
                return np.array([_in_units(prior.get(n), 1.0) is not None for n in names], bool)
            one = prior is None or prior.shape() == ()
            return np.full(len(names), one and _in_units(prior, 1.0) is not None)

        free = np.array(shape.free_mean)
        coef = (known(self.mu, shape.coef) | ~free) & known(self.tau, shape.coef)
        task_predictors = np.zeros(len(shape.task_predictors), bool)
        if shape.task_predictors:
            by_coef = known(self.gamma, shape.coef)
            coef &= by_coef
            task_predictors[:] = by_coef.all()
        return coef, known(self.beta, shape.shared), task_predictors

    def scaled(self, shape: Shape, coef: Any, shared: Any, task_predictors: Any) -> HyperPrior:
        """The same priors where coefficients, β and Γ's columns are multiplied by these."""

        def each(prior: Stated, names: Sequence[str], by: Any) -> Any:
            if prior is None or np.all(np.asarray(by) == 1.0):
                return prior
            parts = prior if isinstance(prior, Mapping) else dict.fromkeys(names, prior)
            units = dict(zip(names, by, strict=True))
            return {n: b if np.all(np.asarray(units[n]) == 1.0) else _in_units(b, units[n])
                    for n, b in parts.items()}  # fmt: skip

        coef, task_predictors = np.asarray(coef), np.asarray(task_predictors)
        return replace(
            self,
            mu=each(self.mu, shape.coef, coef), tau=each(self.tau, shape.coef, coef),
            beta=each(self.beta, shape.shared, shared),
            gamma=each(self.gamma, shape.coef, coef[:, None] * task_predictors),
        )  # fmt: skip

    def _correlation(self, shape: Shape) -> dist.Distribution:
        def lkj(size: int) -> dist.Distribution:
            corr: Any = 2.0 if self.corr is None else self.corr
            if isinstance(corr, dist.LKJ):
                corr = corr.concentration
            return corr if isinstance(corr, dist.Distribution) else LKJ(size, float(corr))

        d = len(shape.coef)
        if shape.blocks == (tuple(range(d)),):
            return lkj(d)
        parts = [(lkj(len(b)), np.ix_(b, b)) for b in shape.blocks if len(b) > 1]
        return Assembled(parts, np.eye(d))


def _in_units(prior: Any, unit: Any) -> dist.Distribution | None:
    """The distribution of ``unit`` times a value; None of a kind that has no scale to change."""
    if isinstance(prior, dist.ImproperUniform):
        return prior
    widened = {
        dist.Normal: ("loc", "scale"), dist.Cauchy: ("loc", "scale"),
        dist.Laplace: ("loc", "scale"), dist.StudentT: ("loc", "scale"),
        dist.HalfNormal: ("scale",), dist.HalfCauchy: ("scale",), dist.Exponential: ("rate",),
        dist.Gamma: ("rate",),
    }.get(type(prior))  # fmt: skip
    if widened is None:
        return None
    names = [n for n in type(prior).arg_constraints if hasattr(prior, n)]
    settings = {n: np.asarray(getattr(prior, n), float) for n in names}
    for name in widened:
        settings[name] = settings[name] / unit if name == "rate" else settings[name] * unit
    return type(prior)(**settings)


def _defaults(shape: Shape, scales: Scales) -> dict[str, dict[str, dist.Distribution]]:
    """The default priors on μ, τ, β and Γ, by coefficient or column."""
    by_coef = list(zip(shape.coef, scales.coef, strict=True))
    return {
        "mu": {
            c: dist.Normal(scales.mu_location[i], 2.5 * scales.mu[i])
            for i, c in enumerate(shape.coef) if shape.free_mean[i]
        },
        "tau": {c: dist.HalfNormal(s) for c, s in by_coef},
        "beta": {
            c: dist.Normal(0.0, 2.5 * s)
            for c, s in zip(shape.shared, scales.shared, strict=True)
        },
        "gamma": {
            c: dist.Normal(0.0, 2.5 * s / scales.task_predictors)
            for c, s in by_coef
            if shape.task_predictors
        },
    }  # fmt: skip


def _filled(name: str, prior: Stated, default: dict[str, dist.Distribution]) -> Any:
    """The user's, completed by the defaults of the coefficients that it does not name."""
    if prior is None:
        return default
    if not isinstance(prior, Mapping):
        return prior
    return {**default, **prior}


def _row(prior: Stated, coef: str) -> dist.Distribution | None:
    return prior.get(coef) if isinstance(prior, Mapping) else prior


def _vector(
    name: str, prior: Stated, labels: Sequence[str], places: list[int]
) -> dist.Distribution:
    """A prior as one distribution over a vector; entries outside ``places`` are zero."""
    size, whole = len(places), len(places) == len(labels)
    if prior is None and not places:  # of no entry nothing is to be resolved
        prior = {}
    if prior is None:
        raise InputError(f"the prior on {name} has not been resolved: call model.resolve(tasks)")
    if isinstance(prior, Mapping):
        alike = {_signature(prior[labels[i]]) for i in places}
        if not (whole and len(alike) == 1 and None not in alike):
            parts = [(prior[labels[i]], (np.array(i),)) for i in places]
            return Assembled(parts, np.zeros(len(labels)))
        kind = type(prior[labels[0]])
        parameters = {
            k: np.array([getattr(prior[labels[i]], k) for i in places], dtype=float)
            for k in kind.arg_constraints
        }
        return kind(**parameters).to_event(1)
    if prior.shape() == ():
        vector = _expanded(prior, size)
    elif prior.batch_shape == (size,) and prior.event_dim == 0:
        vector = prior.to_event(1)
    elif prior.shape() == (size,):
        vector = prior
    else:
        raise InputError(
            f"HyperPrior({name}=…) has shape {prior.shape()}; expected () or ({size},) for "
            f"{', '.join(labels[i] for i in places)}"
        )
    return (
        vector if whole else Assembled([(vector, (np.array(places, int),))], np.zeros(len(labels)))
    )


def _expanded(prior: dist.Distribution, size: int) -> dist.Distribution:
    if isinstance(prior, dist.ImproperUniform):
        return dist.ImproperUniform(prior.support, (), (size,)) if prior.event_dim == 0 else prior
    return prior.expand([size]).to_event(1)


def _signature(prior: dist.Distribution) -> Any:
    """Hyperpriors of one kind stack into one vectorised distribution: same plain class, scalar."""
    plain = type(prior) in (dist.Normal, dist.HalfNormal, dist.HalfCauchy, dist.Exponential)
    return type(prior) if plain and prior.shape() == () else None
