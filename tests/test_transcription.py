"""The numbers quoted in ``references/`` and the shipped data are those of their sources.

Runs where the folder of reference answers is at hand (HIERBAYES_SHARED), else skips.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from assertions import close

import hierbayes as hb

HERE = Path(__file__).parent / "references"
QUOTED = 1e-7  # eight significant digits are quoted
POSTERIORS = [
    ("rats", "rats", None, "reference"),
    ("radon_partially_pooled", "radon_partially_pooled", None, "reference"),
    ("radon_hierarchical_intercept", "radon_hierarchical_intercept", None, "reference"),
    ("eight_schools", "eight_schools", "half_cauchy", "reference"),
    ("eight_schools", "eight_schools", "flat", "flat_prior_reference"),
]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "source", "part", "group"), POSTERIORS)
def test_posterior_moments_are_quoted_right(name, source, part, group, shared):
    quoted = read(HERE / f"{name}.json")
    quoted = quoted if part is None else quoted[part]
    expected = read(shared / "reference" / f"{source}.json")[group]["params"]
    checked = 0
    for parameter, moments in quoted.items():
        if not (isinstance(moments, dict) and {"mean", "sd"} <= set(moments)):
            continue
        for moment in ("mean", "sd"):
            values = np.atleast_1d(moments[moment])
            keys = [parameter] if parameter in expected else [
                f"{parameter}[{i + 1}]" for i in range(len(values))
            ]  # fmt: skip
            close(values, [expected[k][moment] for k in keys], rtol=QUOTED)
            checked += len(values)
    assert checked == 2 * len(expected)  # every parameter of the source is quoted


def test_lme4_is_quoted_right(shared):
    quoted, expected = read(HERE / "lme4.json"), read(shared / "reference" / "lme4_fits.json")
    fits = {name: fit for name, fit in expected.items() if fit.get("class") == "lmerMod"}
    assert set(fits) <= set(quoted)
    for name, fit in fits.items():
        close(quoted[name]["logLik"], fit["logLik"], rtol=1e-9)
        for key in ("fixef", "fixef_se"):
            for term, value in fit[key].items():
                close(quoted[name][key][term], value, rtol=QUOTED)


def test_shipped_radon_is_the_source(shared):
    expected = pd.read_csv(shared / "data" / "radon_mn.csv")
    shipped = hb.datasets.radon()
    assert shipped["county"].tolist() == expected["county"].tolist()
    # three of the four rows at log 0.1 are zero counts
    zero = shipped["activity"] == 0
    assert sorted(shipped["county"][zero]) == ["CARVER", "COTTONWOOD", "MCLEOD"]
    for column in ("floor", "log_radon", "log_uranium"):
        close(shipped[column], expected[column], atol=1e-9)  # ten decimals are shipped
    # the source's activities are rounded to one decimal, and so are the shipped ones
    close(np.log(shipped["activity"] + 0.1), expected["log_radon_pdb"], atol=1e-9)
