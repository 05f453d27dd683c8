"""Mamba-2 (arXiv:2405.21060)."""

from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.conversion.table import WeightTable
from megatron.bridge.models import fragments, ssm_fragments
from megatron.bridge.models.families.dense import refuse_other_values

if TYPE_CHECKING:
    from megatron.bridge.models.hybrid_provider import HybridModelProvider

# What Megatron-Core's mixer is made with; another value would be another model.
ONLY = {"hidden_act": "silu", "use_bias": False, "use_conv_bias": True}
NAMES = fragments.HFNames(embedding="backbone.embeddings", layer="backbone.layers.{l}", final_norm="backbone.norm_f")


class Mamba2Bridge(MegatronModelBridge):
    """`Mamba2ForCausalLM`: nothing but Mamba-2 layers."""

    shared_fields: ClassVar[dict[str, str]] = {
        "hidden_size": "hidden_size",
        "layernorm_epsilon": "layer_norm_epsilon",
        "vocab_size": "vocab_size",
        "share_embeddings_and_output_weights": "tie_word_embeddings",
        "init_method_std": "initializer_range",
        "mamba_num_heads": "num_heads",
        "mamba_head_dim": "head_dim",
        "mamba_num_groups": "n_groups",
        "mamba_state_dim": "state_size",
        "fp32_residual_connection": "residual_in_fp32",
    }

    def provider_bridge(self) -> "HybridModelProvider":
        from megatron.bridge.models.hybrid_provider import HybridModelProvider

        config = self.hf_config
        refuse_other_values(config, ONLY)
        fields: dict[str, Any] = {
            **self.shared_values(),
            "num_layers": config.num_hidden_layers,
            "hybrid_layer_pattern": "M" * config.num_hidden_layers,
            "mamba_step_limit": tuple(config.time_step_limit),
            "normalization": "RMSNorm",
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            # There is no attention, but Megatron-Core's configuration wants heads all the same.
            "num_attention_heads": config.num_heads,
        }
        return HybridModelProvider(**fields)

    def mapping_registry(self) -> WeightTable:
        config, layer = self.hf_config, NAMES.layer
        tied = bool(config.tie_word_embeddings)
        return WeightTable.of(
            fragments.embedding(config.vocab_size, NAMES),
            ssm_fragments.layer_norms("M", f"{layer}.norm"),
            ssm_fragments.mamba2(
                f"{layer}.mixer",
                heads=config.num_heads,
                channels=config.num_heads * config.head_dim,
                groups=config.n_groups,
                state=config.state_size,
            ),
            fragments.head(config.vocab_size, tied=tied, own_norm="decoder.final_norm", names=NAMES),
            tied=fragments.tied_head(tied=tied, names=NAMES),
        )
