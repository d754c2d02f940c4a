"""A learned prior as JSON and back: :meth:`LearnedPrior.to_json` describes the fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hierbayes import inputs
from hierbayes.errors import InputError, listing
from hierbayes.files import write_whole

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
