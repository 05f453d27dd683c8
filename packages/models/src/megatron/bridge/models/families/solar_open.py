"""Solar Open 100B."""

from typing import ClassVar

from megatron.bridge.models.families.sigmoid_moe import SigmoidMoEBridge


class SolarOpenBridge(SigmoidMoEBridge):
    """`SolarOpenForCausalLM`: experts in every layer, so that no size of a dense MLP is stated."""

    shared_fields: ClassVar[dict[str, str]] = {
        field: name for field, name in SigmoidMoEBridge.shared_fields.items() if field != "ffn_hidden_size"
    }
