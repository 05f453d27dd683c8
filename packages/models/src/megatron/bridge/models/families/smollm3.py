"""SmolLM3 of Hugging Face (2025)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.models.families.llama import LlamaBridge


class SmolLM3Bridge(LlamaBridge):
    """`SmolLM3ForCausalLM`: Llama in which some layers do not turn queries and keys (`no_rope_layers`: 0)."""

    def differences(self) -> Mapping[str, Any]:
        return {"no_rope_freq": [1 - int(turned) for turned in self.hf_config.no_rope_layers]}
