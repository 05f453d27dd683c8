"""The pages of docs/ are executed as the README is: each page from its top, in a folder of its own."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from reader import Reader, runnable
from readme_blocks import Block, blocks
from small_models import REPOSITORY

PAGES = {page: blocks(page.read_text("utf-8")) for page in sorted((REPOSITORY / "docs").rglob("*.md"))}
RUN = [(page, block) for page, document in PAGES.items() for block in runnable(document)]


@pytest.fixture(scope="module")
def reader_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Reader]:
    """The reader of a page, who begins when the first of its blocks is asked for."""
    return cache(
        lambda page: Reader(PAGES[page], tmp_path_factory.mktemp(page.stem), tmp_path_factory.mktemp("outputs"))
    )


@pytest.mark.parametrize(("page", "block"), RUN, ids=lambda value: getattr(value, "stem", None) or value.name)
def test_block(reader_of: Callable[[Path], Reader], page: Path, block: Block) -> None:
    reader_of(page).read_to(block)


def test_pages_in_folders_are_found() -> None:
    run = {page.relative_to(REPOSITORY).as_posix() for page, _ in RUN}
    assert {"docs/conversion.md", "docs/migration/from-nvidia.md"} <= run
