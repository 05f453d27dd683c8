"""LoRA as Hugging Face peft has it on fused layers: a pair of matrices for each of q, k, v, gate and up projection."""

from dataclasses import dataclass

from megatron.bridge.peft.lora import LoRA


@dataclass(kw_only=True)
class CanonicalLoRA(LoRA):
    """LoRA with `separate_parts`: `target_modules=["q_proj", "v_proj"]` adapts these and leaves `k_proj` as it is.

    Needs a model that comes from an `AutoBridge`, whose weight table knows the parts.
    """

    separate_parts: bool = True
