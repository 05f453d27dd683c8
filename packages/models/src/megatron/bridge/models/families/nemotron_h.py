"""Nemotron-H and Nemotron 3 of NVIDIA (arXiv:2504.03624)."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.table import WeightRule, WeightTable
from megatron.bridge.models import fragments, ssm_fragments
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.dense import DenseBridge, refuse_other_values, shared_fields
from megatron.bridge.models.routing import balancing, sigmoid_routing

if TYPE_CHECKING:
    from megatron.bridge.models.hybrid_provider import HybridModelProvider

_ONLY = {
    "mamba_hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
    "attention_bias": False,
    "mlp_bias": False,
    "mamba_proj_bias": False,
    "moe_latent_size": None,
}
_MIXER = "backbone.layers.{l}.mixer"
_NAMES = fragments.HFNames(
    embedding="backbone.embeddings",
    layer="backbone.layers.{l}",
    final_norm="backbone.norm_f",
    qkv=("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
    attention_output="mixer.o_proj",
    fc1=("mixer.up_proj",),
    fc2="mixer.down_proj",
)


class NemotronHBridge(DenseBridge):
    """`NemotronHForCausalLM`: each layer is Mamba-2, attention without positions, an MLP or a mixture of experts."""

    shared_fields = shared_fields(
        without=["num_layers"],
        layernorm_epsilon="layer_norm_epsilon",
        hidden_dropout="hidden_dropout",
        mamba_num_heads="mamba_num_heads",
        mamba_head_dim="mamba_head_dim",
        mamba_num_groups="n_groups",
        mamba_state_dim="ssm_state_size",
        fp32_residual_connection="residual_in_fp32",
    )
    names = _NAMES
    gated = False
    activation_field = "mlp_hidden_act"

    @property
    def pattern(self) -> str:
        """The kinds of layers, by Megatron-Core's characters."""
        return str(self.hf_config.hybrid_override_pattern)

    def windows(self) -> Sequence[int | None]:
        return []

    def rope_fields(self) -> dict[str, Any]:
        return {}

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        refuse_other_values(config, _ONLY)
        fields = {
            "num_layers": len(self.pattern),
            "hybrid_layer_pattern": self.pattern,
            "mamba_conv_width": config.conv_kernel,
            # transformers reads the lower limit of random initial steps as a limit of all steps.
            "mamba_step_limit": (config.time_step_min, math.inf),
        }
        if "E" not in self.pattern:
            return fields
        return {
            **fields,
            **sigmoid_routing(
                config.num_experts_per_tok,
                normalised=config.norm_topk_prob,
                scaling=config.routed_scaling_factor,
                groups=config.n_group,
                chosen_groups=config.topk_group,
            ),
            **balancing(None),
            "num_moe_experts": config.n_routed_experts,
            "moe_ffn_hidden_size": config.moe_intermediate_size,
            "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
            "moe_token_dispatcher_type": "alltoall",
        }

    def provider_bridge(self) -> "HybridModelProvider":
        from megatron.bridge.models.hybrid_provider import HybridModelProvider

        return HybridModelProvider(**self.provider_fields())

    def mapping_registry(self) -> WeightTable:
        config, tied = self.hf_config, bool(self.hf_config.tie_word_embeddings)
        return WeightTable.of(
            fragments.embedding(config.vocab_size, _NAMES),
            ssm_fragments.layer_norms(self.pattern, f"{_NAMES.layer}.norm"),
            *(rules for kind, rules in self._parts().items() if kind in self.pattern),
            fragments.head(config.vocab_size, tied=tied, own_norm="decoder.final_norm", names=_NAMES),
            tied=fragments.tied_head(tied=tied, names=_NAMES),
        )

    def _parts(self) -> dict[str, list[WeightRule]]:
        """The weights of each kind of layer."""
        config = self.hf_config
        mamba = ssm_fragments.mamba2(
            _MIXER,
            heads=config.mamba_num_heads,
            channels=config.mamba_num_heads * config.mamba_head_dim,
            groups=config.n_groups,
            state=config.ssm_state_size,
        )
        attention = fragments.attention(
            heads=config.num_attention_heads,
            groups=config.num_key_value_heads,
            head_dim=config.head_dim,
            names=_NAMES,
        )
        mixture = [
            *moe.router(f"{_MIXER}.gate", selection_bias=f"{_MIXER}.gate.e_score_correction_bias"),
            *moe.plain_shared_experts(f"{_MIXER}.shared_experts"),
            *moe.plain_experts(f"{_MIXER}.experts.{{e}}"),
        ]
        return {"M": mamba, "*": attention, "-": fragments.plain_mlp(names=_NAMES), "E": mixture}
