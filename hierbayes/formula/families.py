"""Which likelihood a family's name, and an outcome written p(successes, trials), stand for."""

from __future__ import annotations

from typing import Any

import numpy as np

from hierbayes import likelihoods
from hierbayes.errors import InputError, suggestion
from hierbayes.formula.bars import depths, unquoted
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
    depth = depths(formula)
    tilde = next((i for i, c in enumerate(formula) if c == "~" and depth[i] == 0), 0)
    written = formula[:tilde].rstrip()
    first, last = written.find("("), len(written) - 1
    inner = depth[first + 1 : last]
    if written[:first].strip() != "p" or not written.endswith(")") or 0 in inner:
        return formula, None
    commas = [i for i in range(first + 1, last) if formula[i] == "," and depth[i] == 1]
    if len(commas) != 1:
        return formula, None
    successes = formula[first + 1 : commas[0]].strip()
    trials = unquoted(formula[commas[0] + 1 : last].strip())
    if not successes or not trials:
        return formula, None
    return successes.ljust(last + 1) + formula[last + 1 :], trials


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


def hint_of_family(outcome: str, values: np.ndarray) -> tuple[str, ...]:
    """What is said of an outcome that is fitted as Gaussian and probably is none.

    Zeros and ones are outcomes of trials. Whole numbers, none below zero and of three values or
    more, look like counts where a zero stands among them, or where their mean is under 20 and
    their variance at least 0.7 of it, as counts' is: ratings from 1 to 5 vary less, weights and
    pressures in whole units lie higher.
    """
    if not (values >= 0).all() or (values != np.round(values)).any():
        return ()
    distinct, mean = np.unique(values), values.mean()
    if distinct.tolist() == [0.0, 1.0]:
        what, meant = "is 0 or 1 in every row", ("bernoulli",)
    elif len(distinct) > 2 and (
        distinct[0] == 0 or (mean < 20 and values.var() >= 0.7 * mean)
    ):  # fmt: skip
        what, meant = "holds counts, as it seems", ("poisson", "negative_binomial")
    else:
        return ()
    calls = " or ".join(f'family="{family}"' for family in meant)
    return (
        f"the outcome {outcome!r} {what}, and is fitted as Gaussian because no family was given: "
        f'{calls} is probably meant (--family on the command line); family="gaussian" says that '
        "it is not",
    )


def check_exposure(likelihood: Likelihood, offset: str | None) -> None:
    """Refuse an exposure beside an offset, or of what is no rate."""
    if offset is not None:
        raise InputError("give an exposure or an offset, not both: an exposure's log is an offset")
    if not likelihood.log_link:
        raise InputError(
            f"an exposure multiplies a rate, and the {type(likelihood).__name__} likelihood has no "
            'log link: leave it out, or take family="poisson", "negative_binomial" or "gamma"'
        )
