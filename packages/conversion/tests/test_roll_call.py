"""A roll call finds the ranks that are joined to this one, whatever groups they were in before."""

import time
from typing import Any

import torch.distributed as dist

from megatron.bridge.platform.roll_call import RollCall
from megatron.bridge.testing import run_ranks

FIRST = ([0, 1], [2, 3])
# Rank 0 is joined to 2, and by nothing to 1 and 3.
SECOND = ([0, 2], [1, 3])


def _groups(ranks: tuple[list[int], ...]) -> list[Any]:
    made = [dist.new_group(each) for each in ranks]
    return [group for group, each in zip(made, ranks, strict=True) if dist.get_rank() in each]


def test_a_rank_that_comes_first_does_not_read_what_others_told_earlier() -> None:
    def work() -> list[list[int]]:
        found = []
        for ranks in (FIRST, SECOND, FIRST, (*SECOND, *FIRST)):
            groups = _groups(ranks)
            time.sleep(0.2 * dist.get_rank())
            call = RollCall(groups, timeout_seconds=10)
            call("test")
            call("test, again")
            assert call._ranks is not None
            found.append(call._ranks)
        return found

    everyone = [0, 1, 2, 3]
    assert run_ranks(4, work, timeout=60) == [
        [[0, 1], [0, 2], [0, 1], everyone],
        [[0, 1], [1, 3], [0, 1], everyone],
        [[2, 3], [0, 2], [2, 3], everyone],
        [[2, 3], [1, 3], [2, 3], everyone],
    ]
