"""NumPyro's NUTS, all chains in one vectorised run, in programs that other data do not compile."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import NUTS
from numpyro.infer.util import constrain_fn, potential_energy

from hierbayes.model import HierarchicalModel

SAMPLE_STATS = {
    "diverging": "diverging",
    "accept_prob": "acceptance_rate",
    "num_steps": "n_steps",
    "energy": "energy",
    "potential_energy": "lp",
}
"""NumPyro's fields and their names in ArviZ's schema."""

CHUNK = 50
"""Transitions of one compiled call at most, between which progress is shown."""

Potential = Callable[[Any, Any], jax.Array]
"""(z, data) → minus a log density; hashable by what it does, with its numbers in ``data``."""

Programs = Callable[[Any], Callable[[], None]]
"""data → a NumPyro program; hashable by what it does."""


class Settings(TypedDict):
    """How NUTS is run; ``dense``: with a full mass matrix."""

    dense: bool
    num_draws: int
    num_chains: int
    num_warmup: int
    target_accept: float
    progress: bool | None


class GivenPhi(NamedTuple):
    """θ given φ: data are (φ, location (J, d), root (d, d) or (d,), rows, the task of each)."""

    model: HierarchicalModel

    def __call__(self, data: Any) -> Callable[[], None]:
        """A program with θ = location + root z."""
        phi, location, root, rows, of_row = data

        def program() -> None:
            white = dist.Normal(jnp.zeros(location.shape), 1.0).to_event(2)
            z = jnp.asarray(numpyro.sample("z", white))
            theta = location + (z * root if jnp.ndim(root) == 1 else z @ root.T)
            each = self.model.likelihood.log_likelihood_of_rows(theta, phi, rows, of_row)
            numpyro.factor("rows", each.sum())

        return program


class OfProgram(NamedTuple):
    """The potential energy of a program's unconstrained sites."""

    programs: Programs

    def __call__(self, z: Any, data: Any) -> jax.Array:
        """Minus its log density."""
        return jnp.asarray(potential_energy(self.programs(data), (), {}, z))


def run_nuts(
    programs: Programs, data: Any, key: Any, start: dict[str, Any], **settings: Unpack[Settings]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Draws (chain, draw, …) and sample statistics; ``start`` is unconstrained, one a chain.

    NUTS gets the program's potential energy, compiled, rather than the program: NumPyro would run
    a program operation by operation to set itself up, which takes longer than the sampling.
    """
    found, statistics = run_potential(OfProgram(programs), data, key, start, **settings)
    lead = (settings["num_chains"], settings["num_draws"])
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
    draws = {
        name: np.asarray(value).reshape(*lead, *value.shape[1:])
        for name, value in _constrained(programs, data, flat).items()
    }
    return draws, statistics


@functools.partial(jax.jit, static_argnums=0)
def _constrained(programs: Programs, data: Any, zs: Any) -> dict[str, Any]:
    program = programs(data)
    return jax.lax.map(
        lambda z: constrain_fn(program, (), {}, z, return_deterministic=True), zs, batch_size=256
    )


class _How(NamedTuple):
    """What decides a compiled program, but for shapes."""

    potential: Potential
    dense: bool
    num_warmup: int


def run_potential(
    potential: Potential,
    data: Any,
    key: Any,
    start: Any,
    *,
    dense: bool,
    num_draws: int,
    num_chains: int,
    num_warmup: int,
    target_accept: float,
    progress: bool | None,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Draws (chain, draw, …) of a pytree with density exp(−potential), and sample statistics."""
    from tqdm.auto import tqdm

    how, kept = _How(potential, dense, num_warmup), []
    state = _begun(how, data, jax.random.split(key, num_chains), start, target_accept)
    shown = sys.stderr.isatty() if progress is None else progress
    with tqdm(total=num_warmup + num_draws, desc="NUTS", disable=not shown, leave=False) as bar:
        for phase, length in (("warm-up", num_warmup), ("draws", num_draws)):
            bar.set_description(f"NUTS, {phase}")
            for done in range(0, length, CHUNK):
                count = min(CHUNK, length - done)
                state, found = _moved(how, data, state, count, target_accept)
                if phase == "draws":
                    kept.append(jax.tree.map(lambda a, n=count: np.asarray(a)[:n], found))
                bar.update(count)
    z, fields = jax.tree.map(lambda *parts: np.swapaxes(np.concatenate(parts), 0, 1), *kept)
    statistics = {SAMPLE_STATS[name]: values for name, values in fields.items()}
    statistics["lp"] = -statistics["lp"]
    return z, statistics


def _kernel(how: _How, data: Any, target_accept: Any) -> NUTS:
    def energy(z: Any) -> jax.Array:
        return how.potential(z, data)

    return NUTS(potential_fn=energy, dense_mass=how.dense, target_accept_prob=target_accept)


@functools.partial(jax.jit, static_argnums=0)
def _begun(how: _How, data: Any, keys: Any, start: Any, target_accept: Any) -> Any:
    """The state of every chain before the first transition."""
    return _kernel(how, data, target_accept).init(keys, how.num_warmup, start, (), {})


@functools.partial(jax.jit, static_argnums=0)
def _moved(how: _How, data: Any, state: Any, count: Any, target_accept: Any) -> Any:
    """The state after ``count`` transitions, and where and how they went, (CHUNK, chain, …)."""
    kernel = _kernel(how, data, target_accept)
    # the kernel's functions stand ready once it has begun; what else that computes is not used
    kernel.init(state.rng_key, how.num_warmup, state.z, (), {})

    def told(state: Any) -> Any:
        return state.z, {name: getattr(state, name) for name in SAMPLE_STATS}

    def move(i: Any, carry: Any) -> Any:
        state, kept = carry
        state = kernel.sample(state, (), {})
        return state, jax.tree.map(lambda a, value: a.at[i].set(value), kept, told(state))

    room = jax.tree.map(lambda a: jnp.zeros((CHUNK, *a.shape), a.dtype), told(state))
    return jax.lax.fori_loop(0, count, move, (state, room))
