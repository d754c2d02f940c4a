r"""The learned prior as an object of its own: p(θ_new | D_1..J).

.. math:: p(\theta_\text{new} \mid D_{1..J})
          = \sum_s \pi_s\, N(\theta_\text{new};\; m_s,\; L_s L_s^\top)

Student-t in the place of normal where the prior of tasks is. One component for a point φ, one a
draw of φ under full Bayes; a point in directions without variance.

A learned prior as JSON and back: :meth:`LearnedPrior.to_json` describes the fields.

Roots L of covariances, and the directions in which they have no variance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints

from hierbayes import inputs
from hierbayes.errors import InputError, listing
from hierbayes.files import write_whole
from hierbayes.numerics import as_rng
from hierbayes.phi.assembled import Assembled
from hierbayes.priors.student_t import degrees_of_freedom, root_precision

RANK = 1e-12
"""A pivot below this share of its row's length is zero but for rounding."""


class Structure(NamedTuple):
    """Where a mixture of normals varies: it is known before its numbers are, and hashable."""

    free: tuple[int, ...]
    """Entries that vary."""

    fixed: tuple[tuple[int, float], ...]
    """(entry, value) of those that do not."""

    density: bool
    """Whether there is a density in the entries that vary."""


def structure_of(locations: np.ndarray, roots: np.ndarray) -> Structure:
    """The entries that vary between (S, d) locations or within (S, d, d) or (S, d) roots."""
    entries = np.abs(roots) if roots.ndim == 2 else np.abs(roots).sum(-1)
    varies = (entries > 0).any(0) | (locations != locations[0]).any(0)
    free = np.flatnonzero(varies)
    fixed = tuple((int(k), float(locations[0, k])) for k in np.flatnonzero(~varies))
    if roots.ndim == 2:
        density = bool((entries[:, free] > 0).all())
    else:
        triangles = _triangles(roots[:, free])
        pivots = np.abs(np.diagonal(triangles, axis1=1, axis2=2))
        length = np.linalg.norm(roots[:, free], axis=-1)
        density = bool((pivots > RANK * length).all() and (length > 0).all())
    return Structure(tuple(free.tolist()), fixed, density)


def tidy(roots: np.ndarray, structure: Structure) -> np.ndarray:
    """The same covariances by roots with no negative pivots, zero where nothing varies."""
    if roots.ndim == 2:
        return np.abs(roots)
    free = np.array(structure.free, int)
    fixed = np.array([k for k, _ in structure.fixed], int)
    if fixed.size and np.any(roots[:, :, fixed]):  # what the others share with a fixed entry
        whole = np.zeros_like(roots)
        whole[:, free[:, None], free] = _triangles(roots[:, free])
        roots = whole
    signs = np.where(np.diagonal(roots, axis1=1, axis2=2) < 0, -1.0, 1.0)
    return roots * signs[:, None, :]


def sub_root(roots: Any, free: np.ndarray) -> Any:
    """The root of the entries that vary, of tidy ones."""
    return roots if len(free) == roots.shape[-1] else roots[:, free[:, None], free]


def _triangles(rows: np.ndarray) -> np.ndarray:
    """Lower triangular (S, k, k) roots of the covariances of (S, k, d) rows."""
    if rows.shape[1] == rows.shape[2]:
        return rows
    if not rows.shape[1]:
        return np.zeros((len(rows), 0, 0))
    return np.swapaxes(np.linalg.qr(np.swapaxes(rows, 1, 2), mode="r"), 1, 2)


FORMAT, VERSION = "hierbayes learned prior", 1
FIELDS = ("coef", "weights", "locations", "scale_trils", "df")

MOST_COMPONENTS = 500
"""Components that a file holds unless more are asked for."""


def write_json(prior: Any, path: Any, num_components: int) -> str:
    """The JSON of a learned prior, and to a file where there is a path."""
    num_components = inputs.count("num_components", num_components)
    weights = prior.weights
    kept = np.arange(len(weights))
    if len(weights) > num_components:
        kept = np.linspace(0, len(weights) - 1, int(num_components)).round().astype(int)
        weights = weights[kept] / weights[kept].sum()
    text = json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "coef": list(prior.coef),
            "weights": weights.tolist(),
            "locations": prior.locations[kept].tolist(),
            "scale_trils": prior.scale_trils[kept].tolist(),
            "df": prior.df,
        },
        allow_nan=False,
        ensure_ascii=False,
    )
    if path is not None:
        write_whole(path, f"{text}\n".encode())
    return text


def read_json(path_or_text: Any) -> dict[str, Any]:
    """The fields of a prior, from a path or from the text itself."""
    if isinstance(path_or_text, str) and path_or_text.lstrip()[:1] in ("{", "["):
        text, where = path_or_text, "the text"
    else:
        text, where = _file(path_or_text)
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is no JSON: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(
            f'{where} is no learned prior, which begins with "format": "{FORMAT}": write one with '
            "prior.to_json"
        )
    version = found.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InputError(f"{where} has no version of the format, a whole number from 1 on")
    if version > VERSION:
        raise InputError(
            f"{where} was written by a newer hierbayes (version {version} of the format, this one "
            f"reads {VERSION}); upgrade to read it"
        )
    if missing := [name for name in FIELDS if name not in found]:
        raise InputError(f"{where} is no whole learned prior: it lacks {listing(missing)}")
    coef = found["coef"]
    if not (isinstance(coef, list) and all(isinstance(name, str) for name in coef)):
        raise InputError(f"`coef` of {where} is no list of names")
    return {name: found[name] for name in FIELDS}


def _file(path: Any) -> tuple[str, str]:
    """(the text of a file, what to call it)."""
    try:
        file = Path(path)
    except TypeError as error:
        raise InputError(f"expected a path or JSON text, found {type(path).__name__}") from error
    name = repr(str(path))
    try:
        return file.read_text(encoding="utf-8"), name
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is no JSON: it is no text") from error
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}") from error


class LearnedPrior(dist.Distribution):
    r"""p(θ_new | D_1..J): a NumPyro distribution over (d,), to be used in any NumPyro model.

    .. math:: \theta = m_s + L_s z, \quad z \sim N(0, I), \quad s \sim \pi

    ``fit.prior`` is one. A direction in which every component has the same location and no
    variance (τ̂ = 0) is a point mass: ``log_prob`` is the density in the other directions, and a
    sampler moves in those alone. Where the covariance lacks rank otherwise (a correlation estimated
    as ±1) there is no density: ``log_prob`` refuses, draws and moments stand.

    Parameters
    ----------
    coef : sequence of str
        Names of θ's entries.
    locations : array (S, d)
        m_s.
    scale_trils : array (S, d, d) or (S, d)
        L_s, lower triangular; its diagonal alone where θ's entries are independent.
    weights : array (S,), optional
        π_s, positive, adding up to one; equal by default.
    df : float, optional
        ν, where z is Student-t: that of a :class:`~hierbayes.priors.StudentT` prior.

    Attributes
    ----------
    mean, variance : array (d,)
    covariance : array (d, d)

    Raises
    ------
    InputError
        For shapes that do not agree, numbers that are not finite, weights that are none.

    Examples
    --------
    >>> import jax, hierbayes as hb, numpyro
    >>> model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
    ...                                known_se="se", hyperprior=None)
    >>> prior = hb.full_bayes(model, tasks, num_draws=250, seed=0).prior
    >>> prior
    LearnedPrior(coef=('Intercept',), 1000 components)
    >>> again = hb.priors.LearnedPrior.from_json(prior.to_json(num_components=100))
    >>> again.draws(3, seed=0).shape
    (3, 1)
    >>> def program():
    ...     with numpyro.plate("school", 8):
    ...         numpyro.sample("theta", prior)
    >>> numpyro.infer.Predictive(program, num_samples=2)(jax.random.key(0))["theta"].shape
    (2, 8, 1)
    """

    def __init__(
        self,
        coef: Sequence[str],
        locations: Any,
        scale_trils: Any,
        weights: Any = None,
        *,
        df: float | None = None,
        validate_args: Any = None,
    ):
        self.coef = tuple(str(name) for name in coef)
        self.locations = _finite(locations, "locations")
        roots = _finite(scale_trils, "scale_trils")
        count = len(self.locations)
        if weights is None:
            weights = np.full(count, 1 / max(count, 1))
        self.weights = _finite(weights, "weights")
        _check(self.coef, self.locations, roots, self.weights)
        self.df = None if df is None else degrees_of_freedom(df)
        if self.df is not None and roots.ndim == 2:  # one λ for all entries: not independent
            roots = roots[:, :, None] * np.eye(len(self.coef))
        self._structure: Structure = structure_of(self.locations, roots)
        self.scale_trils = tidy(roots, self._structure)
        super().__init__(event_shape=(len(self.coef),), validate_args=validate_args)

    def __repr__(self) -> str:
        names = self.coef if len(self.coef) <= 12 else f"({listing(self.coef, 3)})"
        count = len(self.weights)
        law = "" if self.df is None else f", Student-t with {self.df:g} degrees of freedom"
        return f"LearnedPrior(coef={names}, {count} component{'s' if count > 1 else ''}{law})"

    # ------------------------------------------------------------ as a distribution

    def tree_flatten(self) -> Any:
        """The numbers are leaves; names, and where there is no variance, are structure."""
        return (self.weights, self.locations, self.scale_trils), (
            self.coef, self._structure, self.df
        )  # fmt: skip

    @classmethod
    def tree_unflatten(cls, aux_data: Any, params: Any) -> Any:
        """The distribution again."""
        whole = cls.__new__(cls)
        whole.weights, whole.locations, whole.scale_trils = params
        whole.coef, whole._structure, whole.df = aux_data
        dist.Distribution.__init__(whole, event_shape=(len(whole.coef),), validate_args=False)
        return whole

    @property
    def support(self) -> Any:  # type: ignore[override]
        """R^d, or the entries that vary, the others at their points."""
        fixed = self._structure.fixed
        if not fixed or not self._structure.density:
            return constraints.real_vector
        background = np.zeros(len(self.coef))
        background[[k for k, _ in fixed]] = [value for _, value in fixed]
        free = np.array(self._structure.free, int)
        if not free.size:
            return Assembled([], background).support
        white = dist.Normal(np.zeros(len(free)), 1.0).to_event(1)
        return Assembled([(white, (free,))], background).support

    def sample(self, key: jax.Array | None, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draws (…, d): a component, then z; in the caller's own precision."""
        assert key is not None
        key_component, key_white = jax.random.split(key)
        locations, roots = jnp.asarray(self.locations), jnp.asarray(self.scale_trils)
        white = jax.random.normal(key_white, (*sample_shape, len(self.coef)), locations.dtype)
        if self.df is not None:
            precision = jax.random.gamma(
                jax.random.fold_in(key, 1), 0.5 * self.df, sample_shape, locations.dtype
            )
            white = white / jnp.sqrt(precision * 2 / self.df)[..., None]
        at: Any = 0
        if len(self.weights) > 1:
            log_weights = jnp.log(jnp.asarray(self.weights))
            at = jax.random.categorical(key_component, log_weights, shape=sample_shape)
        root = roots[at]
        moved = root * white if roots.ndim == 2 else (root @ white[..., None])[..., 0]
        return locations[at] + moved

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        """The log density in the directions that vary, (…) for ``value`` (…, d).

        At another place than theirs in the directions that do not, it is −∞ where no direction
        varies and is not looked at where some do: a sampler that knows ``support`` stays there.
        """
        del intermediates
        if not self._structure.density:
            raise InputError(
                "this prior has no density: in at least one direction its standard deviation is "
                "estimated as exactly 0; it can be sampled, and it has mean and covariance"
            )
        value, locations = jnp.asarray(value), jnp.asarray(self.locations)
        free = np.array(self._structure.free, int)
        if not free.size:
            return jnp.where((value == locations[0]).all(-1), 0.0, -jnp.inf)
        roots = jnp.asarray(self.scale_trils)
        x, m = value[..., None, free], locations[:, free]
        if roots.ndim == 2:
            each = dist.Normal(m, roots[:, free]).log_prob(x).sum(-1)
        elif self.df is None:
            each = dist.MultivariateNormal(m, scale_tril=sub_root(roots, free)).log_prob(x)
        else:
            each = dist.MultivariateStudentT(self.df, m, sub_root(roots, free)).log_prob(x)
        return logsumexp(each + jnp.log(jnp.asarray(self.weights)), axis=-1)

    # --------------------------------------------------------------------- moments

    @property
    def mean(self) -> Any:
        """E[θ] (d,); NaN up to one degree of freedom."""
        if self.df is not None and self.df <= 1:
            return np.full(len(self.coef), np.nan)
        return (self.weights[:, None] * self.locations).sum(0)

    @property
    def variance(self) -> Any:
        """The diagonal of the covariance (d,): the mean of the variances, the variance of means."""
        within = self._widened(self.scale_trils**2)
        within = within if within.ndim == 2 else within.sum(-1)
        return (self.weights[:, None] * (within + (self.locations - self.mean) ** 2)).sum(0)

    @property
    def covariance(self) -> Any:
        """Cov(θ) (d, d), by the law of total variance."""
        moved = self.locations - self.mean
        between = (self.weights[:, None] * moved).T @ moved
        if self.scale_trils.ndim == 2:
            within = (self.weights[:, None] * self.scale_trils**2).sum(0)
            return between + np.eye(len(self.coef)) * within
        products = self._widened(self.scale_trils @ self.scale_trils.swapaxes(-1, -2))
        return between + (self.weights[:, None, None] * products).sum(0)

    def _widened(self, squares: Any) -> Any:
        """Times Var(z): ν / (ν − 2) of Student-t, infinite up to two degrees of freedom."""
        if self.df is None:
            return squares
        if self.df > 2:
            return squares * self.df / (self.df - 2)
        xp: Any = np if isinstance(squares, np.ndarray) else jnp
        return xp.where(squares == 0, 0.0, xp.copysign(np.inf, squares))

    @property
    def covariance_matrix(self) -> Any:
        """The same by the name that NumPyro has for it."""
        return self.covariance

    def draws(self, num_draws: int, seed: int | jax.Array = 0) -> np.ndarray:
        """Draws (num_draws, d) as NumPy float64; the same seed gives the same draws."""
        num_draws, rng = inputs.count("num_draws", num_draws), as_rng(seed)
        at = rng.choice(len(self.weights), size=num_draws, p=self.weights / self.weights.sum())
        white = rng.standard_normal((num_draws, len(self.coef)))
        if self.df is not None:
            white = white / root_precision(self.df, rng, (num_draws,))
        if self.scale_trils.ndim == 2:
            return self.locations[at] + self.scale_trils[at] * white
        return self.locations[at] + np.einsum("sij,sj->si", self.scale_trils[at], white)

    # ------------------------------------------------------------------------ JSON

    def to_json(self, path: Any = None, *, num_components: int = MOST_COMPONENTS) -> str:
        """The prior as JSON, which :meth:`from_json` and any other program can read.

        One object with these fields, floats written so that they come back exactly:

        ==============  ===============================================================
        format          "hierbayes learned prior"
        version         1
        coef            names of θ's entries, d strings
        weights         π_s, S numbers that add up to one
        locations       m_s, S lists of d numbers
        scale_trils     L_s, S lists of d rows of d numbers, lower triangular; or S lists
                        of d standard deviations where θ's entries are independent
        df              ν, or null where z is normal
        ==============  ===============================================================

        so that θ = m_s + L_s z with z standard normal, or Student-t, and s drawn by π.

        Parameters
        ----------
        path : path, optional
            Where to write it too, whole or not at all.
        num_components : int
            Of more components than these (full Bayes has one a draw of φ) so many are kept,
            evenly spaced and weighted anew. The default of 500 keeps the file small and is an
            approximation: pass ``len(prior.weights)`` to keep all.

        Returns
        -------
        str
        """
        return write_json(self, path, num_components)

    @classmethod
    def from_json(cls, path_or_text: Any) -> LearnedPrior:
        """The prior that :meth:`to_json` wrote, from a path or from the text itself.

        Raises
        ------
        InputError
            For a file that is not there, text that is no JSON or no learned prior, fields that are
            missing or do not agree.
        """
        return cls(**read_json(path_or_text))


def _finite(values: Any, what: str) -> np.ndarray:
    """Numbers as float64, refused if they are none."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"`{what}` of a learned prior is no array of numbers: {error}") from error
    if not np.isfinite(array).all():
        raise InputError(f"`{what}` of a learned prior holds NaN or infinite numbers")
    return array


def _check(
    coef: tuple[str, ...], locations: np.ndarray, roots: np.ndarray, weights: np.ndarray
) -> None:
    """Refuse shapes that do not agree, roots that are not triangular, weights that are none."""
    d = len(coef)
    if not d or len(set(coef)) < d:
        raise InputError(f"`coef` of a learned prior names its entries, each once; found {coef}")
    if locations.ndim != 2 or locations.shape[1] != d or not len(locations):
        raise InputError(
            f"`locations` of a learned prior has shape {locations.shape}; expected (components, "
            f"{d}), an entry for each of {listing(coef)}"
        )
    count = len(locations)
    if roots.shape not in ((count, d), (count, d, d)):
        raise InputError(
            f"`scale_trils` of a learned prior has shape {roots.shape}; expected "
            f"({count}, {d}, {d}), or ({count}, {d}) for independent entries"
        )
    if roots.ndim == 3 and np.any(np.triu(roots, 1)):
        raise InputError("`scale_trils` of a learned prior must be lower triangular")
    if weights.shape != (count,) or (weights <= 0).any() or abs(weights.sum() - 1) > 1e-6:
        raise InputError(
            f"`weights` of a learned prior are {count} positive numbers that add up to one; found "
            f"shape {weights.shape}, sum {weights.sum():g}"
        )
