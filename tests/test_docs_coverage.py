"""The documentation's own check: it must see a public name that no page describes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import hierbayes

SOURCE = Path(__file__).parents[1] / "docs" / "ext" / "coverage_check.py"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("coverage_check", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_public_names_cover_the_top_level_and_the_subpackages(check):
    names = check.public_names(hierbayes)
    assert {f"hierbayes.{name}" for name in hierbayes.__all__} <= set(names)
    assert names["hierbayes.priors.Gaussian"] is hierbayes.priors.Gaussian
    assert "hierbayes.Fit.adapt" in names  # a method
    assert "hierbayes.Fit.prior" in names  # a property
    assert "hierbayes.Fit.datatree" in names  # a cached property
    assert not any("._" in name for name in names)


def test_nothing_is_missing_where_all_is_documented(check):
    names = check.public_names(hierbayes)
    assert check.undocumented(names, names) == []


@pytest.mark.parametrize("dropped", ["maml", "Fit", "Fit.adapt", "Fit.datatree", "datasets.radon"])
def test_one_missing_name_is_found(check, dropped):
    names = check.public_names(hierbayes)
    gone = names[f"hierbayes.{dropped}"]
    documented = {name for name, value in names.items() if value is not gone}
    found = check.undocumented(names, documented)
    assert len(found) == 1
    assert found[0].endswith(dropped.split(".")[-1])


def test_one_description_is_enough_for_a_name_that_is_public_twice(check):
    names = check.public_names(hierbayes)
    documented = set(names) - {"hierbayes.priors.HyperPrior"}
    assert check.undocumented(names, documented) == []
    assert "hierbayes.HyperPrior" in check.undocumented(
        names, documented - {"hierbayes.HyperPrior"}
    )


@pytest.mark.slow  # with the documentation's libraries
def test_the_build_stops_at_a_missing_name(check):
    from sphinx.errors import SphinxError

    names = set(check.public_names(hierbayes))

    class Environment:
        def __init__(self, objects: set[str]):
            self.objects = objects

        def get_domain(self, name: str) -> "Environment":
            assert name == "py"
            return self

    check._check(None, Environment(names))
    with pytest.raises(SphinxError, match=r"hierbayes\.maml"):
        check._check(None, Environment(names - {"hierbayes.maml", "hierbayes.meta.maml"}))
