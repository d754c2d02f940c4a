"""Fail the build when a public name is described on no page.

Public are the names in ``hierbayes.__all__``, the names in the ``__all__`` of every subpackage, and
the methods and properties that public classes of the package define themselves.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import Any


def public_modules(package: ModuleType) -> list[ModuleType]:
    """The package and those of its direct children that say in ``__all__`` what they offer."""
    children = [
        importlib.import_module(f"{package.__name__}.{child.name}")
        for child in pkgutil.iter_modules(package.__path__)
        if not child.name.startswith("_")
    ]
    return [package, *(child for child in children if hasattr(child, "__all__"))]


def public_names(package: ModuleType) -> dict[str, Any]:
    """Every public name, dotted, and what it names."""
    names: dict[str, Any] = {}
    for module in public_modules(package):
        for name in module.__all__:
            value = getattr(module, name)
            names[f"{module.__name__}.{name}"] = value
            if inspect.isclass(value) and value.__module__.split(".")[0] == package.__name__:
                names |= {f"{module.__name__}.{name}.{m}": v for m, v in _members(value).items()}
    return names


def _members(cls: type) -> dict[str, Any]:
    """Methods and properties that a class defines itself."""
    kinds = (property, classmethod, staticmethod)
    return {
        name: value
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and (isinstance(value, kinds) or inspect.isfunction(value) or hasattr(value, "func"))
    }


def undocumented(names: dict[str, Any], documented: Iterable[str]) -> list[str]:
    """The names of what is documented under none of its names.

    One object may be public in two places, as ``HyperPrior`` is; one description is enough.
    """
    documented = set(documented)
    described = {id(value) for name, value in names.items() if name in documented}
    missing: dict[int, str] = {}
    for name, value in names.items():
        if id(value) not in described:
            missing.setdefault(id(value), name)
    return sorted(missing.values())


def _check(app: Any, env: Any) -> None:
    from sphinx.errors import SphinxError

    import hierbayes

    documented = set(env.get_domain("py").objects)
    if missing := undocumented(public_names(hierbayes), documented):
        raise SphinxError(
            f"{len(missing)} public name(s) are documented on no page of docs/api: "
            + ", ".join(missing)
        )


def setup(app: Any) -> dict[str, Any]:
    """Sphinx's way in."""
    app.connect("env-check-consistency", _check)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
