"""Parameter-efficient fine-tuning methods on Megatron-Core models. Nothing heavy is imported before one is applied."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.bridge.peft.base import PEFT as PEFT
    from megatron.bridge.peft.base import PEFT_METHODS as PEFT_METHODS
    from megatron.bridge.peft.bitfit import BitFit as BitFit
    from megatron.bridge.peft.canonical_lora import CanonicalLoRA as CanonicalLoRA
    from megatron.bridge.peft.dora import DoRA as DoRA
    from megatron.bridge.peft.ia3 import IA3 as IA3
    from megatron.bridge.peft.lora import LoRA as LoRA
    from megatron.bridge.peft.report import Binding as Binding
    from megatron.bridge.peft.report import BindingReport as BindingReport

_HOMES = {
    "PEFT": "megatron.bridge.peft.base",
    "PEFT_METHODS": "megatron.bridge.peft.base",
    "BitFit": "megatron.bridge.peft.bitfit",
    "CanonicalLoRA": "megatron.bridge.peft.canonical_lora",
    "DoRA": "megatron.bridge.peft.dora",
    "IA3": "megatron.bridge.peft.ia3",
    "LoRA": "megatron.bridge.peft.lora",
    "Binding": "megatron.bridge.peft.report",
    "BindingReport": "megatron.bridge.peft.report",
}

__all__ = ["IA3", "PEFT", "PEFT_METHODS", "Binding", "BindingReport", "BitFit", "CanonicalLoRA", "DoRA", "LoRA"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
