"""The package list is complete, the entry points are there, and the passes have one import name only."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders(top: Path, name: str) -> set[str]:
    """Return the import names of all packages under `top`; links are skipped, `passes` is added by its caller."""
    found = {name}
    for child in top.iterdir():
        if child.is_dir() and not child.is_symlink() and any(child.glob("*.py")):
            found |= folders(child, f"{name}.{child.name}")
    return found


def test_every_package_is_listed() -> None:
    expected = folders(ROOT / "cpcompile", "cpcompile") | folders(ROOT / "passes", "cpcompile.passes")
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


def test_every_package_has_an_init_file() -> None:
    for name in PROJECT["tool"]["setuptools"]["packages"]:
        assert (ROOT / name.replace(".", "/") / "__init__.py").is_file(), name


def test_entry_points() -> None:
    backends = entry_points(group="torch_dynamo_backends", name="cpcompile")
    assert {point.value for point in backends} == {"cpcompile.front.backend:backend"}
    scripts = entry_points(group="console_scripts", name="cpcompile")
    assert {point.value for point in scripts} == {"cpcompile.cli:main"}


def test_passes_cannot_be_imported_from_the_root() -> None:
    done = subprocess.run([sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "import this package as cpcompile.passes" in done.stderr


def test_passes_import_under_their_name() -> None:
    code = "import cpcompile.passes as p; print(p.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "cpcompile.passes"


def test_type_information_is_shipped() -> None:
    assert (ROOT / "cpcompile" / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["cpcompile"]
