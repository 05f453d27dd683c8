"""The README is executed, block by block in its order, in one folder; what is not run says why."""

import re

import pytest
from reader import Reader, runnable, unexplained
from readme_blocks import README, Block, blocks
from small_models import REPOSITORY

BLOCKS = blocks(README.read_text("utf-8"))
RUN = runnable(BLOCKS)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(BLOCKS, tmp_path_factory.mktemp("reader"), tmp_path_factory.mktemp("outputs"))


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.name)
def test_block(reader: Reader, block: Block) -> None:
    reader.read_to(block)


def test_the_reader_ends_with_what_the_readme_promises(reader: Reader) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader.read_to(BLOCKS[-1])
    for folder in ("exported_model", "hf_output", "trained_model", "exported"):
        AutoModelForCausalLM.from_pretrained(reader.folder / folder)
        AutoTokenizer.from_pretrained(reader.folder / folder)
    assert '"passed": true' in (reader.folder / "certificate.json").read_text()
    assert not (reader.folder / "refused").exists()
    assert not list((reader.folder / "data").glob("bad*"))


def test_every_kind_of_block_is_known_and_every_omission_says_why() -> None:
    assert {block.language for block in BLOCKS} == {"python", "sh", "console", "yaml", "toml", "text"}
    assert not unexplained(BLOCKS)
    assert all(block.file for block in BLOCKS if block.language in ("yaml", "toml"))
    assert len(RUN) >= 20


def test_links_lead_somewhere() -> None:
    text = README.read_text("utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (REPOSITORY / target).exists(), target
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in headings, anchor


def test_the_table_of_the_quickstart_is_the_one_it_prints(reader: Reader) -> None:
    (shown,) = [block.body for block in BLOCKS if block.language == "text"]
    reader.read_to(next(block for block in BLOCKS if "quickstart" in block.body))
    printed = (reader.outputs / "quickstart" / "stdout").read_text("utf-8")
    assert _steps(shown) == _steps(printed)
    assert len(_steps(shown)) >= 7


def _steps(table: str) -> list[str]:
    """First cells of the rows of a drawn table, numbers aside."""
    cells = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
    return [re.sub(r"\d+", "N", cell) for cell in cells if cell]
