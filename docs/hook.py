"""mkdocs' hook: what pages link to outside docs/ becomes a part of the site, pages, pictures, results and sources."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("benchmarks/README.md", "benchmarks/paper/README.md", "examples/README.md", "CHANGELOG.md", "CONTRIBUTING.md")
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)")


def targets(markdown: str, page: str) -> list[str]:
    """What the page (a path in the repository) links to, as paths in the repository."""
    return [posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for _, link in LINK.findall(markdown)]


def place(path: str) -> str:
    """Where a file of the repository is on the site: docs/ is its root, all else keeps its path."""
    return path.removeprefix("docs/")


def home(page: str) -> str:
    return page if (ROOT / page).is_file() and not (ROOT / "docs" / page).is_file() else f"docs/{page}"


def on_files(files: Files, config: Any) -> Files:
    pages = [file.src_uri for file in files if file.is_documentation_page()]
    there, wanted = {file.src_uri for file in files}, list(PAGES)
    for page in [*map("docs/{}".format, pages), *PAGES]:
        wanted += targets((ROOT / page).read_text(encoding="utf-8"), page)
    for path in dict.fromkeys(wanted):
        if place(path) not in there and (ROOT / path).is_file():
            files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
            there.add(place(path))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    here = page.file.src_uri
    folder = posixpath.dirname(home(here))

    def moved(link: re.Match[str]) -> str:
        target = place(posixpath.normpath(posixpath.join(folder, link[2])))
        return link[1] + posixpath.relpath(target, posixpath.dirname(here) or ".")

    return LINK.sub(moved, markdown)
