"""`just mimo-towers`: what a divided tower takes on each of two ranks, beside one that is whole on both.

CLIP's ViT-B/16 up to its last layer but one, as LLaVA takes it, forwards and backwards on four images; one thread each.
"""

import sys
import time
from typing import Any

import torch

from megatron.bridge.testing import import_engine, run_ranks

SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SIZES |= {"patch_size": 16, "image_size": 224}
IMAGES, TIMES = 4, 5
CASES = (("transformers", 1), ("transformers", 2), ("megatron", 1), ("megatron", 2))


def taken(implementation: str) -> tuple[float, float, float, float]:
    """Millions of weights, GFLOP, MiB kept for the backward pass and fastest seconds, on this rank."""
    from torch.utils.flop_counter import FlopCounterMode

    from megatron.bridge.mimo.towers import ClipTower

    tower = ClipTower(token_id=1, hf_config=SIZES, feature_layer=-2, implementation=implementation)
    module = _built(tower)
    weights = {each.untyped_storage().data_ptr() for each in module.parameters()}
    pixels = {"pixel_values": torch.randn(IMAGES, 3, SIZES["image_size"], SIZES["image_size"])}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def run() -> float:
        began = time.perf_counter()
        torch.stack(list(tower.encode(module, pixels))).square().mean().backward()
        return time.perf_counter() - began

    with FlopCounterMode(display=False) as counted, torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        run()
    activations = sum(size for place, size in kept.items() if place not in weights)
    number = sum(each.numel() for each in module.parameters())
    return number / 1e6, counted.get_total_flops() / 1e9, activations / 2**20, min(run() for _ in range(TIMES))


def _built(tower: Any) -> torch.nn.Module:
    """The tower, of which all ranks are tensor-parallel ones."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron.bridge import platform
    from megatron.bridge.mimo import MimoParallelismConfig, ModuleParallelismConfig
    from megatron.bridge.mimo.module_groups import build_module_groups

    platform.initialize_distributed()
    ranks = platform.world_size()
    layouts = {name: ModuleParallelismConfig(tensor_parallel=ranks) for name in ("images", "text")}
    places = build_module_groups(MimoParallelismConfig(llm_module_name="text", module_parallelisms=layouts))
    config = TransformerConfig(
        num_layers=1, hidden_size=ranks, num_attention_heads=ranks, kv_channels=1, tensor_model_parallel_size=ranks
    )
    module: torch.nn.Module = tower.build_on(config, places["images"].here, initialized=True)
    return module


def main() -> int:
    """Measure, and print the table."""
    import transformers

    import_engine()
    torch.set_num_threads(1)
    _ = transformers.CLIPVisionModel  # imported once, before ranks are forked
    print("| implementation | ranks | million weights | GFLOP | MiB of activations | seconds |")
    print("|---" * 6 + "|")
    for implementation, ranks in CASES:
        by_rank = run_ranks(ranks, lambda implementation=implementation: taken(implementation), timeout=300)
        weights, operations, activations, seconds = (max(values) for values in zip(*by_rank, strict=True))
        figures = f"{weights:.1f} | {operations:.0f} | {activations:.0f} | {seconds:.1f}"
        print(f"| `{implementation}` | {ranks} | {figures} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
