"""Methods of your own: a prototypical network, and tasks that are known by their median.

    python examples/own_method.py figures

Each is an adaptation, what a task concludes from its support rows under φ, and the name of the
method that learns φ through it. Fitting on episodes, comparison, saving and loading come with that.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import hierbayes as hb

# ------------------------------------------------- a prototypical network, for classes

WIDTH, WAYS = 16, 5


def embed(params, x):
    """h(x), by one hidden layer."""
    return jax.nn.relu(x @ params["one"]) @ params["two"]


def logits(params, x):
    """−‖h(x) − c‖² for every class c of the task."""
    gaps = embed(params, x)[:, None] - params["centres"]
    return -(gaps**2).sum(-1)


def init(key):
    """Weights of h, which tasks share, and centres, which each task finds for itself."""
    one, two = jax.random.split(key)
    first, second = jax.random.normal(one, (20, 64)), jax.random.normal(two, (64, WIDTH))
    centres = jnp.zeros((WAYS, WIDTH))
    return {"one": first / 20**0.5, "two": second / 8, "centres": centres}


@dataclass(frozen=True)
class ClassMeans(hb.adaptation.ByTask):
    """A(D; φ): the class means of the embedded support rows."""

    name = "class means"

    def of_task(self, model, phi, task):
        """The shared weights, and this task's centres."""
        params = model.likelihood.tree(phi["mu"])
        member = jax.nn.one_hot(task.outcome, WAYS) * task.mask[:, None]
        sums = member.T @ embed(params, task.predictors)
        centres = sums / jnp.maximum(member.sum(0), 1)[:, None]
        return model.likelihood.vector(params | {"centres": centres})


@dataclass(frozen=True)
class Prototypes(hb.meta.Learner):
    """A prototypical network (Snell, Swersky and Zemel 2017)."""

    name = "prototypes"

    def adaptation(self):
        """Its only setting is the network, which stands in the model."""
        return ClassMeans()


# ----------------------------------- the median of a task's rows, drawn towards the prior


@dataclass(frozen=True)
class Median(hb.adaptation.ByTask):
    """A(D; φ): the median of the task's rows, with ``weight`` rows at μ beside them."""

    weight: int
    name = "median"

    def of_task(self, model, phi, task):
        """θ (1,), of a model with an intercept alone."""
        rows = jnp.where(task.mask, task.outcome, jnp.nan)
        return jnp.nanmedian(jnp.append(rows, jnp.full(self.weight, phi["mu"][0])))[None]


@dataclass(frozen=True)
class ByMedian(hb.meta.Learner):
    """Learns where tasks lie through their medians, which single wild rows do not move."""

    weight: int = 2
    name = "median"

    def adaptation(self):
        """The median with this weight."""
        return Median(self.weight)


# --------------------------------------------------------------------------- on data


def classes(rng, num_classes=100, num_examples=30):
    """Examples of classes that lie on a curved surface in 20 dimensions, with noise."""
    mix = rng.normal(size=(6, 20))
    centres = rng.normal(size=(num_classes, 1, 6)) + 0.35 * rng.normal(
        size=(num_classes, num_examples, 6)
    )
    x = np.tanh(centres @ mix / 2) + 0.3 * rng.normal(size=(num_classes, num_examples, 20))
    return x.reshape(-1, 20), np.repeat(np.arange(num_classes), num_examples)


def wild_tasks(rng, num_tasks=200, num_rows=12):
    """Tasks with a level each, and one row in eight that is far off."""
    level = rng.normal(0.2, 0.5, (num_tasks, 1))
    spread = np.where(rng.random((num_tasks, num_rows)) < 0.125, 8.0, 0.5)
    y = level + spread * rng.normal(size=spread.shape)
    return hb.Tasks.from_arrays([(np.ones((num_rows, 1)), rows) for rows in y])


def show(fits, episodes, folder, kind):
    """Compare on new tasks, save one of the fits, read it again, and fit once more."""
    support, query = episodes.draw(200, seed=1)
    print(hb.compare(fits, test=query, support=support).table[["log_density", "seconds"]].round(3))
    fit = fits[kind.name]
    fit.save(folder / f"{kind.name}.nc")
    again = hb.load(folder / f"{kind.name}.nc", model=fit.model, method=kind)
    one, two = (f.on(support).predict(query).log_density() for f in (fit, again))
    np.testing.assert_array_equal(one, two)
    print(again.method, "-> fitted again:", again.method(fit.model, episodes, progress=False))


def main(folder: str) -> None:
    """Fit, compare, save, load."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    episodes = hb.Episodes.from_classes(*classes(rng), ways=WAYS, shots=1, queries=10)
    network = hb.likelihoods.Network(logits, init, hb.likelihoods.Categorical(WAYS))
    model = hb.HierarchicalModel(network, hb.priors.Gaussian(correlated=False))
    prototypes = Prototypes(num_meta_steps=300, evaluate_every=100)
    show({
        "prototypes": prototypes(model, episodes, progress=False),
        "MAML": hb.maml(model, episodes, step_size=0.05, num_meta_steps=300, progress=False),
    }, episodes, out, Prototypes)  # fmt: skip
    level = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    tasks = hb.Episodes.from_tasks(wild_tasks(rng), shots=6, queries=6)
    show({
        "median": ByMedian(num_meta_steps=500)(level, tasks, progress=False),
        "MAML": hb.maml(level, tasks, num_meta_steps=300, progress=False),
    }, tasks, out, ByMedian)  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python own_method.py FOLDER")
    main(sys.argv[1])
