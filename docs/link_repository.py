"""A hook of mkdocs: links to files outside of docs/ lead to the repository, or are paths where its URL is not known."""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
_log = logging.getLogger("mkdocs.hooks.link_repository")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Return a page with such links replaced. A file that does not exist is a warning, which `--strict` makes an error."""
    return LINK.sub(lambda found: linked(found, page.file.src_uri, config.repo_url), markdown)


def linked(found: re.Match[str], page: str, repository: str | None) -> str:
    """Return what stands for one link of a page."""
    text, target, anchor = found.groups(default="")
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    if path.startswith("docs/"):
        return found.group()
    if not (ROOT / path).exists():
        _log.warning("%s links to %s, which does not exist", page, path)
    if repository:
        return f"[{text}]({repository.rstrip('/')}/blob/main/{path}{anchor})"
    return text if path in text else f"{text} (`{path}`)"
