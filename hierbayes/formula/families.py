"""Which likelihood a family's name, and an outcome written p(successes, trials), stand for."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from hierbayes import likelihoods
from hierbayes.errors import InputError, suggestion
from hierbayes.likelihoods import Likelihood

FAMILIES = {
    "gaussian": likelihoods.Gaussian,
    "bernoulli": likelihoods.Bernoulli,
    "binomial": likelihoods.Binomial,
    "poisson": likelihoods.Poisson,
    "negative_binomial": likelihoods.NegativeBinomial,
    "student_t": likelihoods.StudentT,
    "gamma": likelihoods.Gamma,
}


def successes_of_trials(formula: Any) -> tuple[Any, str | None]:
    """The formula with successes alone as its outcome, every place kept, and the trials' column."""
    if not isinstance(formula, str):
        return formula, None
    written = re.match(r"\s*p\(\s*([^,()]+?)\s*,\s*([^,()]+?)\s*\)(?=\s*~)", formula)
    if written is None:
        return formula, None
    successes, trials = written.groups()
    return successes.ljust(written.end()) + formula[written.end() :], trials.strip("`")


def likelihood_of(family: Any, known_se: bool, trials: str | None) -> Likelihood:
    """The likelihood of a family's name, or as it was given."""
    if isinstance(family, Likelihood):
        return family
    name = family or ("gaussian" if trials is None else "binomial")
    if name not in FAMILIES:
        raise InputError(f"family {name!r} is not known; {suggestion(str(name), list(FAMILIES))}")
    if trials is not None and name != "binomial":
        raise InputError(f"p(successes, trials) is the outcome of a binomial family, not {name!r}")
    if name == "binomial" and trials is None:
        raise InputError(
            "a binomial family needs the trials: write p(successes, trials) ~ …; for outcomes of "
            '0 and 1 take family="bernoulli"'
        )
    if name == "gaussian":
        return likelihoods.Gaussian(known_se=known_se)
    return FAMILIES[name]()


def slot(name: str, column: str, values: np.ndarray) -> tuple[str, np.ndarray]:
    """An exposure as the offset that it is."""
    if name != "exposure":
        return name, values
    if not (values > 0).all():
        odd = np.flatnonzero(~(values > 0))
        raise InputError(
            f"exposure {column!r} must be above zero in every row: {odd.size} row(s) hold none, "
            f"the first {values[odd[0]]:g} in row {odd[0]}; leave rows without exposure out"
        )
    return "offset", np.log(values)


def check_exposure(likelihood: Likelihood, offset: str | None) -> None:
    """Refuse an exposure beside an offset, or of what is no rate."""
    if offset is not None:
        raise InputError("give an exposure or an offset, not both: an exposure's log is an offset")
    if not likelihood.log_link:
        raise InputError(
            f"an exposure multiplies a rate, and the {type(likelihood).__name__} likelihood has no "
            'log link: leave it out, or take family="poisson", "negative_binomial" or "gamma"'
        )
