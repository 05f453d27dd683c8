"""`MimoProvider`: everything that defines a MIMO model, as one dataclass that can build it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.encoders import Encoder
from megatron.bridge.mimo.model_checks import module_problems
from megatron.bridge.mimo.module_settings import ModuleOptimizerConfig
from megatron.bridge.mimo.parallelism import MimoParallelismConfig, ModuleParallelismConfig
from megatron.bridge.mimo.projector import projector_of
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.peft import PEFT

if TYPE_CHECKING:
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron.bridge.conversion.auto_bridge import AutoBridge
    from megatron.bridge.mimo.engine import MimoEngine
    from megatron.bridge.mimo.model import BridgeMimoModel
    from megatron.bridge.mimo.module_groups import ModuleGroups

# What every module needs so that gradients are sums over tokens, whatever the layout of the others.
_ALIKE: Mapping[str, Any] = {
    "calculate_per_token_loss": True,
    "variable_seq_lengths": True,
    "scatter_embedding_sequence_parallel": False,
    "moe_token_dispatcher_type": "alltoall",
}


@dataclass(kw_only=True)
class MimoProvider:
    """Encoders before a language model, and where each of them stands.

    What is asked of this provider and is not its own is asked of the language model's.

    Attributes:
        language: the language model; its parallel sizes are those of the placement.
        encoders: by name of the modality, which is the name in the placement.
        placement: which module stands on which ranks.
        frozen_language: the language model is not trained.
        adapters: PEFT methods of encoders, on the layers of their towers and projectors; the language model's is the
            run's.
        trained_beside_adapters: encoders, or their projectors (`images.projector`), that are trained where a PEFT
            method adapts the language model; all others stay then. The projector of an adapted encoder, which stays
            too, may be among them.
        optimizers: settings of the optimizer that are not the run's, by module; `images.projector` stands for what
            follows the tower of `images`.
        load_weights: take the weights of the Hugging Face model, where there is one.
    """

    language: GPTModelProvider
    encoders: dict[str, Encoder]
    placement: MimoParallelismConfig
    frozen_language: bool = False
    adapters: dict[str, PEFT] = field(default_factory=dict)
    trained_beside_adapters: tuple[str, ...] = ()
    optimizers: dict[str, ModuleOptimizerConfig] = field(default_factory=dict)
    load_weights: bool = True
    # The Hugging Face model that all modules are of; None for parts put together.
    bridge: "AutoBridge | None" = field(default=None, init=False, repr=False)

    @classmethod
    def from_hf_pretrained(
        cls,
        path_or_id: "str | Path | AutoBridge",
        placement: MimoParallelismConfig,
        *,
        tower_implementation: str = "transformers",
        **changes: Any,
    ) -> "MimoProvider":
        """A Hugging Face vision-language model, taken apart: its modality is the one encoder of the placement.

        Args:
            path_or_id: a folder or hub id, or its bridge.
            placement: of the encoder and the language model.
            tower_implementation: `transformers`, or `megatron` for one that tensor parallelism divides; see
                `VisionHalf.implementation`.
            changes: other values for fields of the language model's provider.

        Raises:
            BridgeError: the model has no vision half, or one that cannot stand apart.
        """
        from megatron.bridge import AutoBridge
        from megatron.bridge.mimo.vision_half import VisionHalf

        bridge = path_or_id if isinstance(path_or_id, AutoBridge) else AutoBridge.from_hf_pretrained(path_or_id)
        encoder = VisionHalf.of(bridge, implementation=tower_implementation)
        names = [name for name in placement.module_parallelisms if name != placement.llm_module_name]
        if len(names) != 1:
            raise BridgeError(f"the model has one vision half, and the placement has the encoders {names}; name one")
        whole = bridge.to_megatron_provider(load_weights=False)
        values = {each.name: getattr(whole, each.name) for each in fields(GPTModelProvider) if each.init}
        language = GPTModelProvider(**{**values, **changes})
        provider = cls(language=language, encoders={names[0]: encoder}, placement=placement)
        provider.bridge = bridge
        return provider

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "language":
            raise AttributeError(name)
        return getattr(self.language, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in _OWN or name not in _OF_LANGUAGE
        object.__setattr__(self if own else self.language, name, value)

    @cached_property
    def engine(self) -> "MimoEngine":
        """What the training loop runs the model by."""
        from megatron.bridge.mimo.engine import MimoEngine

        return MimoEngine(self)

    def initialize_model_parallel(self, seed: int = 1234) -> None:
        """As other providers', which build Megatron-Core's groups here: these are made with the modules."""
        from megatron.bridge import platform

        platform.initialize_distributed()
        self.finalize()

    # --- layout

    @property
    def llm_layout(self) -> ModuleParallelismConfig:
        """The language model's layout."""
        return self.placement.module_parallelisms[self.placement.llm_module_name]

    def finalize(self, world_size: int | None = None) -> None:
        """Check placement and modules, without building anything, and give the language model its parallel sizes.

        Args:
            world_size: ranks; None for this process's world.

        Raises:
            BridgeError: every problem found, each with what would fix it.
        """
        from megatron.bridge import platform

        self.placement.finalize(platform.world_size() if world_size is None else world_size)
        self._refuse_other_names()
        if problems := [*module_problems(self)]:
            raise BridgeError("the MIMO model cannot be built as configured:\n  " + "\n  ".join(problems))
        self.transformer_config()

    def transformer_config(self) -> "TransformerConfig":
        """The language model's, at its place.

        Raises:
            BridgeError: see `GPTModelProvider.transformer_config`.
        """
        for name, value in self._parallel_sizes().items():
            setattr(self.language, name, value)
        return self.language.transformer_config()

    def batch_problems(self, micro_batch_size: int) -> list[str]:
        """Modules whose replicas cannot divide the samples of a forward pass."""
        samples = micro_batch_size * self.llm_layout.data_parallel
        return [
            f"the micro-batches of all replicas have {samples} samples (micro_batch_size={micro_batch_size} x "
            f"data_parallel={self.llm_layout.data_parallel} of {self.placement.llm_module_name!r}), which {name!r} "
            f"cannot divide among data_parallel={layout.data_parallel}; set micro_batch_size="
            f"{micro_batch_size * layout.data_parallel // math.gcd(samples, layout.data_parallel)}"
            for name, layout in self.placement.module_parallelisms.items()
            if samples % layout.data_parallel
        ]

    def _parallel_sizes(self) -> dict[str, Any]:
        layout = self.llm_layout
        return {
            "tensor_model_parallel_size": layout.tensor_parallel,
            "pipeline_model_parallel_size": layout.pipeline_parallel,
            "context_parallel_size": layout.context_parallel,
            "expert_model_parallel_size": layout.expert_parallel,
            **_ALIKE,
        }

    def _refuse_other_names(self) -> None:
        placed = set(self.placement.module_parallelisms) - {self.placement.llm_module_name}
        if placed != set(self.encoders):
            raise BridgeError(
                f"the placement has the encoders {sorted(placed)}, and the model {sorted(self.encoders)}; give both "
                "the same names"
            )

    @property
    def deciding(self) -> dict[str, Encoder]:
        """The encoders whose items decide the positions of tokens."""
        return {name: encoder for name, encoder in self.encoders.items() if encoder.decides_positions}

    # --- building

    def provide_distributed_model(
        self,
        ddp_config: "DistributedDataParallelConfig | None" = None,
        wrap_with_ddp: bool = True,
        pre_wrap_hook: "Callable[[list[torch.nn.Module]], Any] | None" = None,
        seed: int = 1234,
    ) -> "list[BridgeMimoModel]":
        """This rank's modules, with weights where there is a Hugging Face model; one chunk. Collective over the world.

        Args:
            ddp_config: settings of Megatron-Core's DDP, for every module.
            wrap_with_ddp: wrap every module for training.
            pre_wrap_hook: called with the model before its modules are wrapped.
            seed: of the weights' initialisation and dropout.

        Raises:
            BridgeError: the placement, a module or the weights are refused.
        """
        from megatron.bridge import platform
        from megatron.bridge.mimo.adapters import adapt_encoders
        from megatron.bridge.mimo.conversion import load_hf_weights
        from megatron.bridge.mimo.wrapping import prepared, with_ddp

        platform.initialize_distributed()
        self.finalize()
        model = self._built(seed)
        if self.bridge is not None and self.loads_weights:
            load_hf_weights(self.bridge, model)
        if pre_wrap_hook is not None:
            pre_wrap_hook([model])
        if self.adapters:
            adapt_encoders(self.adapters, model, self.bridge, self.trained_beside_adapters)
        self._freeze(model)
        prepared(model)
        if wrap_with_ddp:
            with_ddp(model, ddp_config)
        self.engine.attach(model)
        return [model]

    def _built(self, seed: int) -> "BridgeMimoModel":
        from megatron.core import parallel_state

        from megatron.bridge.mimo.model import BridgeMimoModel
        from megatron.bridge.mimo.module_groups import LANGUAGE, build_module_groups

        modules = build_module_groups(self.placement)
        if parallel_state._GLOBAL_MEMORY_BUFFER is None:
            parallel_state._set_global_memory_buffer()
        config = self.transformer_config()
        build: dict[str, Callable[[], torch.nn.Module]] = {
            name: partial(self._encoder, name, modules[name], seed) for name in self.encoders
        }
        build[LANGUAGE] = partial(self._language, modules[LANGUAGE], seed)
        model = BridgeMimoModel(
            config,
            modules,
            build,
            {name: encoder.token_id for name, encoder in self.encoders.items()},
            self.language.max_position_embeddings or self.language.seq_length,
            shared=self.placement.mode == "homogeneous",
            deciding=next(iter(self.deciding.items()), None),
        )
        _seed(modules[LANGUAGE] if modules[LANGUAGE].groups else _first_here(modules), seed)
        return model

    @property
    def loads_weights(self) -> bool:
        """Whether the model is built with the weights of a Hugging Face model."""
        return self.bridge is not None and self.bridge.source is not None and self.load_weights

    def _encoder(self, name: str, place: "ModuleGroups", seed: int) -> "torch.nn.Module":
        from megatron.bridge.mimo.encoder_module import EncoderModule

        _seed(place, seed)
        encoder, config = self.encoders[name], self._encoder_config(name, place.layout)
        tower = encoder.build_on(config, place.here, initialized=not self.loads_weights)
        projector = None
        if not encoder.projects:
            kind = projector_of(encoder.projector)
            projector = kind.build(config, encoder.width, self.language.hidden_size, place.here)
        return EncoderModule(name, encoder, config, tower, projector, place.here)

    def _encoder_config(self, name: str, layout: ModuleParallelismConfig) -> "TransformerConfig":
        """What Megatron-Core's DDP and optimizer ask of a module; the encoder's own sizes are its own business."""
        import torch
        from megatron.core.transformer.transformer_config import TransformerConfig

        language = self.language
        return TransformerConfig(
            num_layers=1,
            hidden_size=self.encoders[name].width,
            num_attention_heads=layout.tensor_parallel,
            kv_channels=1,
            tensor_model_parallel_size=layout.tensor_parallel,
            params_dtype=language.params_dtype,
            pipeline_dtype=language.params_dtype or torch.float32,
            bf16=language.bf16,
            calculate_per_token_loss=True,
        )

    def _language(self, place: "ModuleGroups", seed: int) -> "torch.nn.Module":
        from megatron.core import parallel_state

        from megatron.bridge.mimo.projectors import tell_group

        _seed(place, seed)
        pipeline, tensor = place.here.pp, place.here.tp
        # Layer specs, ours and Megatron-Core's, ask here for the place of the only model that they know of.
        parallel_state.set_pipeline_model_parallel_rank(pipeline.rank())
        parallel_state.set_tensor_model_parallel_rank(tensor.rank())
        first, last = pipeline.rank() == 0, pipeline.rank() == pipeline.size() - 1
        provider = self.language.replace(perform_initialization=not self.loads_weights)
        model = provider.provide(first, last, pg_collection=place.here)
        tell_group(model, place.here)
        return model

    def _freeze(self, model: "BridgeMimoModel") -> None:
        if self.frozen_language and model.language_model is not None:
            model.language_model.requires_grad_(False)
        for encoder in model.encoders().values():
            encoder.freeze()


_OWN = frozenset(each.name for each in fields(MimoProvider))
_OF_LANGUAGE = frozenset(each.name for each in fields(GPTModelProvider))


def _first_here(modules: "Mapping[str, ModuleGroups]") -> "ModuleGroups":
    return next(each for each in modules.values() if each.groups is not None)


def _seed(place: "ModuleGroups", seed: int) -> None:
    """Seed torch and Megatron-Core's tracker for a module: tensor-parallel ranks differ, replicas do not."""
    import torch
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    groups = place.here
    seed += 100 * groups.pp.rank()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed, tp_rank=groups.tp.rank(), ep_rank=groups.ep.rank(), etp_rank=groups.expt_tp.rank()
    )
