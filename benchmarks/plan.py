"""Planning without weights: `uv run benchmarks/plan.py [--layers 60] [--experts 1000]`.

The index of a mixture of experts, names and shapes only, is joined to its Megatron side: as the offline conversion does
it, once with one weight per expert and projection, once with the experts of a layer stacked. CPU seconds are printed.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

from megatron.bridge.conversion.offline.index import megatron_shapes
from megatron.bridge.conversion.offline.keys import places
from megatron.bridge.conversion.plan import export_plan, import_plan
from megatron.bridge.conversion.table import WeightTable
from megatron.bridge.models.fragments import attention, embedding, head, pre_norms
from megatron.bridge.models.moe_fragments import experts, moe_norm, router, stacked_experts

VOCAB, HIDDEN, HEADS, GROUPS, FFN = 129280, 7168, 64, 8, 2048
MLP = "model.layers.{l}.mlp"
STACKED = stacked_experts(f"{MLP}.experts.gate_up_proj", f"{MLP}.experts.down_proj")


def table(*, stacked: bool) -> WeightTable:
    return WeightTable.of(
        embedding(VOCAB),
        [rule for rule in pre_norms() if ".linear_fc1." not in rule.megatron],
        attention(heads=HEADS, groups=GROUPS, head_dim=128),
        moe_norm(),
        router(),
        STACKED if stacked else experts(),
        head(VOCAB, tied=False),
    )


def layer_shapes(number_of_experts: int, *, stacked: bool) -> dict[str, tuple[int, ...]]:
    """Names within a layer, with shapes."""
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (HEADS * 128, HIDDEN),
        "self_attn.k_proj.weight": (GROUPS * 128, HIDDEN),
        "self_attn.v_proj.weight": (GROUPS * 128, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * 128),
        "mlp.gate.weight": (number_of_experts, HIDDEN),
    }
    if stacked:
        return shapes | {
            "mlp.experts.gate_up_proj": (number_of_experts, 2 * FFN, HIDDEN),
            "mlp.experts.down_proj": (number_of_experts, HIDDEN, FFN),
        }
    for expert in range(number_of_experts):
        own = f"mlp.experts.{expert}"
        shapes[f"{own}.gate_proj.weight"] = shapes[f"{own}.up_proj.weight"] = (FFN, HIDDEN)
        shapes[f"{own}.down_proj.weight"] = (HIDDEN, FFN)
    return shapes


def index(layers: int, number_of_experts: int, *, stacked: bool) -> dict[str, tuple[int, ...]]:
    """Every name of a checkpoint with its shape."""
    within = layer_shapes(number_of_experts, stacked=stacked)
    names = {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in within.items()}
    ends = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    return {**ends, **names, "model.norm.weight": (HIDDEN,)}


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def plan_all(layers: int, number_of_experts: int, *, stacked: bool) -> dict[str, float]:
    """CPU seconds of each step, by name."""
    rules, hf = table(stacked=stacked), index(layers, number_of_experts, stacked=stacked)
    seconds = {}
    seconds["shapes"], megatron = cpu_seconds(lambda: megatron_shapes(rules, hf, 128, "benchmark"))
    seconds["import plan"], plan = cpu_seconds(lambda: import_plan(rules, hf, megatron))
    seconds["places"], _ = cpu_seconds(lambda: places(plan))
    seconds["export plan"], back = cpu_seconds(lambda: export_plan(rules, megatron))
    if back.hf_shapes != hf:
        raise SystemExit("the way back gives other weights")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--experts", type=int, default=1000)
    options = parser.parse_args()
    for stacked in (False, True):
        names = len(index(options.layers, options.experts, stacked=stacked))
        seconds = plan_all(options.layers, options.experts, stacked=stacked)
        steps = ", ".join(f"{step} {value:.2f}" for step, value in seconds.items())
        print(f"{names:,} names ({'stacked' if stacked else 'single'} experts): {steps}; {sum(seconds.values()):.2f} s")


if __name__ == "__main__":
    main()
