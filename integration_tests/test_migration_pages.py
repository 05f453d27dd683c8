"""The pages for those who come from other libraries name things of ours that exist."""

import dataclasses
import importlib
import re
import typing
from typing import Any

import pytest
from small_models import REPOSITORY

from megatron.bridge.registry import GROUPS
from megatron.bridge.training.config import ConfigContainer

PAGES = sorted((REPOSITORY / "docs/migration").glob("*.md"))


def ours(page: str) -> list[str]:
    """What stands in backticks in the last column of the tables."""
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return re.findall(r"`(megatron\.bridge[\w.]*|cfg\.\w+\.?\w*)`", "\n".join(row[-1] for row in rows))


NAMES = sorted({name for page in PAGES for name in ours(page.read_text("utf-8"))})


def found(name: str) -> Any:
    """The module or attribute at a dotted name."""
    parts = name.split(".")
    for count in range(len(parts), 1, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            value = getattr(value, attribute)
        return value
    raise AssertionError(name)


@pytest.mark.parametrize("name", NAMES)
def test_it_exists(name: str) -> None:
    if name.startswith("cfg."):
        section, *field = name.removeprefix("cfg.").split(".")
        kind = typing.get_type_hints(ConfigContainer, localns=_later())[section]
        assert not field or field[0] in {each.name for each in dataclasses.fields(kind)}
    else:
        assert name in GROUPS or found(name) is not None


def _later() -> dict[str, Any]:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    return {"OptimizerConfig": OptimizerConfig, "DistributedDataParallelConfig": DistributedDataParallelConfig}


def test_enough_is_looked_up() -> None:
    assert len(NAMES) >= 40
    assert len(PAGES) >= 2
