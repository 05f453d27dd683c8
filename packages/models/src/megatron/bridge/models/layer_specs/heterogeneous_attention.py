"""Self-attention that may take its values from its keys, or keys and values from an earlier layer."""

import dataclasses
from typing import Any

from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.heterogeneous_layers import HeterogeneousLayers
from megatron.bridge.models.layer_specs.layer_states import LayerStates
from megatron.bridge.models.layer_specs.norms import rms_norm


class HeterogeneousAttention(SelfAttention):
    """`SelfAttention` whose `linear_qkv` gives queries, and such keys and values as the layer has; values are normed.

    Args:
        layers: how the model's layers differ.
    """

    states: LayerStates  # set by the model, which shares one between its layers

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *args: Any,
        layers: HeterogeneousLayers,
        **kwargs: Any,
    ) -> None:
        if config.fused_single_qkv_rope:
            raise BridgeError("heterogeneous layers cannot rotate in the projection; set fused_single_qkv_rope=False")
        self.layer, sources = layer_number - 1, layers.key_value_sources
        self.source, self.gives = sources[self.layer], self.layer in sources
        self.own = 0 if self.source is not None else 1 if layers.value_is_key[self.layer] else 2
        heads = config.num_attention_heads + self.own * (config.num_query_groups or 0)
        build, rows = submodules.linear_qkv, heads * (config.kv_channels or 0)
        changes: dict[str, Any] = {"linear_qkv": lambda inputs, _, **options: build(inputs, rows, **options)}
        if self.own == 0:
            changes["k_layernorm"] = IdentityOp
        super().__init__(config, dataclasses.replace(submodules, **changes), layer_number, *args, **kwargs)

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, `[sequence, batch, this rank's heads, size]`."""
        mixed, _ = self.linear_qkv(hidden_states)
        if self.source is not None:
            query = mixed.unflatten(-1, (-1, self.hidden_size_per_attention_head))
            return self.q_layernorm(query), *self.states.keys_values[self.source]
        query, key, value = self._split(mixed)
        key, value = self.k_layernorm(key), rms_norm(value, self.config.layernorm_epsilon)
        if self.gives:
            self.states.keys_values[self.layer] = key, value
        return self.q_layernorm(query), key, value

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups, size = self.config.num_query_groups or 0, self.hidden_size_per_attention_head
        queries = self.config.num_attention_heads // groups
        sharing = max(self.world_size // groups, 1)  # ranks that share a key/value head, each with some of its queries
        rank = self.pg_collection.tp.rank()
        if sharing > 1:
            whole = all_gather_last_dim_from_tensor_parallel_region(mixed, group=self.pg_collection.tp)
            mixed = whole.chunk(groups, -1)[rank // sharing]
        by_group = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1, size))
        query, *own = by_group.split([queries, *[1] * self.own], 3)
        query = query.flatten(2, 3).chunk(sharing, 2)[rank % sharing]
        key, value = own[0].squeeze(3), own[-1].squeeze(3)
        return query, key, value
