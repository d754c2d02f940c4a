"""Two processes with two devices each, under jax.distributed on 127.0.0.1, against one device.

Run by .ci/run: ``python tests/two_processes.py``. Both processes fit the same tasks, alone and
spread over all four devices, and say how far apart the results are. It ends with status 1 where
they are further apart than 1e-10, where the processes disagree, or after a time limit.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

AGREE = 1e-10
SECONDS = 600
"""For all of it; a process that waits for one that has died is ended then."""


def one_process(process: int, address: str) -> None:
    """Compare every method, and print the differences as JSON on the last line."""
    import jax

    jax.distributed.initialize(address, num_processes=2, process_id=process)
    import numpy as np
    import sharded

    import hierbayes as hb
    from hierbayes.numerics import float64
    from hierbayes.statistics import placed_statistics

    sharded.quietly()
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
    mesh = jax.make_mesh((4,), ("tasks",))
    found = sharded.compare(
        sharded.two_coefficients, mesh,
        {
            "ml": hb.empirical_bayes,
            "maml": lambda m, t: hb.maml(m, t, num_steps=3),
            "reptile": lambda m, t: hb.reptile(m, t, num_steps=3),
        },
    )  # fmt: skip
    found |= sharded.compare(
        sharded.few_with_known_errors, mesh,
        {
            "full Bayes": lambda m, t: hb.full_bayes(m, t, num_draws=50, num_chains=2, seed=3),
            "map": lambda m, t: hb.empirical_bayes(m, t, criterion="map"),
            "iMAML": lambda m, t: hb.imaml(m, t, prior_precision=0.5),
        },
    )  # fmt: skip
    found |= sharded.compare(sharded.binary, mesh, {"Laplace": sharded.laplace})
    _, tasks = sharded.two_coefficients()
    with float64():
        x = placed_statistics(tasks.shard(mesh)).x
    held = sum(part.data.shape[-1] for part in x.addressable_shards)
    # a control: what a process holds by itself is not the whole
    assert (x.shape[-1], held) == (24, 12), "each process holds half of the tasks"
    assert not x.is_fully_addressable
    assert sharded.furthest({"a": np.ones(2)}, {"a": np.ones(2) + 1e-9}) > AGREE
    print(json.dumps(found), flush=True)


def main() -> int:
    """Start both processes, wait for them, and judge what they found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }  # fmt: skip
    script, started = str(Path(__file__).resolve()), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"process-{k}") for k in range(2)]
        processes = []
        for k, log in enumerate(logs):
            with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
                command = [sys.executable, script, str(k), address]
                processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err))
        try:
            while any(p.poll() is None for p in processes):
                late = time.monotonic() - started > SECONDS
                if late or any(p.poll() for p in processes):
                    break
                time.sleep(0.2)
            else:
                late = False
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        said = [log.with_suffix(".out").read_text() for log in logs]
        for k, log in enumerate(logs):
            lines = log.with_suffix(".err").read_text().splitlines()
            kept = [line for line in lines if k == 0 and "furthest" in line]
            print("\n".join(kept if all(p.returncode == 0 for p in processes) else lines))
    codes = [process.returncode for process in processes]
    if any(codes):
        print(f"ended with status {codes}" + (f" after {SECONDS} s" if late else ""))
        return 1
    found = [json.loads(text.splitlines()[-1]) for text in said]
    worst = max(max(differences.values()) for differences in found)
    alike = found[0] == found[1]
    print(
        f"{len(found[0])} fits on 2 processes with 2 devices each: at most {worst:.1e} from one "
        f"device ({AGREE:.0e} allowed), {'alike' if alike else 'not alike'} on both processes, "
        f"{time.monotonic() - started:.0f} s"
    )
    return 0 if worst <= AGREE and alike else 1


if __name__ == "__main__":
    if len(sys.argv) == 3:
        one_process(int(sys.argv[1]), sys.argv[2])
    else:
        sys.exit(main())
