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
_GROUPS = f"{_PREFIX}/groups"
_PRESENT = "present"
_GIVEN_UP = 1 << 40  # more than there are ranks
# How often this process was called, by those who are called with it: the same number on each of them.
_calls: Counter[str] = Counter()


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
        present = {tuple(sorted(dist.get_process_group_ranks(group))) for group in groups if group is not None}
        self._groups = [list(ranks) for ranks in sorted(present) if len(ranks) > 1]
        self._ranks: list[int] | None = None

    def __call__(self, doing: str, failure: str | None = None) -> None:
        """Wait until every rank has come to do the same.

        Args:
            doing: named in errors, e.g. "export".
            failure: why this rank cannot take part; then every rank is told.

        Raises:
            RankAbsent: (on every rank that came) names the ranks that did not, or the one that failed and its reason.
        """
        if not self._groups:
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
        """Every rank that is joined to this one: each tells its groups to their members, who ask theirs in turn."""
        store, here = _store_and_rank()
        mine = self._numbered_groups()
        for label, _ in mine:
            store.set(f"{_GROUPS}/{label}/{here}", json.dumps(mine))
        deadline = time.monotonic() + self._timeout
        found, waiting, absent = {here: mine[0][0]}, list(mine), []
        while waiting:
            label, ranks = waiting.pop()
            for rank in set(ranks) - found.keys():
                found[rank] = label
                if self._came(store, f"{_GROUPS}/{label}/{rank}", deadline - time.monotonic()):
                    waiting += json.loads(store.get(f"{_GROUPS}/{label}/{rank}"))
                else:
                    absent.append(rank)
        if absent:
            for label, _ in mine:
                store.set(f"{_GROUPS}/{label}/{here}/given-up", self._absence(absent))
        # Who comes late must not go on where the others have given up.
        for rank, label in sorted(found.items()):
            if store.check([given_up := f"{_GROUPS}/{label}/{rank}/given-up"]):
                raise RankAbsent(f"{doing}: {store.get(given_up).decode()}")
        return sorted(found)

    def _numbered_groups(self) -> list[tuple[str, list[int]]]:
        """This rank's groups, each with how often its members were called together: all of them have counted alike.

        Without the number a rank might read what another told in an earlier call, when it was in other groups.
        """
        numbered = []
        for ranks in self._groups:
            digest = f"group-{_digest(ranks)}"
            _calls[digest] += 1
            numbered.append((f"{digest}/{_calls[digest]}", ranks))
        return numbered

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


def _digest(ranks: list[int]) -> str:
    return hashlib.blake2b(json.dumps(ranks).encode(), digest_size=8).hexdigest()


def _store_and_rank() -> tuple[Any, int]:
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store(), dist.get_rank()
