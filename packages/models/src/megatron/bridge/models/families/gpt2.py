"""GPT-2 (2019) of OpenAI, and StarCoder 1 (arXiv:2305.06161), whose layout GPTBigCode is."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.dense import BiasedBridge
from megatron.bridge.models.fragments import HFNames

_FIELDS: dict[str, str] = {
    "num_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "layernorm_epsilon": "layer_norm_epsilon",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "n_positions",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
    "init_method_std": "initializer_range",
    "attention_dropout": "attn_pdrop",
    "hidden_dropout": "resid_pdrop",
}
_NAMES: dict[str, Any] = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "layer": "transformer.h.{l}",
    "final_norm": "transformer.ln_f",
    "input_norm": "ln_1",
    "mlp_norm": "ln_2",
    "qkv": ("attn.c_attn",),
    "attention_output": "attn.c_proj",
    "fc1": ("mlp.c_fc",),
    "fc2": "mlp.c_proj",
}


class GPT2Bridge(BiasedBridge):
    """`GPT2LMHeadModel`: learned positions, LayerNorms, biases, and matrices stored transposed."""

    shared_fields = _FIELDS
    names = HFNames(**_NAMES, conv1d=True)
    activation_field = "activation_function"

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        if not config.scale_attn_weights or getattr(config, "scale_attn_by_inverse_layer_idx", False):
            raise BridgeError(
                "config.json: scale_attn_weights=False and scale_attn_by_inverse_layer_idx=True are not supported"
            )
        return {"ffn_hidden_size": config.n_inner or 4 * config.n_embd}

    def rope_fields(self) -> dict[str, Any]:
        return {"position_embedding_type": "learned_absolute"}

    def ignored(self) -> tuple[str, ...]:
        """Masks that old checkpoints stored."""
        return ("transformer.h.{l}.attn.bias", "transformer.h.{l}.attn.masked_bias")


class GPTBigCodeBridge(GPT2Bridge):
    """`GPTBigCodeForCausalLM`: all query heads share one key and value head, or each has its own."""

    names = HFNames(**_NAMES, grouped_qkv=True)

    def differences(self) -> Mapping[str, Any]:
        # Either way the one weight is laid out as Megatron's: all queries, the key, the value; or these three by head.
        groups = 1 if self.hf_config.multi_query else self.hf_config.n_head
        return {**super().differences(), "num_query_groups": groups}
