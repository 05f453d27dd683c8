"""Fake distributions: real dist-info folders in a temporary folder on sys.path."""

import base64
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron.bridge.registry import refresh


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder at the head of sys.path; modules imported from it are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    refresh()


@pytest.fixture
def install(site: Path) -> Callable[..., Path]:
    """`install(name, entry_points, version, folder, requires=(...), **{module: source})` -> its dist-info folder.

    A module may be given as a path (`"package/__init__.py"`) or as a plain name.
    """

    def install(
        name: str,
        points: str = "",
        version: str = "1.0",
        folder: Path = site,
        requires: tuple[str, ...] = (),
        **modules: str,
    ) -> Path:
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        needs = "".join(f"Requires-Dist: {each}\n" for each in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}\nName: no\n")
        (info / "entry_points.txt").write_text(points)
        record = []
        for module, source in modules.items():
            file = folder / (module if module.endswith(".py") else f"{module}.py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
            digest = base64.urlsafe_b64encode(hashlib.sha256(source.encode()).digest()).rstrip(b"=").decode()
            record.append(f"{file.relative_to(folder)},sha256={digest},{len(source)}\n")
        (info / "RECORD").write_text("".join(record) + f"{info.name}/RECORD,,\n")
        refresh()
        return info

    return install
