"""Small real data sets that ship with the package, as pandas DataFrames.

========================  =====================================================================
:func:`eight_schools`     8 schools: estimated effect of coaching and its standard error
:func:`radon`             919 houses in 85 counties of Minnesota: radon, floor, county's uranium
:func:`rats`              30 rats weighed in five weeks
:func:`sleepstudy`        18 people: reaction time over ten days of little sleep
:func:`sinusoids`         tasks drawn on the fly: sinusoids of random amplitude and phase
========================  =====================================================================
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hierbayes.tasks import Episodes

__all__ = ["CATALOGUE", "DataSet", "eight_schools", "radon", "rats", "sinusoids", "sleepstudy"]


def eight_schools() -> Any:
    """Coaching for the SAT-V in eight schools: columns ``school``, ``y``, ``se``.

    Source: Rubin (1981), Estimation in parallel randomized experiments, Journal of Educational
    Statistics 6, table 1; effects and standard errors in points of the test.

    Examples
    --------
    >>> import hierbayes as hb
    >>> hb.datasets.eight_schools().shape
    (8, 3)
    """
    import pandas as pd

    return pd.DataFrame(
        {
            "school": list("ABCDEFGH"),
            "y": [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0],
            "se": [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0],
        }
    )


def radon() -> Any:
    """Radon in 919 houses of 85 Minnesota counties.

    Columns: ``county``; ``floor`` (0 measured in the basement, 1 on the first floor); ``activity``
    (pCi/L, three counts are zero); ``log_radon`` (log of the activity, zeros taken as 0.1);
    ``log_uranium`` (log of the county's uranium, ppm).

    Source: the data of Gelman and Hill (2007), Data Analysis Using Regression and
    Multilevel/Hierarchical Models, chapter 12, as in the R package HLMdiag.

    Examples
    --------
    >>> import hierbayes as hb
    >>> df = hb.datasets.radon()
    >>> df.shape, df["county"].nunique()
    ((919, 5), 85)
    """
    return _read("radon")


def rats() -> Any:
    """Weights of 30 young rats on five days: columns ``rat``, ``day``, ``weight`` (g).

    Source: Gelfand et al. (1990), Illustration of Bayesian inference in normal data models using
    Gibbs sampling, JASA 85; BUGS examples, volume 1.

    Examples
    --------
    >>> import hierbayes as hb
    >>> hb.datasets.rats().shape
    (150, 3)
    """
    return _read("rats")


def sinusoids(
    shots: int = 10,
    queries: int | None = None,
    *,
    amplitude: tuple[float, float] = (0.1, 5.0),
    phase: tuple[float, float] = (0.0, math.pi),
    x: tuple[float, float] = (-5.0, 5.0),
    noise: float = 0.0,
) -> Episodes:
    r"""Sinusoids drawn on the fly, the tasks of the MAML paper.

    .. math:: y = A \sin(x - b), \quad A \sim U(0.1, 5), \; b \sim U(0, \pi), \;
              x \sim U(-5, 5)

    They are linear in two features that all share, sin x and cos x, and free of noise: a method
    that were given those would be exact from two rows on.

    Parameters
    ----------
    shots, queries : int
        Rows to adapt to and to be judged by; as many queries as shots by default.
    amplitude, phase, x : (float, float)
        The ranges of A, b (radians) and x. Many ports draw b from (−π, π), which is harder.
    noise : float
        Standard deviation of normal noise on y.

    Source: Finn, Abbeel and Levine (2017), Model-agnostic meta-learning, ICML, section 5.1.

    Examples
    --------
    >>> import hierbayes as hb
    >>> support, query = hb.datasets.sinusoids(shots=5, queries=20).draw(2)
    >>> support.sizes.tolist(), query.sizes.tolist()
    ([5, 5], [20, 20])
    """
    from hierbayes.tasks import Episodes

    ranges = (tuple(amplitude), tuple(phase), tuple(x))
    return Episodes.from_sampler(_sinusoid(*ranges, float(noise)), shots, queries)


@functools.cache  # one function for the same sinusoids, so that programs of them are compiled once
def _sinusoid(
    amplitude: tuple[float, float], phase: tuple[float, float], x: tuple[float, float], noise: float
) -> Any:
    import jax
    import jax.numpy as jnp

    def sample(key: Any, num_rows: int) -> tuple[Any, Any]:
        of_a, of_b, of_x, of_y = jax.random.split(key, 4)
        a = jax.random.uniform(of_a, minval=amplitude[0], maxval=amplitude[1])
        b = jax.random.uniform(of_b, minval=phase[0], maxval=phase[1])
        at = jax.random.uniform(of_x, (num_rows, 1), minval=x[0], maxval=x[1])
        y = a * jnp.sin(at[:, 0] - b)
        return at, y + noise * jax.random.normal(of_y, (num_rows,)) if noise else y

    return sample


def sleepstudy() -> Any:
    """Reaction times of 18 people over ten days of three hours' sleep.

    Columns: ``subject``, ``days``, ``reaction`` (ms, mean of a day's tests).

    Source: Belenky et al. (2003), Patterns of performance degradation and restoration during
    sleep restriction and subsequent recovery, Journal of Sleep Research 12; as in lme4.

    Examples
    --------
    >>> import hierbayes as hb
    >>> hb.datasets.sleepstudy().shape
    (180, 3)
    """
    return _read("sleepstudy")


def _read(name: str) -> Any:
    import pandas as pd

    with (
        resources.files("hierbayes.datasets").joinpath(f"{name}.csv").open(encoding="utf-8") as file
    ):
        return pd.read_csv(file)


@dataclass(frozen=True)
class DataSet:
    """A shipped data set and the model that is usually fitted to it."""

    load: Callable[[], Any]
    formula: str
    known_se: str | None
    about: str


CATALOGUE: dict[str, DataSet] = {
    "eight_schools": DataSet(
        eight_schools, "y ~ 1 + (1 | school)", "se", "coaching effects in 8 schools"
    ),
    "radon": DataSet(
        radon,
        "log_radon ~ 1 + floor + (1 + floor | county)",
        None,
        "919 radon measurements in 85 counties",
    ),
    "rats": DataSet(
        rats, "weight ~ 1 + center(day) + (1 + center(day) | rat)", None, "30 rats, five weighings"
    ),
    "sleepstudy": DataSet(
        sleepstudy,
        "reaction ~ 1 + days + (1 + days | subject)",
        None,
        "18 people, ten days of little sleep",
    ),
}
"""The data sets by name, as the command line knows them."""
