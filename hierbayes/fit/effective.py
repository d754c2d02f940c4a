"""ArviZ's measures of draws on arrays, for fits in many threads."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


@functools.cache
def statistics() -> Any:
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
    return statistics().ess(xr.DataArray(values, dims=dims), method=method).values
