"""What steps are, as a prior, from what they do along each direction of curvature."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np

from hierbayes.adaptation.descent import Descent, Flow
from hierbayes.errors import InputError, listing
from hierbayes.tasks import Tasks


class Status(enum.StrEnum):
    """What the steps are, as a prior, for one task."""

    PROPER = "proper"
    """A Gaussian prior of positive precision in every direction."""

    OVERSHOOTS = "overshoots"
    """Proper, but equal steps pass the optimum and come back: the prior tightens with more of η."""

    FLAT = "flat"
    """The steps reach the optimum in some direction: the prior's precision is 0 there."""

    NO_PRIOR = "no prior"
    """Negative precision in some direction: no Gaussian prior makes the steps a MAP estimate."""


FLAT = 1e-12
"""Share of φ left below which the steps count as having reached the optimum."""

NULL = 1e-10
"""Curvatures below this share of a task's largest count as zero, where ``null="pinned"``."""


def described(method: Descent | Flow) -> str:
    """The method in words."""
    if isinstance(method, Flow):
        return f"gradient flow for a time of {float(method.time):.3g}"
    steps = f"{method.num_steps} step{'s' if method.num_steps > 1 else ''}"
    size = np.asarray(method.step_size)
    text = f"{steps} of {size:.3g}" if size.ndim == 0 else (
        f"{steps} of {size.min():.3g} to {size.max():.3g}"
    )  # fmt: skip
    if method.momentum is None:
        return text
    return f"{text} with {'Nesterov ' if method.nesterov else ''}momentum {method.momentum:g}"


def judge(
    tasks: Tasks,
    method: Descent | Flow,
    curvature: np.ndarray,
    left: np.ndarray,
    moved: np.ndarray,
    *,
    refuse: bool = True,
) -> tuple[np.ndarray, list[str]]:
    """Status of each task, and what to say of it; steps that diverge are refused, naming the task.

    ``curvature`` (J, d) may be that of the preconditioned problem. Without ``refuse``
    steps that diverge on the linearised task are judged as having no prior: the log likelihood is
    not quadratic, and the steps themselves need not diverge.
    """
    away = _farther(method, curvature, left, moved)
    lost = away if refuse else ~np.isfinite(left)  # what overflows has no number to be judged by
    if lost.any():
        _refuse_divergence(tasks, method, curvature, lost)
    far = away.any(1)
    none = (left < -FLAT).any(1) | far
    flat = (np.abs(left) <= FLAT).any(1)
    over = np.zeros(tasks.num_tasks, dtype=bool)
    if isinstance(method, Descent) and method.plain:
        over = (float(method.step_size) * curvature > 1 + 1e-9).any(1)
    status = np.select(
        [none, over, flat], [Status.NO_PRIOR, Status.OVERSHOOTS, Status.FLAT], Status.PROPER
    )
    return np.asarray(status, dtype=object), _remarks(tasks, method, far, none, over, flat)


def says_nothing(curvature: np.ndarray) -> np.ndarray:
    """(J, d): the directions in which a task's curvature counts as zero."""
    size = np.abs(curvature)
    return size <= NULL * size.max(axis=1, keepdims=True, initial=0.0)


def _farther(
    method: Descent | Flow, curvature: np.ndarray, left: np.ndarray, moved: np.ndarray
) -> np.ndarray:
    """(J, d): the directions in which the steps end farther from the optimum than they began."""
    with np.errstate(invalid="ignore"):
        away = (moved <= 0) | ~np.isfinite(left)
        longest = None if isinstance(method, Flow) else method.longest
        if longest is None:
            away |= left <= -1
        elif isinstance(method, Descent):  # a ball may swing far past the optimum and yet settle
            away |= float(method.step_size) * curvature >= longest * (1 - 1e-12)
    return away


def _remarks(
    tasks: Tasks, method: Descent | Flow, far: Any, none: Any, over: Any, flat: Any
) -> list[str]:
    """What there is to say of the tasks (J,) whose steps are no prior, or an odd one."""
    names = np.asarray(tasks.names)
    messages = []
    if far.any():
        messages.append(
            f"in {far.sum()} of {len(names)} task(s) ({listing(names[far].tolist(), 3)}) "
            f"{described(method)} end farther from the optimum of the linearised task than they "
            "began: their length exceeds 2/λ_max"
        )
    if none.any():
        messages.append(
            f"no Gaussian prior makes these steps a MAP estimate in {none.sum()} of {len(names)} "
            f"task(s) ({listing(names[none].tolist(), 3)}): they end "
            "beyond the optimum, and the implied precision is negative"
            + ("; take an even number of steps or shorter ones" if over.any() else "")
        )
    if (only := over & ~none).any():
        messages.append(
            f"the steps overshoot and come back in {only.sum()} of {len(names)} task(s) "
            f"({listing(names[only].tolist(), 3)}), where step_size "
            "is longer than 1/λ_max: the implied prior is proper but tightens again as step_size "
            "grows"
        )
    if (only := flat & ~none).any():
        messages.append(
            f"in {only.sum()} of {len(names)} task(s) some direction reaches its optimum: the "
            "implied prior is flat there and its covariance infinite"
        )
    return messages


def _refuse_divergence(
    tasks: Tasks,
    method: Descent | Flow,
    curvature: np.ndarray,
    away: np.ndarray,
) -> None:
    bad = np.any(away, axis=1)
    worst = int(np.argmax(np.where(away, np.abs(curvature), -np.inf).max(1)))
    bend = curvature[worst, away[worst]]
    bend = bend[np.argmax(np.abs(bend))]
    cause = ""
    if bend <= 0:
        cause = f", where the log likelihood bends away from its optimum (curvature {bend:.3g})"
    else:
        cause = f", whose largest curvature is λ_max = {bend:.3g}"
        if isinstance(method, Descent) and method.plain:
            cause += f"; step_size must stay below 2/λ_max = {2 / bend:.3g} there"
    raise InputError(
        f"{described(method)} diverge in {bad.sum()} of {bad.size} task(s), most in "
        f"{listing([tasks.names[worst]])} ({tasks.sizes[worst]} rows){cause}"
    )
