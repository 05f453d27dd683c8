"""What only CUDA's own tools can see: ranges for nsys, and who holds device memory."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def nsys_range(record_shapes: bool = False) -> Iterator[None]:
    """The block is what `nsys profile --capture-range=cudaProfilerApi` captures, with torch's operators named.

    Args:
        record_shapes: name the operators' input shapes too.
    """
    import torch

    torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStart())
    try:
        with torch.autograd.profiler.emit_nvtx(record_shapes=record_shapes):
            yield
    finally:
        torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStop())


@contextlib.contextmanager
def memory_history(snapshot: Path) -> Iterator[None]:
    """Record who allocates device memory in the block, for https://pytorch.org/memory_viz; written at its end."""
    import torch

    torch.cuda.memory._record_memory_history()
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(snapshot))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
