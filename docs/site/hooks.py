"""What MkDocs does not do by itself: pages from the whole repository, patterns in the navigation, sources in one tree.

Every page keeps its path in the repository as its name in the site, so that a relative link leads to the same page on
the code host and here.
"""

import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]
OUTSIDE = ("*.md", "LICENSE", "packages/*/README.md", "recipes/README.md", "plugins/README.md", "plugins/*/README.md")
INSIDE = ("docs/**/*.md", "docs/*.svg", "docs/site/*.css")
# What a path begins with, and what its address begins with: each page has one of its own.
ADDRESSES = {"docs/": "", "README.md": "tour/", "plugins/": "packages/plugins/", "recipes/": "packages/recipes/"}

_COMPILED = shutil.ignore_patterns("__pycache__")
# Several names with one description, which griffe takes for a name and its type.
_NAMES = re.compile(r"^( +\w+)((?:, \w+)+): ", re.MULTILINE)

_sources = tempfile.TemporaryDirectory(prefix="megatron-bridge-sources-")


@event_priority(100)  # before mkdocstrings looks at its paths
def on_config(config: "MkDocsConfig") -> None:
    """Fill in the navigation and the sources that the reference is made from."""
    config.nav = expanded(config.nav or [], set(named(config.nav or [])))
    collect_sources(Path(_sources.name))
    python = config.plugins["mkdocstrings"].config.handlers["python"]
    python["paths"] = [_sources.name]


def on_files(files: "Files", config: "MkDocsConfig") -> None:
    """Put the repository's pages in the place of those that were found in `docs_dir`."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    pages = [page(path, config) for path in found(*OUTSIDE, *INSIDE)]
    if twice := [address for address, count in Counter(each.dest_uri for each in pages).items() if count > 1]:
        raise PluginError(f"several pages have the address {', '.join(twice)}; give them others in {__file__}")
    for each in pages:
        files.append(each)


def page(path: str, config: "MkDocsConfig") -> File:
    """The file at `path` of the repository, at its address."""
    start = next((start for start in ADDRESSES if path.startswith(start)), "")
    plain = File(path, str(ROOT), config.site_dir, config.use_directory_urls)
    address = ADDRESSES.get(start, "") + plain.dest_uri.removeprefix(start)
    return File(path, str(ROOT), config.site_dir, config.use_directory_urls, dest_uri=address)


def named(nav: Any) -> list[str]:
    """The paths that `nav` names one by one."""
    if isinstance(nav, str):
        return [] if "*" in nav else [nav]
    return [path for entry in (nav.values() if isinstance(nav, dict) else nav) for path in named(entry)]


def expanded(nav: list[Any], taken: set[str]) -> list[Any]:
    """`nav` with each pattern replaced by the files that it finds and that are not `taken`."""
    entries: list[Any] = []
    for entry in nav:
        if isinstance(entry, str) and "*" in entry:
            entries += [path for path in found(entry) if path not in taken]
        elif isinstance(entry, dict):
            entries.append(
                {title: expanded(below, taken) if isinstance(below, list) else below for title, below in entry.items()}
            )
        else:
            entries.append(entry)
    return entries


def found(*patterns: str) -> list[str]:
    """Paths of the repository's files that match, sorted by pattern."""
    return [path.relative_to(ROOT).as_posix() for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def collect_sources(target: Path) -> None:
    """Lay the packages into one tree, as their wheels do; Megatron-Core, which shares the name, stays outside."""
    for source in (*ROOT.glob("packages/*/src/megatron"), ROOT / "recipes/src/megatron"):
        shutil.copytree(source, target / "megatron", dirs_exist_ok=True, ignore=_COMPILED, copy_function=copy_source)
    (target / "megatron" / "__init__.py").touch()


def copy_source(source: str, target: str) -> None:
    """Copy a file; names that a docstring describes together (`lr, min_lr: ...`) are joined for griffe."""
    text = Path(source).read_text("utf-8")
    Path(target).write_text(_NAMES.sub(lambda match: match[1] + match[2].replace(", ", ",") + ": ", text), "utf-8")
