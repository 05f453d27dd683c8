"""The documentation builds as a site: no warning, every page, every link and anchor, nothing fetched from elsewhere."""

import ast
import html
import re
from pathlib import Path

import pytest
from readme_blocks import blocks
from small_models import REPOSITORY
from test_every_block import PAGES


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `just docs` builds it; MkDocs itself follows the links, and a warning ends the build."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(REPOSITORY / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


def test_every_page_is_in_it(site: Path) -> None:
    found = [re.search(r"<h1[^>]*>(.*?)<a class", page.read_text("utf-8"), re.DOTALL) for page in site.rglob("*.html")]
    shown = {html.unescape(re.sub(r"<[^>]*>", "", match[1])).strip() for match in found if match}
    for page in PAGES:
        first = re.search(r"^# (.*)$", (REPOSITORY / page).read_text("utf-8"), re.MULTILINE)
        assert first, f"{page} has no title"
        assert first[1].replace("`", "") in shown, page


def test_the_reference_has_what_the_docstrings_say(site: Path) -> None:
    page = (site / "reference/conversion/index.html").read_text("utf-8")
    assert "Joins a Hugging Face model to its Megatron-Core counterpart." in page


def test_modules_that_the_pages_import_are_in_the_reference() -> None:
    described = {
        module
        for page in REPOSITORY.glob("docs/reference/*.md")
        for module in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.MULTILINE)
    }
    packages = {module.rpartition(".")[0] for module in described}
    for page in PAGES:
        for block in blocks((REPOSITORY / page).read_text("utf-8")):
            if block.language == "python":
                absent = {module for module in _imported(block.body) - described - packages if not _is_recipe(module)}
                assert not absent, f"{page}: {sorted(absent)}; name them in docs/reference/"


def _is_recipe(module: str) -> bool:
    """Whether it is a family's module of recipes: docs/recipe-book.md lists what is in it."""
    return re.match(r"megatron\.bridge\.recipes\.(?!base|mimo)", module) is not None


def _imported(source: str) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {node.module for node in nodes if node.module and node.module.startswith("megatron.bridge.")}


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        fetched = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(https?://[^"]+)"', page.read_text("utf-8"))
        assert not fetched, (page, fetched)
