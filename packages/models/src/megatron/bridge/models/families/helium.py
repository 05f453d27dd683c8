"""Helium 1 of Kyutai (2025)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.models.families.llama import LlamaBridge


class HeliumBridge(LlamaBridge):
    """`HeliumForCausalLM`: Llama that turns neighbouring channels together."""

    def output_bias(self) -> bool:
        return False

    def differences(self) -> Mapping[str, Any]:
        return {"rotary_interleaved": True}
