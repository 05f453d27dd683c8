"""Mamba (arXiv:2312.00752), Falcon Mamba (arXiv:2410.05355) and Mamba-2 (arXiv:2405.21060)."""

from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.conversion.table import WeightRule, WeightTable
from megatron.bridge.models import fragments, ssm_fragments
from megatron.bridge.models.families.dense import refuse_other_values

if TYPE_CHECKING:
    from megatron.bridge.models.hybrid_provider import HybridModelProvider

# What Megatron-Core's mixer is made with; another value would be another model.
_ONLY = {"hidden_act": "silu", "use_bias": False, "use_conv_bias": True}
_NAMES = fragments.HFNames(embedding="backbone.embeddings", layer="backbone.layers.{l}", final_norm="backbone.norm_f")
_SHARED = {
    "hidden_size": "hidden_size",
    "layernorm_epsilon": "layer_norm_epsilon",
    "vocab_size": "vocab_size",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
    "init_method_std": "initializer_range",
    "mamba_state_dim": "state_size",
    "mamba_conv_width": "conv_kernel",
    "fp32_residual_connection": "residual_in_fp32",
}


class MambaBridge(MegatronModelBridge):
    """`MambaForCausalLM`: nothing but layers of the first Mamba."""

    shared_fields: ClassVar[dict[str, str]] = {
        **_SHARED,
        "mamba_num_heads": "intermediate_size",
        "mamba_step_rank": "time_step_rank",
    }

    def mixer_fields(self) -> dict[str, Any]:
        """Provider fields of the mixer."""
        return {"mamba_head_dim": 1, "mamba_num_groups": 1}

    def mixer_rules(self, hf: str) -> list[WeightRule]:
        """The weights of the mixer called `hf`."""
        return ssm_fragments.mamba1(hf)

    def provider_bridge(self) -> "HybridModelProvider":
        from megatron.bridge.models.hybrid_provider import HybridModelProvider

        config = self.hf_config
        refuse_other_values(config, _ONLY)
        fields: dict[str, Any] = {
            **self.shared_values(),
            "num_layers": config.num_hidden_layers,
            "hybrid_layer_pattern": "M" * config.num_hidden_layers,
            "normalization": "RMSNorm",
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            # There is no attention, but Megatron-Core's configuration wants heads all the same.
            "num_attention_heads": config.hidden_size,
            **self.mixer_fields(),
        }
        return HybridModelProvider(**fields)

    def mapping_registry(self) -> WeightTable:
        config, tied = self.hf_config, bool(self.hf_config.tie_word_embeddings)
        return WeightTable.of(
            fragments.embedding(config.vocab_size, _NAMES),
            ssm_fragments.layer_norms("M", f"{_NAMES.layer}.norm"),
            self.mixer_rules(f"{_NAMES.layer}.mixer"),
            fragments.head(config.vocab_size, tied=tied, own_norm="decoder.final_norm", names=_NAMES),
            tied=fragments.tied_head(tied=tied, names=_NAMES),
        )


class FalconMambaBridge(MambaBridge):
    """`FalconMambaForCausalLM`: with norms, without weights, of what steps, B and C are made from."""

    def mixer_fields(self) -> dict[str, Any]:
        return {**super().mixer_fields(), "mamba_step_norm_eps": self.hf_config.mixer_rms_eps}


class Mamba2Bridge(MambaBridge):
    """`Mamba2ForCausalLM`: nothing but layers of the second Mamba."""

    shared_fields: ClassVar[dict[str, str]] = {
        **_SHARED,
        "mamba_num_heads": "num_heads",
        "mamba_head_dim": "head_dim",
        "mamba_num_groups": "n_groups",
    }

    def mixer_fields(self) -> dict[str, Any]:
        return {"mamba_step_limit": tuple(self.hf_config.time_step_limit)}

    def mixer_rules(self, hf: str) -> list[WeightRule]:
        config = self.hf_config
        return ssm_fragments.mamba2(
            hf,
            heads=config.num_heads,
            channels=config.num_heads * config.head_dim,
            groups=config.n_groups,
            state=config.state_size,
        )
