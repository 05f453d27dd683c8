"""No block of any page escapes: it is run somewhere, it is part of something that is run, or it says why it is not."""

import re
from pathlib import Path

import pytest
from reader import NOT_RUN, unexplained
from readme_blocks import Block, blocks
from small_models import REPOSITORY

# Pages, who runs their blocks, and in which languages. A file that is no Python is used by another block.
BY_READERS = {"python", "sh", "console"}
RUNNERS: dict[str, tuple[str, set[str]]] = {
    "README.md": ("integration_tests/test_readme.py", BY_READERS),
    "packages/data/README.md": ("packages/data/tests/test_data_readme.py", {"python", "console"}),
    "packages/mimo/README.md": ("packages/mimo/tests/test_mimo_readme.py", {"python"}),
    "plugins/internlm2/README.md": ("plugins/internlm2/tests/test_internlm2.py", {"python"}),
    "plugins/vera/README.md": ("plugins/vera/tests/test_vera.py", {"python"}),
    "plugins/primus/README.md": ("plugins/primus/tests/test_primus.py", {"sh", "yaml"}),
    **{
        f"packages/{name}/README.md": ("integration_tests/test_package_readmes.py", BY_READERS)
        for name in ("conversion", "models", "peft", "training")
    },
    "recipes/README.md": ("integration_tests/test_package_readmes.py", BY_READERS),
}
PATTERNS = (
    "*.md",
    "docs/**/*.md",
    "packages/*/README.md",
    "recipes/README.md",
    "plugins/README.md",
    "plugins/*/README.md",
)
PAGES = sorted({path.relative_to(REPOSITORY).as_posix() for pattern in PATTERNS for path in REPOSITORY.glob(pattern)})


def runner(page: str) -> tuple[str, set[str]]:
    if page.startswith("docs/"):
        return "integration_tests/test_docs.py", BY_READERS
    return RUNNERS.get(page, ("", set()))


def escapes(block: Block, document: list[Block], languages: set[str]) -> bool:
    """Whether nobody runs, uses or excuses `block`."""
    if block.language == "text" or block.note.startswith(NOT_RUN):
        return False
    if block.file and "/" in block.file:  # of a package that the document installs
        package = block.file.split("/")[0]
        return not any(re.search(rf"uv pip install \./{package}$", each.body, re.MULTILINE) for each in document)
    if block.language in ("yaml", "toml", "bash") and block.file:
        return not any(block.file in each.body for each in document if each is not block)
    return block.language not in languages


@pytest.mark.parametrize("page", PAGES)
def test_no_block_escapes(page: str) -> None:
    text = (REPOSITORY / page).read_text("utf-8")
    document = blocks(text)
    fences = re.findall(r"^[ \t>]*(?:```|~~~)", text, re.MULTILINE)
    assert len(fences) == 2 * len(document), "a fence is indented, of another kind, or has more than a language"
    assert not unexplained(document)
    assert not [block.name for block in document if escapes(block, document, runner(page)[1])]


def test_those_who_run_them_are_there() -> None:
    for page, (test, _) in RUNNERS.items():
        assert (REPOSITORY / page).is_file(), page
        source = Path(REPOSITORY / test).read_text("utf-8")
        assert "README" in source, f"{test} does not read {page}"


def test_a_block_that_nobody_runs_is_noticed() -> None:
    quiet = "```python\npass\n```\n"
    for text in ("```rust\nfn main() {}\n```\n", "```toml\n[a]\n```\n", "```yaml\n# lonely.yaml\na: 1\n```\n"):
        document = blocks(quiet + text)
        assert [escapes(block, document, BY_READERS) for block in document] == [False, True]
