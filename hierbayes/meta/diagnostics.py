"""What the sampler's diagnostics say, in words, with advice.

ArviZ's measures of draws on arrays, for fits in many threads.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from hierbayes.fit.datatree import Dims, correlation_pairs, dataset
from hierbayes.tasks import Tasks


@functools.cache
def arviz_statistics() -> Any:
    """ArviZ's functions of DataArrays, which leave Python's warning filters alone.

    ArviZ's own autocovariance ignores all warnings while it runs, by ``catch_warnings``; those of
    two threads at once can leave its filter behind, which then swallows every later warning.
    """
    from arviz_stats.base.array import BaseArray
    from arviz_stats.base.dataarray import BaseDataArray

    class Stats(BaseArray):
        def autocov(self, ary: Any, axis: int = -1) -> Any:
            """The same by the same Fourier transform."""
            centred = np.moveaxis(np.asarray(ary, dtype=float), axis, -1)
            centred = centred - centred.mean(-1, keepdims=True)
            size = centred.shape[-1]
            length = 1 << (2 * size - 1).bit_length()
            spectrum = np.fft.rfft(centred, length)
            found = np.fft.irfft((spectrum * np.conjugate(spectrum)).real, length)[..., :size]
            return np.moveaxis(found / size, -1, axis)

    return BaseDataArray(array_class=Stats())


def ess(values: Any, method: str) -> Any:
    """Effective draws (…) of draws (chain, draw, …)."""
    import xarray as xr

    dims = ("chain", "draw", *(f"axis_{i}" for i in range(np.ndim(values) - 2)))
    return arviz_statistics().ess(xr.DataArray(values, dims=dims), method=method).values


LARGEST_RHAT = 1.01
"""Vehtari et al. (2021), Rank-normalization, folding, and localization: an improved R̂."""

SMALLEST_ESS_PER_CHAIN = 100

MOST_TASKS = 500
"""θ of at most this many tasks is judged, evenly spread; given φ all are drawn alike."""


def remarks(
    draws: dict[str, np.ndarray],
    theta: np.ndarray | None,
    sample_stats: dict[str, np.ndarray],
    tasks: Tasks,
    dims: Dims,
) -> list[str]:
    """R̂, effective sample sizes and divergences, as sentences; empty where all is well."""
    broken = [name for name, values in draws.items() if not np.isfinite(values).all()]
    if broken or (theta is not None and not np.isfinite(theta).all()):
        return [
            f"draws of {', '.join(broken) or 'theta'} are not finite: nothing can be said from "
            "them. Look for predictors of very different scales, or a prior far from the data"
        ]
    found = _of_divergences(sample_stats)
    chains, per_chain = next(iter(draws.values())).shape[:2]
    if per_chain < 4:
        return found
    rhat, bulk, tail = _diagnostics(draws, theta, tasks, dims)
    if chains > 1:
        found += _of_rhat(rhat)
    wanted = SMALLEST_ESS_PER_CHAIN * chains
    return [*found, *_of_ess("bulk", bulk, wanted), *_of_ess("tail", tail, wanted)]


def _of_divergences(sample_stats: dict[str, np.ndarray]) -> list[str]:
    """How many draws diverged, if any did."""
    diverging = int(sample_stats.get("diverging", np.zeros(1)).sum())
    if not diverging:
        return []
    size = sample_stats["diverging"].size
    return [
        f"{diverging} of {size} draws diverged ({diverging / size:.1%}): the "
        "sampler may miss a part of the posterior. Raise target_accept (0.95, 0.99), use "
        'method="collapsed" where it applies, or give tau a more informative prior'
    ]


def _of_rhat(rhat: dict[str, float]) -> list[str]:
    """The parameter that has mixed worst, if it has not."""
    worst = max(rhat, key=lambda k: rhat[k])
    if not rhat[worst] > LARGEST_RHAT:
        return []
    return [
        f"R-hat is {rhat[worst]:.3f} for {worst} (at most {LARGEST_RHAT} wanted): the chains "
        "have not mixed. Raise num_draws, and num_warmup where NUTS is the sampler"
    ]


def _of_ess(kind: str, sizes: dict[str, float], wanted: int) -> list[str]:
    """The parameter with the fewest effective draws, if they are too few."""
    worst = min(sizes, key=lambda k: sizes[k])
    if not sizes[worst] < wanted:
        return []
    return [
        f"the {kind} effective sample size of {worst} is {sizes[worst]:.0f} (at least "
        f"{wanted} wanted): its {'mean' if kind == 'bulk' else 'interval'} is rough. "
        "Raise num_draws"
    ]


def _diagnostics(
    draws: dict[str, np.ndarray], theta: np.ndarray | None, tasks: Tasks, dims: Dims
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """(R̂, bulk ESS, tail ESS) by parameter; constants have none."""
    import arviz_stats

    tree = dataset(draws, tasks, dims, ("chain", "draw"))
    if "corr" in tree:
        tree = tree.drop_vars("corr").assign(correlation_pairs(tree["corr"]))
    variables = {str(name): values for name, values in tree.data_vars.items()}
    if theta is not None:
        some = np.unique(np.linspace(0, tasks.num_tasks - 1, MOST_TASKS).astype(int))
        judged = dataset({"theta": theta}, tasks, {}, ("chain", "draw"))["theta"].isel(task=some)
        variables["theta"] = judged
    results: list[dict[str, float]] = []
    for measure in (
        lambda a: arviz_stats.rhat(a.to_dataset(name="a"))["a"],
        lambda a: arviz_statistics().ess(a, method="bulk"),
        lambda a: arviz_statistics().ess(a, method="tail"),
    ):
        values: dict[str, float] = {}
        for name, array in variables.items():
            moving = array.std(("chain", "draw")).values > 0
            flat: Any = measure(array).values
            for index in np.argwhere(np.atleast_1d(moving)):
                at = tuple(index) if np.ndim(flat) else ()
                labels = [str(array[d].values[i]) for d, i in zip(array.dims[2:], at, strict=True)]
                values[f"{name}[{', '.join(labels)}]" if labels else name] = float(flat[at])
        results.append({k: v for k, v in values.items() if np.isfinite(v)} or {"phi": np.nan})
    return results[0], results[1], results[2]
