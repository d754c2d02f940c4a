"""The house as design.md draws it: rooms import upward, modules stay small, little is public."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import hierbayes

PACKAGE = Path(hierbayes.__file__).parent

ROOMS = [
    "errors", "inputs", "files", "numerics", "sharding", "tasks", "statistics", "phi",
    "likelihoods", "rows", "priors",
    "model", "simulation", "formula", "adaptation", "equivalence", "evidence", "fit", "meta",
    "checks", "plots",
    "calibration", "comparison", "datasets", "cli",
]  # fmt: skip
"""From the top of the house to the bottom; a room imports only rooms above it, or itself."""

FREE = {"__init__", "__main__"}
"""The doors: they may import every room."""


def imported(source: str) -> set[str]:
    """All that a module imports of the package, by its full name.

    At its top, inside functions and for type checkers alike: an arrow is one however it is drawn.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in names if name.startswith("hierbayes.")}


def imported_rooms(source: str) -> set[str]:
    """The rooms that a module imports from."""
    return {name.split(".")[1] for name in imported(source)}


def violations(room: str, source: str, order: list[str]) -> list[str]:
    """What a module of ``room`` imports from below; datasets stand beside the line."""
    found = []
    for other in sorted(imported_rooms(source) - {room}):
        if other not in order:
            found.append(f"{other} is no room")
        elif order.index(other) > order.index(room) or other == "datasets" != room != "cli":
            found.append(f"{room} imports {other}")
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_above_it(path):
    room = room_of(path)
    if room not in FREE:
        assert room in ROOMS, f"{room} has no place in the house"
        assert violations(room, path.read_text(encoding="utf-8"), ROOMS) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from hierbayes.fit import Fit", ["tasks imports fit"]),
        ("import hierbayes.fit.fit", ["tasks imports fit"]),
        ("def f():\n    from hierbayes import model", ["tasks imports model"]),
        ("from hierbayes.datasets import radon", ["tasks imports datasets"]),
        ("from hierbayes.cellar import wine", ["cellar is no room"]),
        ("if TYPE_CHECKING:\n    from hierbayes.fit import Fit", ["tasks imports fit"]),
        ("from hierbayes.errors import InputError\nfrom hierbayes.tasks.frames import Frame", []),
    ],
)  # fmt: skip
def test_the_reader_of_imports_sees_them(source, expected):
    """The control: what the test above would let pass, and what not."""
    assert violations("tasks", source, ROOMS) == expected


def name_of(path: Path) -> str:
    """The module's full name; a package's is that of its folder."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def arrows() -> dict[str, set[str]]:
    """Which file imports from which."""
    sources = {name_of(path): path.read_text(encoding="utf-8") for path in MODULES}

    def file_of(name: str) -> str:
        return name if name in sources else name.rpartition(".")[0]

    return {
        name: {file_of(other) for other in imported(source)} & {*sources} - {name}
        for name, source in sources.items()
    }


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The files left when those without an arrow to another are taken away, again and again."""
    left = {name: set(others) for name, others in graph.items()}
    while ends := [name for name, others in left.items() if not others & {*left}]:
        for name in ends:
            del left[name]
    return sorted(left)


def test_there_is_no_circle_of_files():
    assert circle(arrows()) == []


def test_a_circle_is_seen():
    """The control."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_at_most_25_names_at_the_top_and_all_of_them_exist():
    names = hierbayes.__all__
    assert len(names) == len(set(names))
    values = {name: getattr(hierbayes, name) for name in names}
    assert len([n for n, v in values.items() if not isinstance(v, ModuleType)]) <= 25
    fixed = {"Tasks", "HierarchicalModel", "from_formula", "HyperPrior", "full_bayes",
             "empirical_bayes", "maml", "load", "compare"}  # fmt: skip
    assert fixed <= set(names), "design.md section 3 fixes these"


def test_each_name_lives_where_the_door_says():
    rooms = hierbayes._ROOM_OF
    submodules = {n for n in hierbayes.__all__ if isinstance(getattr(hierbayes, n), ModuleType)}
    assert set(rooms) | submodules == set(hierbayes.__all__)
    for name, room in rooms.items():
        assert getattr(hierbayes, name).__module__.startswith(f"hierbayes.{room}")
    assert set(hierbayes.__all__) <= set(dir(hierbayes))
    with pytest.raises(AttributeError, match="no attribute 'full_bays'"):
        _ = hierbayes.full_bays


def test_importing_opens_no_room():
    code = "import sys, hierbayes; print([m for m in sys.modules if m.startswith('hierbayes.')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


LATE = ["matplotlib", "arviz_stats", "arviz_plots", "arviz_base", "pandas", "formulaic"]
"""What loads only when first used; design.md section 5."""

REPORT = """
import json, sys, warnings
{before}
import jax
filters, flags = list(warnings.filters), (jax.config.jax_enable_x64, jax.config.jax_platforms)
import numpyro
filters_of_numpyro = list(warnings.filters)
import hierbayes
everything = [getattr(hierbayes, name) for name in hierbayes.__all__]  # rooms open when entered
print(json.dumps({{
    "loaded": [m for m in {late} if m in sys.modules],
    "flags": (jax.config.jax_enable_x64, jax.config.jax_platforms) == flags,
    "x64": jax.config.jax_enable_x64,
    "filters": warnings.filters == filters_of_numpyro,
    "backend": bool(jax._src.xla_bridge._backends),
}}))
"""


def state_after_import(before: str = "") -> dict[str, object]:
    """What a fresh interpreter looks like after ``import hierbayes``."""
    code = REPORT.format(before=before, late=LATE)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_importing_loads_little_and_changes_nothing():
    state = state_after_import()
    assert state["loaded"] == []
    assert state["flags"]
    assert state["x64"] is False
    assert state["filters"]
    assert state["backend"] is False, "no device is started by an import"


@pytest.mark.slow
def test_the_report_on_an_import_sees_what_is_loaded():
    """The control."""
    state = state_after_import(
        "import pandas\nimport jax\njax.config.update('jax_enable_x64', True)"
    )
    assert "pandas" in state["loaded"]
    assert state["x64"] is True


def long_bodies(source: str, most: int = 30) -> list[str]:
    """Public functions and methods of more lines of code than this, without their docstrings."""
    found = []
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef)):
            continue
        for f in node.body:
            if isinstance(f, ast.FunctionDef) and not f.name.startswith("_"):
                body = f.body[1:] if ast.get_docstring(f) is not None else f.body
                code = [
                    line for start in body[:1] for line in lines[start.lineno - 1 : f.end_lineno]
                    if line.strip() and not line.strip().startswith("#")
                ]  # fmt: skip
                if len(code) > most:
                    found.append(f"{f.name} has {len(code)} lines")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_public_functions_are_short(path):
    """Each reads like its definition; what it rests on has a name of its own."""
    assert long_bodies(path.read_text(encoding="utf-8")) == []


def test_the_counter_of_lines_counts():
    """The control: 31 lines are too many, docstrings and comments are none."""
    body = "\n".join(f"    x = {i}" for i in range(30))
    assert long_bodies(f'def f():\n    """Doc."""\n    # why\n{body}') == []
    assert long_bodies(f"def f():\n{body}\n    return x") == ["f has 31 lines"]
    assert long_bodies(f"class A:\n  def f():\n{body}\n    return x") == ["f has 31 lines"]
