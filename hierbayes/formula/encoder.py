"""From a formula and a DataFrame to a model and its tasks, and new rows by the same transforms.

The columns that formulaic makes of checked terms, now and again of new rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hierbayes import inputs, priors
from hierbayes.errors import InputError, announce, listing
from hierbayes.formula import new_data
from hierbayes.formula.bars import Bar, FormulaError, Parts, split
from hierbayes.formula.families import (
    check_exposure,
    hint_of_family,
    likelihood_of,
    slot,
    successes_of_trials,
)
from hierbayes.formula.names import Names
from hierbayes.formula.terms import (
    Terms,
    context,
    first_line,
    read_terms,
    refuse_wide,
    under_our_names,
)
from hierbayes.likelihoods import Likelihood
from hierbayes.model import HierarchicalModel
from hierbayes.priors import HyperPrior
from hierbayes.tasks import Labels, Tasks
from hierbayes.tasks.container import assemble
from hierbayes.tasks.frames import Frame, Missing, complete_rows


@dataclass(frozen=True)
class Encoded:
    """One part of the formula as formulaic encoded it.

    ``names`` are the user's for its columns, ``made`` the same in our names.
    """

    spec: Any
    names: tuple[str, ...]
    made: tuple[str, ...]

    @classmethod
    def fit(
        cls, terms: Terms, table: Any, parts: Parts, names: Names
    ) -> tuple[Encoded, np.ndarray]:
        """The part as encoded in the training data, and its columns there."""
        with _formulaic_errors(terms, parts, names):
            matrix = terms.formula.get_model_matrix(
                table, context=context(names), na_action="ignore", output="numpy"
            )
            spec: Any = matrix.model_spec
            new_data.refuse_unseen_levels(spec, table, context(names))
        # treatment-coded and full dummies of one level are the same column: name them alike
        made = tuple(name.replace("[T.", "[") for name in spec.column_names)
        found = cls(spec, tuple(names.show(name) for name in made), made)
        return found, found._finite(matrix)

    def matrix(
        self, table: Any, terms: Terms, parts: Parts, names: Names, training: Any
    ) -> np.ndarray:
        """The columns of new rows."""
        ours = under_our_names(table, names)
        with _formulaic_errors(terms, parts, names, (table, training)):
            new_data.refuse_unseen_levels(self.spec, ours, context(names))
            matrix = self.spec.get_model_matrix(ours, context=context(names))
        return self._finite(matrix)

    def _finite(self, matrix: Any) -> np.ndarray:
        values = np.asarray(matrix, dtype=np.float64)
        for i, name in enumerate(self.names):
            bad = ~np.isfinite(values[:, i])
            if bad.any():
                raise InputError(
                    f"the term {name!r} is NaN or infinite in {bad.sum()} row(s), the first "
                    f"{int(np.flatnonzero(bad)[0])} (counting from 0), though its columns are "
                    "finite; a log of zero perhaps"
                )
        return values


class _formulaic_errors:
    """Formulaic's errors and warnings as sentences that point into the user's formula."""

    def __init__(
        self, terms: Terms, parts: Parts, names: Names, tables: tuple[Any, Any] | None = None
    ):
        self.terms, self.parts, self.names, self.tables = terms, parts, names, tables
        self.quiet = np.errstate(all="ignore")  # log(0): refused by name afterwards

    def __enter__(self) -> None:
        self.quiet.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from formulaic.errors import DataMismatchWarning

        self.quiet.__exit__(kind, error, trace)
        if not isinstance(error, Exception) or isinstance(error, InputError):
            return
        if isinstance(error, (DataMismatchWarning, new_data.UnseenLevels)):
            if self.tables is None:
                place = max(self.parts.text.find("levels"), 0)
                raise FormulaError(
                    self.parts.text, place, "the levels that are listed are not all that the data "
                    f"hold in {self.terms.text!r}"
                ) from error  # fmt: skip
            unseen = new_data.unseen_categories(*self.tables, self.terms.categories)
            raise InputError(
                f"new data hold categories that the training data did not: "
                f"{unseen or self.names.show(str(error))}; "
                "nothing was learned of them: leave these rows out, or learn from data that "
                "hold them"
            ) from error
        problem = self.names.show(first_line(error)) or type(error).__name__
        place = max(self.parts.text.find(self.terms.text), 0)
        raise FormulaError(self.parts.text, place, problem) from error


def from_formula(
    formula: str,
    data: Any,
    family: str | Likelihood | None = None,
    hyperprior: HyperPrior | None = None,
    known_se: str | None = None,
    *,
    task_predictors: Sequence[str] = (),
    offset: str | None = None,
    weight: str | None = None,
    exposure: str | None = None,
    missing: Missing = "raise",
) -> tuple[HierarchicalModel, Tasks]:
    r"""A model and its tasks from a formula in lme4's language.

    ``y ~ 1 + x + z + (1 + x | g)`` reads: coefficients of the columns inside bars vary between
    the tasks g, :math:`\theta_j \sim N(\mu, \Sigma)`; those that also stand outside have a mean
    μ to be learned, the others have μ = 0; columns outside bars only are shared, β. Effects
    inside one bar are correlated; ``||`` and separate bars make them independent. Successes of
    trials are written ``p(successes, trials) ~ …``.

    Parameters
    ----------
    formula : str
        Terms are read by formulaic: transformations that remember the training data
        (``center(x)``, ``poly(x, 2)``, ``bs(x, df=4)``), categories, interactions. They see the
        columns and nothing else.
    data : DataFrame
        Pandas, polars or anything that narwhals reads.
    family : str or Likelihood
        Distribution of the outcome, with its usual link: "gaussian" (identity, the default),
        "bernoulli" and "binomial" (logit; the default for ``p(successes, trials)``), "poisson",
        "negative_binomial" and "gamma" (log), "student_t" (identity); or a likelihood of
        :mod:`hierbayes.likelihoods`. Without one, an outcome of zeros and ones, and one that looks
        like a count (whole numbers, none below 0, with a zero among them or with a mean under 20
        and a variance of at least 0.7 of it), is fitted as Gaussian with a warning that names the
        family that is probably meant; ``family="gaussian"`` says that it is not.
    hyperprior : HyperPrior, optional
        p(φ); defaults are weakly informative and scaled to the data.
    known_se : str, optional
        Column of known standard errors (outcome's units); then there is no σ to learn.
    task_predictors : sequence of str
        Columns constant within tasks that move the mean of θ_j: μ + Γ w_j.
    offset, weight : str, optional
        Columns of offsets (on the scale of the linear predictor), and of weights: of precisions
        under a Gaussian likelihood, else of each row's log likelihood.
    exposure : str, optional
        Column of exposures of counts (time, area, population), whose logarithm is an offset.
    missing : "raise" or "drop"
        What to do with rows that have missing values.

    Returns
    -------
    (HierarchicalModel, Tasks)

    Raises
    ------
    InputError
        For a formula that cannot be read (pointing at the place), a column that is missing or of
        the wrong kind, missing values, two grouping factors.

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula(
    ...     "log_radon ~ 1 + floor + log_uranium + (1 + floor | county)", hb.datasets.radon()
    ... )
    >>> tasks.coef, tasks.labels.shared
    (('Intercept', 'floor'), ('log_uranium',))
    """
    formula, trials = successes_of_trials(formula)
    likelihood = likelihood_of(family, known_se is not None, trials)
    parts = split(formula)
    frame = Frame(data)
    if exposure is not None:
        check_exposure(likelihood, offset)
    named = dict(known_se=known_se, offset=offset, weight=weight, trials=trials, exposure=exposure)
    slots = tuple(
        (name, inputs.column(name, column)) for name, column in named.items() if column is not None
    )
    encoder = FormulaEncoder(parts, slots, inputs.names("task_predictors", task_predictors))
    tasks = encoder.fit(frame, missing)
    if family is None and known_se is None and trials is None:
        announce(hint_of_family(parts.outcome, tasks.outcome))
    correlated, zero_mean = encoder.structure()
    model = HierarchicalModel(
        likelihood,
        priors.Gaussian(correlated, zero_mean),
        hyperprior or HyperPrior(),
        encoder,
    )
    return model, tasks


@dataclass
class FormulaEncoder:
    """Remembers how the formula's terms were encoded in the training data.

    ``terms`` holds the checked terms of the outcome, the fixed part and each bar, ``specs``
    formulaic's model specifications of them.
    """

    parts: Parts
    slots: tuple[tuple[str, str], ...] = ()
    task_predictors: tuple[str, ...] = ()
    names: Names = field(default_factory=Names, repr=False)
    terms: tuple[Terms, ...] = field(default=(), repr=False)
    specs: list[Any] = field(default_factory=list, repr=False)
    training: Any = field(default=None, repr=False)

    def fit(self, frame: Frame, missing: Missing) -> Tasks:
        """Encode the training data and remember its transforms."""
        return self._tasks(frame, missing, training=True)

    def encode(self, data: Any, missing: Missing = "raise") -> Tasks:
        """New rows through the remembered transforms; the outcome may be absent."""
        return self._tasks(Frame(data), missing, training=False)

    def structure(self) -> tuple[bool | tuple[tuple[str, ...], ...], tuple[str, ...]]:
        """(which coefficients are correlated, which have mean zero), for the prior."""
        fixed = self._names(1)
        groups: list[tuple[str, ...]] = []
        for i, bar in enumerate(self.parts.bars):
            names = self._names(2 + i)
            groups += [(name,) for name in names] if bar.independent else [tuple(names)]
        coef = [name for group in groups for name in group]
        zero_mean = tuple(name for name in coef if name not in fixed)
        if len(groups) == 1:
            return len(coef) > 1, zero_mean
        return (tuple(groups) if any(len(g) > 1 for g in groups) else False), zero_mean

    def _tasks(self, frame: Frame, missing: Missing, *, training: bool) -> Tasks:
        parts = self.parts
        frame.require([parts.group], "grouping column")
        frame.require([c for _, c in self.slots], "column")
        frame.require(self.task_predictors, "task predictor")
        if training:
            self._read(frame.columns)
        outcome_terms, *terms = self.terms
        with_outcome = training or set(outcome_terms.columns) <= set(frame.columns)
        read = [*terms, outcome_terms] if with_outcome else terms
        used = list(dict.fromkeys(c for term in read for c in term.columns))
        if not training:
            new_data.check_new_columns(frame, used, self.training)
        for column in used:
            new_data.refuse_spoiled_numbers(frame, column)
        numeric = [c for c in used if frame.is_numeric(c)]
        checked = {c: frame.numbers(c) for c in numeric}
        checked |= {c: np.where(frame.is_null(c), np.nan, 0.0) for c in used if c not in numeric}
        level = {c: frame.numbers(c) for c in (*self.task_predictors, *(c for _, c in self.slots))}
        checked |= level
        nameless = np.where(frame.is_null(parts.group), np.nan, 0.0)
        keep = complete_rows({parts.group: nameless} | checked, missing)
        if not keep.all():
            rows = np.flatnonzero(keep)
            frame, level = frame.take(rows), {c: v[rows] for c, v in level.items()}
        matrices = self._matrices(frame, used, training, with_outcome)
        outcome, fixed, *varying = matrices
        coef = [name for i in range(len(parts.bars)) for name in self._names(2 + i)]
        if len(set(coef)) < len(coef):
            twice = sorted({c for c in coef if coef.count(c) > 1})
            raise FormulaError(
                parts.text, parts.bars[-1].start,
                f"{listing(twice)} stands in two bars; write 0 + … to leave an intercept out",
            )  # fmt: skip
        shared = [i for i, name in enumerate(self._names(1)) if name not in coef]
        return assemble(
            frame, parts.group,
            predictors=np.column_stack(varying),
            shared=fixed[:, shared],
            task_level=_columns(level, self.task_predictors, len(frame)),
            outcome=outcome,
            slots=dict(slot(name, column, level[column]) for name, column in self.slots),
            labels=Labels(
                np.zeros(0), tuple(coef), tuple(self._names(1)[i] for i in shared),
                self.task_predictors, parts.group, parts.outcome, self,
            ),
        )  # fmt: skip

    def _matrices(
        self, frame: Frame, used: list[str], training: bool, with_outcome: bool
    ) -> list[Any]:
        """The outcome (N,) and one matrix a part, by training or remembered transforms."""
        table = frame.to_pandas(used)
        if training:
            first, *rest = self._learn(new_data.with_used_categories(table))
            return [self._one_column(first), *rest]
        table = new_data.without_idle_categories(table, self.training)
        first = self._encoded(0, table) if with_outcome else None
        rest = [self._encoded(i, table) for i in range(1, len(self.terms))]
        return [None if first is None else self._one_column(first), *rest]

    def _one_column(self, outcome: np.ndarray) -> np.ndarray:
        if outcome.shape[1] != 1:
            raise InputError(
                f"the outcome {self.parts.outcome!r} is not one column of numbers: it gives "
                f"{listing(list(self.specs[0].names))}"
            )
        return outcome[:, 0]

    def _read(self, columns: Sequence[str]) -> None:
        """Check every part of the formula, before anything of it is evaluated."""
        parts, self.names = self.parts, Names.beside(columns)
        outcome = read_terms(parts.outcome, parts, columns, self.names, intercept=False)
        others = {
            term: read_terms(term, parts, columns, self.names)
            for term in (parts.fixed, *(bar.terms for bar in parts.bars))
        }
        self.terms = (outcome, others[parts.fixed], *(others[bar.terms] for bar in parts.bars))

    def _learn(self, table: Any) -> list[np.ndarray]:
        """Let formulaic encode every part of the formula once, and keep what it learned."""
        _, fixed, *bars = self.terms
        refuse_wide(self.parts, [fixed], self.names, table, "shared")
        refuse_wide(self.parts, bars, self.names, table, "varying")
        ours = under_our_names(table, self.names)
        fitted: dict[int, tuple[Encoded, np.ndarray]] = {}  # bars may share what they read
        for terms in self.terms:
            if id(terms) not in fitted:
                fitted[id(terms)] = Encoded.fit(terms, ours, self.parts, self.names)
        self.specs = [fitted[id(terms)][0] for terms in self.terms]
        self.training = table
        self._refuse_alike()
        return [fitted[id(terms)][1] for terms in self.terms]

    def _refuse_alike(self) -> None:
        """Two columns of one name are one coefficient: refuse those that are not the same."""
        meant: dict[str, str] = {}
        for spec in self.specs[1:]:
            for name, made in zip(spec.names, spec.made, strict=True):
                if meant.setdefault(name, made) != made:
                    raise InputError(
                        f"two different columns of the model are called {name!r}: one of them is "
                        f"the column {name!r} of the data, or a category with such a name; "
                        "rename it"
                    )

    def _encoded(self, i: int, table: Any) -> np.ndarray:
        """A part of new rows, by what was learned of the training rows."""
        return self.specs[i].matrix(table, self.terms[i], self.parts, self.names, self.training)

    def to_plain(self) -> tuple[dict[str, Any], Any]:
        """The encoder as JSON and its training columns as a Dataset, from which it learns again."""
        import xarray as xr

        plain: dict[str, Any] = {
            "formula": self.parts.text,
            "slots": self.slots,
            "task_predictors": self.task_predictors,
            "outcome_columns": self.terms[0].columns,
            "columns": list(self.training.columns),
            "categories": {},
        }
        variables = {}
        for i, column in enumerate(self.training.columns):
            values = self.training[column]
            if hasattr(values, "cat"):
                plain["categories"][column] = [str(c) for c in values.cat.categories]
            array = (
                values.to_numpy(float)
                if new_data.is_numeric(values)
                else np.array(values.astype(str), np.str_)
            )
            variables[f"column{i}"] = ("training_row", array)
        return plain, xr.Dataset(variables)

    @classmethod
    def from_plain(cls, plain: dict[str, Any], columns: Any) -> FormulaEncoder:
        """The inverse of :meth:`to_plain`."""
        import pandas as pd

        table = {}
        for i, column in enumerate(plain["columns"]):
            values = columns[f"column{i}"].values
            if column in plain["categories"]:
                table[column] = pd.Categorical(values, categories=plain["categories"][column])
            else:
                table[column] = values
        slots = tuple((name, column) for name, column in plain["slots"])
        encoder = cls(split(plain["formula"]), slots, tuple(plain["task_predictors"]))
        encoder._read(plain["columns"])
        encoder._learn(pd.DataFrame(table))
        return encoder

    def _names(self, i: int) -> list[str]:
        return list(self.specs[i].names)


def _columns(columns: dict[str, np.ndarray], names: Sequence[str], num_rows: int) -> np.ndarray:
    return np.column_stack([columns[c] for c in names]) if names else np.zeros((num_rows, 0))


__all__ = ["Bar", "FormulaEncoder", "from_formula"]
