"""What a run was made of: versions of everything installed, and the commit of the code around it. Torch-free."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

_SECONDS = 10  # for git, on a slow file system


def versions() -> dict[str, str]:
    """Distribution -> version of every one that is installed, and of Python itself."""
    found = {each.name: each.version for each in importlib.metadata.distributions() if each.name}
    return {"python": platform.python_version(), **dict(sorted(found.items(), key=lambda item: item[0].lower()))}


def git_commit(folder: Path) -> dict[str, str | bool] | None:
    """The commit that `folder` is at and whether files differ from it; None outside a repository or without git."""
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit, "changed": bool(changes)}


def _git(folder: Path, *words: str) -> str | None:
    try:
        ended = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.strip()
