r"""φ as one object: its parts by name, where each may lie, and φ as a vector x of order one.

.. math:: \varphi = \varphi(x), \qquad
          \log p(x) = \log p(\varphi(x)) + \log \left|\tfrac{d\varphi}{dx}\right|

Likelihood, prior and adaptation each state the parts of φ that they own; a space is their product.
Searches and samplers see x alone. A search has τ itself as an entry with the bound τ ≥ 0, where it
may well end; a sampler wants no bounds (:meth:`Space.opened`), and there

.. math:: \tau = u \log(1 + e^x)

is a straight line of x where τ is large beside its unit u and a logarithm where it is small, so
that τ → 0 lies at −∞, in a tail no heavier than an exponential one of width u.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions.transforms import (
    CorrCholeskyTransform,
    CorrMatrixCholeskyTransform,
    ExpTransform,
    Transform,
    biject_to,
)

from hierbayes.numerics import float64
from hierbayes.phi.assembled import Assembled
from hierbayes.phi.lkj import LKJ

Support = Literal["real", "spread", "open spread", "positive", "correlation", "hyperprior"]

FLAT = 1e-12
"""Curvature, beside the largest, below which a direction is taken as not curved at all."""

AT_AN_END = 1e-4
"""How fast φ moves with x, beside the middle of its range, below which it is at an end of it."""

TINY = 1e-300
"""Stands for τ = 0 in densities: NumPyro's half-normal gives 0 none, though it may be the mode."""


@dataclass(frozen=True)
class Part:
    """One name of φ as its owner states it.

    ``support``: "real"; "spread", a standard deviation, which may be zero, and "open spread", the
    same without a bound of x; "positive", of which x is the logarithm; "correlation", a matrix with
    correlations inside ``blocks`` of positions alone; "hyperprior", where its prior lies.
    ``learned``: flat positions of the entries that are learned; the others are zero. None: all.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    support: Support = "real"
    learned: tuple[int, ...] | None = None
    blocks: tuple[tuple[int, ...], ...] = ()

    @property
    def moved(self) -> bool:
        """Whether entries go through a transform."""
        return self.support in ("hyperprior", "positive")

    @property
    def size(self) -> int:
        """Entries of x."""
        if self.support == "correlation":
            return sum(len(b) * (len(b) - 1) // 2 for b in self.blocks)
        return int(np.prod(self.shape)) if self.learned is None else len(self.learned)

    def array(self, entries: Any) -> Any:
        """The part (…) with these values (n,) in the places of its learned entries."""
        if self.learned is None:
            return entries.reshape(self.shape)
        places, size = np.array(self.learned, int), int(np.prod(self.shape))
        if isinstance(entries, np.ndarray):
            flat = np.zeros(size)
            flat[places] = entries
            return flat.reshape(self.shape)
        return jnp.zeros(size, entries.dtype).at[places].set(entries).reshape(self.shape)

    def entries(self, array: Any) -> Any:
        """The learned entries (n,) of an array of the part's shape."""
        flat = array.reshape(-1) if isinstance(array, jax.Array) else np.ravel(array)
        return flat if self.learned is None else flat[np.array(self.learned, int)]


class _Places(dict[str, slice]):
    """Slices by name; an empty one of names that are not there."""

    def __missing__(self, name: str) -> slice:
        return slice(0)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["units", "origin", "transforms"],
    meta_fields=["parts"],
)
@dataclass(frozen=True, eq=False)
class Space:
    """The parts of φ, and x (n,) with φ(x): entries in ``units`` (n,) around ``origin`` (n,).

    Entries of correlations have neither, open spreads no origin.

    ``transforms``: NumPyro's, by name, of positive parts and those whose prior says where they lie.
    A pytree whose numbers are leaves, so that programs serve every space of the same parts.
    """

    parts: tuple[Part, ...]
    units: Any
    origin: Any
    transforms: dict[str, Transform]

    @classmethod
    def of(
        cls,
        parts: Sequence[Part],
        *,
        units: Mapping[str, Any] = MappingProxyType({}),
        hyperpriors: Mapping[str, dist.Distribution] = MappingProxyType({}),
        starts: Mapping[str, Any] = MappingProxyType({}),
    ) -> Space:
        """The product of some parts; use it in float64.

        ``units`` by name, one where none are given; ``starts`` by name: φ at x = 0 of parts that go
        through a transform, where that is not its own.
        """
        transforms: dict[str, Any] = {
            p.name: biject_to(hyperpriors[p.name].support)
            if p.support == "hyperprior"
            else ExpTransform()
            for p in parts
            if p.moved
        }
        bare = cls(tuple(parts), None, None, transforms)
        scale, origin = np.ones(bare.size), np.zeros(bare.size)
        for part in parts:
            at = bare.at[part.name]
            if part.name in units and part.size:
                scale[at] = part.entries(np.broadcast_to(units[part.name], part.shape))
            if part.moved and part.name in starts:
                start = part.entries(np.broadcast_to(starts[part.name], part.shape))
                origin[at] = _free(transforms[part.name], start)
        return replace(bare, units=scale, origin=origin)

    def __add__(self, other: Space) -> Space:
        """The product of two spaces of different names."""
        return Space(
            self.parts + other.parts,
            np.concatenate([self.units, other.units]),
            np.concatenate([self.origin, other.origin]),
            self.transforms | other.transforms,
        )

    # ----------------------------------------------------------------------- names

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The parts' names, in the order of x."""
        return tuple(p.name for p in self.parts)

    def __getitem__(self, name: str) -> Part:
        """The part of this name."""
        if name not in self.names:
            raise KeyError(name)
        return self.parts[self.names.index(name)]

    @functools.cached_property
    def at(self) -> Mapping[str, slice]:
        """Where each part lies in x; nowhere, of names that are none of φ's."""
        ends = np.cumsum([0, *(p.size for p in self.parts)]).tolist()
        return _Places({p.name: slice(*ends[i : i + 2]) for i, p in enumerate(self.parts)})

    @property
    def size(self) -> int:
        """The length of x."""
        return sum(p.size for p in self.parts)

    @property
    def lower(self) -> np.ndarray:
        """Bounds of x (n,), zero of standard deviations and −∞ of all else."""
        lower = np.full(self.size, -np.inf)
        for part in self.parts:
            if part.support == "spread":
                lower[self.at[part.name]] = 0.0
        return lower

    def inside(self, x: np.ndarray) -> np.ndarray:
        """Entries of x, (n,) of bool, that are at no end of where their part may lie."""
        found = x > self.lower
        for part in self.parts:
            if part.support == "hyperprior":
                ended = _flat(self.transforms[part.name], self._in_units(part, x))
                found[self.at[part.name]] &= ~ended
        return found

    def entry_names(self, labels: Mapping[str, Sequence[str]]) -> list[str]:
        """The entries of x: ``mu[Intercept]``, ``tau[x]``, ``corr[Intercept, x]``, ``sigma``.

        ``labels`` by dimension.
        """
        found = []
        for part in self.parts:
            if part.support == "correlation":
                coef = labels[part.dims[0]]
                pairs = [(b[k], b[i]) for b in part.blocks for i in range(len(b)) for k in range(i)]
                found += [f"{part.name}[{coef[k]}, {coef[i]}]" for k, i in pairs]
            elif part.dims:
                each = [", ".join(c) for c in itertools.product(*(labels[d] for d in part.dims))]
                found += [f"{part.name}[{c}]" for c in part.entries(each)]
            else:
                found.append(part.name)
        return found

    @property
    def starts(self) -> dict[str, Any]:
        """φ at x = 0 of the parts that go through a transform."""
        names = [p.name for p in self.parts if p.moved]
        own = self.only(*names)
        return {n: np.asarray(v) for n, v in own.phi(np.zeros(own.size)).items()}

    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """Groups of correlated coefficients."""
        return next((p.blocks for p in self.parts if p.support == "correlation"), ())

    def only(self, *names: str) -> Space:
        """The space of some of the parts alone."""
        places = [range(self.size)[self.at[n]] for n in self.names if n in names]
        where = np.array([i for r in places for i in r], int)
        return Space(
            tuple(p for p in self.parts if p.name in names),
            self.units[where], self.origin[where],
            {n: t for n, t in self.transforms.items() if n in names},
        )  # fmt: skip

    def plain(self) -> Space:
        """The same parts, each entry as it is, in units of one."""
        return replace(self, units=np.ones(self.size), origin=np.zeros(self.size))

    def opened(self) -> Space:
        """The space without bounds, for samplers."""
        parts = tuple(
            replace(p, support="open spread") if p.support == "spread" else p for p in self.parts
        )
        return replace(self, parts=parts)

    # ------------------------------------------------------------------- φ from x, and back

    def _values(self, part: Part, x: Any) -> Any:
        """The learned entries (n,) of a part, from all of x."""
        at = self.at[part.name]
        if part.support == "open spread":
            return self.units[at] * jax.nn.softplus(x[at])
        free = self._in_units(part, x)
        return self.transforms[part.name](free) if part.moved else free

    def _in_units(self, part: Part, x: Any) -> Any:
        """The entries of a part as they are, or as its transform takes them."""
        at = self.at[part.name]
        return self.origin[at] + self.units[at] * x[at]

    def phi(self, x: Any) -> dict[str, Any]:
        """φ by name."""
        return {
            p.name: _correlations(p, x[self.at[p.name]])
            if p.support == "correlation"
            else p.array(self._values(p, x))
            for p in self.parts
        }

    def x(self, phi: Mapping[str, Any], *, shrunk: float = 0.0) -> np.ndarray:
        """x of φ: the inverse of :meth:`phi`; use it in float64.

        ``shrunk``: the share of the identity that correlations are mixed with, since those of ±1
        have no place in x.
        """
        found = np.zeros(self.size)
        for part in self.parts:
            at = self.at[part.name]
            if part.name not in phi:
                continue
            if part.support == "correlation":
                found[at] = _inverse_correlations(part, np.asarray(phi[part.name]), shrunk)
                continue
            values = part.entries(np.broadcast_to(phi[part.name], part.shape))
            if part.support == "open spread":
                found[at] = inverse_softplus(values / self.units[at])
                continue
            if part.moved:
                values = _free(self.transforms[part.name], values)
            found[at] = (values - self.origin[at]) / self.units[at]
        return found

    def near(self, phi: Mapping[str, Any], floor: float = 0.0) -> np.ndarray:
        """x from which a search sets out: no spread below ``floor`` units, and no correlations."""
        found = self.x({n: v for n, v in phi.items() if n != "corr"})
        for part in self.parts:
            if part.support == "spread":
                found[self.at[part.name]] = np.maximum(found[self.at[part.name]], floor)
        return found

    def in_units(self, **units: Any) -> Space:
        """The same parts in other units, by name."""
        scale = np.array(self.units)
        for name, unit in units.items():
            part = self[name]
            scale[self.at[name]] = part.entries(np.broadcast_to(unit, part.shape))
        return replace(self, units=scale)

    def around(self, **phi: Any) -> Space:
        """The same space with x = 0 at these values, of parts that go through a transform."""
        origin = np.array(self.origin)
        for name, value in phi.items():
            origin[self.at[name]] = _free(self.transforms[name], value)
        return replace(self, origin=origin)

    # ------------------------------------------------------------------------ densities

    def log_hyperprior(self, x: Any, hyperpriors: Mapping[str, dist.Distribution]) -> Any:
        """log p(φ) as a mode has it: of τ and R themselves, and of what a family owns as in x."""
        phi, total = self.phi(x), jnp.zeros(())
        for part in self.parts:
            value, hyperprior = phi[part.name], hyperpriors[part.name]
            if part.support == "spread":
                value = jnp.where(value > 0, value, TINY)
            total = total + jnp.sum(jnp.asarray(hyperprior.log_prob(value)))
            if part.moved:
                total = total + self._log_jacobian(part, x)
        return total

    def placed(self, x: Any, hyperpriors: Mapping[str, dist.Distribution]) -> Placed:
        """φ at x, the root of R, and the density of x under p(φ), with the Jacobian."""
        phi, total, root = {}, jnp.zeros(()), None
        for part in self.parts:
            entries, hyperprior = x[self.at[part.name]], hyperpriors[part.name]
            if part.support == "correlation":
                root, more = _root_of_correlations(part, entries, hyperprior)
                phi[part.name] = root @ root.T
                total = total + more
                continue
            phi[part.name] = part.array(self._values(part, x))
            total = total + log_prob(hyperprior, phi[part.name]) + self._log_jacobian(part, x)
        return Placed(phi, root, total)

    def _log_jacobian(self, part: Part, x: Any) -> Any:
        """log |dφ/dx| of a part whose entries stand by themselves."""
        at = self.at[part.name]
        entries, unit = x[at], self.units[at]
        total = jnp.log(jnp.asarray(unit)).sum()
        if part.support == "open spread":
            total = total + jax.nn.log_sigmoid(entries).sum()
        elif part.moved:
            free = self._in_units(part, x)
            transform = self.transforms[part.name]
            total = total + jnp.sum(transform.log_abs_det_jacobian(free, transform(free)))
        return total

    # ---------------------------------------------------------------- what is known of φ̂

    def along(
        self, x: np.ndarray, inside: np.ndarray, hessian: np.ndarray
    ) -> dict[str, np.ndarray]:
        """How φ moves at x along independent normal directions of unit size, by name (…, r).

        ``hessian`` (p, p) of minus the criterion in the coordinates that are ``inside``; NaN
        outside of them, and everywhere off a maximum or where none is inside. Use it in float64.
        """
        moves = np.full((self.size, max(int(inside.sum()), 1)), np.nan)
        if hessian.size and np.isfinite(hessian).all():
            values = np.linalg.eigvalsh(hessian)
            if values[0] > FLAT * values[-1]:
                moves[inside] = root_of(np.linalg.inv(hessian))
        return {n: np.asarray(v) for n, v in _along(self, x, moves).items()}


class Placed(NamedTuple):
    """φ by name, the root of its correlations (None without any), and the density of x."""

    phi: dict[str, Any]
    root: Any
    log_density: Any


def at_an_end(space: Space, x: np.ndarray) -> list[str]:
    """What to say of parts that an estimate has at an end of where their priors let them lie."""
    inside = space.inside(x)
    names = [
        p.name for p in space.parts
        if p.support == "hyperprior" and not inside[space.at[p.name]].all()
    ]  # fmt: skip
    phi = phi_at(space, x) if names else {}
    return [
        f"{name} is estimated as {float(phi[name]):.3g}, an end of where its prior lets it lie: it "
        "has no standard error, and those of the others hold it there"
        for name in names
    ]


def standard_errors(along: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By name, from how φ moves; of correlations none are told."""
    return {n: np.sqrt((v**2).sum(-1)) for n, v in along.items() if n != "corr"}


@jax.jit
def phi_at(space: Space, x: Any) -> dict[str, jax.Array]:
    """φ by name, compiled once for all spaces of the same parts."""
    return space.phi(x)


@jax.jit
def _along(space: Space, x: Any, moves: Any) -> dict[str, jax.Array]:
    known = jnp.nan_to_num(moves)
    turned = jax.vmap(lambda m: jax.jvp(space.phi, (x,), (m,))[1], -1, -1)(known)
    for part in space.parts:
        if part.support != "correlation":  # entry by entry, so that what is not known stays so
            lost = jnp.isnan(moves[space.at[part.name]])
            marks = jax.vmap(part.array, -1, -1)(lost.astype(moves.dtype))
            turned[part.name] = jnp.where(marks > 0, jnp.nan, turned[part.name])
    return turned


@jax.jit
def _hyperprior(space: Space, hyperpriors: Any, x: Any) -> tuple[jax.Array, jax.Array]:
    return jax.value_and_grad(lambda v: space.log_hyperprior(v, hyperpriors))(x)


def log_hyperprior_in(
    space: Space, hyperpriors: Mapping[str, dist.Distribution]
) -> Callable[[Any], tuple[jax.Array, jax.Array]]:
    """log p(φ) as :meth:`Space.log_hyperprior` has it, and its slope, as functions of x."""
    return functools.partial(_hyperprior, space, {n: hyperpriors[n] for n in space.names})


def root_of(covariance: np.ndarray) -> np.ndarray:
    """A with A Aᵀ the covariance matrix, NaN where that is not known."""
    if not np.isfinite(covariance).all():
        return np.full_like(covariance, np.nan)
    units = np.sqrt(np.maximum(np.diag(covariance), 1e-300))
    values, vectors = np.linalg.eigh(covariance / np.outer(units, units))
    return units[:, None] * vectors * np.sqrt(np.maximum(values, 0.0))


def inverse_softplus(value: Any) -> Any:
    """x with log(1 + eˣ) = value."""
    return value + np.log(-np.expm1(-value))


def _free(transform: Transform, value: Any) -> np.ndarray:
    """What the transform takes to a value; where that is outside of its range, zero."""
    with float64():
        found = np.asarray(transform._inverse(value))
    return np.where(np.isfinite(found), found, 0.0)


def _flat(transform: Transform, free: Any) -> np.ndarray:
    """Whether a transform has come to an end of its range, where it hardly moves."""
    if isinstance(transform, ExpTransform):  # zero is as far away as infinity
        return np.zeros(np.shape(free), bool)
    slopes = [transform.log_abs_det_jacobian(v, transform(v)) for v in (free, 0.0 * free)]
    return np.asarray(slopes[0] - slopes[1]) < np.log(AT_AN_END)


def log_prob(hyperprior: dist.Distribution, value: Any) -> jax.Array:
    """The log density, −∞ outside the support, which NumPyro does not look at by itself."""
    support: Any = hyperprior.support
    total = jnp.sum(jnp.asarray(hyperprior.log_prob(value)))
    return jnp.where(jnp.all(support(value)), total, -jnp.inf)


def _root_of_correlations(
    part: Part, entries: Any, hyperprior: dist.Distribution
) -> tuple[Any, Any]:
    """C with R = C Cᵀ, and the density of its entries in x."""
    root, start, total = jnp.eye(part.shape[0]), 0, jnp.zeros(())
    each = [p for p, _ in hyperprior.parts] if isinstance(hyperprior, Assembled) else [hyperprior]
    for b, one in zip(part.blocks, each, strict=True):
        size = len(b) * (len(b) - 1) // 2
        free = entries[start : start + size]
        factor = jnp.asarray(CorrCholeskyTransform()(free))
        total = total + CorrCholeskyTransform().log_abs_det_jacobian(free, factor)
        total = total + _log_prob_of_factor(one, factor)
        root = root.at[np.ix_(b, b)].set(factor)
        start += size
    return root, total


def _log_prob_of_factor(hyperprior: dist.Distribution, factor: jax.Array) -> jax.Array:
    """The log density of R = C Cᵀ as one of the entries of C below its diagonal."""
    to_factor: Any = CorrMatrixCholeskyTransform()
    corr = factor @ factor.T
    own = (
        hyperprior.of_root(factor)
        if isinstance(hyperprior, LKJ)
        else jnp.asarray(hyperprior.log_prob(corr))
    )
    return own - to_factor.log_abs_det_jacobian(corr, factor)


def _correlations(part: Part, entries: Any) -> Any:
    corr, start = jnp.eye(part.shape[0]), 0
    for b in part.blocks:
        size = len(b) * (len(b) - 1) // 2
        factor = CorrCholeskyTransform()(entries[start : start + size])
        corr = corr.at[np.ix_(b, b)].set(factor @ factor.T)
        start += size
    return corr


def _inverse_correlations(part: Part, corr: np.ndarray, shrunk: float) -> np.ndarray:
    found = []
    for b in part.blocks:
        block = (1 - shrunk) * corr[np.ix_(b, b)] + shrunk * np.eye(len(b))
        found.append(np.asarray(CorrCholeskyTransform()._inverse(jnp.linalg.cholesky(block))))
    return np.concatenate(found)
