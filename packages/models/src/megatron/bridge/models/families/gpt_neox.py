"""GPT-NeoX and Pythia of EleutherAI (arXiv:2204.06745, arXiv:2304.01373), and Persimmon of Adept (2023)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.models.families.dense import BiasedBridge, shared_fields
from megatron.bridge.models.fragments import HFNames


class GPTNeoXBridge(BiasedBridge):
    """`GPTNeoXForCausalLM`: attention and MLP side by side, each with its LayerNorm; q, k, v in one weight by head."""

    shared_fields = shared_fields(
        without=["num_query_groups"], layernorm_epsilon="layer_norm_eps", hidden_dropout="hidden_dropout"
    )
    names = HFNames(
        embedding="gpt_neox.embed_in",
        layer="gpt_neox.layers.{l}",
        final_norm="gpt_neox.final_layer_norm",
        output="embed_out",
        qkv=("attention.query_key_value",),
        grouped_qkv=True,
        attention_output="attention.dense",
        fc1=("mlp.dense_h_to_4h",),
        fc2="mlp.dense_4h_to_h",
    )

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    output_bias = qkv_bias

    def differences(self) -> Mapping[str, Any]:
        return {"parallel_block": bool(self.hf_config.use_parallel_residual)}

    def ignored(self) -> tuple[str, ...]:
        """Masks and frequencies that checkpoints made before transformers 4.32 stored."""
        return tuple(
            f"gpt_neox.layers.{{l}}.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
        )


class PersimmonBridge(GPTNeoXBridge):
    """`PersimmonForCausalLM`: one after the other, with norms on queries and keys."""

    names = HFNames(
        final_norm="model.final_layernorm",
        qkv=("self_attn.query_key_value",),
        grouped_qkv=True,
        attention_output="self_attn.dense",
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        fc1=("mlp.dense_h_to_4h",),
        fc2="mlp.dense_4h_to_h",
    )

    def qkv_bias(self) -> bool:
        return True

    output_bias = qkv_bias

    def qk_norm(self) -> bool:
        return bool(self.hf_config.qk_layernorm)

    def differences(self) -> Mapping[str, Any]:
        return {}

    def ignored(self) -> tuple[str, ...]:
        """Frequencies that checkpoints made before transformers 4.32 stored."""
        return ("model.layers.{l}.self_attn.rotary_emb.inv_freq",)
