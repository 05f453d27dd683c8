"""Deterministic mode (`model.deterministic_mode`): two runs of the same configuration are equal to the last bit.

It takes torch's deterministic algorithms (an operator that has none raises), no search for the fastest kernel, a fixed
workspace for cuBLAS, one algorithm for NCCL's reductions, and Transformer Engine's deterministic attention. Seeds, the
order of data, and the layout make the rest; runs at other layouts differ by rounding.
"""

import contextlib
import os
from collections.abc import Iterator

# Read when CUDA, NCCL and Transformer Engine start; what the user has set stays.
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within the block what runs is deterministic, where it is `wanted`; torch's settings are put back after it."""
    if not wanted:
        yield
        return
    import torch

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
