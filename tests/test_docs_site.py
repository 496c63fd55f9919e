"""The site of the documentation builds without a warning, and has every page in its navigation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as `make docs` does. (With --quiet, mkdocs would not see its own warnings.)"""
    pytest.importorskip("material", reason="mkdocs-material is in the extras docs and dev")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_links_to_nothing_are_errors(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "link_repository.py", tmp_path / "docs")
    text = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(text)
    for link in ("nothing.md", "index.md#nothing", "../nothing.py"):
        (tmp_path / "docs" / "index.md").write_text(f"[x]({link})\n")
        done = build(tmp_path, tmp_path / "site")
        assert done.returncode != 0 and "nothing" in done.stderr


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "index.html").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        name = name.removesuffix("index") if page.name == "index.md" else f"{name}/"
        assert "```" not in (tmp_path / name / "index.html").read_text(), (
            f"{page.name} has a fence that is not understood"
        )
        assert f'href="{name or "."}"' in index, f"{page.name} is in no menu"


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import link_repository

    return link_repository


@pytest.mark.parametrize(
    ("page", "link", "repository", "expected"),
    [
        ("index.md", "[a](../examples/fsdp2.py)", None, "a (`examples/fsdp2.py`)"),
        ("index.md", "[examples/fsdp2.py](../examples/fsdp2.py)", None, "examples/fsdp2.py"),
        ("recipes/lora.md", "[a](../../README.md#b)", "https://host/x/", "[a](https://host/x/blob/main/README.md#b)"),
        ("recipes/lora.md", "[a](../memory.md#b)", "https://host/x/", "[a](../memory.md#b)"),
    ],
)
def test_links_out_of_the_pages(hook: ModuleType, page: str, link: str, repository: str | None, expected: str) -> None:
    assert hook.LINK.sub(lambda found: hook.linked(found, page, repository), link) == expected


def test_a_link_to_nothing_is_a_warning(hook: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    hook.LINK.sub(lambda found: hook.linked(found, "index.md", None), "[a](../no.py)")
    assert "index.md links to no.py, which does not exist" in caplog.text
