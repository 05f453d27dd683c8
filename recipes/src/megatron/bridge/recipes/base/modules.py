"""The names of a family's recipes, made from its table of sizes.

A size `llama32_1b` in `recipes.llama` gives the module `recipes.llama.llama32_1b` with `pretrain_config`,
`finetune_config` and `lora_config`, and the same functions in `recipes.llama` as `llama32_1b_pretrain_config`, ...
"""

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from megatron.bridge.errors import did_you_mean
from megatron.bridge.recipes.base.recipe import Finetune, Pretrain, Recipe
from megatron.bridge.recipes.base.size import Size


def recipes_of_size(name: str, size: Size) -> dict[str, Recipe]:
    """The recipes of one size, by what follows its name."""
    return {
        "pretrain_config": Pretrain(name, "pretrain_config", size),
        "finetune_config": Finetune(name, "finetune_config", size),
        "lora_config": Finetune(name, "lora_config", size, peft="lora"),
    }


def recipes_of(family: str, sizes: Mapping[str, Size]) -> Callable[[str], Any]:
    """A family module's `__getattr__`, which knows the recipes of its sizes.

    Args:
        family: the module's `__name__`; modules of its sizes are registered below it, so that they can be imported.
        sizes: by name.
    """
    known: dict[str, Any] = {"__all__": []}
    for name, size in sizes.items():
        found = recipes_of_size(name, size)
        known[name] = sys.modules[f"{family}.{name}"] = _module(f"{family}.{name}", size, found)
        known |= {f"{name}_{task}": recipe for task, recipe in found.items()}
    known["__all__"] = [name for name in known if name != "__all__"]

    def attribute(name: str) -> Any:
        if name in known:
            return known[name]
        raise AttributeError(f"module {family!r} has no attribute {name!r}{did_you_mean(name, known)}")

    return attribute


def _module(name: str, size: Size, recipes: Mapping[str, Recipe]) -> ModuleType:
    module = ModuleType(name, f"{size.title}, {size.parameters} parameters: https://huggingface.co/{size.home}")
    vars(module).update(recipes, SIZE=size, __all__=list(recipes))
    return module
