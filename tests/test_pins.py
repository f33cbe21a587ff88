"""pyproject.toml, constraints.txt and environment.yml describe one environment."""
from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COURSE_EXTRAS = ("train", "dev")    # what `make setup` installs


def direct(*extras: str) -> list[Requirement]:
    optional = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + [line for extra in extras for line in optional[extra]]
    return [Requirement(line) for line in lines]


def pins(lines) -> dict[str, str]:
    """Package name to version, of lines that must all read name==version."""
    versions = {}
    for line in lines:
        name, equals, version = line.partition("==")
        assert equals and version.strip(), f"{line!r} is not name==version"
        assert canonicalize_name(name) not in versions, f"{name} is pinned twice"
        versions[canonicalize_name(name)] = version.strip()
    return versions


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return pins(line for line in lines if line and not line.startswith("#"))


def environment() -> list:
    return yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


@pytest.mark.parametrize("requirement", direct(*PROJECT["optional-dependencies"]), ids=str)
def test_every_direct_dependency_is_pinned_within_its_range(requirement):
    version = constraints().get(canonicalize_name(requirement.name))
    assert version is not None, f"{requirement.name} is not in constraints.txt"
    assert requirement.specifier.contains(version), f"{requirement} in pyproject.toml, pinned to {version}"


def test_no_direct_dependency_is_listed_twice():
    names = [canonicalize_name(requirement.name) for requirement in direct(*PROJECT["optional-dependencies"])]
    assert sorted(names) == sorted(set(names))


def test_environment_has_the_pins_of_the_direct_dependencies():
    listed = next(item["pip"] for item in environment() if isinstance(item, dict))
    expected = {name: constraints()[name]
                for name in (canonicalize_name(requirement.name) for requirement in direct(*COURSE_EXTRAS))}
    assert pins(listed) == expected


def test_environment_has_a_python_that_the_package_supports():
    python = next(item for item in environment() if isinstance(item, str) and item.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))


def test_the_repository_url_stands_only_in_pyproject():
    url = PROJECT["urls"]["Repository"]
    texts = [path for folder in ("p2p_helpers", "tests") for path in (ROOT / folder).rglob("*.py")]
    texts += [ROOT / name for name in ("Makefile", "constraints.txt", "environment.yml", ".ci/run", "NOTICE")]
    assert [str(path.relative_to(ROOT)) for path in texts if url in path.read_text(encoding="utf-8")] == []
