"""`AutoBridge`: from a Hugging Face model to Megatron-Core and back."""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from megatron.bridge.conversion import hf_config as reader
from megatron.bridge.conversion.foreign import refuse_foreign_bridge
from megatron.bridge.conversion.heads import HeadedBridge, head_of, head_on, headed_architectures
from megatron.bridge.conversion.hf import HFSource
from megatron.bridge.conversion.hf.names import holds_weights
from megatron.bridge.conversion.model_bridge import MODEL_BRIDGES, MegatronModelBridge
from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.registry import UnknownPlugin

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PretrainedConfig

    from megatron.bridge.conversion.dtype_policy import DtypePolicy
    from megatron.bridge.conversion.live import Model, Progress, WeightSource
    from megatron.bridge.conversion.live_export import Bucket, Exporter
    from megatron.bridge.conversion.plan import Plan
    from megatron.bridge.conversion.table import WeightTable
    from megatron.bridge.conversion.weight_source import StoredWeights

refuse_foreign_bridge()

# Seconds that ranks which stay away from an export are waited for.
RANK_TIMEOUT = 600.0


class AutoBridge:
    """Joins a Hugging Face model to its Megatron-Core counterpart.

    Made by `from_hf_pretrained`, `from_hf_config` or `from_megatron_checkpoint`. Nothing heavy happens until weights or
    a model are asked for.
    """

    def __init__(
        self, hf_config: "PretrainedConfig", source: HFSource | None = None, changes: Mapping[str, Any] | None = None
    ) -> None:
        self.hf_config = hf_config
        self.source = source
        # Values in which `hf_config` differs from the source's own file.
        self.changes = dict(changes or {})
        self.model_bridge: MegatronModelBridge = _model_bridge(hf_config)
        if source is not None and not self.changes:
            self.model_bridge.weight_names = lambda: source.weight_names

    def __repr__(self) -> str:
        return f"AutoBridge({reader.architecture(self.hf_config)}, source={self.source})"

    # --- finding a bridge

    @classmethod
    def from_hf_pretrained(
        cls, path_or_id: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
    ) -> "AutoBridge":
        """The bridge of a Hugging Face model.

        Args:
            path_or_id: a local folder, or a hub id.
            trust_remote_code: run the configuration code that the model ships.
            revision: branch, tag or commit on the hub, for configuration and weights alike.

        Raises:
            BridgeError: no such model, an unreadable configuration, or an architecture that nothing installed offers.
        """
        source = HFSource(path_or_id, revision)
        return cls(reader.read_config(source.folder, trust_remote_code=trust_remote_code), source)

    @classmethod
    def from_hf_config(cls, config: "PretrainedConfig") -> "AutoBridge":
        """The bridge of a configuration without weights, e.g. to train from scratch and export later."""
        return cls(config)

    @classmethod
    def from_megatron_checkpoint(cls, path: str | Path, *, trust_remote_code: bool = False) -> "AutoBridge":
        """The bridge of a Megatron checkpoint.

        Those that this library wrote hold the Hugging Face files. Of one that Megatron-LM's own training wrote the
        configuration is derived from the run's arguments; it has no tokenizer.

        Raises:
            BridgeError: no checkpoint there, or one that does not tell which model it is.
        """
        from megatron.bridge.conversion.megatron_checkpoint import hf_files, holds_hf_files
        from megatron.bridge.conversion.megatron_lm import derived_hf_config

        if not holds_hf_files(path) and (config := derived_hf_config(path)) is not None:
            return cls.from_hf_config(config)
        return cls.from_hf_pretrained(hf_files(path), trust_remote_code=trust_remote_code)

    @classmethod
    def can_handle(cls, path_or_id: str | Path, *, trust_remote_code: bool = False) -> bool:
        """Whether the model at `path_or_id` has a bridge. A model that cannot be found or read is still an error."""
        folder = HFSource(path_or_id).folder
        return cls.supports(reader.read_config(folder, trust_remote_code=trust_remote_code))

    @staticmethod
    def supports(config: "PretrainedConfig") -> bool:
        """Whether a bridge is offered for the configuration's architecture."""
        names = list(config.architectures or ())
        return len(names) == 1 and (names[0] in MODEL_BRIDGES or head_of(names[0]) is not None)

    @staticmethod
    def list_supported_models(*, heads: bool = False) -> list[str]:
        """Architecture names for which a bridge is installed or registered, sorted.

        Args:
            heads: with those of the same decoders under a classification head, for which transformers is imported.
        """
        return sorted([*MODEL_BRIDGES, *(headed_architectures() if heads else ())])

    def with_new_head(self, num_labels: int = 1, *, per_token: bool = False) -> "AutoBridge":
        """The bridge of this model's decoder under a fresh head: a reward model to train from a language model.

        Everything but the head comes from this bridge's folder, whose output layer is left aside; the head keeps its
        random initial values. What is exported is of the headed architecture.

        Args:
            num_labels: outputs of the head; 1 for rewards and values.
            per_token: a token classification model; otherwise a sequence classification one. Either gives the logits
                of every token in Megatron.

        Raises:
            BridgeError: transformers has no such model.
        """
        from megatron.bridge.conversion.derived_config import with_values

        architecture = head_on(reader.architecture(self.hf_config), per_token=per_token)
        changes = {"architectures": [architecture], "num_labels": num_labels}
        headed = AutoBridge(with_values(self.hf_config, changes), self.source, self.changes | changes)
        if not isinstance(headed.model_bridge, HeadedBridge):
            raise BridgeError(f"{architecture} is offered by a bridge of its own, which makes no fresh heads")
        headed.model_bridge.is_new = True
        return headed

    # --- into Megatron

    def to_megatron_provider(self, load_weights: bool = True, dtype: "torch.dtype | None" = None) -> Any:
        """A provider of this model; set its parallel sizes, then build it.

        Args:
            load_weights: fill the model with the Hugging Face weights when it is built.
            dtype: of the parameters; None takes the one the weights were saved in.

        Raises:
            BridgeError: the configuration cannot be expressed, or weights are wanted and there is no source of them.
        """
        import torch

        provider = self.model_bridge.provider_bridge()
        provider.params_dtype = dtype or reader.dtype(self.hf_config)
        provider.bf16 = provider.params_dtype == torch.bfloat16
        provider.fp16 = provider.params_dtype == torch.float16
        # Training keeps the Hugging Face files beside its checkpoints, so that they can be exported by themselves.
        provider.bridge = self
        if load_weights and self.source is not None:
            provider.register_pre_wrap_hook(self._load_hook, loads_weights=True)
        return provider

    def _load_hook(self, chunks: "list[torch.nn.Module]") -> None:
        self.load_hf_weights(chunks)

    def to_megatron_model(
        self, load_weights: bool = True, dtype: "torch.dtype | None" = None, wrap_with_ddp: bool = False, **layout: Any
    ) -> "list[torch.nn.Module]":
        """This rank's model with weights: one module per virtual pipeline stage. Collective.

        Args:
            load_weights, dtype: as in `to_megatron_provider`.
            wrap_with_ddp: wrap for training.
            layout: provider fields, e.g. `tensor_model_parallel_size=2`.
        """
        provider = self.to_megatron_provider(load_weights, dtype)
        _set_fields(provider, layout)
        chunks: list[torch.nn.Module] = provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp)
        return chunks

    def load_hf_weights(
        self,
        model: "Model",
        weights: "str | Path | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | None" = None,
        progress: "Progress | None" = None,
        process_groups: Any = None,
    ) -> "Plan":
        """Fill a model with Hugging Face weights. Collective; each rank reads the bytes it owns.

        Args:
            model: chunks of this rank.
            weights: a folder or hub id, a state dict, or (name, tensor) pairs; None takes the bridge's own source.
            progress: called with (Megatron name, elements) after each weight.
            process_groups: an object with the groups `tp`, `pp` (and `ep`, `expt_tp`) of a framework that keeps its
                own; None takes the model's.

        Raises:
            PlanError: some weight on either side is unaccounted for; no weight was touched.
        """
        from megatron.bridge.conversion.live import load_weights

        source, what = self._weight_source(weights)
        table, kept = self.weight_table(source.shapes), tuple[str, ...]()
        if weights is None and isinstance(self.model_bridge, HeadedBridge) and self.model_bridge.is_new:
            table, kept = self.model_bridge.headless_table(), self.model_bridge.head_weights()
        return load_weights(model, table, source, f"import of {what}", progress, process_groups, kept)

    @cached_property
    def stored_weights(self) -> "StoredWeights":
        """The weights of the bridge's own source, by name; those stored in few bits are decoded when they are read.

        Raises:
            BridgeError: there is no source, its files are damaged, or its low-bit format is not supported.
        """
        from megatron.bridge.conversion.weight_source import open_weights

        if self.source is None:
            raise BridgeError(
                "this bridge was made from a configuration and has no weights; pass a folder or a state dict"
            )
        return open_weights(self.source, reader.dtype(self.hf_config))

    def _weight_source(self, weights: Any) -> "tuple[WeightSource, str]":
        from megatron.bridge.conversion.live import TensorsInMemory
        from megatron.bridge.conversion.weight_source import open_weights

        if weights is None:
            return self.stored_weights, str(self.source and self.source.path_or_id)
        if isinstance(weights, str | Path):
            return open_weights(HFSource(weights), reader.dtype(self.hf_config)), str(weights)
        return TensorsInMemory(dict(weights)), "a state dict"

    # --- out of Megatron

    def weight_table(self, names: "Iterable[str] | None" = None) -> "WeightTable":
        """The family's table, with Hugging Face names as `names` (of weights) spell them; None takes the source's."""
        table = self.model_bridge.mapping_registry()
        if not table.spellings:
            return table
        return table.spelled(self._source_names() if names is None else names)

    def _source_names(self) -> "Iterable[str]":
        if self.source is None or not any(map(holds_weights, self.source.folder.iterdir())):
            return ()
        return self.stored_weights.shapes

    def get_conversion_tasks(
        self,
        model: "Model",
        *,
        dtype: "DtypePolicy" = None,
        process_groups: Any = None,
        rank_timeout: float = RANK_TIMEOUT,
        merge_adapter_weights: bool = True,
    ) -> "Exporter":
        """The export plan of a model: what becomes what, with shapes, dtypes, bytes and owners. Collective.

        Give it to `export_hf_weights` as often as wanted: it holds for as long as the model keeps its structure,
        through training steps and through offloading its parameters and bringing them back.

        Args:
            model: chunks of this rank.
            dtype: one for all floating-point weights; or by pattern of Hugging Face names, where the first that fits
                counts (`{"*.mlp.*": torch.bfloat16}`); or a function of name and dtype. None keeps the model's.
            process_groups: an object with the groups `tp`, `pp` (and `ep`, `expt_tp`) of a framework that keeps its
                own; None takes the model's.
            rank_timeout: seconds that an absent rank is waited for, before an error names it.
            merge_adapter_weights: give weights of layers with an adapter (`megatron.bridge.peft`) with the active one
                in them, merged one by one as they leave; False gives the weights of the model beneath.
        """
        from megatron.bridge.conversion.live_export import Exporter

        table = self.describing(model).weight_table()
        return Exporter(
            model,
            table,
            dtype=dtype,
            process_groups=process_groups,
            rank_timeout=rank_timeout,
            merged=merge_adapter_weights,
        )

    def describing(self, model: "Model") -> "AutoBridge":
        """This bridge with the configuration of `model`, which may have changed since: fewer layers, more tokens."""
        from megatron.bridge.conversion.derived_config import changed_values, with_values

        changes = changed_values(self.model_bridge, model)
        if not changes:
            return self
        return AutoBridge(with_values(self.hf_config, changes), self.source, self.changes | changes)

    def config_json(self, **changes: Any) -> dict[str, Any]:
        """What the model's `config.json` should say, with further changes."""
        from megatron.bridge.conversion.derived_config import config_json

        source = None if self.source is None else self.source.folder
        return config_json(self.hf_config, source, self.changes | changes)

    @overload
    def export_hf_weights(
        self,
        model: "Model",
        cpu: bool = ...,
        show_progress: bool = ...,
        dtype: "DtypePolicy" = ...,
        *,
        bucket_bytes: None = ...,
        conversion_tasks: "Exporter | None" = ...,
        stacked: bool = ...,
        process_groups: Any = ...,
        rank_timeout: float = ...,
        merge_adapter_weights: bool = ...,
        weight_dtype: "DtypePolicy" = ...,
    ) -> "Iterator[tuple[str, torch.Tensor]]": ...

    @overload
    def export_hf_weights(
        self,
        model: "Model",
        cpu: bool = ...,
        show_progress: bool = ...,
        dtype: "DtypePolicy" = ...,
        *,
        bucket_bytes: int,
        conversion_tasks: "Exporter | None" = ...,
        stacked: bool = ...,
        process_groups: Any = ...,
        rank_timeout: float = ...,
        merge_adapter_weights: bool = ...,
        weight_dtype: "DtypePolicy" = ...,
    ) -> "Iterator[Bucket]": ...

    def export_hf_weights(
        self,
        model: "Model",
        cpu: bool = False,
        show_progress: bool = False,
        dtype: "DtypePolicy" = None,
        *,
        bucket_bytes: int | None = None,
        conversion_tasks: "Exporter | None" = None,
        stacked: bool = True,
        process_groups: Any = None,
        rank_timeout: float = RANK_TIMEOUT,
        merge_adapter_weights: bool = True,
        weight_dtype: "DtypePolicy" = None,
    ) -> "Iterator[tuple[str, torch.Tensor]] | Iterator[Bucket]":
        """Yield every Hugging Face weight, whole, in the same order on every rank. Collective.

        Args:
            model: chunks of this rank.
            cpu: yield CPU tensors.
            show_progress: draw a progress bar on rank 0.
            dtype: as in `get_conversion_tasks`.
            bucket_bytes: yield the weights in buckets (name -> tensor) of at most so many bytes instead of one by one,
                gathered together. What one Megatron weight becomes, and the experts of a stacked weight, are never
                parted. A bucket is let go when the next is asked for; beside it, at most the bytes of the largest
                weight are held.
            conversion_tasks: the plan that `get_conversion_tasks` made of this model; it knows dtype, groups and
                time-out already.
            stacked: join the experts of a stacked weight; otherwise yield each as `NAME[e]`.
            process_groups, rank_timeout, merge_adapter_weights: as in `get_conversion_tasks`.
            weight_dtype: another name of `dtype`, which RL frameworks use.

        Raises:
            BridgeError: the model does not match the table, or a rank stayed away (named, on every rank that came).
        """
        from megatron.bridge.conversion.progress import tracked

        if dtype is not None and weight_dtype is not None:
            raise BridgeError("dtype and weight_dtype are two names of one setting; give one of them")
        dtype = weight_dtype if dtype is None else dtype
        tasks = conversion_tasks
        if tasks is None:
            tasks = self.get_conversion_tasks(
                model,
                dtype=dtype,
                process_groups=process_groups,
                rank_timeout=rank_timeout,
                merge_adapter_weights=merge_adapter_weights,
            )
        elif dtype is not None or process_groups is not None:
            raise BridgeError("dtype and process_groups belong to conversion_tasks: give them to get_conversion_tasks")
        elif not tasks.belongs_to(model):
            raise BridgeError("these conversion_tasks were made of another model; call get_conversion_tasks(model)")
        if bucket_bytes is not None:
            total = len(tasks.buckets(bucket_bytes))
            return tracked(tasks.stream(bucket_bytes, cpu=cpu, stacked=stacked), total, "export", shown=show_progress)
        weights = tasks.weights(cpu=cpu, stacked=stacked)
        return tracked(weights, len(tasks.hf_shapes), "export", shown=show_progress)

    def save_hf_pretrained(
        self,
        model: "Model",
        path: str | Path,
        *,
        overwrite: bool = False,
        show_progress: bool = False,
        dtype: "DtypePolicy" = None,
        distributed_save: bool = True,
        max_shard_bytes: float = 5e9,
        quantization: str | None = None,
    ) -> Path:
        """Write a complete Hugging Face folder: weights, configuration, tokenizer, templates, code. Collective.

        The folder appears at once when it is whole and verified; on failure nothing is left behind.

        Args:
            model: chunks of this rank.
            path: the folder to make.
            overwrite: replace a Hugging Face folder that is there.
            show_progress: draw a progress bar on rank 0.
            dtype: as in `get_conversion_tasks`.
            distributed_save: every rank writes its share of the files; False leaves all to rank 0.
            max_shard_bytes: size of one weight file.
            quantization: "fp8-block" writes the linear layers in float8 with a scale per 128 x 128 block, as DeepSeek
                publishes; None writes full precision, whatever the source held.

        Raises:
            BridgeError: the target exists or cannot be written, or the model does not match the table.
        """
        from megatron.bridge.conversion.save import save_hf_folder

        return save_hf_folder(
            self.describing(model),
            model,
            Path(path),
            companions=True,
            overwrite=overwrite,
            show_progress=show_progress,
            dtype=dtype,
            distributed_save=distributed_save,
            max_shard_bytes=max_shard_bytes,
            quantization=quantization,
        )

    def save_hf_weights(self, model: "Model", path: str | Path, **options: Any) -> Path:
        """Write weights and configuration only; otherwise as `save_hf_pretrained`."""
        from megatron.bridge.conversion.save import save_hf_folder

        return save_hf_folder(self.describing(model), model, Path(path), companions=False, **options)

    # --- adapters

    def export_adapter_weights(
        self, model: "Model", *, adapter_name: str | None = None, cpu: bool = False, dtype: "DtypePolicy" = None
    ) -> "Iterator[tuple[str, torch.Tensor]]":
        """Yield an adapter's weights, whole, by the names in Hugging Face peft's files. Collective.

        Every rank gets all of them in the same order.

        Args:
            model: chunks of this rank.
            adapter_name: None takes the one that takes part.
            cpu: yield CPU tensors.
            dtype: as in `get_conversion_tasks`.

        Raises:
            BridgeError: the model has no such adapter, or peft cannot hold it.
        """
        from megatron.bridge.conversion.hf_adapter import AdapterExport

        return AdapterExport(self, model, adapter_name, dtype).weights(cpu=cpu)

    def save_hf_adapter(
        self,
        model: "Model",
        path: str | Path,
        *,
        adapter_name: str | None = None,
        overwrite: bool = False,
        dtype: "DtypePolicy" = None,
    ) -> Path:
        """Write a folder that `peft.PeftModel.from_pretrained` loads. Collective.

        The folder appears at once when it is whole; on failure nothing is left behind.

        Args:
            model: chunks of this rank.
            path: the folder to make.
            adapter_name: None takes the one that takes part.
            overwrite: replace a folder of weights that is there.
            dtype: as in `get_conversion_tasks`.

        Raises:
            BridgeError: the model has no such adapter, peft cannot hold it, or the target cannot be written.
        """
        from megatron.bridge.conversion.hf_adapter import save_hf_adapter

        return save_hf_adapter(self, model, Path(path), adapter_name, overwrite=overwrite, dtype=dtype)

    def load_hf_adapter(
        self, model: "Model", path: str | Path, *, adapter_name: str = "default", training: bool = False
    ) -> Any:
        """Put an adapter that peft wrote on a model, bit for bit. Collective.

        Args:
            model: chunks of this rank, not wrapped for training yet.
            path: peft's folder.
            adapter_name: what it is called here.
            training: let it train on.

        Returns:
            The method that was applied, with its `report`.

        Raises:
            BridgeError: an adapter of another model (weights and shapes are named), a feature of peft that Megatron
                models cannot have (named), or a damaged file. The model is then as it was.
        """
        from megatron.bridge.conversion.hf_adapter import load_hf_adapter

        return load_hf_adapter(self, model, Path(path), adapter_name, training=training)

    # --- Megatron checkpoints

    def save_megatron_model(self, model: "Model", path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a Megatron distributed checkpoint of the weights, with the Hugging Face files beside it. Collective."""
        from megatron.bridge.conversion.megatron_checkpoint import save_model

        return save_model(self.describing(model), model, path, overwrite=overwrite)

    def load_megatron_model(
        self, path: str | Path, *, wrap_with_ddp: bool = False, dtype: "torch.dtype | None" = None, **layout: Any
    ) -> "list[torch.nn.Module]":
        """This rank's model with the weights of a Megatron checkpoint, at any layout. Collective.

        Args:
            path: a checkpoint folder, or the root that holds it.
            wrap_with_ddp, dtype, layout: as in `to_megatron_model`.
        """
        from megatron.bridge.conversion.megatron_checkpoint import load_model

        provider = self.to_megatron_provider(load_weights=False, dtype=dtype)
        _set_fields(provider, layout)
        provider.register_pre_wrap_hook(lambda chunks: load_model(chunks, path), loads_weights=True)
        chunks: list[torch.nn.Module] = provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp)
        return chunks

    @classmethod
    def import_ckpt(
        cls,
        hf_model: str | Path,
        megatron_path: str | Path,
        *,
        trust_remote_code: bool = False,
        revision: str | None = None,
        overwrite: bool = False,
        **layout: Any,
    ) -> Path:
        """Convert a Hugging Face model to a Megatron checkpoint that loads at any layout. Collective.

        Args:
            hf_model: folder or hub id.
            megatron_path: the checkpoint's root folder.
            layout: provider fields to convert with, e.g. `tensor_model_parallel_size=2` to spread memory.
        """
        bridge = cls.from_hf_pretrained(hf_model, trust_remote_code=trust_remote_code, revision=revision)
        return bridge.save_megatron_model(bridge.to_megatron_model(**layout), megatron_path, overwrite=overwrite)

    def export_ckpt(
        self,
        megatron_path: str | Path,
        hf_path: str | Path,
        *,
        overwrite: bool = False,
        show_progress: bool = False,
        quantization: str | None = None,
        **layout: Any,
    ) -> Path:
        """Convert a Megatron checkpoint to a complete Hugging Face folder. Collective.

        Args:
            megatron_path: a checkpoint folder, or the root that holds it.
            hf_path: the folder to make.
            quantization: as in `save_hf_pretrained`.
            layout: provider fields to convert with.
        """
        model = self.load_megatron_model(megatron_path, **layout)
        return self.save_hf_pretrained(
            model, hf_path, overwrite=overwrite, show_progress=show_progress, quantization=quantization
        )


def _set_fields(provider: Any, values: Mapping[str, Any]) -> None:
    """Set fields of a provider dataclass; a name that is none of them is refused with the nearest."""
    known = {field.name for field in dataclasses.fields(provider)}
    for name, value in values.items():
        if name not in known:
            raise BridgeError(f"{type(provider).__name__} has no field {name!r}{did_you_mean(name, known)}")
        setattr(provider, name, value)


def _model_bridge(config: "PretrainedConfig") -> MegatronModelBridge:
    name = reader.architecture(config)
    head = None if name in MODEL_BRIDGES else head_of(name)
    if head is not None:
        return HeadedBridge(config, head)
    try:
        return MODEL_BRIDGES[name](config)
    except UnknownPlugin as error:
        raise UnknownPlugin(
            f'{error}\nA family that is not offered can be added by any package: see "Write a plugin" in the README'
        ) from None
