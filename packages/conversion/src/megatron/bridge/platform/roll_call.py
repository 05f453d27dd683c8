"""A roll call before ranks exchange data: who stays away is named within a time-out, on every rank that came.

A collective that one rank never joins hangs the others, and the backend's own time-out tells neither who nor why. The
call goes through the store by which the ranks met, so it needs no group and works on any backend.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from megatron.bridge.errors import BridgeError

_PREFIX = "megatron-bridge/roll-call"
_PRESENT = "present"
_GIVEN_UP = 1 << 40  # more than there are ranks
# How often this process was called, by those who are called with it: the same number on each of them.
_calls: Counter[str] = Counter()
# The peers that this process was called with, call by call, and the store in which it told them.
_told: list[tuple[Any, list[list[int]]]] = []


class RankAbsent(BridgeError):
    """A rank that must take part did not come, or came to say that it cannot go on."""


class RollCall:
    """Calls every rank that is joined to this one by `groups`, directly or through the groups of its peers.

    Args:
        groups: the process groups in which this rank will exchange data; None among them is left out.
        timeout_seconds: how long the others are waited for.
    """

    def __init__(self, groups: Iterable[Any], timeout_seconds: float = 600.0) -> None:
        import torch.distributed as dist

        self._timeout = timeout_seconds
        present = [group for group in groups if group is not None]
        self._peers = sorted({rank for group in present for rank in dist.get_process_group_ranks(group)})
        self._ranks: list[int] | None = None

    def __call__(self, doing: str, failure: str | None = None) -> None:
        """Wait until every rank has come to do the same.

        Args:
            doing: named in errors, e.g. "export".
            failure: why this rank cannot take part; then every rank is told.

        Raises:
            RankAbsent: (on every rank that came) names the ranks that did not, or the one that failed and its reason.
        """
        if len(self._peers) <= 1:
            if failure is not None:
                raise RankAbsent(f"{doing}: {failure}")
            return
        if self._ranks is None:
            self._ranks = self._all_ranks(doing)
        members = _digest(self._ranks)
        _calls[members] += 1
        self._attend(f"{_PREFIX}/{members}", _calls[members], self._ranks, doing, failure)

    def _attend(self, prefix: str, number: int, ranks: list[int], doing: str, failure: str | None) -> None:
        store, here = _store_and_rank()
        key = f"{prefix}/{number}"
        store.set(f"{key}/{here}", _PRESENT)
        if failure is not None:
            store.set(f"{key}/outcome", f"rank {here}: {failure}")
        elif store.add(f"{key}/count", 1) == len(ranks):
            store.set(f"{key}/outcome", _PRESENT)
            # Whoever was counted now has read the last outcome.
            for left_over in ("count", "outcome"):
                store.delete_key(f"{prefix}/{number - 1}/{left_over}")
        if not self._came(store, f"{key}/outcome", self._timeout):
            self._give_up(key, ranks)
        outcome = store.get(f"{key}/outcome").decode()
        store.delete_key(f"{prefix}/{number - 1}/{here}")
        if outcome != _PRESENT:
            raise RankAbsent(f"{doing}: {outcome}")

    def _give_up(self, key: str, ranks: list[int]) -> None:
        """End a call in which somebody is absent, unless the last one came just now."""
        store, _ = _store_and_rank()
        if store.add(f"{key}/count", -_GIVEN_UP) != len(ranks) - _GIVEN_UP:
            # Who comes late cannot complete the count any more, reads this too, and is in step with the next call.
            store.set(f"{key}/outcome", self._absence([rank for rank in ranks if not store.check([f"{key}/{rank}"])]))

    def _all_ranks(self, doing: str) -> list[int]:
        """Every rank that is joined to this one: each tells its peers, and theirs are asked in turn.

        A rank may have been called before, with other peers. Of two peers each was called as often with the other, so
        that tells which of its calls is this one.
        """
        store, here = _store_and_rank()
        told = _told_so_far(store)
        told.append(self._peers)
        store.set(f"{_PREFIX}/peers/{here}/{len(told) - 1}", json.dumps(self._peers))
        deadline = time.monotonic() + self._timeout
        calls = {here: list(told)}  # of every rank, up to this one
        waiting, absent = [(here, rank) for rank in self._peers], []
        while waiting:
            peer, rank = waiting.pop()
            if rank in calls or rank in absent:
                continue
            together = sum(rank in peers for peers in calls[peer])
            found = self._told_by(store, rank, peer, together, deadline)
            if found is None:
                absent.append(rank)
            else:
                calls[rank] = found
                waiting += [(rank, other) for other in found[-1]]
        if absent:
            store.set(f"{_PREFIX}/peers/{here}/{len(told) - 1}/given-up", self._absence(absent))
        # Who comes late must not go on where the others have given up.
        for rank, found in sorted(calls.items()):
            if store.check([given_up := f"{_PREFIX}/peers/{rank}/{len(found) - 1}/given-up"]):
                raise RankAbsent(f"{doing}: {store.get(given_up).decode()}")
        return sorted(calls)

    def _told_by(self, store: Any, rank: int, peer: int, together: int, deadline: float) -> "list[list[int]] | None":
        """What `rank` has told up to its call number `together` with `peer`; None when that does not come in time."""
        found: list[list[int]] = []
        while sum(peer in peers for peers in found) < together:
            key = f"{_PREFIX}/peers/{rank}/{len(found)}"
            if not self._came(store, key, deadline - time.monotonic()):
                return None
            found.append(json.loads(store.get(key)))
        return found

    @staticmethod
    def _came(store: Any, key: str, seconds: float) -> bool:
        import torch.distributed as dist

        try:
            store.wait([key], timedelta(seconds=max(seconds, 0.001)))
        # The stores do not agree on what they raise: DistStoreError, RuntimeError, LookupError.
        except (dist.DistError, RuntimeError, LookupError):
            return bool(store.check([key]))
        return True

    def _absence(self, absent: list[int]) -> str:
        named = ", ".join(map(str, sorted(absent)[:16])) + (", ..." if len(absent) > 16 else "")
        return (
            f"{'rank' if len(absent) == 1 else 'ranks'} {named} did not come within {self._timeout:.0f} s; every rank "
            "of the model must take part. See what those ranks do instead, or allow more time (rank_timeout)"
        )


def _told_so_far(store: Any) -> list[list[int]]:
    if not _told or _told[0][0] is not store:  # another world is another beginning
        _told[:] = [(store, [])]
    return _told[0][1]


def _digest(ranks: list[int]) -> str:
    return hashlib.blake2b(json.dumps(ranks).encode(), digest_size=8).hexdigest()


def _store_and_rank() -> tuple[Any, int]:
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store(), dist.get_rank()
