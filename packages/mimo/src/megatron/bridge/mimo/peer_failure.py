"""Which rank, of which module, is at fault when a step fails: told on every rank that is left."""

from typing import TYPE_CHECKING

from megatron.bridge.conversion.rank_agreement import reason
from megatron.bridge.errors import BridgeError
from megatron.bridge.platform.roll_call import RankAbsent, RollCall

if TYPE_CHECKING:
    from megatron.bridge.mimo.parallelism import MimoParallelismConfig


class ModuleFailed(BridgeError):
    """A rank failed in a step, or is gone, while others waited for its module."""


def peer_failure(error: Exception, placement: "MimoParallelismConfig", timeout: float) -> Exception:
    """The error to raise in the place of `error`, which ended a step on this rank. Collective over those that are left.

    Every rank comes to a roll call. One that failed by itself says why; one whose exchange with a peer broke waits to
    be told, and who is gone does not answer.

    Args:
        error: what ended the step here.
        placement: names the modules.
        timeout: seconds that ranks are waited for.
    """
    import torch.distributed as dist

    if dist.get_world_size() == 1:
        return error
    own = None if _of_an_exchange(error) else reason(error)
    try:
        RollCall([dist.group.WORLD], timeout)("a step of a MIMO model", own)
    except RankAbsent as absence:
        return ModuleFailed(f"{absence} ({_modules(placement)})")
    except (dist.DistError, RuntimeError) as lost:  # the store went with rank 0
        return ModuleFailed(f"a step of a MIMO model: rank 0 is gone ({_modules(placement)}): {reason(lost)}")
    return error


def _of_an_exchange(error: Exception) -> bool:
    """Whether an error is of torch.distributed: gloo's have no type of their own."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _modules(placement: "MimoParallelismConfig") -> str:
    spans = (
        f"{name!r} stands on rank {each.ranks.start}"
        if each.total_ranks == 1
        else f"{name!r} stands on ranks {each.ranks.start}-{each.ranks.stop - 1}"
        for name, each in placement.module_parallelisms.items()
    )
    return ", ".join(spans)
