"""Decoders with multi-latent attention, as in DeepSeek-V2 (arXiv:2405.04434)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.conversion import hf_config
from megatron.bridge.conversion.table import WeightRule
from megatron.bridge.errors import BridgeError
from megatron.bridge.models import latent_fragments
from megatron.bridge.models.families.dense import DenseBridge, shared_fields

if TYPE_CHECKING:
    from megatron.bridge.models.mla_provider import MLAModelProvider

# Megatron field <- Hugging Face field, beside those of other decoders. Keys have no heads of their own to group.
LATENT_FIELDS = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}


class LatentAttentionBridge(DenseBridge):
    """The Llama layout with multi-latent attention; to be named before a bridge that says what the MLPs are."""

    shared_fields: ClassVar[Mapping[str, str]] = shared_fields(without=["num_query_groups"], **LATENT_FIELDS)
    # The norms of latents have this epsilon, whatever the configuration says of other norms.
    latent_epsilon: ClassVar[float] = 1e-6

    def provider_class(self) -> "type[MLAModelProvider]":
        from megatron.bridge.models.mla_provider import MLAModelProvider

        return MLAModelProvider

    def interleaved(self) -> bool:
        """Neighbouring channels turn together."""
        return bool(self.hf_config.rope_interleave)

    def qk_norm(self) -> bool:
        return True  # of the latents

    def rope_fields(self) -> dict[str, Any]:
        config, fields = self.hf_config, super().rope_fields()
        if int(hf_config.head_dim(config) * fields["rotary_percent"]) != config.qk_rope_head_dim:
            raise BridgeError(
                f"config.json: partial_rotary_factor={fields['rotary_percent']} of head_dim={config.head_dim} under "
                f"multi-latent attention, which turns qk_rope_head_dim={config.qk_rope_head_dim} channels"
            )
        scaling = dict(fields["rope_parameters"] or {})
        scaling.pop("partial_rotary_factor", None)
        # Scores are scaled by the square of what YaRN calls mscale.
        scored = bool(scaling.get("mscale_all_dim"))
        return {
            **fields,
            "rotary_percent": 1.0,
            "rope_parameters": scaling or None,
            "rope_type": "yarn" if scaling else "rope",
            "rotary_scaling_factor": float(scaling["factor"]) if scored else 1.0,
            "mscale_all_dim": float(scaling["mscale_all_dim"]) if scored else 0.0,
        }

    def differences(self) -> Mapping[str, Any]:
        if self.hf_config.attention_bias:
            raise BridgeError("config.json: attention_bias=True under multi-latent attention is not supported")
        epsilon = self.latent_epsilon
        return {} if epsilon == self.hf_config.rms_norm_eps else {"latent_norm_epsilon": epsilon}

    def pre_norm_rules(self, differences: Mapping[str, Any]) -> list[WeightRule]:
        return latent_fragments.latent_pre_norms(self.names)

    def attention_rules(self, differences: Mapping[str, Any]) -> list[WeightRule]:
        config = self.hf_config
        return latent_fragments.latent_attention(
            query_latent=config.q_lora_rank is not None,
            kept=config.qk_nope_head_dim,
            kv_latent=config.kv_lora_rank,
            rotated=config.qk_rope_head_dim,
            interleaved=self.interleaved(),
            names=self.names,
        )
