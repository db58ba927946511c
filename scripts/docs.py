"""Builds the documentation as a site: `make docs`, or `python scripts/docs.py --site build/site`.

The pages of docs/ and the project's own files are staged in a folder, the reference is written beside them from the code (`reference.py`),
and Zensical builds the site in strict mode: a broken link or anchor, a page that the navigation lacks, or one that it has and that is not
there, is an error.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reference

ROOT = Path(__file__).parents[1]
PROJECT = {"CHANGELOG.md": "project/changelog.md", "CONTRIBUTING.md": "project/contributing.md", "SECURITY.md": "project/security.md"}
LEAVES_DOCS = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:src|benchmarks|tests|examples)/[^)]*\)")  # what only the repository has


def stage(folder: Path) -> None:
    """Everything that the site is made of."""
    shutil.copytree(ROOT / "docs", folder, ignore=shutil.ignore_patterns("*.json", "*.jsonl", "__pycache__", "results"), dirs_exist_ok=True)
    for path in folder.rglob("*.md"):
        path.write_text(LEAVES_DOCS.sub(r"\1", path.read_text()))
    for name, page in PROJECT.items():
        (folder / page).parent.mkdir(exist_ok=True)
        (folder / page).write_text(for_the_site((ROOT / name).read_text()))
    for page, text in reference.pages().items():
        (folder / page).write_text(text)


def for_the_site(text: str) -> str:
    """A file of the repository's root as a page of a folder of the site."""

    def moved(found: re.Match[str]) -> str:
        label, path, anchor = found.groups()
        if path in PROJECT:
            return f"[{label}]({Path(PROJECT[path]).name}{anchor})"
        return f"[{label}](../{path.removeprefix('docs/')}{anchor})" if path.startswith("docs/") else label

    return re.sub(r"\[([^\]]+)\]\((?![a-z]+:|#)([^)#\s]+)([^)\s]*)\)", moved, text)


def in_navigation(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from in_navigation(value) if isinstance(value, list) else [value]


def missing_pictures(pages: Path) -> Iterator[str]:
    """Zensical looks at links alone."""
    for page in pages.rglob("*.md"):
        for link in re.findall(r"!\[[^\]]*\]\(([^)\s]+)|<img[^>]* src=\"([^\"]+)", page.read_text()):
            picture = next(filter(None, link))
            if not (page.parent / picture).is_file():
                yield f"{page.relative_to(pages)} shows {picture}, which is not there"


def build(site: Path, staged: Path) -> None:
    """Writes the site. Raises SystemExit, with what is wrong on stderr, where it is not whole."""
    shutil.rmtree(staged, ignore_errors=True)
    stage(staged / "pages")
    if missing := sorted(missing_pictures(staged / "pages")):
        sys.exit("\n".join(missing))
    settings = (ROOT / "zensical.toml").read_text()
    listed = set(in_navigation(tomllib.loads(settings)["project"]["nav"]))
    there = {path.relative_to(staged / "pages").as_posix() for path in (staged / "pages").rglob("*.md")}
    if listed != there:
        lines = [f"zensical.toml names {page}, which is not there" for page in sorted(listed - there)]
        lines += [f"the navigation of zensical.toml lacks {page}" for page in sorted(there - listed)]
        sys.exit("\n".join(lines))
    (staged / "zensical.toml").write_text(settings)
    done = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=staged, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(staged / "site", site, dirs_exist_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--site", type=Path, default=ROOT / "build" / "site", help="where the site is written")
    parser.add_argument("--staged", type=Path, default=ROOT / "build" / "docs", help="where its sources are put together")
    arguments = parser.parse_args()
    build(arguments.site, arguments.staged)
    print(f"open {arguments.site / 'index.html'}; to search, serve it: python -m http.server -d {arguments.site}")
