"""EXAONE 4.0 of LG AI Research (arXiv:2507.11407)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.models.families.dense import DenseBridge


class Exaone4Bridge(DenseBridge):
    """`Exaone4ForCausalLM`: norms behind attention and MLP only; layers without a window do not turn."""

    def qk_norm(self) -> bool:
        return True

    def differences(self) -> Mapping[str, Any]:
        mixed = self.hf_config.sliding_window is not None
        unturned = [int(mixed and window is None) for window in self.windows()]
        return {"pre_norm": False, "post_norm": True, "no_rope_freq": unturned}
