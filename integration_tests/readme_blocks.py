"""Reads a README as a list of things to run: files to write, Python, command lines with the output they promise."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"

_BLOCK = re.compile(
    r"(?:^<!-- (?P<note>.*?) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE
)
_FILE = re.compile(r"# ([\w./-]+\.(?:py|toml|yaml|sh))\n")


@dataclass(frozen=True)
class Block:
    """One fenced block. `note` is the HTML comment on the line above it, `line` where its body begins."""

    language: str
    body: str
    note: str
    line: int

    @property
    def name(self) -> str:
        return f"line{self.line}-{self.language or 'plain'}"

    @property
    def file(self) -> str | None:
        """The file that the block's first line names."""
        match = _FILE.match(self.body)
        return match[1] if match else None

    @property
    def ranks(self) -> int:
        match = re.fullmatch(r"ranks: (\d+)", self.note)
        return int(match[1]) if match else 1

    @property
    def commands(self) -> list[tuple[list[str], str]]:
        """(words, the output that is promised) of each command; `sh` blocks promise none."""
        if self.language == "sh":
            return [(shlex.split(line), "") for line in self.body.replace("\\\n", "").splitlines()]
        parts = re.split(r"^\$ (.*)\n", self.body, flags=re.MULTILINE)
        return [(shlex.split(command), output) for command, output in zip(parts[1::2], parts[2::2], strict=True)]


def blocks(text: str) -> list[Block]:
    """Every fenced block, in order."""
    return [
        Block(match["language"], match["body"], match["note"] or "", text.count("\n", 0, match.start("body")) + 1)
        for match in _BLOCK.finditer(text)
    ]


def promises(expected: str, actual: str) -> bool:
    """Whether `actual` is `expected`, where `...` stands for anything: lines when alone on one, else part of a line."""
    pattern = ""
    for line in expected.splitlines():
        if line.strip() == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*".join(map(re.escape, line.rstrip().split("..."))) + r"[ ]*\n"
    return re.fullmatch(pattern, actual) is not None
