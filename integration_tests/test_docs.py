"""The pages of docs/ are executed as the README is: each page from its top, in a folder of its own."""

from pathlib import Path

import pytest
from reader import Reader, runnable
from readme_blocks import Block, blocks
from small_models import REPOSITORY

PAGES = {page: blocks(page.read_text("utf-8")) for page in sorted((REPOSITORY / "docs").rglob("*.md"))}
RUN = [(page, block) for page, document in PAGES.items() for block in runnable(document)]


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Reader]:
    return {
        page: Reader(document, tmp_path_factory.mktemp(page.stem), tmp_path_factory.mktemp("outputs"))
        for page, document in PAGES.items()
        if runnable(document)
    }


@pytest.mark.parametrize(("page", "block"), RUN, ids=lambda value: getattr(value, "stem", None) or value.name)
def test_block(readers: dict[Path, Reader], page: Path, block: Block) -> None:
    readers[page].read_to(block)


def test_pages_in_folders_are_found() -> None:
    run = {page.relative_to(REPOSITORY).as_posix() for page, _ in RUN}
    assert {"docs/conversion.md", "docs/migration/from-nvidia.md"} <= run
