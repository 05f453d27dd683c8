"""MPT of MosaicML (2023): positions by ALiBi (arXiv:2108.12409)."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.activations import activation
from megatron.bridge.models.families.dense import DenseBridge
from megatron.bridge.models.fragments import HFNames


class MptBridge(DenseBridge):
    """`MptForCausalLM`: LayerNorms without biases, and no biases elsewhere; q, k and v in one weight."""

    shared_fields: ClassVar[Mapping[str, str]] = {
        "num_layers": "n_layers",
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "layernorm_epsilon": "layer_norm_epsilon",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_seq_len",
        "share_embeddings_and_output_weights": "tie_word_embeddings",
        "init_method_std": "initializer_range",
        "hidden_dropout": "resid_pdrop",
    }
    names = HFNames(
        embedding="transformer.wte",
        layer="transformer.blocks.{l}",
        final_norm="transformer.norm_f",
        input_norm="norm_1",
        mlp_norm="norm_2",
        qkv=("attn.Wqkv",),
        attention_output="attn.out_proj",
        fc1=("ffn.up_proj",),
        fc2="ffn.down_proj",
    )
    normalization = "LayerNorm"
    gated = False

    def rope_fields(self) -> dict[str, Any]:
        return {"position_embedding_type": "none"}

    def activation_function(self) -> Any:
        return activation("gelu")

    def differences(self) -> Mapping[str, Any]:
        config, attention = self.hf_config, self.hf_config.attn_config
        needed = {"alibi": True, "clip_qkv": None, "qk_ln": False, "prefix_lm": False}
        other = {name: getattr(attention, name) for name, value in needed.items() if getattr(attention, name) != value}
        if other:
            raise BridgeError(f"config.json: attn_config {other} is not supported in MptForCausalLM, it needs {needed}")
        return {
            "ffn_hidden_size": config.expansion_ratio * config.d_model,
            "attention_dropout": attention.attn_pdrop,
            "softmax_scale": attention.softmax_scale,
            "alibi_slopes": mpt_slopes(config.n_heads, attention.alibi_bias_max),
        }


def mpt_slopes(heads: int, steepest: int) -> list[float]:
    """Slopes 2^(-steepest k / n); where the heads are no power of two, every other one of more, odd places first."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2 ** (-steepest * place / power) for place in range(1, power + 1)]
    return slopes if power == heads else (slopes[1::2] + slopes[::2])[:heads]
