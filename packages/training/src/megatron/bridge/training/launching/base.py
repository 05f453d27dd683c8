"""What a launcher is, and what it is given to start. Torch-free."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# What of a configuration can be proven where a command is given: that its files are there, and that the machine can.
type Sight = frozenset[Literal["files", "machine"]]
EVERYTHING: Sight = frozenset({"files", "machine"})


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command, to be run by every rank.

    Attributes:
        name: for queues and people, e.g. the recipe's.
        arguments: what follows `megatron-bridge` on each rank; nothing in it is about launching.
        restartable: the same for ranks that may be started again by whatever starts them: then they go on.
        work: the same as a function, for ranks that are forked from this process.
        nodes, ranks_per_node: how many ranks there are.
        run_folder: absolute; None for a run without one.
        timeout_seconds: how long a collective waits for an absent rank.
    """

    name: str
    arguments: tuple[str, ...]
    restartable: tuple[str, ...]
    work: Callable[[], None]
    nodes: int = 1
    ranks_per_node: int = 1
    run_folder: Path | None = None
    timeout_seconds: float = 600.0


@dataclass(kw_only=True)
class Launcher(ABC):
    """Starts the ranks of a run. Subclass it as a dataclass: `--launch FIELD=VALUE` sets its fields.

    A package offers one by an entry point of the group `megatron.bridge.launchers`.
    """

    def sight(self) -> Sight:
        """What can be checked here before the start: files and devices, where ranks will see the same."""
        return EVERYTHING

    def problems(self, job: Job) -> Iterator[str]:
        """Why this launcher cannot start `job`; all of it is reported at once, before anything is done."""
        yield from ()

    @abstractmethod
    def describe(self, job: Job) -> str:
        """What `launch` would do, as text for `--dry-run`."""

    @abstractmethod
    def launch(self, job: Job) -> None:
        """Start `job`; return when it is done, or when it is in other hands.

        Raises:
            BridgeError: it cannot be started, or failed.
        """
