"""GPT-Neo of EleutherAI (2021)."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.bridge.models.families.dense import shared_fields
from megatron.bridge.models.families.gpt2 import GPT2Bridge
from megatron.bridge.models.fragments import HFNames


class GPTNeoBridge(GPT2Bridge):
    """`GPTNeoForCausalLM`: GPT-2 with windows on `local` layers, and scores that are not scaled."""

    shared_fields = shared_fields(
        without=["ffn_hidden_size", "num_query_groups"],
        num_layers="num_layers",
        num_attention_heads="num_heads",
        layernorm_epsilon="layer_norm_epsilon",
        hidden_dropout="resid_dropout",
    )
    names = HFNames(
        embedding="transformer.wte",
        positions="transformer.wpe",
        layer="transformer.h.{l}",
        final_norm="transformer.ln_f",
        input_norm="ln_1",
        mlp_norm="ln_2",
        qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        attention_output="attn.attention.out_proj",
        fc1=("mlp.c_fc",),
        fc2="mlp.c_proj",
    )

    def qkv_bias(self) -> bool:
        return False

    def windows(self) -> Sequence[int | None]:
        config = self.hf_config
        return [config.window_size if kind == "local" else None for kind in config.attention_layers]

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        return {"ffn_hidden_size": config.intermediate_size or 4 * config.hidden_size, "softmax_scale": 1.0}

    def ignored(self) -> tuple[str, ...]:
        """Masks that old checkpoints stored."""
        return tuple(f"transformer.h.{{l}}.attn.attention.{name}" for name in ("bias", "masked_bias"))
