"""What of a model's definition, and of its layout, decides about sizes; under Megatron-Core's names."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron.bridge.errors import BridgeError


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder's sizes at a parallel layout: fields of `GPTModelProvider` that count, with its names and meaning."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    seq_length: int
    ffn_hidden_size: int | None = None
    num_query_groups: int | None = None
    kv_channels: int | None = None
    make_vocab_size_divisible_by: int = 128
    share_embeddings_and_output_weights: bool = False
    position_embedding_type: str = "rope"
    max_position_embeddings: int | None = None
    position_offset: int = 0
    normalization: str = "LayerNorm"
    gated_linear_unit: bool = False
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    add_attention_output_bias: bool | None = None
    add_mlp_bias: bool | None = None
    output_bias: bool = False
    qk_layernorm: bool = False
    qk_norm_over: str = "channels"
    attention_output_gate: bool = False
    softmax_type: str = "vanilla"
    pre_norm: bool = True
    post_norm: bool = False
    shared_pre_norm: bool = False
    norm_weight: bool = True
    norm_bias: bool = True
    embedding_norm: bool = False
    # Mixtures of experts.
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_layer_freq: int | list[int] = 1
    moe_router_topk: int = 2
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    # Multi-latent attention.
    multi_latent_attention: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_head_dim: int = 128
    qk_pos_emb_head_dim: int = 64
    v_head_dim: int = 128
    mtp_num_layers: int | None = None
    # What a model may have that is not planned for, and must not.
    experimental_attention_variant: str | None = None
    moe_latent_size: int | None = None
    heterogeneous_layers: Any = None
    mamba_beside_attention: Any = None
    trained_activation: str | None = None
    num_labels: int | None = None
    # The layout.
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False
    pipeline_model_parallel_layout: Any = None
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None

    def __post_init__(self) -> None:
        """Fill in what follows from the rest, as Megatron-Core does."""
        derived = {
            "ffn_hidden_size": 4 * self.hidden_size,
            "num_query_groups": self.num_attention_heads,
            "kv_channels": self.hidden_size // self.num_attention_heads,
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.num_moe_experts is not None and self.moe_ffn_hidden_size is None:
            object.__setattr__(self, "moe_ffn_hidden_size", self.ffn_hidden_size)

    def replace(self, **changes: Any) -> "ModelShape":
        """The same with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        multiple = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple

    @property
    def expert_tensor(self) -> int:
        """Ranks that divide each expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @cached_property
    def has_experts(self) -> list[bool]:
        """Of each layer, whether its MLP is a mixture of experts."""
        from megatron.bridge.training.flops import layers_with_experts

        return layers_with_experts(self)


_NAMES = [field.name for field in dataclasses.fields(ModelShape)]
# Fields that nothing here counts: a model that sets one is refused.
_NOT_PLANNED = (
    "experimental_attention_variant",
    "moe_latent_size",
    "heterogeneous_layers",
    "mamba_beside_attention",
    "trained_activation",
    "num_labels",
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
)


def shape_of(provider: Any) -> ModelShape:
    """The sizes of a provider, or of anything that has its fields.

    Raises:
        BridgeError: the model has parts whose sizes are not known here.
    """
    kind = type(provider).__name__
    if kind not in ("GPTModelProvider", "MLAModelProvider", "ProviderFields"):
        raise BridgeError(f"{kind} cannot be planned: GPT models can, dense and with experts; leave the planner out")
    held = {name: getattr(provider, name) for name in _NAMES if hasattr(provider, name)}
    other = [name for name in _NOT_PLANNED if held.get(name) is not None]
    if other:
        raise BridgeError(f"a model with {', '.join(other)} cannot be planned: nothing here knows its sizes")
    return ModelShape(**held)
