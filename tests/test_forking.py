"""A fork after a fit says why it cannot fit, in the place of waiting for ever."""

import os
import subprocess
import sys

import pytest

CODE = """
import os, warnings
warnings.simplefilter("ignore")
import hierbayes as hb
model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(), known_se="se")
for when in ("before", "after"):
    child = os.fork()
    if child == 0:
        try:
            found = "fitted " + hb.complete_pooling(model, tasks).method.name
        except RuntimeError as error:
            found = f"refused: {error}"
        print(when, found, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    print(when, "parent:", hb.complete_pooling(model, tasks).method.name, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_is_refused_after_a_fit_and_works_before_one():
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    for said in (
        "before fitted complete pooling", "before parent: complete pooling",
        "after refused: this process was forked", "after parent: complete pooling",
    ):  # fmt: skip
        assert said in run.stdout
