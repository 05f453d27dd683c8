"""What conversion knows of adapters: whose layers they are on, and the weight table that joins them to peft's files.

Methods live elsewhere. What they owe conversion is in `HoldsAdapters` and `IsAdapter`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megatron.bridge.conversion.entries import base_name
from megatron.bridge.conversion.live_weights import ADAPTERS, CanonicalNames, Layout
from megatron.bridge.conversion.names import NamePattern
from megatron.bridge.conversion.peft_names import PeftNames
from megatron.bridge.conversion.rank_agreement import gather_within
from megatron.bridge.conversion.shards import Blocks, Expert, Replicated
from megatron.bridge.conversion.table import Tied, WeightRule, WeightTable
from megatron.bridge.conversion.transforms import Identity, Repeated, Transform
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import torch

_WEIGHT, _BIAS = ".weight", ".bias"
_OUTPUT = "output_layer"


@dataclass(frozen=True)
class AdapterWeight:
    """One weight of an adapter as peft holds it.

    Args:
        own: its name in the adapter.
        hf: peft's names; several that hold the same where there is no transform.
        transform: between both sides; None for the same.
    """

    own: str
    hf: tuple[str, ...]
    transform: Transform | None = None


class IsAdapter(Protocol):
    """An adapter on one layer."""

    method: Any

    def shards(self) -> Mapping[str, Blocks | Replicated]: ...
    def exported(self) -> "Mapping[str, torch.Tensor]": ...
    def hf_weights(self, modules: tuple[str, ...], rows: Transform) -> Iterator[AdapterWeight]: ...
    def hf_targets(self, targets: tuple[str, ...]) -> tuple[str, ...]: ...
    def hf_settings(self, target: str) -> dict[str, Any]: ...


class HoldsAdapters(Protocol):
    """A layer with adapters, which are its sub-module `adapters`."""

    active: str | None

    @property
    def adapters(self) -> Mapping[str, IsAdapter]: ...

    def merged_weight(self, weight: "torch.Tensor") -> "torch.Tensor": ...
    def merged_bias(self, bias: "torch.Tensor") -> "torch.Tensor": ...


class ModuleTable:
    """A weight table read by modules: which Hugging Face modules a Megatron layer holds, by transformers' own names.

    Args:
        table: of the family.
        peft: how peft names the modules of this model.
    """

    def __init__(self, table: WeightTable, peft: PeftNames) -> None:
        self._table, self._peft = table, peft

    def modules(self, megatron: str) -> tuple[str, ...]:
        """The Hugging Face modules of a weight by its canonical Megatron name; empty where no rule is for it."""
        met = self._table.resolve(megatron)
        if met is not None:
            rule, indices = met
            return tuple(_module(base_name(name)) for name in self._inside(rule).hf_for(indices))
        return tuple(_module(tie.name) for tie in self._ties(megatron))

    def _ties(self, megatron: str) -> Sequence[Tied]:
        return self._table.tied if megatron.endswith(f"{_OUTPUT}{_WEIGHT}") else ()

    def rule(self, megatron: str) -> WeightRule | None:
        """The rule of a layer's weight; a tied output layer goes by the one of the embedding."""
        met = self._table.resolve(megatron)
        if met is not None:
            return self._inside(met[0])
        for tie in self._ties(megatron):
            for rule in self._table.rules:
                if rule.hf_names == (tie.to,):
                    return WeightRule(megatron, tie.name, rule.transform, rule.shard)
        return None

    def _inside(self, rule: WeightRule) -> WeightRule:
        return self._peft.inside(rule, self._table.spellings) if self._table.spellings else rule


def _module(name: str) -> str:
    return name.removesuffix(_WEIGHT)


def table_of(chunk: Any) -> ModuleTable | None:
    """The modules' table of a chunk that was built by a provider of an `AutoBridge`, else None."""
    bridge = getattr(chunk, "bridge", None)
    return None if bridge is None else ModuleTable(bridge.weight_table(), PeftNames(bridge.hf_config))


@dataclass(frozen=True)
class Adapted:
    """A layer with adapters: its canonical name, and itself."""

    name: str
    layer: HoldsAdapters


def adapted(chunks: "Sequence[torch.nn.Module]", layout: Layout | None = None) -> list[Adapted]:
    """The layers of these chunks that have adapters."""
    found = []
    for chunk in chunks:
        held = [(name, module) for name, module in chunk.named_modules() if ADAPTERS in module._modules]
        if held:
            names = CanonicalNames(chunk, layout)
            found += [Adapted(names.canonical(name), module) for name, module in held]
    return found


class MergedWeights(Mapping[str, "torch.Tensor"]):
    """Weights and biases by canonical name, those of layers with an active adapter with it merged, when asked for.

    Nothing is kept, so at most one merged weight exists at a time.
    """

    def __init__(self, chunks: "Sequence[torch.nn.Module]", weights: "Mapping[str, torch.Tensor]") -> None:
        refuse_tied(chunks)
        self._weights = weights
        layers = adapted(chunks)
        self._merged: dict[str, Callable[[torch.Tensor], torch.Tensor]]
        self._merged = {f"{each.name}{_WEIGHT}": each.layer.merged_weight for each in layers}
        self._merged |= {f"{each.name}{_BIAS}": each.layer.merged_bias for each in layers}

    def __getitem__(self, name: str) -> "torch.Tensor":
        weight = self._weights[name]
        return self._merged[name](weight) if name in self._merged else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def refuse_tied(chunks: "Sequence[Any]") -> None:
    """Refuse to merge what is on an embedding or an output layer that share one weight.

    Raises:
        BridgeError: names the layer.
    """
    for chunk in chunks:
        if not getattr(chunk, "share_embeddings_and_output_weights", False):
            continue
        for each in adapted([chunk]):
            if each.layer.active is not None and each.name.endswith(("word_embeddings", _OUTPUT)):
                raise BridgeError(
                    f"the adapter on {each.name!r} cannot be merged: the embedding and the output layer share one "
                    "weight here, and the other one would change too; export the adapter by itself (save_hf_adapter)"
                )


class AdapterTable:
    """The weight table of one adapter of a model. Made collectively.

    Args:
        chunks: of this rank, unwrapped.
        table: of the family.
        name: of the adapter.
        peft: how peft names the modules of this model.
        layout: of the model.
    """

    def __init__(
        self,
        chunks: "Sequence[torch.nn.Module]",
        table: WeightTable,
        name: str,
        peft: "PeftNames",
        layout: Layout,
    ) -> None:
        self._modules, self._name, self._peft = ModuleTable(table, peft), name, peft
        self.layers = [each for each in adapted(chunks, layout) if name in each.layer.adapters]
        # Experts whose two layers both have adapters are named in another way than those of which one has.
        bases = {rule.megatron: rule for rule in map(self._rule, self.layers)}
        bases = _united(gather_within(layout.groups, bases))
        here = {rule.megatron: rule for each in self.layers for rule in self._rules(each, bases.values())}
        self.table = WeightTable(tuple(_united(gather_within(layout.groups, here)).values()))
        self.settings = _united(gather_within(layout.groups, self._settings()))
        configs = gather_within(layout.groups, self._config())
        self.config: dict[str, Any] = next((config for config in configs.values() if config), {})

    @property
    def weights(self) -> "dict[str, torch.Tensor]":
        """This rank's parts of what peft holds, by canonical name."""
        return {
            f"{each.name}.{ADAPTERS}.{self._name}.{own}": tensor
            for each in self.layers
            for own, tensor in each.layer.adapters[self._name].exported().items()
        }

    def _config(self) -> dict[str, Any]:
        """peft's configuration, on a rank that has a layer."""
        if not self.layers:
            return {}
        method = self.layers[0].layer.adapters[self._name].method
        config: dict[str, Any] = {"peft_type": method.hf_name, **method.hf_config(self.settings)}
        return config

    def _settings(self) -> dict[str, dict[str, Any]]:
        """peft's name of a target -> what is particular to the adapter on it."""
        found: dict[str, dict[str, Any]] = {}
        for each in self.layers:
            rule, adapter = self._rule(each), each.layer.adapters[self._name]
            indices = rule.pattern.match(f"{each.name}{_WEIGHT}") or {}
            for target in adapter.hf_targets(self._peft.targets(rule)):
                found[NamePattern(target).format(indices)] = adapter.hf_settings(target)
        return found

    def _rule(self, each: Adapted) -> WeightRule:
        rule = self._modules.rule(f"{each.name}{_WEIGHT}")
        if rule is None:
            raise BridgeError(
                f"the adapter on {each.name} cannot be named for Hugging Face: the weight table has no rule for it"
            )
        return rule

    def _rules(self, each: Adapted, bases: Iterable[WeightRule]) -> Iterator[WeightRule]:
        base, adapter = self._rule(each), each.layer.adapters[self._name]
        place, shards = base.megatron.removesuffix(_WEIGHT), adapter.shards()
        modules, rows, entry = self._peft.place(base, bases)
        for weight in adapter.hf_weights(modules, rows):
            transform = weight.transform
            if transform is None:
                transform = Repeated(len(weight.hf)) if len(weight.hf) > 1 else Identity()
            shard = shards[weight.own]
            yield WeightRule(
                f"{place}.{ADAPTERS}.{self._name}.{weight.own}",
                tuple(name + entry for name in weight.hf),
                transform,
                Expert(shard) if isinstance(base.shard, Expert) else shard,
                optional=True,
            )


def _united[V](by_rank: Mapping[int, Mapping[str, V]]) -> dict[str, V]:
    return {name: value for held in by_rank.values() for name, value in held.items()}
