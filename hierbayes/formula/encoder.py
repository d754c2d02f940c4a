"""From a formula and a DataFrame to a model and its tasks, and new rows by the same transforms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hierbayes import priors
from hierbayes.errors import InputError, listing, suggestion
from hierbayes.formula import new_data
from hierbayes.formula.bars import Bar, FormulaError, Parts, split
from hierbayes.formula.families import check_exposure, likelihood_of, slot, successes_of_trials
from hierbayes.formula.safety import refuse_code
from hierbayes.likelihoods import Likelihood
from hierbayes.model import HierarchicalModel
from hierbayes.priors import HyperPrior
from hierbayes.tasks import Labels, Tasks
from hierbayes.tasks.frames import Frame, Missing, complete_rows
from hierbayes.tasks.reading import assemble


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
        :mod:`hierbayes.likelihoods`.
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
    slots = tuple((name, column) for name, column in named.items() if column is not None)
    encoder = FormulaEncoder(parts, slots, tuple(task_predictors))
    tasks = encoder.fit(frame, missing)
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

    ``specs`` holds formulaic's model specifications, of the outcome, the fixed part and each bar.
    """

    parts: Parts
    slots: tuple[tuple[str, str], ...] = ()
    task_predictors: tuple[str, ...] = ()
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
        outcome_columns = _columns_in(parts.outcome, frame.columns)
        with_outcome = training or self._has_outcome(outcome_columns, frame)
        terms = [parts.fixed, *(bar.terms for bar in parts.bars)]
        if not training:
            read = [*terms, parts.outcome] if with_outcome else terms
            learned = list(self.training.columns)
            needed = dict.fromkeys(c for term in read for c in _columns_in(term, learned))
            new_data.check_new_columns(frame, list(needed), self.training)
        used = list(dict.fromkeys(c for term in terms for c in _columns_in(term, frame.columns)))
        used += outcome_columns if with_outcome else []
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

    def _has_outcome(self, columns: list[str], frame: Frame) -> bool:
        needed = _columns_in(self.parts.outcome, list(self.specs[0].required_columns))
        return set(needed) <= set(columns) if needed else set(columns) <= set(frame.columns)

    def _matrices(
        self, frame: Frame, used: list[str], training: bool, with_outcome: bool
    ) -> list[Any]:
        """The outcome (N,) and one matrix a part, by training or remembered transforms."""
        table = frame.to_pandas(used)
        if training:
            outcome_columns = _columns_in(self.parts.outcome, frame.columns)
            first, *rest = self._learn(table, frame.columns, outcome_columns)
            return [self._one_column(first), *rest]
        table = new_data.without_idle_categories(table, self.training)
        context = (self.parts, frame.columns, self.training)
        first = self.specs[0].matrix(table, *context) if with_outcome else None
        rest = [spec.matrix(table, *context) for spec in self.specs[1:]]
        return [None if first is None else self._one_column(first), *rest]

    def _one_column(self, outcome: np.ndarray) -> np.ndarray:
        if outcome.shape[1] != 1:
            raise InputError(
                f"the outcome {self.parts.outcome!r} is not one column of numbers: it gives "
                f"{listing(list(self.specs[0].names))}"
            )
        return outcome[:, 0]

    def _learn(
        self, table: Any, known: Sequence[str], outcome_columns: Sequence[str]
    ) -> list[np.ndarray]:
        """Let formulaic encode every part of the formula once, and keep what it learned."""
        parts = self.parts
        terms = [parts.fixed, *(bar.terms for bar in parts.bars)]
        outcome, first = _Spec.fit(f"0 + {parts.outcome}", parts.outcome, table, parts, known)
        fitted = {term: _Spec.fit(term, term, table, parts, known) for term in terms}
        self.specs = [replace(outcome, required_columns=tuple(outcome_columns))]
        self.specs += [fitted[term][0] for term in terms]
        self.training = table
        return [first, *(fitted[term][1] for term in terms)]

    def to_plain(self) -> tuple[dict[str, Any], Any]:
        """The encoder as JSON and its training columns as a Dataset, from which it learns again."""
        import xarray as xr

        plain: dict[str, Any] = {
            "formula": self.parts.text,
            "slots": self.slots,
            "task_predictors": self.task_predictors,
            "outcome_columns": self.specs[0].required_columns,
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
        encoder._learn(pd.DataFrame(table), plain["columns"], plain["outcome_columns"])
        return encoder

    def _names(self, i: int) -> list[str]:
        return list(self.specs[i].names)


@dataclass(frozen=True)
class _Spec:
    """One part of the formula as formulaic encoded it."""

    spec: Any
    names: tuple[str, ...]
    required_columns: tuple[str, ...] = ()

    @classmethod
    def fit(
        cls, text: str, shown: str, table: Any, parts: Parts, known: Sequence[str]
    ) -> tuple[_Spec, np.ndarray]:
        """The part as encoded in the training data, and its columns there."""
        from formulaic import Formula

        with _formulaic_errors(shown, parts, known):
            parsed: Any = Formula(text)  # type: ignore[abstract]
            refuse_code(parsed, parts, known)
            matrix = parsed.get_model_matrix(table, context={}, na_action="ignore", output="numpy")
            spec: Any = matrix.model_spec
            new_data.refuse_unseen_levels(spec, table, parts.text, table)
        # treatment-coded and full dummies of one level are the same column: name them alike
        names = tuple(name.replace("[T.", "[") for name in spec.column_names)
        made = cls(spec, names)
        return made, made._finite(matrix)

    def matrix(self, table: Any, parts: Parts, known: Sequence[str], training: Any) -> np.ndarray:
        with _formulaic_errors(str(self.spec.formula), parts, known):
            new_data.refuse_unseen_levels(self.spec, table, parts.text, training)
            matrix = self.spec.get_model_matrix(table, context={})
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
    """Formulaic's errors as sentences that point into the user's formula."""

    def __init__(self, piece: str, parts: Parts, known: Sequence[str]):
        self.piece, self.parts, self.known = piece, parts, known
        self.quiet = np.errstate(all="ignore")  # log(0): refused by name afterwards

    def __enter__(self) -> None:
        self.quiet.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from formulaic.errors import FormulaicError

        self.quiet.__exit__(kind, error, trace)
        if error is None or isinstance(error, InputError):
            return
        if isinstance(error, (FormulaicError, SyntaxError, NameError, TypeError, ValueError)):
            raise self._translated(error) from error

    def _translated(self, error: BaseException) -> InputError:
        message = str(error)
        unknown = re.search(r"NameError: (?:name )?[`'](\w+)[`']", message)
        if unknown:
            name = unknown.group(1)
            return FormulaError(
                self.parts.text, max(self.parts.text.find(name), 0),
                f"{name!r} is neither a column nor a known function; "
                f"{suggestion(name, self.known)}",
            )  # fmt: skip
        marked = re.search(r"⧛\x1b\[[\d;]*m(.*?)\x1b", message, re.DOTALL)
        place = self.parts.text.find(self.piece.removeprefix("0 + "))
        if marked:
            line = message.splitlines()[-1]
            inside = max(line.find("⧛"), 0)
            place = max(place, 0) + inside
        problem = re.sub(r"\x1b\[[\d;]*m|[⧛⧚]", "", message).splitlines()[0]
        return FormulaError(self.parts.text, max(place, 0), problem)


def _columns_in(text: str, columns: Sequence[str]) -> list[str]:
    """The columns whose names occur in a piece of formula, bare or in backticks."""
    quoted = re.findall(r"`([^`]+)`", text)
    bare = re.findall(
        r"(?<![\w.])[^\W\d]\w*(?!\w)", re.sub(r"`[^`]*`|'[^']*'|\"[^\"]*\"", " ", text)
    )
    return [c for c in columns if c in quoted or c in bare]


def _columns(columns: dict[str, np.ndarray], names: Sequence[str], num_rows: int) -> np.ndarray:
    return np.column_stack([columns[c] for c in names]) if names else np.zeros((num_rows, 0))


__all__ = ["Bar", "FormulaEncoder", "from_formula"]
