"""Adapters on a layer in place: the layer stays the module it was, with its keys, and gains adapters by name.

As `torch.nn.utils.parametrize` does, the object is given a subclass of its own class, so that everything that looks for
a layer, its weight or its type still finds it.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron.bridge.conversion.adapters import refuse_tied
from megatron.bridge.conversion.live_weights import ADAPTERS, as_chunks
from megatron.bridge.conversion.shards import Blocks
from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.peft.adapter import Adapter


class AdaptedLayer:
    """What a layer with adapters has besides.

    Attributes:
        adapters: by name.
        active: the name of the one that takes part; None for the layer alone.
        merged_adapter: the name of the one that is in the weight.
    """

    # A class without room of its own, so that an object can be given it.
    __slots__ = ()

    adapters: torch.nn.ModuleDict
    active: str | None
    merged_adapter: str | None

    def _with_adapter(self, forward: Any, values: Tensor) -> Any:
        if self.active is None or self.merged_adapter is not None:
            return forward(values)
        adapter: Any = self.adapters[self.active]
        return adapter(self, forward, values)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """This rank's part of the weight with the active adapter in it. Collective over the ranks of the layer."""
        return self._merged("merged", weight)

    def merged_bias(self, bias: Tensor) -> Tensor:
        """The same of the bias."""
        return self._merged("merged_bias", bias)

    def _merged(self, how: str, values: Tensor) -> Tensor:
        if self.active is None or self.merged_adapter is not None:
            return values
        with torch.no_grad():
            merged: Tensor = getattr(self.adapters[self.active], how)(values.detach())
        return merged

    def _sharded(
        self, own: Callable[..., dict[str, Any]], prefix: str, offsets: Any, metadata: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The layer's own sharded state dict, as it would be without adapters, and theirs."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = own(self, prefix, offsets, metadata)
        state = {key: value for key, value in state.items() if not key.startswith(f"{prefix}{ADAPTERS}.")}
        for name, adapter in self.adapters.items():
            state |= _sharded(adapter, f"{prefix}{ADAPTERS}.{name}.", offsets, metadata)
        return state


@cache
def _adapted_class(base: Any) -> type:
    """The subclass of a layer's class. Its own class comes first among the bases: only then has it the same room."""

    def forward(self: Any, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._with_adapter(lambda given: base.forward(self, given, *args, **kwargs), values)

    def gating(self: Any, values: Tensor) -> Any:
        return self._with_adapter(lambda given: base.gating(self, given), values)

    def sharded_state_dict(self: Any, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        return self._sharded(base.sharded_state_dict, prefix, sharded_offsets, metadata)

    product = {"gating": gating} if issubclass(base, Router) else {"forward": forward}
    members = {**product, "__module__": base.__module__}
    if hasattr(base, "sharded_state_dict"):  # layers of torch have none, and are saved by what they are in
        members["sharded_state_dict"] = sharded_state_dict
    return type(f"Adapted{base.__name__}", (base, AdaptedLayer), members)


def attach(layer: Any, name: str, adapter: Adapter) -> torch.nn.Module:
    """Put `adapter` on `layer` under `name` and let it take part; returns the layer.

    Raises:
        BridgeError: the layer has an adapter of this name already.
    """
    if not isinstance(layer, AdaptedLayer):
        layer.__class__ = _adapted_class(type(layer))  # type: ignore[arg-type]  # classes are hashable
        setattr(layer, ADAPTERS, torch.nn.ModuleDict())
        layer.merged_adapter = None
    if name in layer.adapters:
        raise BridgeError(
            f"{adapter.place.name} has an adapter named {name!r} already; give this one another adapter_name"
        )
    layer.adapters[name] = adapter
    layer.active = name
    attached: torch.nn.Module = layer
    return attached


def adapted_layers(model: Any) -> Iterator[Any]:
    """The layers of a model, or of its chunks, that have adapters."""
    for chunk in model if isinstance(model, list | tuple) else [model]:
        yield from (module for module in chunk.modules() if isinstance(module, AdaptedLayer))


def use_adapter(model: Any, name: str | None) -> None:
    """Let the adapter `name`, and no other, take part and train; None leaves the model alone.

    Raises:
        BridgeError: no layer here has an adapter of that name, or one is merged.
    """
    layers = list(adapted_layers(model))
    known = sorted({each for layer in layers for each in layer.adapters})
    if name is not None and layers and name not in known:
        raise BridgeError(f"no adapter is called {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
    merged = [layer.merged_adapter for layer in layers if layer.merged_adapter is not None]
    if merged:
        raise BridgeError(f"the adapter {merged[0]!r} is merged into the weights; call unmerge_adapter(model) first")
    for layer in layers:
        layer.active = name if name in layer.adapters else None
        for own, adapter in layer.adapters.items():
            adapter.requires_grad_(own == name)


@contextlib.contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Within the block the model is the one beneath its adapters: a reference policy, for instance."""
    before = [(layer, layer.active) for layer in adapted_layers(model)]
    for layer, _ in before:
        layer.active = None
    try:
        yield
    finally:
        for layer, active in before:
            layer.active = active


def merge_adapter(model: Any) -> None:
    """Put the active adapter into the weights, for inference at the model's own speed.

    Raises:
        BridgeError: a weight is used by another layer too (tied embeddings), or there is no active adapter.
    """
    layers = [layer for layer in adapted_layers(model) if layer.active is not None]
    if not layers:
        raise BridgeError("no adapter takes part in this model, so there is none to merge")
    refuse_tied(as_chunks(model))
    for layer in layers:
        if layer.merged_adapter is None:
            merged = {"weight": layer.merged_weight(layer.weight)}
            if getattr(layer, "bias", None) is not None:
                merged["bias"] = layer.merged_bias(layer.bias)
            # What was there is kept: the difference of two large numbers is not what was added.
            layer.kept_values = {name: getattr(layer, name).detach().clone() for name in merged}
            for name, values in merged.items():
                getattr(layer, name).data.copy_(values)
            layer.merged_adapter = layer.active


def unmerge_adapter(model: Any) -> None:
    """Take the merged adapter out of the weights again, bit for bit."""
    for layer in adapted_layers(model):
        if layer.merged_adapter is not None:
            for name, values in layer.kept_values.items():
                getattr(layer, name).data.copy_(values)
            layer.merged_adapter = layer.kept_values = None


def _sharded(adapter: Any, prefix: str, offsets: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """One adapter's parameters; layers have keys of their own, for some layers may have no adapter, or another rank."""
    if adapter.borrows:
        return {}
    division, shards = adapter.division, adapter.shards()
    offsets = tuple(offsets)
    experts = offsets[-1:] if division.expert else ()
    layer = f"{offsets[0][1]}." if len(offsets) > len(experts) else ""
    shared = adapter.place.shared
    inner = () if shared else tuple((0, *offset[1:]) for offset in experts)
    group = division.group if division.group is not None else _tensor_group()
    state = make_sharded_tensors_for_checkpoint(
        adapter.state_dict(keep_vars=True),
        prefix,
        {name: shard.axis for name, shard in shards.items() if isinstance(shard, Blocks)},
        inner,
        tp_group=group,
        dp_cp_group=metadata["dp_cp_group"],
    )
    for name, shard in shards.items():
        key = prefix + name
        if isinstance(shard, Blocks) and shard.parts == 2 and key in state:
            state[key] = apply_swiglu_sharded_factory(
                state[key], inner, False, tp_group=group, dp_group=metadata["dp_cp_group"]
            )
    for value in state.values():
        value.key = value.key.replace(f"{ADAPTERS}.", f"{ADAPTERS}.{layer}", 1)
        if shared:
            # Written by the rank that has the first expert, and read by all.
            value.replica_id = (offsets[-1][1], *value.replica_id[1:])
    return state


def _tensor_group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()
