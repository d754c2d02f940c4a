r"""A family averaged over a normal f.

.. math:: p(y) = \int p(y \mid f)\, N(f; m, v)\, df, \qquad
          P(Y \le y) = \int P(Y \le y \mid f)\, N(f; m, v)\, df = \int q_y(t)\,
          \Phi\!\left(\frac{t - m}{\sqrt v}\right) dt

with q_y = −∂P(Y ≤ y | f) / ∂f, the density of what f must lie below for Y ≤ y: the log of a gamma
or the logit of a beta variable. All are log-concave, so that every integral is taken around its own
mode, however narrow p(y | f) is beside the normal density or that beside it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from hierbayes.likelihoods.integral import enclosed, inverted, of_concave

AT_ONCE = 5_000
"""Integrals that are taken together."""

LARGEST = 700.0
"""Of an exponent: beyond, its exponential is no number any more."""

ROOT_TAU = 0.5 * np.log(2.0 * np.pi)

STEPS = 0.7 * np.arange(-10.0, 11.0)
"""Trapezium nodes: right to 1e-9 for what is no steeper than the normal density."""

SHARES = np.exp(-0.5 * STEPS**2) / np.exp(-0.5 * STEPS**2).sum()


IGNORED = np.errstate(over="ignore", divide="ignore", invalid="ignore")
"""Exponents that overflow far from a mode are no mode."""


class Kernel(NamedTuple):
    """``base − slope log(1 + e^−u) − rest log(1 + e^u)`` where ``logistic``.

    ``base + slope u − rest e^u`` elsewhere; u = ``sign`` f + ``shift``.
    """

    logistic: bool
    slope: Any
    rest: Any
    base: Any
    shift: Any = 0.0
    sign: float = 1.0

    def value(self, u: np.ndarray) -> np.ndarray:
        """The kernel at u."""
        if self.logistic:
            least = np.log1p(np.exp(-np.abs(u)))
            up, down = np.maximum(u, 0.0) + least, np.maximum(-u, 0.0) + least
            return self.base - self.slope * down - self.rest * up
        return self.base + self.slope * u - self.rest * np.exp(np.minimum(u, LARGEST))

    def slopes(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Its slope, and its curvature with the sign turned, in u."""
        if self.logistic:
            yes, no = special.expit(u), special.expit(-u)
            return self.slope * no - self.rest * yes, (self.slope + self.rest) * yes * no
        rate = self.rest * np.exp(np.minimum(u, LARGEST))
        return self.slope - rate, rate

    def peak(self) -> np.ndarray:
        """About where it is highest, a half standing for none."""
        left = np.maximum(self.rest, 0.5) if self.logistic else self.rest
        return np.log(np.maximum(self.slope, 0.5)) - np.log(left)

    def beyond(self, u: np.ndarray) -> np.ndarray:
        """Of a density in u, the chance to lie above u; below it where u falls with f."""
        if self.logistic:
            return special.betainc(self.rest, self.slope, special.expit(-u))
        rate = np.exp(np.minimum(u, LARGEST))
        of = special.gammaincc if self.sign > 0 else special.gammainc
        return of(self.slope, rate)

    def take(self, which: Any) -> Kernel:
        """Some of many, by their numbers."""
        parts = {n: getattr(self, n)[which] for n in ("slope", "rest", "base", "shift")}
        return self._replace(**parts)

    def flat(self, shape: tuple[int, ...]) -> Kernel:
        """Every part in one line, (n,)."""
        parts = {
            n: np.broadcast_to(np.asarray(getattr(self, n), float), shape).ravel()
            for n in ("slope", "rest", "base", "shift")
        }
        return self._replace(**parts)


class Family(abc.ABC):
    """p(y | f) with the family's own parameters in it, averaged over a normal f."""

    discrete: bool = True
    lowest: float = 0.0
    highest: Any = np.inf

    @abc.abstractmethod
    def at(self, f: Any) -> Any:
        """The frozen SciPy distribution at f."""

    @abc.abstractmethod
    def moments(self, m: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """E[y] and Var(y); the median where there is no mean."""

    @abc.abstractmethod
    def log_density(self, y: np.ndarray, m: np.ndarray, s: np.ndarray) -> np.ndarray:
        """log p(y) of y in the support."""

    @abc.abstractmethod
    def cdf(self, y: np.ndarray, m: np.ndarray, s: np.ndarray) -> np.ndarray:
        """P(Y ≤ y) of y in the support, short of its end."""

    @abc.abstractmethod
    def typical(self, f: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A y that goes with f, and a step to look for others; of amounts in their logarithm."""


class Concave(Family):
    """Families that are log-concave in f."""

    @abc.abstractmethod
    def kernel(self, y: Any) -> Kernel:
        """log p(y | f)."""

    @abc.abstractmethod
    def pivot(self, y: Any) -> Kernel:
        """log q_y(t)."""

    def log_density(self, y: np.ndarray, m: np.ndarray, s: np.ndarray) -> np.ndarray:
        """log p(y) of y in the support."""
        return log_average(self.kernel(y), m, s)

    def cdf(self, y: np.ndarray, m: np.ndarray, s: np.ndarray) -> np.ndarray:
        """P(Y ≤ y) of y in the support, short of its end."""
        return average_beyond(self.pivot(y), m, s)


class OfRate(Concave):
    """Families with mean e^f."""

    @abc.abstractmethod
    def spread(self) -> tuple[Any, Any]:
        """How much of e^f, and how much of e^2f, is Var(y | f)."""

    def moments(self, m: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """E[y] and Var(y): e^f is log-normal. Held below what overflows."""
        linear, square = self.spread()

        def power(of: Any) -> np.ndarray:
            return np.exp(np.minimum(of, LARGEST))

        mean, second = power(m + 0.5 * s**2), power(2.0 * (m + s**2))
        of_mean = -second * np.expm1(-(s**2))
        return mean, linear * mean + square * second + of_mean

    def typical(self, f: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """e^f; its logarithm of amounts."""
        if not self.discrete:
            return f, 1.0 + 0.0 * s
        rate = np.floor(np.exp(np.minimum(f, LARGEST - 20)))
        return rate, np.ceil(np.sqrt(rate) + 0.1 * rate)


@IGNORED
def log_average(kernel: Kernel, m: np.ndarray, s: np.ndarray) -> np.ndarray:
    """log ∫ e^kernel N(f; m, s²) df."""
    flat, m_flat, s_flat = kernel.flat(m.shape), m.ravel(), s.ravel()
    found = [_averaged(flat.take(some), m_flat[some], s_flat[some]) for some in _blocks(m.size)]
    return np.concatenate(found).reshape(m.shape)


@IGNORED
def average_beyond(pivot: Kernel, m: np.ndarray, s: np.ndarray) -> np.ndarray:
    """P(f < T), f ~ N(m, s²), of T with the density q."""
    flat, m_flat, s_flat = pivot.flat(m.shape), m.ravel(), s.ravel()
    # no steeper than its own scale, and than that of its tails, which is one
    narrow = s_flat**2 * np.maximum(flat.slopes(flat.peak())[1], 1.0) <= 1.0
    found = np.empty(m.size)
    for some in _blocks(m.size):
        few, many = some[narrow[some]], some[~narrow[some]]
        if len(few):
            q = flat.take(few)
            u = q.sign * m_flat[few] + q.shift
            rule = zip(STEPS, SHARES, strict=True)
            found[few] = sum(w * q.beyond(u + q.sign * z * s_flat[few]) for z, w in rule)
        if len(many):
            found[many] = _below(flat.take(many), m_flat[many], s_flat[many])
    return np.clip(found, 0.0, 1.0).reshape(m.shape)


def _blocks(size: int) -> list[np.ndarray]:
    return np.split(np.arange(size), range(AT_ONCE, size, AT_ONCE))


def _averaged(kernel: Kernel, m: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Over z = (f − m) / s, so that a normal of any width keeps its digits."""
    centre, per = kernel.sign * m + kernel.shift, kernel.sign * s

    def curve(z: np.ndarray, i: Any) -> np.ndarray:
        return kernel.take(i).value(centre[i] + per[i] * z) - 0.5 * z**2

    def slopes(z: np.ndarray, i: Any) -> tuple[np.ndarray, np.ndarray]:
        first, second = kernel.take(i).slopes(centre[i] + per[i] * z)
        return per[i] * first - z, s[i] ** 2 * second + 1.0

    # the mode lies between those of the two factors
    with np.errstate(divide="ignore", invalid="ignore"):
        theirs = (kernel.peak() - centre) / per
    theirs = np.where(np.abs(theirs) < 1e100, theirs, 0.0)
    low, high = np.minimum(theirs, 0.0), np.maximum(theirs, 0.0)
    return of_concave(curve, slopes, low, high) - ROOT_TAU


def _below(pivot: Kernel, m: np.ndarray, s: np.ndarray) -> np.ndarray:
    """∫ q(t) Φ((t − m) / s) dt."""
    centre, per = pivot.sign * m + pivot.shift, pivot.sign * s

    def curve(u: np.ndarray, i: Any) -> np.ndarray:
        return pivot.take(i).value(u) + special.log_ndtr((u - centre[i]) / per[i])

    def slopes(u: np.ndarray, i: Any) -> tuple[np.ndarray, np.ndarray]:
        first, second = pivot.take(i).slopes(u)
        z = (u - centre[i]) / per[i]
        ratio = np.exp(-0.5 * z**2 - ROOT_TAU - special.log_ndtr(z))
        return first + ratio / per[i], second + np.maximum(ratio * (ratio + z), 0.0) / s[i] ** 2

    peak = pivot.peak()
    return np.exp(of_concave(curve, slopes, peak, peak))


def averaged(family: Family, location: Any, variance: Any) -> Any:
    """The family averaged over f ~ N(location, variance); SciPy's own where f is known."""
    if np.max(variance, initial=0.0) == 0:
        return family.at(np.asarray(location))
    return OverNormal(family, np.asarray(location, float), np.sqrt(np.asarray(variance, float)))


class OverNormal:
    """Answers what a frozen SciPy distribution answers."""

    def __init__(self, family: Family, location: np.ndarray, sd: np.ndarray):
        self.family = family
        self.location, self.sd = np.broadcast_arrays(location, sd)
        self.dist = family.at(self.location).dist

    def mean(self) -> np.ndarray:
        """E[y]; the median where there is none."""
        return self.family.moments(self.location, self.sd)[0]

    def var(self) -> np.ndarray:
        """Var(y), of which that of f is a part."""
        return self.family.moments(self.location, self.sd)[1]

    def std(self) -> np.ndarray:
        """The root of the variance."""
        return np.sqrt(self.var())

    def logpdf(self, y: Any) -> np.ndarray:
        """The log density at y."""
        of, y = self.family, np.broadcast_to(np.asarray(y, float), self.location.shape)
        there = (y >= of.lowest) & (y <= of.highest)
        if of.discrete:
            there &= y == np.floor(y)
        inside = np.where(there, y, np.maximum(of.lowest, 0.0) if of.discrete else 1.0)
        return np.where(there, of.log_density(inside, self.location, self.sd), -np.inf)

    logpmf = logpdf

    def cdf(self, y: Any) -> np.ndarray:
        """P(Y ≤ y)."""
        of, y = self.family, np.broadcast_to(np.asarray(y, float), self.location.shape)
        y = np.floor(y) if of.discrete else y
        below, above = y < of.lowest, y >= of.highest
        inside = np.where(below | above | np.isnan(y), 0.0 if of.discrete else 1.0, y)
        found = np.where(above, 1.0, of.cdf(inside, self.location, self.sd))
        return np.where(np.isnan(y), np.nan, np.where(below, 0.0, found))

    def ppf(self, probability: float) -> np.ndarray:
        """The smallest y with P(Y ≤ y) ≥ probability."""
        return self._inverted(self.cdf, probability, self.location, self.sd)

    def quantile(self, probability: float) -> np.ndarray:
        """The same of the equally weighted mixture over the first axis, (N,)."""
        f = self.location + special.ndtri(probability) * self.sd
        middle, spread = np.median(f, axis=0), np.median(self.sd, axis=0)
        return self._inverted(lambda y: self.cdf(y).mean(0), probability, middle, spread)

    def _inverted(
        self, cdf: Callable[[Any], np.ndarray], probability: float, f: np.ndarray, sd: np.ndarray
    ) -> np.ndarray:
        of = self.family
        start, step = of.typical(f, sd)
        if of.discrete:
            start = np.clip(start, 0.0, of.highest)
            low, high = enclosed(cdf, probability, start, np.maximum(step, 1.0))
            low = np.maximum(low, -1.0)
            return inverted(cdf, probability, low, high, whole=True)
        tight = 1e-9 * step
        if of.lowest < 0:
            low, high = enclosed(cdf, probability, start, step)
            return inverted(cdf, probability, low, high, tight=tight)

        def of_log(x: np.ndarray) -> np.ndarray:
            return cdf(np.exp(np.clip(x, -LARGEST, LARGEST)))

        low, high = enclosed(of_log, probability, start, step)
        return np.exp(np.minimum(inverted(of_log, probability, low, high, tight=tight), LARGEST))

    def drawn(self, component: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draws (n, N), each from one of the components (n,) on the first axis of ``location``."""
        shape, count = self.location.shape, len(component)
        if shape[0] == 1:
            f = self.location + self.sd * rng.standard_normal((count, *shape[1:]))
            return np.asarray(self.family.at(f).rvs(size=f.shape, random_state=rng))
        # all components are drawn from at once: as often as one of them is wanted
        order = np.argsort(component, kind="stable")
        turn = np.empty(count, int)
        first = np.searchsorted(component[order], component[order])
        turn[order] = np.arange(count) - first
        drawn = np.empty((count, *shape[1:]))
        for k in range(int(turn.max(initial=-1)) + 1):
            f = self.location + self.sd * rng.standard_normal(shape)
            values = np.asarray(self.family.at(f).rvs(size=shape, random_state=rng))
            drawn[turn == k] = values[component[turn == k]]
        return drawn
