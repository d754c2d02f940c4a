"""What a user may hand to the equivalence, read and refused before any computation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hierbayes import inputs
from hierbayes.adaptation.descent import Descent, Flow
from hierbayes.errors import InputError, listing
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Tasks


def read_tasks(model: HierarchicalModel, task: Any) -> tuple[Tasks, bool]:
    """(tasks, whether it was one task given as (X, y)): with outcomes that the model describes."""
    single = isinstance(task, tuple) and len(task) == 2
    tasks = model.tasks(Tasks.from_arrays([task]) if single else task)
    model.likelihood.check(tasks)
    if tasks.outcome is None:
        raise InputError(f"the tasks hold no outcome {tasks.labels.outcome!r} to adapt to")
    return tasks, single


def read_phi(
    model: HierarchicalModel, tasks: Tasks, phi: Any, sigma: Any = None, beta: Any = None
) -> dict[str, np.ndarray]:
    """φ by name, from a fit's φ or from an array shaped like θ; finite and of the right shapes."""
    found = _named(model, tasks, phi, sigma, beta)
    labels = tasks.labels
    d, q = len(tasks.coef), len(labels.task_predictors)
    shapes = {"mu": (d,)} | ({"gamma": (d, q)} if q and isinstance(phi, Mapping) else {})
    shapes |= {p.name: p.shape for p in model.likelihood.parts(labels.shared)}
    read = {name: _read_part(found, name, shape, tasks) for name, shape in shapes.items()}
    for name in model.likelihood.parameters():
        inputs.positive(f"phi's {name}", float(read[name]))
    return read


def _named(
    model: HierarchicalModel, tasks: Tasks, phi: Any, sigma: Any, beta: Any
) -> dict[str, Any]:
    """What was given of φ by name, refused where it has no place in the model or the tasks."""
    found = dict(phi) if isinstance(phi, Mapping) else {"mu": phi}
    if sigma is not None and "sigma" not in model.likelihood.parameters():
        raise InputError("sigma has no place in this likelihood; leave it out")
    found |= {k: v for k, v in {"sigma": sigma, "beta": beta}.items() if v is not None}
    if "mu" not in found:
        raise InputError(f"phi holds no 'mu' to start from; it holds {listing(sorted(found))}")
    for name, columns, what in (
        ("beta", tasks.labels.shared, "shared columns"),
        ("gamma", tasks.labels.task_predictors, "task predictors"),
    ):
        if not columns and name in found and _size(found[name]):
            raise InputError(
                f"phi holds {name!r}, but these tasks have no {what} for it to multiply; give "
                "the tasks that phi was learned from, or leave it out"
            )
    return found


def _read_part(
    found: dict[str, Any], name: str, shape: tuple[int, ...], tasks: Tasks
) -> np.ndarray:
    """One part of φ, finite and of this shape."""
    if name not in found:
        raise InputError(
            f"phi holds no {name!r}, which these tasks need; pass {name}=… or a fit's phi"
        )
    try:
        # a copy: the array itself may be part of a program compiled in float32
        value = np.array(inputs.real_array(found[name]), dtype=float)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"phi's {name} is not a number or an array of numbers") from error
    if value.shape != shape:
        of = f" for the coefficients {', '.join(tasks.coef)}" if name == "mu" else ""
        raise InputError(f"phi's {name} has shape {value.shape}; expected {shape}{of}")
    if not np.isfinite(value).all():
        raise InputError(f"phi's {name} is not finite: {value}")
    return value


def _size(value: Any) -> int:
    """How many numbers a value holds; one where it cannot be told, as of what is no array."""
    try:
        return int(np.size(value))
    except (TypeError, ValueError):
        return 1


class Asked(NamedTuple):
    """φ and the steps asked for, with what a fit took where nothing was asked."""

    phi: Any
    num_steps: Any
    step_size: Any
    preconditioner: Any
    loss: str


def read_fit(asked: Asked, *, flow: bool, loss: Any) -> Asked:
    """Fill in what a fit took: K, η, a step size by coefficient, its loss."""
    fit = asked.phi
    info = getattr(fit, "info", None)
    if not (isinstance(info, Mapping) and hasattr(fit, "phi")):
        return asked._replace(loss=_loss("sum" if loss is None else loss))
    took = fit.adaptation
    if getattr(took, "proximal", False):
        raise InputError(
            f"the tasks of {fit.method} are MAP estimates under the shared prior N(phi, tau²) "
            "already, which is fit.prior; its steps only approach them"
        )
    asked = asked._replace(
        phi=fit.phi, loss=_loss(getattr(took, "loss", "sum") if loss is None else loss)
    )
    if flow:
        return asked
    if asked.num_steps is None:
        asked = asked._replace(num_steps=info.get("num_steps"))
    return asked if asked.step_size is not None else _with_step_size_of(fit, asked)


def _with_step_size_of(fit: Any, asked: Asked) -> Asked:
    """The step size that a fit took, or learned, with a preconditioner where it is one."""
    if getattr(fit.adaptation, "optimiser", None) is not None:
        raise InputError(NO_OPTIMISER.format(what=f"the inner optimiser of {fit.method}"))
    learned: Any = fit.phi.get("step_size")
    size = fit.info.get("step_size") if learned is None else learned
    at, own = getattr(fit, "at", None), asked.preconditioner is not None
    if at is not None and own:
        raise InputError(
            f"the steps of {fit.method} were taken in scaled columns, which is a preconditioner "
            "already: leave preconditioner out, or pass fit.phi['mu'] with steps of your own"
        )
    if at is not None and size is not None:
        size, inside = at.steps(size)
        return asked._replace(step_size=size, preconditioner=inside)
    if learned is None or not np.ndim(learned):
        return asked._replace(step_size=size)
    if own:
        raise InputError(
            f"{fit.method} has learned a step size for each coefficient, which is a preconditioner "
            "already: leave preconditioner out, or pass fit.phi['mu'] with steps of your own"
        )
    return asked._replace(step_size=1.0, preconditioner=np.asarray(learned))


def _loss(loss: Any) -> str:
    return inputs.one_of("loss", loss, ("sum", "mean"))


NO_OPTIMISER = (
    "{what} has no equivalent prior that could be told from it: pass num_steps and step_size, with "
    "momentum=… and preconditioner=… if wanted. Adam, clipping and others whose steps depend on "
    "the data correspond to no prior that is fixed before them"
)


def read_method(
    num_steps: Any, step_size: Any, momentum: Any, nesterov: bool, time: Any
) -> Descent | Flow:
    """The first-order method asked for, whose coefficients must be fixed before the data."""
    nesterov = inputs.flag("nesterov", nesterov)
    if time is not None:
        rest = (step_size is None, not momentum, not nesterov)
        if not (num_steps is None and all(rest)):
            raise InputError(
                "time is for gradient flow, which has no steps: leave num_steps, step_size, "
                "momentum and nesterov out"
            )
        return Flow(inputs.positive("time", time))
    if num_steps is None:
        raise InputError(
            "num_steps must be a positive integer, found None; for gradient flow, the limit of "
            "many small steps, pass time=… alone"
        )
    num_steps = inputs.count("num_steps", num_steps)
    sizes = _read_sizes(step_size, num_steps)
    kept = inputs.number("momentum", momentum, "a number in [0, 1)")
    if not 0 <= kept < 1:
        raise InputError(f"momentum must lie in [0, 1), found {momentum}")
    if nesterov and not kept:
        raise InputError("nesterov=True needs a momentum to look ahead by; pass momentum=…")
    return Descent(num_steps, sizes, kept or None, nesterov)


def _read_sizes(step_size: Any, num_steps: int) -> Any:
    """η, or one a step (K,)."""
    if isinstance(step_size, tuple) and hasattr(step_size, "update"):
        raise InputError(NO_OPTIMISER.format(what="an Optax optimiser"))
    if step_size is None:
        raise InputError("pass step_size=…, in units of the summed log likelihood")
    if np.ndim(step_size) == 0:
        return inputs.positive("step_size", step_size)
    sizes = np.array([inputs.positive("step_size", eta) for eta in step_size])
    if sizes.shape != (num_steps,):
        raise InputError(
            f"step_size holds {len(sizes)} values for {num_steps} steps; give one, or one a step"
        )
    return sizes


def over_rows(root: np.ndarray, tasks: Tasks) -> np.ndarray:
    """C of the same steps on the mean over each task's rows: B / n_j."""
    whole = np.broadcast_to(root, (tasks.num_tasks, *root.shape[-2:]))
    return whole / np.sqrt(np.maximum(tasks.sizes, 1))[:, None, None]


def over_equal_rows(root: np.ndarray, tasks: Tasks) -> np.ndarray:
    """:func:`over_rows` of a diagonal that all tasks share, for tasks of one size."""
    sizes = np.unique(tasks.sizes[tasks.sizes > 0])
    if len(sizes) > 1:
        raise InputError(
            f'loss="mean" without matrices is for tasks of one size, found {sizes.min()} to '
            f"{sizes.max()} rows: take tasks of one size at a time, or step_size / n_j for each"
        )
    return root / np.sqrt(max(sizes.max(initial=1), 1))


def read_preconditioner(given: Any, tasks: Tasks) -> np.ndarray:
    """C with B = C Cᵀ a diagonal (d,), a matrix (d, d), or one a task (J, d, d)."""
    d, num_tasks = len(tasks.coef), tasks.num_tasks
    if given is None:
        return np.eye(d)
    matrix = _numbers(given)
    if matrix.shape == (d,):
        matrix = np.diag(matrix)
    if matrix.shape not in ((d, d), (num_tasks, d, d)):
        raise InputError(
            f"preconditioner has shape {matrix.shape}; expected ({d},), ({d}, {d}), or "
            f"({num_tasks}, {d}, {d}) with one a task"
        )
    return np.linalg.cholesky(_definite(matrix, tasks))


def _numbers(given: Any) -> np.ndarray:
    try:
        return np.asarray(inputs.real_array(given), dtype=float)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError("preconditioner is not an array of numbers, or a list of them") from error


def _definite(matrix: np.ndarray, tasks: Tasks) -> np.ndarray:
    """The matrices, if all are symmetric and positive definite."""
    if not np.isfinite(matrix).all():
        raise InputError("preconditioner is not finite")
    scale = np.abs(matrix).max()
    if np.abs(matrix - np.swapaxes(matrix, -1, -2)).max() > 1e-10 * scale:
        raise InputError("preconditioner is not symmetric")
    matrix = 0.5 * (matrix + np.swapaxes(matrix, -1, -2))
    least = np.linalg.eigvalsh(matrix)[..., 0]
    if (least <= 0).any():
        where = ""
        if matrix.ndim == 3:
            where = f" for task {listing([tasks.names.tolist()[int(np.argmin(least))]])}"
        raise InputError(
            f"preconditioner is not positive definite{where}: its smallest eigenvalue is "
            f"{least.min():.3g}"
        )
    return matrix


def read_diagonal(given: Any, d: int) -> np.ndarray:
    """C of a diagonal B (d,), which is all that goes without matrices."""
    diagonal = np.ones(d) if given is None else _numbers(given)
    if diagonal.shape != (d,):
        raise InputError(
            f"preconditioner has shape {diagonal.shape}; where there are many coefficients or rank "
            f"is given it must be a diagonal, of shape ({d},)"
        )
    if not (np.isfinite(diagonal).all() and (diagonal > 0).all()):
        raise InputError("preconditioner must hold positive numbers")
    return np.sqrt(diagonal)


def read_rank(rank: Any, d: int) -> int | None:
    """How many directions of curvature to keep."""
    if rank is None:
        return None
    if isinstance(rank, (int, np.integer)) and 0 < rank < d:
        return int(rank)
    raise InputError(
        f"rank must be a positive integer below the number of coefficients, {d}; found "
        f"{inputs.shown(rank)}"
    )
