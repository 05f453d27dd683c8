"""Real text that every machine has: the sources of the Python standard library, about 10 MB."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron.bridge.errors import BridgeError

# Tests hold encodings on purpose broken and triple the size; the rest is installed or generated, hence not the same
# on every machine of one Python version.
_LEFT_OUT = frozenset({"__pycache__", "ensurepip", "site-packages", "dist-packages", "test", "tests", "idle_test"})


def python_stdlib_files() -> list[Path]:
    """The `.py` files of the standard library in UTF-8 and not empty, sorted; tests and installed packages left out.

    Raises:
        BridgeError: this Python has its library without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path
        for path in root.rglob("*.py")
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    )
    files = [path for path in files if _is_text(path.read_bytes())]
    if not files:
        raise BridgeError(f"this Python has no library sources in {str(root)!r}; give a text of your own")
    return files


def python_stdlib_texts() -> Iterator[str]:
    """The texts of `python_stdlib_files()`, in that order."""
    for path in python_stdlib_files():
        yield path.read_bytes().decode("utf-8")


def _is_text(content: bytes) -> bool:
    try:
        return bool(content.decode("utf-8").strip())
    except UnicodeDecodeError:
        return False
