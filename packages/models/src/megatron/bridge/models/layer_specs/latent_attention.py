"""Multi-latent attention (arXiv:2405.04434) for all layer specs: Megatron-Core's, of the modules its spec names."""

import dataclasses
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

# Own name of a norm -> its name in checkpoints, where Transformer Engine has it as part of the projection behind it.
_FUSED_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


class LatentAttention(MLASelfAttention):
    """`MLASelfAttention` of exactly the norms and projections in its spec.

    Megatron-Core puts a norm before `linear_q_proj` wherever keys and values have one; models whose queries are not
    compressed have none there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.q_lora_rank is not None and not self.config.sequence_parallel:
            # Megatron-Core sums the gradients of whatever is called q_layernorm over tensor-parallel ranks. That is for
            # norms of single heads; here every rank has the whole gradient already.
            for parameter in self.q_layernorm.parameters():
                parameter.average_gradients_across_tp_domain = True

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The latents of queries, and of keys and values with the rotated part of keys.

        That part goes into every head, so that each tensor-parallel rank has but its heads' share of its gradient.
        Where the projection is cut, Megatron-Core 0.19 takes this share for the whole; here the shares are added up.
        """
        queries, keys = super()._qkv_down_projection(hidden_states)
        latent, rotated = self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim
        if keys.shape[-1] == latent + rotated:
            return queries, keys
        keys = gather_from_tensor_model_parallel_region(keys)
        if self.config.sequence_parallel:
            # Megatron-Core then gathers the rotated part, and adds up its gradients in doing so.
            return queries, scatter_to_sequence_parallel_region(keys)
        turning = copy_to_tensor_model_parallel_region(keys[..., latent:])
        return queries, torch.cat([keys[..., :latent], turning], -1)


def with_latent_attention(layer: TransformerLayerSubmodules, config: TransformerConfig) -> TransformerLayerSubmodules:
    """A stock layer of multi-latent attention with `LatentAttention`, and with one set of checkpoint keys.

    The projections to the latents are cut over tensor-parallel ranks, as Megatron-Core's local ones are; its spec for
    Transformer Engine repeats them on every rank.
    """
    stock = layer.self_attention
    down = stock.submodules.linear_kv_down_proj
    if down is not ColumnParallelLinear:
        down = stock.submodules.linear_q_proj
    changes = {"linear_q_down_proj": down, "linear_kv_down_proj": down}
    if config.q_lora_rank is None:
        changes["q_layernorm"] = IdentityOp
    modules = dataclasses.replace(stock.submodules, **changes)
    attention = dataclasses.replace(stock, module=LatentAttention, submodules=modules)
    keys = layer.sharded_state_dict_keys_map
    if modules.kv_layernorm is not IdentityOp:
        keys = {**keys, **_FUSED_NORMS}
    return dataclasses.replace(layer, self_attention=attention, sharded_state_dict_keys_map=keys)
