"""How Hugging Face peft names what an adapter is on, which follows transformers' modules rather than the files' names.

A linear layer or an embedding is a target module. What is a bare parameter in transformers (stacked experts, routers)
is a target parameter; peft wraps a module once for each of its target parameters, one wrapper around the other.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.entries import base_name
from megatron.bridge.conversion.names import NamePattern
from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.conversion.transforms import Identity, Transform
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WEIGHT, _EXPERT = ".weight", ".{e}."
# transformers' names of the two parameters that stack the experts of a layer.
_STACKED = {"linear_fc1": "gate_up_proj", "linear_fc2": "down_proj"}


class PeftNames:
    """peft's names of the modules of one model.

    Args:
        hf_config: of the model, whose class is built without memory to look at its modules.
    """

    def __init__(self, hf_config: "PretrainedConfig") -> None:
        self._config = hf_config

    @cached_property
    def _model(self) -> Any:
        """transformers' model on the meta device; None where transformers has no class for it."""
        import torch

        from megatron.bridge.conversion.reference import model_class

        try:
            build = model_class(self._config)
            with torch.device("meta"):
                return (
                    build._from_config(self._config)
                    if hasattr(build, "_from_config")
                    else build.from_config(self._config)
                )
        except (ValueError, KeyError, ImportError):
            return None

    @cached_property
    def modules(self) -> frozenset[str]:
        """The modules that may be targets."""
        if self._model is None:
            return frozenset()
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        kinds = (nn.Linear, nn.Embedding, Conv1D)
        return frozenset(name for name, module in self._model.named_modules() if isinstance(module, kinds))

    @cached_property
    def parameters(self) -> frozenset[str]:
        """The parameters that may be targets: those of other modules."""
        if self._model is None:
            return frozenset()
        names = (name for name, _ in self._model.named_parameters())
        return frozenset(name for name in names if name.rpartition(".")[0] not in self.modules)

    def inside(self, rule: WeightRule, spellings: Iterable[tuple[str, str]]) -> WeightRule:
        """The rule by the names inside transformers' model, which files may spell in another way.

        Args:
            rule: by the names in files.
            spellings: of the table: (beginning, other beginning).
        """
        beginnings = [("", ""), *spellings]
        return replace(rule, hf=tuple(self._inside(name, beginnings) for name in rule.hf_names))

    def _inside(self, weight: str, beginnings: Iterable[tuple[str, str]]) -> str:
        spelled = (other + weight.removeprefix(own) for own, other in beginnings if weight.startswith(own))
        heads = ((name, name.removesuffix(_WEIGHT).partition("{")[0].removesuffix(".")) for name in spelled)
        return next((name for name, head in heads if head in self._places), weight)

    @cached_property
    def _places(self) -> frozenset[str]:
        """Every module and parameter, and all that they are inside of."""
        parts = (name.split(".") for name in self.modules | self.parameters)
        return frozenset(".".join(each[: count + 1]) for each in parts for count in range(len(each)))

    def stacked(self, rule: WeightRule) -> str | None:
        """The pattern of the parameter that holds the experts of this rule's weight, None where none does."""
        first = rule.hf_names[0]
        if base_name(first) != first:
            return base_name(first)
        if _EXPERT not in first:
            return None
        parent = first.partition(_EXPERT)[0]
        leaf = _STACKED.get(rule.megatron.removesuffix(_WEIGHT).rpartition(".")[2])
        pattern = f"{parent}.{leaf}"
        return pattern if _spelled(pattern, self.parameters) else None

    def targets(self, rule: WeightRule) -> tuple[str, ...]:
        """The patterns of the modules or parameters that this rule's weight is on the Hugging Face side."""
        stacked = self.stacked(rule)
        if stacked is not None:
            return (stacked,)
        return tuple(map(self._target, rule.hf_names))

    def _target(self, weight: str) -> str:
        module = weight.removesuffix(_WEIGHT)
        if self._model is None or _spelled(module, self.modules):
            return module
        if _spelled(weight, self.parameters):
            return weight
        raise BridgeError(
            f"the adapter on {module} cannot be given to peft: transformers' {type(self._model).__name__} has neither "
            "a linear layer nor a parameter of that name; leave it out (exclude_modules), or merge the adapter"
        )

    def place(self, rule: WeightRule, adapted: Iterable[WeightRule]) -> tuple[tuple[str, ...], Transform, str]:
        """Where peft keeps the adapter of this rule's weight.

        Args:
            rule: of the weight.
            adapted: the rules of all weights that have adapters.

        Returns:
            The patterns that the names begin with, the transform between their outputs and the layer's, and what the
            names of stacked weights end in.
        """
        stacked = self.stacked(rule)
        if stacked is None:
            return tuple(name.removesuffix(_WEIGHT) for name in rule.hf_names), rule.transform.on_rows, ""
        parent = stacked.rpartition(".")[0]
        beside = [self.stacked(other) for other in adapted if other.megatron != rule.megatron]
        inner = rule.megatron.endswith(f"linear_fc1{_WEIGHT}") and any(
            other is not None and other.rpartition(".")[0] == parent for other in beside
        )
        # Of experts that the files hold one by one, gate and up are in transformers what they are here.
        rows = Identity() if _EXPERT in rule.hf_names[0] else rule.transform.on_rows
        return (f"{parent}.base_layer" if inner else parent,), rows, "[{e}]"

    def shortened(self, targets: Iterable[str]) -> tuple[list[str], list[str]]:
        """Target modules and parameters: by the end of their names, where every one with that end is among them."""
        wanted = set(targets)
        parameters = wanted & self.parameters
        # peft adapts whatever has such an end, convolutions too, and refuses what it has no adapter for.
        modules = frozenset() if self._model is None else frozenset(name for name, _ in self._model.named_modules())
        return _endings(wanted - parameters, modules), _endings(parameters, self.parameters, shortest=2)


def _spelled(pattern: str, names: Iterable[str]) -> bool:
    return any(NamePattern(pattern).match(name) is not None for name in names)


def _endings(wanted: set[str], known: frozenset[str], shortest: int = 1) -> list[str]:
    found: set[str] = set()
    for name in wanted:
        parts = name.split(".")
        ends = (".".join(parts[-count:]) for count in range(min(shortest, len(parts)), len(parts)))
        whole = (end for end in ends if known and {each for each in known if f".{each}".endswith(f".{end}")} <= wanted)
        found.add(next(whole, name))
    return sorted(found)
