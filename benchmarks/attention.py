"""Causal attention on this CPU in fp32: in blocks of queries, as layer spec `torch` has it, beside the fused kernel.

Forward and backward of one layer with grouped queries, in turn, at several numbers of tokens; medians.

    uv run python benchmarks/attention.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from megatron.bridge.models.layer_specs.causal_attention_cpu import blocked_causal_attention, fits
from megatron.bridge.platform import keep_freed_memory

HEADS, KEY_HEADS, SIZE = 8, 4, 64
ROWS_AND_LENGTHS = ((8, 256), (4, 512), (8, 512), (2, 1024), (1, 2048))


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def blocked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Ours."""
    return blocked_causal_attention(query, key, value, None)


def once(attention: Callable[..., Tensor], tensors: list[Tensor], gradient: Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    begin = time.perf_counter()
    attention(*leaves).backward(gradient)
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default: 15)")
    arguments = parser.parse_args()
    keep_freed_memory()  # as a training run does
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {arguments.rounds} rounds\n")
    print(f"{'rows x tokens':16}{'fused ms':>10}{'blocked ms':>12}{'blocked / fused':>17}  taken in training")
    for rows, length in ROWS_AND_LENGTHS:
        # As Megatron-Core has them in memory: by position first.
        shapes = [(length, rows, heads, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
        *tensors, gradient = (torch.randn(shape).permute(1, 2, 0, 3) for shape in shapes)
        turns = [[once(each, tensors, gradient) for each in (fused, blocked)] for _ in range(arguments.rounds)]
        theirs, ours = (statistics.median(turn[which] for turn in turns[1:]) * 1e3 for which in (0, 1))
        ratio = statistics.median(turn[1] / turn[0] for turn in turns[1:])
        taken = "blocked" if fits(tensors[0]) else "fused"
        print(f"{f'{rows} x {length:,}':16}{theirs:10.1f}{ours:12.1f}{ratio:16.2f}x  {taken}")


if __name__ == "__main__":
    main()
