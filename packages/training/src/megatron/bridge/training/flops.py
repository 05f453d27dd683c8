"""How many floating-point operations a model's step takes, from its configuration.

What the mathematics asks for, as model FLOPs utilisation counts it (PaLM, arXiv:2204.02311, appendix B): matrix
products alone, each multiply-add as two operations; attention over the whole sequence, whatever mask is used; the
backward pass twice the forward pass; nothing for activations that are computed again.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

# A forward pass, and one backward pass each for inputs and weights.
_PASSES = 3


def step_flops(model: Any, sequences: int) -> float | None:
    """Operations of a step over `sequences` full sequences, on all ranks together; None where no formula is known.

    There is one for GPT models: dense and with experts, with grouped-query and multi-latent attention, with prediction
    layers. There is none for state-space, linear-attention, encoder-decoder and vision models.
    """
    forward = forward_flops_per_token(model)
    return None if forward is None else _PASSES * forward * sequences * float(model.seq_length)


def forward_flops_per_token(model: Any) -> float | None:
    """Operations of the forward pass per token of a full sequence; None where no formula is known."""
    from megatron.bridge.models import GPTModelProvider
    from megatron.bridge.models.mla_provider import MLAModelProvider

    if type(model) not in (GPTModelProvider, MLAModelProvider) or model.num_labels is not None:
        return None
    config = model.transformer_config()
    if config.experimental_attention_variant is not None or config.moe_latent_size is not None:
        return None
    return config_flops_per_token(config, model.seq_length, model.padded_vocab_size)


def config_flops_per_token(config: Any, length: int, vocabulary: int) -> float:
    """Operations of the forward pass per token, from a config or anything with its fields. Torch-free.

    Args:
        config: sizes of the model, as Megatron-Core names them.
        length: tokens of a sequence.
        vocabulary: rows of the output layer.
    """
    predicted, kinds = config.mtp_num_layers or 0, layers_with_experts(config)
    experts = sum(kinds)
    products = experts * _layer(config, length, True) if experts else 0
    products += (len(kinds) - experts) * _layer(config, length, False)
    # A prediction layer joins the hidden state with the next embedding, has one layer, and uses the output layer again.
    products += predicted * (_layer(config, length, kinds[-1]) + 2 * config.hidden_size**2)
    products += (1 + predicted) * config.hidden_size * vocabulary
    return 2.0 * products


def attention_flops_per_token(config: Any, length: int) -> float:
    """The share of `config_flops_per_token` that scores and their products with values take; it grows with `length`."""
    layers = config.num_layers + (config.mtp_num_layers or 0)
    attention = _latent_attention if config.multi_latent_attention else _attention
    return 2.0 * layers * (attention(config, length) - attention(config, 0))


def layers_with_experts(config: Any) -> list[bool]:
    """Of each layer, whether it has experts."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    if isinstance(config.moe_layer_freq, int):
        return [layer % config.moe_layer_freq == 0 for layer in range(config.num_layers)]
    return [bool(flag) for flag in config.moe_layer_freq]


def _layer(config: "TransformerConfig", length: int, experts: bool) -> int:
    """Multiply-adds of one layer per token."""
    attention = _latent_attention if config.multi_latent_attention else _attention
    return attention(config, length) + (_experts(config) if experts else _mlp(config, config.ffn_hidden_size))


def _attention(config: "TransformerConfig", length: int) -> int:
    query = config.kv_channels * config.num_attention_heads
    key_value = 2 * config.kv_channels * config.num_query_groups
    gate = query if config.attention_output_gate else 0
    projections = config.hidden_size * (query + key_value + gate + query)
    return projections + 2 * length * query


def _latent_attention(config: Any, length: int) -> int:
    hidden, heads = config.hidden_size, config.num_attention_heads
    query_width = heads * (config.qk_head_dim + config.qk_pos_emb_head_dim)
    rank = config.q_lora_rank
    query = hidden * query_width if rank is None else rank * (hidden + query_width)
    down = hidden * (config.kv_lora_rank + config.qk_pos_emb_head_dim)
    up = config.kv_lora_rank * heads * (config.qk_head_dim + config.v_head_dim)
    return query + down + up + length * (query_width + heads * config.v_head_dim) + heads * config.v_head_dim * hidden


def _mlp(config: "TransformerConfig", width: int) -> int:
    return (3 if config.gated_linear_unit else 2) * config.hidden_size * width


def _experts(config: "TransformerConfig") -> int:
    """Those a token is sent to, the router, and what all tokens share."""
    routed = config.moe_router_topk * _mlp(config, config.moe_ffn_hidden_size)
    shared = _mlp(config, config.moe_shared_expert_intermediate_size or 0)
    gate = config.hidden_size if config.moe_shared_expert_gate else 0
    return routed + shared + gate + config.hidden_size * config.num_moe_experts
