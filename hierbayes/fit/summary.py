"""Tables of φ and of θ, a row an entry, whose labels name one entry each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hierbayes.errors import InputError, suggestion
from hierbayes.fit import datatree as trees
from hierbayes.fit.learned import Learned

Entries = list[tuple[str, tuple[Any, ...]]]
"""A variable's name and the coordinates of an entry of it, for each row of a table."""


def summary(
    fit: Learned, names: str | Sequence[str] | None = None, errors: Mapping[str, Any] | None = None
) -> Any:
    """φ, or what is named of φ and θ, as a pandas DataFrame; see :meth:`Fit.summary`."""
    import pandas as pd

    chosen = _chosen(fit, names)
    draws = {name: _draws_of(fit, name) for name in chosen}
    kept = {name: values for name, values in draws.items() if values is not None}
    point = [name for name in chosen if name not in kept]
    parts, entries = [], []
    if kept:
        table, of_draws = _of_draws(fit, kept)
        parts.append(table)
        entries += of_draws
    if point or not kept:
        table, of_point = _of_point(fit, point, errors or {})
        if fit.phi_draws is not None:
            table = table.rename(columns={"estimate": "mean", "se": "sd"})
        parts.append(table)
        entries += of_point
    together = pd.concat(parts)
    together.index = pd.Index(labels(entries), dtype=object)
    return together


def labels(entries: Entries) -> list[str]:
    """``name[task, coef]`` of every entry; names in quotes where they would be ambiguous else."""
    plain = [_label(name, map(str, at)) for name, at in entries]
    seen = Counter(plain)
    if len(seen) == len(plain):
        return plain
    quoted = [_label(name, map(repr, at)) for name, at in entries]
    mixed = [q if seen[p] > 1 else p for p, q in zip(plain, quoted, strict=True)]
    return mixed if len(set(mixed)) == len(mixed) else quoted


def _label(name: str, at: Any) -> str:
    inside = ", ".join(at)
    return f"{name}[{inside}]" if inside else name


def _chosen(fit: Learned, names: str | Sequence[str] | None) -> list[str]:
    known = [*fit.phi, "theta"]
    if names is None:
        return list(fit.phi)
    chosen = [names] if isinstance(names, str) else list(names)
    for name in chosen:
        if name not in known:
            raise InputError(
                f"summary takes names of phi, or 'theta'; found {name!r}: "
                f"{suggestion(str(name), known)}"
            )
    return list(dict.fromkeys(chosen))


def _draws_of(fit: Learned, name: str) -> np.ndarray | None:
    """Draws that are of a posterior of φ too: at a point φ̂ its estimates are summarised."""
    if fit.phi_draws is None:
        return None
    return fit.theta_draws if name == "theta" else fit.phi_draws.get(name)


def _of_draws(fit: Learned, draws: Mapping[str, np.ndarray]) -> tuple[Any, Entries]:
    """ArviZ's summary. It sees one variable without names: its own labels may be of others.

    ArviZ stacks values in the order of a Dataset's dimensions, and labels them in each variable's.
    """
    import arviz_stats
    import xarray as xr

    columns, entries = [], []
    labelled = trees.dataset(dict(draws), fit.tasks, trees.dims(fit), ("chain", "draw"))
    for name in draws:
        values = labelled[name]
        places, at = _entries(values, name, values.dims[2:])
        columns.append(values.values.reshape(*values.shape[:2], -1)[:, :, places])
        entries += at
    flat = np.concatenate(columns, axis=-1)
    data: Any = xr.Dataset({"x": (("chain", "draw", "entry"), flat)})
    exact: Any = "none"
    return arviz_stats.summary(data, round_to=exact), entries


def _of_point(fit: Learned, names: Sequence[str], errors: Mapping[str, Any]) -> tuple[Any, Entries]:
    """``estimate`` and ``se``; of θ the posterior standard deviation where nothing else is said."""
    import pandas as pd

    ours = fit.adapted if "theta" in names else None
    estimates = {n: fit.phi[n] for n in names if n != "theta"}
    spreads = dict(fit.standard_errors)
    if ours is not None:
        estimates["theta"], spreads["theta"] = ours.posterior.mean, ours.sd.values
    spreads |= errors
    labelled = trees.dataset(estimates, fit.tasks, trees.dims(fit))
    columns, entries = [np.zeros((2, 0))], []
    for name in names:
        values = labelled[name]
        places, at = _entries(values, name, values.dims)
        se = np.broadcast_to(np.asarray(spreads.get(name, np.nan), float), values.shape)
        columns.append(np.stack([values.values.reshape(-1)[places], se.reshape(-1)[places]]))
        entries += at
    both = np.concatenate(columns, axis=1)
    return pd.DataFrame({"estimate": both[0], "se": both[1]}), entries


def _entries(values: Any, name: str, dims: Sequence[str]) -> tuple[Any, Entries]:
    """Positions of a variable's entries along its ``dims``, in one line, and where they stand.

    Of correlations those above the diagonal, the rest being constant or said already.
    """
    sizes = tuple(values.sizes[d] for d in dims)
    where = np.indices(sizes).reshape(len(sizes), int(np.prod(sizes)))
    places = np.arange(where.shape[1])
    if name == "corr":
        places = np.flatnonzero(where[0] < where[1])
    names = [values[d].values.tolist() for d in dims]
    columns = [[of[i] for i in at[places].tolist()] for of, at in zip(names, where, strict=True)]
    coordinates = zip(*columns, strict=True) if columns else [()] * len(places)
    return places, [(name, at) for at in coordinates]
