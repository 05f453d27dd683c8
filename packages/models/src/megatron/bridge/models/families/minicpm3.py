"""MiniCPM3 of OpenBMB (arXiv:2404.06395)."""

import math
from collections.abc import Mapping
from typing import Any

from megatron.bridge.models.families.latent import LatentAttentionBridge


class MiniCPM3Bridge(LatentAttentionBridge):
    """`MiniCPM3ForCausalLM`: multi-latent attention, with factors on embeddings, residual branches and logits."""

    def interleaved(self) -> bool:
        return False

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        return {
            **super().differences(),
            "embedding_multiplier": float(config.scale_emb),
            "residual_multiplier": config.scale_depth / math.sqrt(config.num_hidden_layers),
            "logits_multiplier": 1 / config.logits_scaling,
        }
