"""What one rank measured of a run, as plain data. Torch-free."""

from dataclasses import dataclass, field

from megatron.bridge.mimo.experiments.exchanges import Exchange

# What a span can be, besides phases of the training loop.
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Span:
    """Something that a rank did, from `begin` to `end` (`time.perf_counter`).

    Attributes:
        what: `forward` or `backward` of a module, or a phase of the loop (`megatron.bridge.training.phases`).
        module: by its name in the placement; None for a phase.
    """

    what: str
    module: str | None
    begin: float
    end: float


@dataclass
class RankLog:
    """One rank's part of a run.

    Attributes:
        host: its machine: clocks of one machine agree.
        modules: that stand on it.
        seconds: of each step that was timed.
        watched: when each watched step began, and the last one ended.
        spans, exchanges: of the watched steps.
        memory_bytes: the most that was held.
        samples, tokens: of a step, over all ranks.
        flops: model FLOPs of a step, over all ranks; None where they are not known.
        peak_flops: per second that its device can do; None where it is not known.
    """

    host: str
    modules: list[str]
    seconds: list[float] = field(default_factory=list)
    watched: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    memory_bytes: int = 0
    samples: int = 0
    tokens: int = 0
    flops: float | None = None
    peak_flops: float | None = None
