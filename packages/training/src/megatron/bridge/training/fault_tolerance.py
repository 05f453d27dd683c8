"""When a step goes wrong, its loss or gradient not finite or its loss leaping: what then (`FaultToleranceConfig`).

Megatron-Core has a machine for the same purpose, `megatron.core.rerun_state_machine`. It validates one rank's value at
a time, knows neither gradients nor skipping, and settles a fault by leaving the process with an exit code for a
scheduler to react to. Here all ranks agree on what is wrong before the update, and the step is done again or left out.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.before_step import BeforeStep
from megatron.bridge.training.config import FaultToleranceConfig

if TYPE_CHECKING:
    from megatron.bridge.training.state import Batches, RunState


class StepFault(BridgeError):
    """A step went wrong, and the policy is to stop, or cannot help."""


class NotFinite(StepFault):
    """The loss or the gradient became NaN or infinite."""


class LossSpike(StepFault):
    """The loss leapt."""


@dataclass(frozen=True)
class Gradients:
    """What forward and backward passes gave, before the update.

    Attributes:
        loss: mean over the tokens of the global batch.
        tokens: tokens that the loss counts.
        own: sum of losses that this rank adds to it; 0 where another pipeline stage has the loss.
    """

    loss: float
    tokens: int
    own: float


@dataclass(frozen=True)
class Verdict:
    """Whether a step may update the weights, and what there is to tell.

    Attributes:
        gradients: of the attempt that counts.
        update: whether to update.
        told: what went wrong, and what was done; None for a step without a fault.
    """

    gradients: Gradients
    update: bool = True
    told: str | None = None


type Compute = Callable[[list[Batches]], Gradients]


class Guard:
    """Watches over a run's steps.

    Args:
        settings: the policy.
        scaled: gradients are scaled for fp16; the optimizer looks for infinities in them by itself.
    """

    def __init__(self, settings: FaultToleranceConfig, scaled: bool) -> None:
        self._settings, self._scaled = settings, scaled
        self._losses: deque[float] = deque(maxlen=settings.loss_spike_window)
        self._left_out = 0
        self._gradient_norm = 0.0

    @property
    def awake(self) -> bool:
        """Whether steps are looked at before the update. Otherwise what is not finite stops the run by itself."""
        return self._settings.on_fault != "stop" or self._settings.loss_spike_threshold is not None

    def look_at_gradients(self, buffers: list[Any]) -> None:
        """Take the norm of this rank's gradients; before they are reduced a fault shows where it arose."""
        if self.awake:
            self._gradient_norm = _norm(buffers)

    def watched(self, run: "RunState", compute: Compute) -> Verdict:
        """Do a step's forward and backward passes, and what the policy asks for when they go wrong. Collective.

        Raises:
            StepFault: (on every rank) the step is at fault, and the policy is to stop, or too many in a row were.
        """
        if not self.awake:
            return Verdict(compute(run.train_data))
        before = BeforeStep(run)
        first = compute(before.recorded)
        fault = self._fault(first, run.progress.iteration + 1)
        if fault is None:
            self._accept(first)
            return Verdict(first)
        if self._settings.on_fault == "stop":
            raise fault
        if self._settings.on_fault == "skip":
            return self._leave_out(before, first, fault)
        return self._again(run, before, first, fault, compute)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide as this one would."""
        return {"losses": list(self._losses), "left_out": self._left_out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; the window may have changed."""
        self._losses.extend(state["losses"])
        self._left_out = state["left_out"]

    def _accept(self, gradients: Gradients) -> None:
        self._losses.append(gradients.loss)
        self._left_out = 0

    def _fault(self, found: Gradients, iteration: int) -> StepFault | None:
        """What is wrong with an attempt; the same on every rank. Collective."""
        import torch
        import torch.distributed as dist

        from megatron.bridge.platform import device

        gradient = self._scaled or math.isfinite(self._gradient_norm)
        leaps = self.leaps(found.loss)
        flags = torch.tensor([not (math.isfinite(found.loss) and gradient), leaps], dtype=torch.int32, device=device())
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        broken, spike = flags.tolist()
        if broken:
            return NotFinite(self._where(found, gradient, iteration))
        if spike:
            usual = statistics.median(self._losses)
            return LossSpike(
                f"the loss leapt to {found.loss:.4f} at iteration {iteration}, from a median of {usual:.4f}"
            )
        return None

    def leaps(self, loss: float) -> bool:
        """Whether `loss` lies above the median of the last ones by more than `loss_spike_threshold` deviations.

        The deviation is the median absolute one, as a standard deviation (x 1.4826), and at least 1% of the median, so
        that a flat curve does not make every ripple a leap. Nothing leaps before there are `loss_spike_window` losses.
        """
        threshold = self._settings.loss_spike_threshold
        if threshold is None or len(self._losses) < self._settings.loss_spike_window:
            return False
        usual = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(each - usual) for each in self._losses)
        return loss - usual > threshold * max(deviation, 0.01 * abs(usual))

    def _where(self, found: Gradients, gradient: bool, iteration: int) -> str:
        from megatron.bridge.conversion.rank_agreement import gather

        states = gather((math.isfinite(found.own), gradient))
        losses = [str(rank) for rank, (loss, _) in enumerate(states) if not loss]
        norms = [str(rank) for rank, (_, norm) in enumerate(states) if not norm]
        if losses:
            return f"the loss is not finite at iteration {iteration} on rank {', '.join(losses)}"
        if norms:
            return f"the gradient is not finite at iteration {iteration} on rank {', '.join(norms)}"
        return f"the loss is {found.loss} at iteration {iteration}, though each rank's part of it is finite"

    def _leave_out(self, before: BeforeStep, found: Gradients, fault: StepFault, told: str = "") -> Verdict:
        before.restore_buffers()
        self._left_out += 1
        most = self._settings.max_skips_in_a_row
        if self._left_out > most:
            raise type(fault)(
                f"{fault}{told}; {most} steps in a row were skipped before it (fault_tolerance.max_skips_in_a_row). "
                "Resume from the last checkpoint with a lower optimizer.lr or in fp32; look at the data of these steps"
            )
        return Verdict(found, update=False, told=f"{fault}{told}; its update is skipped")

    def _again(
        self, run: "RunState", before: BeforeStep, first: Gradients, fault: StepFault, compute: Compute
    ) -> Verdict:
        """Do the step again from the same state, and tell a fault of the machine from one of model or data."""
        norm = self._gradient_norm
        before.restore()
        second = compute(before.replayed())
        still = self._fault(second, run.progress.iteration + 1)
        differing = self._differing((first.own, norm), (second.own, self._gradient_norm))
        told = "; done again from the same state " + _diagnosis(second, still, differing)
        if self._settings.after_rerun == "stop":
            raise type(fault)(f"{fault}{told}. The weights are those of iteration {run.progress.iteration}")
        if still is not None:
            return self._leave_out(before, second, fault, told)
        self._accept(second)
        return Verdict(second, told=f"{fault}{told}; going on with the second result")

    def _differing(self, first: tuple[float, float], second: tuple[float, float]) -> list[str]:
        """Ranks on which loss or gradient norm came out otherwise."""
        from megatron.bridge.conversion.rank_agreement import gather

        tolerance = self._settings.rerun_tolerance
        alike = all(_alike(one, other, tolerance) for one, other in zip(first, second, strict=True))
        return [str(rank) for rank, same in enumerate(gather(alike)) if not same]


def _alike(one: float, other: float, tolerance: float) -> bool:
    return (math.isnan(one) and math.isnan(other)) or math.isclose(one, other, rel_tol=tolerance, abs_tol=0.0)


def _diagnosis(second: Gradients, still: StepFault | None, differing: list[str]) -> str:
    ranks = f"rank {', '.join(differing)}"
    if still is None:
        return f"it is sound (loss {second.loss:.4f}): suspect the hardware, first that of {ranks}, not model or data"
    if differing:
        return f"it is wrong too, but not in the same way on {ranks}: suspect the hardware or kernels that vary"
    return "it comes out the same: model or data are at fault, not the hardware"


def _norm(buffers: list[Any]) -> float:
    """The norm of all that this rank has in its gradient buffers."""
    import torch

    norms = [torch.linalg.vector_norm(buffer.grad_data, dtype=torch.float32) for buffer in buffers]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
