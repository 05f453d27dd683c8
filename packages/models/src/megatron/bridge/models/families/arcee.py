"""Arcee AFM (2025)."""

from megatron.bridge.models.families.llama import LlamaBridge
from megatron.bridge.models.fragments import HFNames


class ArceeBridge(LlamaBridge):
    """`ArceeForCausalLM`: Llama with an MLP that has no gate."""

    names = HFNames(fc1=("mlp.up_proj",))
    gated = False
