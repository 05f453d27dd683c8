"""Megatron-Core's `MimoModel`, built of our providers' language models and of `EncoderModule`s."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.models.mimo.config.role import ModuleLayout, ModuleStageInfo, RankRole
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from megatron.bridge.conversion.live_weights import unwrap
from megatron.bridge.mimo.context_parts import ContextParts, with_whole_gradients
from megatron.bridge.mimo.documents import bounds_in_one_row, one_row
from megatron.bridge.mimo.module_groups import LANGUAGE, ModuleGroups
from megatron.bridge.mimo.places import PLACES, places_of
from megatron.bridge.mimo.uneven_bridges import UnevenColocated, of_whole_sequences
from megatron.bridge.training.gpt_step import packed_documents

if TYPE_CHECKING:
    from megatron.bridge.mimo.encoder_module import EncoderModule
    from megatron.bridge.mimo.encoders import Encoder

type Build = Callable[[], torch.nn.Module]


class BridgeMimoModel(MimoModel):
    """Encoders and a language model, each at its own layout; on a rank the modules that stand there.

    Args:
        config: the language model's.
        modules: place of every module.
        build: how every module is built.
        token_ids: of every modality.
        max_sequence_length: of the language model.
        shared: the modules share their groups; encoders stand on the first pipeline stage.
        deciding: the encoder that decides the positions of tokens, and its name, whether it is on this rank or not.
    """

    partition_adapter: ContextParts | None

    def __init__(
        self,
        config: TransformerConfig,
        modules: Mapping[str, ModuleGroups],
        build: Mapping[str, Build],
        token_ids: Mapping[str, int],
        max_sequence_length: int,
        shared: bool,
        deciding: "tuple[str, Encoder] | None" = None,
    ) -> None:
        self._build, self._shared = build, shared
        self.deciding = deciding
        self.module_groups = dict(modules)
        language = ModuleSpec(module=MimoModel, params={"config": config, "max_sequence_length": max_sequence_length})
        own = modules[LANGUAGE].groups
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Megatron-Core calls its MIMO stack experimental
            super().__init__(
                MimoModelConfig(
                    language_model_spec=language,
                    modality_submodules_spec=dict.fromkeys(token_ids, language),
                    special_token_ids=dict(token_ids),
                    module_to_grid_map={name: each.grid for name, each in modules.items()},
                ),
                cp_group=None if own is None else own.cp,
                tp_group=None if own is None else own.tp,
            )
        if self.partition_adapter is not None:
            self.partition_adapter = ContextParts(self.partition_adapter.cfg)
        self.model_type = ModelType.encoder_or_decoder
        self.pg_collection = own

    def parts(self) -> dict[str, torch.nn.Module]:
        """The modules on this rank, wrapped as they are, by name; the language model by Megatron-Core's key."""
        found = dict(self.modality_submodules.items())
        return found | ({} if self.language_model is None else {LANGUAGE: self.language_model})

    def encoders(self) -> "dict[str, EncoderModule]":
        """The encoders on this rank, without what wraps them."""
        return {name: unwrap(each) for name, each in self.modality_submodules.items()}  # type: ignore[misc]

    def wrap(self, wrapped: Mapping[str, torch.nn.Module]) -> None:
        """Put wrapped modules in the place of `parts`."""
        for name, module in wrapped.items():
            if name == LANGUAGE:
                self.language_model = module
            else:
                self.modality_submodules[name] = module

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Megatron-Core's, by names that are the same whatever wraps the modules and wherever they stand."""
        state: dict[str, Any] = {}
        for name, part in self.parts().items():
            own = {**(metadata or {}), "dp_cp_group": self.module_groups[name].here.dp_cp}
            where = prefix + _checkpoint_prefix(name)
            state |= unwrap(part).sharded_state_dict(where, sharded_offsets, own)  # type: ignore[operator]
        return state

    def saved_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The parameters on this rank, by the names of `sharded_state_dict`."""
        for name, part in self.parts().items():
            for own, parameter in unwrap(part).named_parameters():
                yield _checkpoint_prefix(name) + own, parameter

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Fill the modules on this rank from what was loaded for `sharded_state_dict`."""
        missing: list[str] = []
        unexpected: list[str] = []
        for name, part in self.parts().items():
            where = _checkpoint_prefix(name)
            own = {key.removeprefix(where): value for key, value in state_dict.items() if key.startswith(where)}
            outcome = unwrap(part).load_state_dict(own, strict=strict, assign=assign)
            missing += (where + each for each in outcome.missing_keys)
            unexpected += (where + each for each in outcome.unexpected_keys)
        return _IncompatibleKeys(missing, unexpected)

    @property
    def ddp_config(self) -> Any:
        """Settings of Megatron-Core's DDP, which wraps every module by itself; no such attribute before that."""
        return next(iter(self.parts().values())).ddp_config

    @property
    def buffers_of_gradients(self) -> list[Any]:
        """Megatron-Core's gradient buffers of all modules on this rank."""
        wrapped = [each for each in self.parts().values() if isinstance(each, DistributedDataParallel)]
        return [buffer for each in wrapped for buffer in (*each.buffers, *each.expert_parallel_buffers)]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        labels: Tensor | None = None,
        modality_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Any, Tensor | None]:
        """One micro-batch through the modules on this rank.

        Args:
            input_ids: token ids [samples, sequence] of the language model, or of the encoder on a rank without one.
            position_ids, loss_mask, labels: [samples, sequence] of the language model; positions that items decide are
                [axes, samples, sequence].
            attention_mask: None: attention is causal.
            modality_inputs: of every encoder here the inputs of its own samples, with `places` and `items`.
            cu_seqlens: of packed samples of the language model where each document begins and the last one ends,
                [samples, documents + 1]. Megatron-Core packs one row, so they go on as one: [1, samples x sequence].

        Returns:
            On the last stage of the language model the loss of each token [samples, sequence] (logits without labels)
            and the loss mask, where sequences are divided of this rank's part (see `ContextParts`); on other ranks what
            the next stage is sent, by module.
        """
        given = {name: dict((modality_inputs or {}).get(name) or {}) for name in self.modality_submodules}
        for name, inputs in given.items():
            self._tell_rows(name, input_ids, inputs.get(PLACES))
        packing = None
        if cu_seqlens is not None:
            packing = vars(packed_documents(bounds_in_one_row(cu_seqlens, input_ids.shape[1])))
            rows = (one_row(each) for each in (input_ids, position_ids, loss_mask, labels))
            input_ids, position_ids, loss_mask, labels = rows  # type: ignore[assignment]
        elif self.partition_adapter is not None and position_ids is not None and position_ids.dim() > 2:
            position_ids = self.partition_adapter.positions(position_ids)
        if self._shared and not self.role.is_first_stage(LANGUAGE):
            output, loss_mask = self._forward_language_module(
                input_ids, position_ids, attention_mask, loss_mask, labels, None, packing
            )
            return (output[LANGUAGE] if isinstance(output, dict) else output), loss_mask
        result: tuple[Any, Tensor | None] = super().forward(
            input_ids, position_ids, attention_mask, loss_mask, labels, given, packing
        )
        return result

    def set_input_tensor(self, input_tensor: Any) -> None:
        """As Megatron-Core's, through the wrappers of the language model."""
        first = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if isinstance(first, dict) or self.language_model is None:
            super().set_input_tensor(input_tensor)
        else:
            unwrap(self.language_model).set_input_tensor(first)  # type: ignore[operator]

    def shared_embedding_or_output_weight(self) -> Any:
        """The language model's."""
        return unwrap(self.language_model).shared_embedding_or_output_weight()  # type: ignore[operator]

    # --- how Megatron-Core's constructor builds

    def _initialize_submodules(self) -> None:
        if self._shared:
            pipeline = self.module_groups[LANGUAGE].here.pp
            first, last = pipeline.rank() == 0, pipeline.rank() == pipeline.size() - 1
            stages = {name: ModuleStageInfo(True, True) for name in self.mimo_config.modality_submodules_spec if first}
            self.role = RankRole({**stages, LANGUAGE: ModuleStageInfo(first, last)}, ModuleLayout.COLOCATED)
        for name in self.mimo_config.modality_submodules_spec:
            if name in self.role.modules:
                self.modality_submodules[name] = self._build[name]()

    def _initialize_language_model(self) -> None:
        if self.role.has_language_module:
            self.language_model = self._build[LANGUAGE]()
        else:
            self.register_module("language_model", None)

    def _build_colocated_communicators(self) -> None:
        for name in () if self._shared else self.mimo_config.modality_submodules_spec:
            self.colocated_comms[name, LANGUAGE] = UnevenColocated(
                src_grid=self.module_groups[name].grid,
                dest_grid=of_whole_sequences(self.module_groups[LANGUAGE].grid),
                src_module_name=name,
                dest_module_name=LANGUAGE,
                dim_mapping={"b": 0, "h": 1},
            )

    # --- how features find their places

    def get_text_embeddings(
        self, input_ids: Tensor, position_ids: Tensor | None, special_token_ids: dict[str, int]
    ) -> Tensor:
        """Megatron-Core's. Positions in several axes turn queries and keys alone, and are this rank's part by now."""
        if position_ids is not None and position_ids.dim() > 2:
            position_ids = None
        found: Tensor = super().get_text_embeddings(input_ids, position_ids, special_token_ids)
        return found

    def align_embeddings_by_token_positions(
        self, modality_embeddings: dict[str, Tensor], input_ids: Tensor, special_token_ids: dict[str, int]
    ) -> Tensor:
        """Megatron-Core's, with a way back for features of encoders that have ranks of their own."""
        context = self.module_groups[LANGUAGE].here.cp
        if not self._shared and context.size() > 1:
            modality_embeddings = with_whole_gradients(modality_embeddings, context)
        found: Tensor = super().align_embeddings_by_token_positions(modality_embeddings, input_ids, special_token_ids)
        return found

    def _tell_rows(self, name: str, input_ids: Tensor, places: Tensor | None) -> None:
        bridge = self.colocated_comms.get((name, LANGUAGE))
        if bridge is not None:
            wider = places if bridge.is_fan_out() and places is not None else None
            counts = places_of(input_ids, self.special_token_ids[name]) if wider is None else wider
            bridge.rows_of_samples = counts.reshape(len(counts), -1).sum(1).tolist()

    def _attach_modality_split_sizes(self, output: Tensor, input_ids: Tensor | None, encoder_name: str) -> None:
        encoder, language = self.module_groups[encoder_name].layout, self.module_groups[LANGUAGE].layout
        if encoder.data_parallel <= language.data_parallel:  # otherwise `UnevenBridge` has the rows of each sender
            super()._attach_modality_split_sizes(output, input_ids, encoder_name)


def _checkpoint_prefix(name: str) -> str:
    return "language_model." if name == LANGUAGE else f"modality_submodules.{name}."
