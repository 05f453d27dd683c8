"""A recipe written out as a Python file that runs."""

import pprint
from collections.abc import Iterator
from pathlib import Path

from megatron.bridge.errors import BridgeError
from megatron.bridge.recipes.base.description import Description

_HEAD = '''\
"""{name}, as `megatron-bridge recipes cp` wrote it out. Change what you like, then:

    uv run {file} train.train_iters=10
"""

from megatron.bridge.recipes.base.description import Description
from megatron.bridge.recipes.base.script import main
from megatron.bridge.recipes.base.stated import Stated

RECIPE = Description(
    task="{task}",
    # https://huggingface.co/{home}
    home="{home}",
    hf_config={{'''
_TAIL = """\
    },
)

if __name__ == "__main__":
    main(RECIPE)"""


def write(file: Path, name: str, description: Description) -> None:
    """Write the file, whole or not at all.

    Raises:
        BridgeError: it exists, or cannot be written.
    """
    if file.exists():
        raise BridgeError(f"{file} exists; give another name, or remove it")
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_text("\n".join(_lines(file, name, description)) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise BridgeError(f"{file} cannot be written: {error}") from error


def _lines(file: Path, name: str, description: Description) -> Iterator[str]:
    yield _HEAD.format(name=name, file=file, task=description.task, home=description.home)
    for key, value in description.hf_config.items():
        yield f'        "{key}": {_literal(value)},'
    yield "    },"
    yield "    settings={"
    for key, each in description.settings.items():
        yield f'        "{key}": Stated({_literal(each.value)}, {each.source!r}),'
    yield _TAIL


def _literal(value: object) -> str:
    """A value as Python writes it, over several lines where it is long."""
    return pprint.pformat(value, indent=4, width=100, compact=True, sort_dicts=False).replace("\n", "\n        ")
