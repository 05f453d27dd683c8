"""A Mamba-2 mixer beside attention in one layer (Falcon-H1, arXiv:2507.22448)."""

import dataclasses
from typing import Any

from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs.mamba_mixer import CONVOLUTION_KEYS, TorchMambaMixer
from megatron.bridge.models.layer_specs.rotary_cpu import RotarySelfAttention
from megatron.bridge.models.mamba_beside_attention import MambaBesideAttention


def with_mamba(layer: TransformerLayerSubmodules, beside: MambaBesideAttention) -> TransformerLayerSubmodules:
    """A layer's parts with a mixer beside attention.

    Raises:
        BridgeError: the layer has attention of another kind.
    """
    attention = layer.self_attention
    if attention.module not in (SelfAttention, RotarySelfAttention):
        raise BridgeError(f"a Mamba mixer stands beside plain self-attention only, not beside {attention.module}")
    params = {**(attention.params or {}), "beside": beside}
    keys = {f"self_attention.{own}": f"self_attention.{key}" for own, key in CONVOLUTION_KEYS.items()}
    return dataclasses.replace(
        layer,
        self_attention=dataclasses.replace(attention, module=AttentionBesideMamba, params=params),
        sharded_state_dict_keys_map={**layer.sharded_state_dict_keys_map, **keys},
    )


class AttentionBesideMamba(RotarySelfAttention):
    """Self-attention and a mixer, in a layer's place for attention."""

    def __init__(self, *args: Any, beside: MambaBesideAttention, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.context_parallel_size > 1:
            raise BridgeError(
                f"context_parallel_size={self.config.context_parallel_size}: a Mamba mixer needs whole sequences; "
                "set it to 1, and use tensor and pipeline parallelism"
            )
        self.beside = beside
        self.mixer = TorchMambaMixer(
            self.config,
            MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
            self.config.hidden_size,
            pg_collection=self.pg_collection,
            **beside.mixer,
        )

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        """As `SelfAttention`: `[length, batch, hidden]` in and out, with the bias of attention's last projection."""
        beside = self.beside
        attended, bias = super().forward(hidden_states * beside.attention_in, attention_mask, **kwargs)
        mixed, _ = self.mixer(
            hidden_states * beside.mixer_in,
            kwargs.get("inference_context"),
            packed_seq_params=kwargs.get("packed_seq_params"),
        )
        output = attended * beside.attention_out + mixed * beside.mixer_out
        return output, None if bias is None else bias * beside.attention_out
