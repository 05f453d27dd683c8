"""Writing a plugin from its template: in a folder beside the target, which appears whole or not at all."""

import importlib.resources
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from megatron.bridge.cli.new.kinds import PluginTemplate
from megatron.bridge.cli.new.naming import Names
from megatron.bridge.errors import BridgeError

_COMMON = "megatron.bridge.cli.new.common"
_SUFFIX = ".tmpl"
_MODULE = "MODULE"


def write_plugin(template: PluginTemplate, names: Names, into: Path) -> Path:
    """Write the package `names.name` into a new folder of `into`, and return that.

    Raises:
        BridgeError: the folder is there already, or cannot be written.
    """
    target = into / names.name
    if target.exists():
        raise BridgeError(f"{target} exists; choose another name, or another folder with --into")
    try:
        into.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{names.name}.", dir=into))
        try:
            _fill(staged, template, names)
            staged.chmod(0o755)  # temporary folders are for their owner's eyes only
            staged.rename(target)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
    except OSError as error:
        raise BridgeError(f"{target} cannot be written: {error.strerror}; choose another folder with --into") from error
    return target


def _fill(folder: Path, template: PluginTemplate, names: Names) -> None:
    fields = {**names.fields, **_project_fields(template, names)}
    for package in (_COMMON, template.files):
        for path, text in _files(importlib.resources.files(package)):
            file = folder / path.replace(_MODULE, names.module)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(Template(text).substitute(fields), "utf-8")


def _files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(path without its suffix, text) of each file of a template."""
    for each in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if each.is_dir():
            yield from _files(each, f"{prefix}{each.name}/")
        elif each.name.endswith(_SUFFIX):
            yield prefix + each.name.removesuffix(_SUFFIX), each.read_text("utf-8")


def _project_fields(template: PluginTemplate, names: Names) -> dict[str, str]:
    """What `pyproject.toml` asks for besides names."""
    return {
        "summary": template.summary,
        "dependencies": json.dumps(list(template.dependencies)),
        "tested_with": json.dumps(["pytest>=9", *template.tested_with]),
        "entry_points": "\n\n".join(_tables(template.entry_points, names)),
    }


def _tables(groups: Mapping[str, Mapping[str, str]], names: Names) -> Iterator[str]:
    for group, points in groups.items():
        lines = [f"{name} = {json.dumps(target)}" for name, target in points.items()]
        yield Template("\n".join([f'[project.entry-points."{group}"]', *lines])).substitute(names.fields)
