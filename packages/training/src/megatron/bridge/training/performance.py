"""How fast a run is and what holds it up: time per phase, TFLOP/s, memory, the slowest rank; where steps are logged."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.bridge import platform
from megatron.bridge.training.peaks import peak_tflops
from megatron.bridge.training.phases import PHASES

if TYPE_CHECKING:
    from megatron.bridge.training.state import RunState

# What ranks do by themselves. The other phases wait for peers, so that the fastest rank seems the slowest there.
_OWN_WORK = ("data_wait", "forward_backward")


@dataclass(frozen=True)
class Performance:
    """Of the steps since the last look, over all ranks.

    Attributes:
        metrics: `step_seconds`, `tflops_per_device`, `mfu`, `memory_gib`, and seconds per step of each phase on the
            slowest rank, over the steps whose phases were told apart.
        stragglers: a line for each phase in which a rank is much slower than the others.
    """

    metrics: dict[str, float]
    stragglers: list[str]


def performance(run: "RunState", sequences: int) -> Performance:
    """What the ranks measured since the last call. Collective over the world, once.

    Args:
        run: at the end of a step.
        sequences: of that step.
    """
    import torch
    import torch.distributed as dist

    mine = run.phases.taken()
    values = [*mine.by_phase, mine.step, platform.peak_memory_bytes() / 2**30]
    row = torch.tensor([values], dtype=torch.float64, device=platform.device())
    table = torch.empty(dist.get_world_size(), len(values), dtype=torch.float64, device=platform.device())
    dist.all_gather_into_tensor(table, row)
    by_rank = table.tolist()
    seconds = statistics.mean(row[-2] for row in by_rank)
    metrics = {"step_seconds": seconds, "memory_gib": max(row[-1] for row in by_rank)}
    metrics |= _speed(run, sequences, seconds, len(by_rank))
    metrics |= {f"{phase}_seconds": max(row[place] for row in by_rank) for place, phase in enumerate(PHASES)}
    return Performance(metrics, list(_stragglers(by_rank, run.cfg.logger.straggler_factor)))


def _speed(run: "RunState", sequences: int, seconds: float, world: int) -> dict[str, float]:
    """TFLOP/s per device, and the share of what it can do, where these are known."""
    if run.flops_per_sequence is None or seconds <= 0:
        return {}
    tflops = run.flops_per_sequence * sequences / seconds / world / 1e12
    dtype = str(run.cfg.model.params_dtype).removeprefix("torch.")
    peak = run.cfg.logger.peak_tflops or peak_tflops(platform.device_name(), dtype)
    return {"tflops_per_device": tflops} | ({} if peak is None else {"mfu": tflops / peak})


def _stragglers(by_rank: list[list[float]], factor: float | None) -> Iterator[str]:
    for phase in _OWN_WORK if factor is not None else ():
        column = [row[PHASES.index(phase)] for row in by_rank]
        usual, slowest = statistics.median_low(column), max(column)
        if factor is not None and slowest > factor * usual:
            yield (
                f"rank {column.index(slowest)} is slow in {phase}: {slowest:.4g} s per step, where the median of "
                f"{len(column)} ranks is {usual:.4g} s"
            )
