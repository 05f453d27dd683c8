"""How many sequences each step takes: always the same, or more and more in a ramp-up. Torch-free.

The size of a step follows from the samples drawn before it, so a resume is in the same place of the ramp.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    """Sequences per optimizer step, over all ranks.

    Attributes:
        stages: `(first sample, size)`, rising; from this many samples drawn on, steps have this size.
    """

    stages: tuple[tuple[int, int], ...]

    def at(self, consumed_samples: int) -> int:
        """The size of the step that follows `consumed_samples`."""
        return next(size for first, size in reversed(self.stages) if consumed_samples >= first)

    def samples_after(self, iterations: int) -> int:
        """Samples drawn by the first `iterations` steps of a run."""
        samples = 0
        for (_, size), until in zip(self.stages, self._ends(), strict=True):
            steps = iterations if until is None else min(iterations, max(0, -(-(until - samples) // size)))
            samples += steps * size
            iterations -= steps
        return samples

    def iterations_within(self, samples: int) -> int:
        """Whole steps that draw no more than `samples`."""
        iterations = drawn = 0
        for (_, size), until in zip(self.stages, self._ends(), strict=True):
            most = max(0, (samples - drawn) // size)
            steps = most if until is None else min(most, max(0, -(-(until - drawn) // size)))
            iterations, drawn = iterations + steps, drawn + steps * size
        return iterations

    def _ends(self) -> list[int | None]:
        return [*(first for first, _ in self.stages[1:]), None]


def batch_sizes(global_batch_size: int, ramp: Sequence[int] | None) -> BatchSizes:
    """The sizes of a run's steps.

    Args:
        global_batch_size: of every step, or of those after the ramp.
        ramp: `(start, increment, samples)`: from `start` in equal parts of `samples` up to `global_batch_size`, each
            part with `increment` sequences more; None for no ramp.
    """
    if ramp is None:
        return BatchSizes(((0, global_batch_size),))
    start, increment, samples = ramp
    parts = (global_batch_size - start) // increment
    # The part begins where as many samples were drawn; parts need not be of a whole number.
    return BatchSizes(
        tuple((-(-samples * part // parts) if parts else 0, start + part * increment) for part in range(parts + 1))
    )


def ramp_problem(global_batch_size: int, ramp: Sequence[int]) -> str | None:
    """Why `ramp` is none, or None."""
    named = f"train.rampup_batch_size={list(ramp)}"
    if len(ramp) != 3 or min(ramp) <= 0:
        return f"{named} must be three numbers greater than 0: the first batch size, its increment, the ramp's samples"
    start, increment, _ = ramp
    if start > global_batch_size or (global_batch_size - start) % increment:
        return (
            f"{named} does not lead to train.global_batch_size={global_batch_size}: {start} and a multiple of "
            f"{increment} must make it"
        )
    return None
