"""MAML on sinusoids in PyTorch, by learn2learn and by higher, as a process that answers questions.

It reads one JSON object a line from stdin and answers each by a line on stdout, so that the asking
process can alternate between contestants. It needs ``torch`` and the packages themselves, nothing
of hierbayes. Both loop over the tasks of a meta-batch, as their own examples do.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import time
import types
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import nn

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x, y, x query, y query) of a batch of tasks, backward into the network → query loss."""

mean_squared_error = nn.MSELoss(reduction="mean")


def network(width: int) -> nn.Module:
    """1 → width → width → 1 with ReLU; weights truncated normals of sd 1/√inputs, biases zero."""
    made = nn.Sequential(
        nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    )
    for layer in made:
        if isinstance(layer, nn.Linear):
            sd = 1 / math.sqrt(layer.in_features)
            nn.init.trunc_normal_(layer.weight, std=sd, a=-2 * sd, b=2 * sd)
            nn.init.zeros_(layer.bias)
    return made


def learn2learn_maml() -> Any:
    """``learn2learn.algorithms.MAML``, without the rest of the package.

    Importing all of learn2learn needs gym, torchvision and more, none of which MAML uses.
    """
    if "learn2learn" not in sys.modules:
        spec = importlib.util.find_spec("learn2learn")
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError("learn2learn is not installed")
        package = types.ModuleType("learn2learn")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["learn2learn"] = package
    return importlib.import_module("learn2learn.algorithms.maml").MAML


def by_learn2learn(model: nn.Module, num_steps: int, step_size: float) -> Loss:
    """Clone, adapt and backward, task after task, as in learn2learn's ``maml_sine.py``."""
    maml = learn2learn_maml()(model, lr=step_size, first_order=False)

    def loss(x: Any, y: Any, x_query: Any, y_query: Any) -> torch.Tensor:
        total = 0.0
        for i in range(len(x)):
            learner = maml.clone()
            for _ in range(num_steps):
                learner.adapt(mean_squared_error(learner(x[i]), y[i]))
            total = total + mean_squared_error(learner(x_query[i]), y_query[i])
        total = total / len(x)
        total.backward()
        return total.detach()

    return loss


def by_higher(model: nn.Module, num_steps: int, step_size: float) -> Loss:
    """``innerloop_ctx`` and backward, task after task, as in higher's ``maml-omniglot.py``."""
    import higher

    inner = torch.optim.SGD(model.parameters(), lr=step_size)

    def loss(x: Any, y: Any, x_query: Any, y_query: Any) -> torch.Tensor:
        total = torch.zeros(())
        for i in range(len(x)):
            with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fast, steps):
                for _ in range(num_steps):
                    steps.step(mean_squared_error(fast(x[i]), y[i]))
                query = mean_squared_error(fast(x_query[i]), y_query[i]) / len(x)
                query.backward()
                total += query.detach()
        return total

    return loss


PEERS = {"learn2learn": by_learn2learn, "higher": by_higher}


def sinusoids(num_tasks: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y), each (tasks, rows, 1): amplitude U(0.1, 5), phase U(0, π), x U(−5, 5)."""
    amplitude = torch.empty(num_tasks, 1, 1).uniform_(0.1, 5.0)
    phase = torch.empty(num_tasks, 1, 1).uniform_(0.0, math.pi)
    x = torch.empty(num_tasks, num_rows, 1).uniform_(-5.0, 5.0)
    return x, amplitude * torch.sin(x - phase)


class Run:
    """One contestant's network, optimiser and inner loop; it goes on where it was."""

    def __init__(self, asked: dict[str, Any]) -> None:
        torch.manual_seed(asked.get("seed", 0))
        self.asked = asked
        self.model = network(asked["width"])
        self.adam = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.loss = PEERS[asked["peer"]](self.model, asked["num_steps"], asked["step_size"])

    def train(self, count: int) -> list[float]:
        """The query losses of ``count`` meta-steps."""
        shots, losses = self.asked["shots"], []
        for _ in range(count):
            x, y = sinusoids(self.asked["batch_size"], 2 * shots)
            self.adam.zero_grad()
            losses.append(self.loss(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:]))
            self.adam.step()
        return [float(value) for value in losses]

    def slope(self, weights: list[Any], batch: list[Any]) -> list[Any]:
        """The meta-gradient at these weights on this batch, in the order and shapes of both."""
        with torch.no_grad():
            for parameter, given in zip(self.model.parameters(), weights, strict=True):
                parameter.copy_(torch.tensor(given))
        self.model.zero_grad()
        self.loss(*(torch.tensor(part) for part in batch))
        return [parameter.grad.tolist() for parameter in self.model.parameters()]


def answer(asked: dict[str, Any], runs: dict[str, Run], default_threads: int) -> dict[str, Any]:
    """What is asked for: "versions", "slope" or "train"."""
    if asked["what"] == "versions":
        found = {"torch": torch.__version__, "threads": default_threads}
        for name in PEERS:
            try:
                learn2learn_maml() if name == "learn2learn" else importlib.import_module(name)
                found[name] = metadata.version(name)
            except Exception as error:
                found[name] = None
                found[f"{name} lacks"] = f"{type(error).__name__}: {error}"
        return found
    torch.set_num_threads(asked.get("threads") or default_threads)
    if asked["what"] == "slope":
        return {"slope": Run(asked).slope(asked["weights"], asked["batch"])}
    key = json.dumps({k: v for k, v in asked.items() if k not in ("what", "count", "threads")})
    if key not in runs:
        runs[key] = Run(asked)
    started = time.perf_counter()
    losses = runs[key].train(asked["count"])
    return {"seconds": time.perf_counter() - started, "losses": losses}


def main() -> int:
    """Answer until stdin ends."""
    runs: dict[str, Run] = {}
    default_threads = torch.get_num_threads()
    replies, sys.stdout = sys.stdout, sys.stderr  # what the packages print goes elsewhere
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), runs, default_threads)), file=replies, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
