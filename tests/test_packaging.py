"""The package list is complete, what is built from it works, and the passes have one import name only."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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


def test_pythons_that_are_claimed_are_those_of_the_readme() -> None:
    claimed = re.findall(
        r"^Programming Language :: Python :: (3\.\d+)$", "\n".join(PROJECT["project"]["classifiers"]), re.MULTILINE
    )
    assert f"Python {' or '.join(claimed)}" in (ROOT / "README.md").read_text()
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert claimed[0] == oldest
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")


BUILD = """
import sys
from setuptools import build_meta

print(getattr(build_meta, f"build_{sys.argv[1]}")(sys.argv[2]), file=sys.stderr)
"""


def built(what: str, source: Path, folder: Path) -> Path:
    """Return the sdist or the wheel of a source tree, built as pip builds them, but by the setuptools that is installed."""
    done = subprocess.run([sys.executable, "-c", BUILD, what, str(folder)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stderr.split()[-1]


def test_what_is_built_works(tmp_path: Path) -> None:
    """An sdist of the checkout, a wheel of the sdist, and the command out of the wheel."""
    pytest.importorskip("setuptools", minversion="77")
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "benchmarks", "docs", "runs")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=ignored)
    sdist = built("sdist", checkout, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    wheel = built("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path)
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    sources = {path.relative_to(ROOT) for path in (ROOT / "cpcompile").rglob("*.py") if "passes" not in path.parts}
    sources |= {Path("cpcompile") / path.relative_to(ROOT) for path in (ROOT / "passes").rglob("*.py")}
    assert {path.relative_to(installed) for path in installed.rglob("*.py")} == sources
    assert (installed / "cpcompile" / "py.typed").is_file()
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import cpcompile.cli as c; print(c.__file__); c.main()"
    command = [sys.executable, "-c", code, str(installed), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed)) and "verify" in done.stdout
