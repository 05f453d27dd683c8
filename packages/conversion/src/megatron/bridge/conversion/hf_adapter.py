"""Adapters in Hugging Face peft's format: a folder with `adapter_config.json` and `adapter_model.safetensors`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.adapters import AdapterTable, adapted
from megatron.bridge.conversion.entries import base_name
from megatron.bridge.conversion.hf.staging import StagedFolder
from megatron.bridge.conversion.live import Model, load_weights
from megatron.bridge.conversion.live_export import Exporter
from megatron.bridge.conversion.live_weights import Layout, as_chunks
from megatron.bridge.conversion.names import NamePattern
from megatron.bridge.conversion.peft_names import PeftNames
from megatron.bridge.conversion.rank_agreement import on_every_rank, on_rank_zero
from megatron.bridge.conversion.transforms import Region, Shape
from megatron.bridge.errors import BridgeError
from megatron.bridge.registry import Registry

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.auto_bridge import AutoBridge

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Models of which peft refuses LoRA on these layers: transformers' kernels read their weights past any adapter.
_STATE_SPACE = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
_PAST_ADAPTERS = frozenset({"out_proj", "conv1d"})
# What peft puts before the names of the model's own modules.
_PREFIX = "base_model.model."


# peft_type -> a function (configuration, weights by name, adapter's name) that gives the method whose adapters the
# weights fill, and refuses features that Megatron models cannot have, each by name. Weights that belong to no layer it
# proves itself, and takes them out of what it is given: whatever is left must have a place in the model.
HF_ADAPTERS: Registry[Any] = Registry("megatron.bridge.hf_adapters", object, "kind of peft adapter")


def adapter_of(model: Model, name: str | None) -> str:
    """The name of the adapter that is meant: `name`, else the one that takes part.

    Raises:
        BridgeError: the model has none.
    """
    chunks = as_chunks(model)
    layout = Layout.of(chunks)
    from megatron.bridge.conversion.rank_agreement import gather_within

    here = {each.layer.active for each in adapted(chunks, layout) if each.layer.active is not None}
    known = {own for each in adapted(chunks, layout) for own in each.layer.adapters}
    active = set().union(*gather_within(layout.groups, here).values())
    known = set().union(*gather_within(layout.groups, known).values())
    if not known:
        raise BridgeError("the model has no adapters; apply a PEFT method to it, or load an adapter, first")
    if name is None and len(active) != 1:
        raise BridgeError(f"no adapter takes part, name one of {', '.join(sorted(known))}")
    if name is not None and name not in known:
        raise BridgeError(f"the model has no adapter {name!r}; there are {', '.join(sorted(known))}")
    return name or next(iter(active))


class AdapterExport:
    """One adapter of a spread model, on its way to peft's format. Made collectively.

    Args:
        bridge: of the model.
        model: chunks of this rank.
        name: of the adapter; None for the one that takes part.
        dtype: of the weights; None keeps the model's.
    """

    def __init__(self, bridge: "AutoBridge", model: Model, name: str | None, dtype: Any = None) -> None:
        chunks = as_chunks(model)
        self._peft = PeftNames(bridge.hf_config)
        self._is_state_space = bridge.hf_config.model_type in _STATE_SPACE
        self.name = adapter_of(model, name)
        self._table = AdapterTable(chunks, bridge.weight_table(), self.name, self._peft, Layout.of(chunks))
        self._exporter = Exporter(
            model,
            self._table.table,
            f"export of adapter {self.name!r}",
            dtype=dtype,
            weights=lambda: self._table.weights,
        )

    def weights(self, *, cpu: bool = False) -> "Iterator[tuple[str, torch.Tensor]]":
        """peft's weights by peft's names, whole, in the same order on every rank. Collective."""
        for name, tensor in self._exporter.weights(cpu=cpu):
            yield _PREFIX + name, packed(name, tensor)

    @property
    def targets(self) -> tuple[str, ...]:
        """peft's names of what the adapter is on, in full."""
        return tuple(self._table.settings)

    def config(self, base: str | None) -> dict[str, Any]:
        """`adapter_config.json`."""
        modules, parameters = self._peft.shortened(self._table.settings)
        config = dict(self._table.config)
        if inputs := config.get("feedforward_modules"):
            # peft wants each of them word by word among the targets.
            config["feedforward_modules"], _ = self._peft.shortened(inputs)
            modules = sorted({*modules, *config["feedforward_modules"]})
        past = sorted(each for each in modules if each.rpartition(".")[2] in _PAST_ADAPTERS)
        if past and self._is_state_space and config["peft_type"] == "LORA":
            raise BridgeError(
                f"peft refuses LoRA on {', '.join(past)} of state-space models, whose kernels read the weight past any "
                "adapter; leave it out (exclude_modules), or export the merged model"
            )
        if parameters and (config["peft_type"] != "LORA" or config["use_dora"]):
            raise BridgeError(
                f"peft has plain LoRA alone for parameters that are no layers: {', '.join(parameters)}; leave them out"
            )
        if parameters:
            # peft refuses dropout here, which plays no part but in training.
            config |= {"target_parameters": parameters} | {key: 0.0 for key in config if key.endswith("_dropout")}
        return {
            "base_model_name_or_path": base,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "target_modules": modules,
            **config,
        }


def packed(name: str, tensor: "torch.Tensor") -> "torch.Tensor":
    """A weight of stacked experts as peft lays it out; any other as it is.

    A: [experts, rank, inputs] -> [experts x rank, inputs]; B: [experts, outputs, rank] -> [outputs, rank x experts].
    """
    if tensor.ndim != 3:
        return tensor
    if _is_expanding(name):
        return tensor.permute(1, 2, 0).flatten(1).contiguous()
    return tensor.flatten(0, 1)


def unpacked(name: str, tensor: "torch.Tensor", experts: int) -> "torch.Tensor":
    """The other way."""
    if _is_expanding(name):
        return tensor.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return tensor.unflatten(0, (experts, -1))


def _is_expanding(name: str) -> bool:
    return name.endswith("lora_B.weight")


def save_hf_adapter(
    bridge: "AutoBridge", model: Model, path: Path, name: str | None, *, overwrite: bool, dtype: Any
) -> Path:
    """See `AutoBridge.save_hf_adapter`. Collective."""
    from megatron.bridge import platform

    files = gathered_adapter(bridge, model, name, dtype, keeps=platform.rank() == 0)
    on_rank_zero(lambda: files.write(path, overwrite=overwrite), f"export of adapter {files.name!r} to {path} failed")
    return path


@dataclass(frozen=True)
class AdapterFiles:
    """What peft's folder holds.

    Args:
        name: of the adapter.
        weights: by peft's names; none on a rank that keeps none.
        config: `adapter_config.json`.
        targets: peft's names of all modules and parameters that it is on, in full.
    """

    name: str
    weights: "Mapping[str, torch.Tensor]"
    config: Mapping[str, Any]
    targets: tuple[str, ...]

    def write(self, path: Path, *, overwrite: bool) -> None:
        """Write the folder, whole or not at all."""
        from safetensors.torch import save_file

        needed = sum(each.nbytes for each in self.weights.values())
        staged = StagedFolder(path, overwrite=overwrite, needed_bytes=needed)
        config = json.dumps(self.config, indent=2, sort_keys=True)
        try:
            save_file(dict(self.weights), staged.path / WEIGHTS, metadata={"format": "pt"})
            (staged.path / CONFIG).write_text(config + "\n", encoding="utf-8")
            staged.publish()
        except BaseException:
            staged.remove()
            raise


def gathered_adapter(bridge: "AutoBridge", model: Model, name: str | None, dtype: Any, *, keeps: bool) -> AdapterFiles:
    """One adapter of a spread model. Collective over the ranks that share it; an adapter is a small part of its model.

    Args:
        bridge: of the model.
        model: chunks of this rank.
        name: of the adapter; None for the one that takes part.
        dtype: of the weights; None keeps the model's.
        keeps: whether this rank is given the weights.
    """
    import torch

    export = AdapterExport(bridge, model, name, dtype)
    kept = {
        own: tensor.clone(memory_format=torch.contiguous_format) for own, tensor in export.weights(cpu=True) if keeps
    }
    source = bridge.source
    config = export.config(None if source is None else str(source.path_or_id))
    return AdapterFiles(export.name, kept, config, export.targets)


@dataclass(frozen=True)
class AdapterFolder:
    """A folder that peft wrote.

    Args:
        path: the folder.
    """

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """`adapter_config.json`.

        Raises:
            BridgeError: it is not there, or is no configuration.
        """
        file = self.path / CONFIG
        try:
            config = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise BridgeError(
                f"{file} cannot be read ({error}); give a folder that peft's save_pretrained wrote"
            ) from error
        if not isinstance(config, dict) or "peft_type" not in config:
            raise BridgeError(f"{file} is no configuration of peft: it has no peft_type")
        return config

    @cached_property
    def tensors(self) -> "dict[str, torch.Tensor]":
        """The weights by peft's names, without what they all begin with."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self.path / WEIGHTS
        try:
            held = load_file(file)
        except (OSError, SafetensorError) as error:
            raise BridgeError(f"{file} cannot be read ({error}); write it again with save_pretrained") from error
        return {name.removeprefix(_PREFIX): tensor for name, tensor in held.items()}


class _Weights:
    """The weights of a folder as a table's rules name them: those of stacked experts entry by entry."""

    def __init__(self, tensors: "Mapping[str, torch.Tensor]", stacked: list[NamePattern], experts: int) -> None:
        self._tensors = {
            name: unpacked(name, tensor, experts)
            if any(pattern.match(name) is not None for pattern in stacked)
            else tensor
            for name, tensor in tensors.items()
        }

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, region: Region) -> "torch.Tensor":
        return self._tensors[name][tuple(slice(start, stop) for start, stop in region)]


def load_hf_adapter(bridge: "AutoBridge", model: Model, path: Path, name: str, *, training: bool) -> Any:
    """See `AutoBridge.load_hf_adapter`. Collective."""
    folder, what = AdapterFolder(path), f"import of the adapter {path}"
    tensors: dict[str, torch.Tensor] = {}
    chunks = as_chunks(model)
    layout = Layout.of(chunks)

    def read() -> Any:
        method = HF_ADAPTERS[folder.config["peft_type"]]
        tensors.update(folder.tensors)
        return method(folder.config, tensors, name)

    method = on_every_rank(read, what)
    for chunk in chunks:
        chunk.bridge = bridge  # type: ignore[assignment]
    before = {id(each.layer) for each in adapted(chunks) if name in each.layer.adapters}
    try:
        method(chunks, training=training)
        table = AdapterTable(chunks, bridge.weight_table(), name, PeftNames(bridge.hf_config), layout)
        own_names = {own for rule in table.table.rules for own in rule.hf_names}
        stacked = [NamePattern(base_name(own)) for own in own_names if base_name(own) != own]
        source = _Weights(tensors, stacked, getattr(chunks[0].config, "num_moe_experts", None) or 0)
        load_weights(model, table.table, source, what, adapter=table.weights)
    except BaseException:
        for each in adapted(chunks):
            if id(each.layer) not in before and name in each.layer.adapters:
                del each.layer.adapters[name]  # type: ignore[attr-defined]  # a ModuleDict is changed here alone
                each.layer.active = None
        raise
    return method
