"""The page on errors quotes messages that the sources really have."""

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest
from small_models import REPOSITORY

PAGE = REPOSITORY / "docs/errors.md"
QUOTES = re.findall(r"^\| `(.*?)`", PAGE.read_text("utf-8"), re.MULTILINE)
_ANYTHING = "\0"


def _template(node: ast.expr) -> str | None:
    """A text of the sources, with `_ANYTHING` for what is filled in; None for what is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) or _ANYTHING for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_template(node.left) or _ANYTHING) + (_template(node.right) or _ANYTHING)
    return None


@cache
def _texts() -> list[str]:
    """Every text in the sources that is no docstring."""
    return [
        text for file in sorted(REPOSITORY.glob("packages/*/src/**/*.py")) for text in _of(ast.parse(file.read_bytes()))
    ]


def _of(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        for field, value in ast.iter_fields(node):
            for each in value if isinstance(value, list) else [value]:
                is_docstring = isinstance(node, ast.Expr) and field == "value"
                if isinstance(each, ast.expr) and not is_docstring and (text := _template(each)):
                    yield text


def _said(quote: str, text: str) -> bool:
    """Whether `text` contains `quote`: its words in order, with something filled in where it has `...`."""
    pieces = [piece for piece in quote.removeprefix("... ").removesuffix(" ...").split("...") if piece.strip()]
    pattern = f".*?{_ANYTHING}.*?".join(map(re.escape, pieces))
    return re.search(pattern, text, re.DOTALL) is not None


def _readings(quote: str) -> list[str]:
    """`quote`, and the same with one or two of its words filled in, as the name of a kind is."""
    words = quote.split(" ")
    spans = [(start, start + length) for length in (1, 2) for start in range(1, len(words) - length)]
    return [quote, *(" ".join([*words[:start], "...", *words[end:]]) for start, end in spans)]


@pytest.mark.parametrize("quote", QUOTES)
def test_the_sources_say_it(quote: str) -> None:
    words = re.findall(r"[a-z]+", quote.replace("...", " "))
    assert len(words) >= 2, f"{quote!r} would be found anywhere"
    assert any(_said(reading, text) for reading in _readings(quote) for text in _texts()), quote


def test_what_nobody_says_is_noticed() -> None:
    assert len(QUOTES) >= 50
    for reading in _readings("no model bridge was called ..."):
        assert not any(_said(reading, text) for text in _texts()), reading
