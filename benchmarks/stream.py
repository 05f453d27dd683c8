"""Streaming out in buckets beside one weight at a time: `uv run benchmarks/stream.py [--size moe] [--bucket-mb 64]`.

A random model is spread over two forked ranks of this machine (gloo), and every Hugging Face weight is gathered on
both, by one plan. The two ways alternate in one run; printed are medians of the slower rank's seconds, and the most
bytes that were live in tensors besides the model's (those inside the backend are not seen).
"""

import argparse
import statistics
import time
from typing import Any

LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
}
SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000, "dtype": "float32"}


def configuration(size: str) -> Any:
    """`moe`: 1,024 small experts; `dense`: few and larger weights; `small` is there to try the script."""
    from transformers import LlamaConfig, Qwen3MoeConfig

    if size == "dense":
        return LlamaConfig(**SHAPE, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    hidden, layers, experts = (512, 8, 128) if size == "moe" else (64, 2, 8)
    return Qwen3MoeConfig(
        **SHAPE,
        hidden_size=hidden,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        head_dim=64,
    )


def measure(size: str, layout: dict[str, int], bucket_bytes: int, repeat: int) -> dict[str, Any]:
    """In one rank: seconds of each run and peak bytes, both ways."""
    import torch.distributed as dist

    from megatron.bridge import AutoBridge
    from megatron.bridge.testing import LiveBytes

    config = configuration(size)
    config.architectures = ["LlamaForCausalLM" if size == "dense" else "Qwen3MoeForCausalLM"]
    bridge = AutoBridge.from_hf_config(config)
    model = bridge.to_megatron_model(**layout)
    tasks = bridge.get_conversion_tasks(model)
    ways: dict[str, dict[str, Any]] = {"one by one": {}, "in buckets": {"bucket_bytes": bucket_bytes}}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeat):
        for way, options in ways.items():
            dist.barrier()
            started = time.perf_counter()
            for item in bridge.export_hf_weights(model, conversion_tasks=tasks, **options):
                del item
            seconds[way].append(time.perf_counter() - started)
    peaks = {}
    for way, options in ways.items():
        with LiveBytes() as counted:
            for item in bridge.export_hf_weights(model, conversion_tasks=tasks, **options):
                del item
        peaks[way] = counted.peak
    allowed = max(bucket.nbytes for bucket in tasks.buckets(bucket_bytes)) + tasks.largest_bytes
    return {"seconds": seconds, "peaks": peaks, "allowed": allowed, "bytes": tasks.nbytes, "weights": len(tasks)}


def report(layout: str, ranks: list[dict[str, Any]]) -> None:
    first = ranks[0]
    median = {way: max(statistics.median(rank["seconds"][way]) for rank in ranks) for way in first["seconds"]}
    for way, seconds in median.items():
        peak = max(rank["peaks"][way] for rank in ranks) / 1e6
        speed = first["bytes"] / 1e9 / seconds
        print(f"{layout:6}{way:12}{first['weights']:8}{first['bytes'] / 1e6:9.0f}{seconds:9.3f}{speed:8.2f}{peak:9.1f}")
    ratio = median["one by one"] / median["in buckets"]
    print(f"{layout:6}in buckets: {ratio:.2f}x as fast; peak allowed {first['allowed'] / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("moe", "dense", "small"), default="moe")
    parser.add_argument("--bucket-mb", type=float, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    options = parser.parse_args()
    import torch

    from megatron.bridge.platform.engine import import_engine
    from megatron.bridge.platform.launch import run_ranks

    torch.set_num_threads(1)
    import_engine()
    print(f"{'':6}{'':12}{'weights':>8}{'MB':>9}{'seconds':>9}{'GB/s':>8}{'peak MB':>9}")
    for layout in options.layout or [name for name in LAYOUTS if name != "ep2" or options.size != "dense"]:
        ranks = run_ranks(
            2, measure, options.size, LAYOUTS[layout], int(options.bucket_mb * 1e6), options.repeat, timeout=None
        )
        report(layout, ranks)


if __name__ == "__main__":
    main()
