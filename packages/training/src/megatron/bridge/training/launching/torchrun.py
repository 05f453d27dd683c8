"""Ranks started by torchrun, on this machine or as one node of several. Torch-free until launched."""

import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.bridge.training.launching.base import Job, Launcher


@dataclass(kw_only=True)
class TorchrunLauncher(Launcher):
    """This process becomes torchrun. Of several nodes each gives the same command, with its own `node_rank`.

    Attributes:
        node_rank: which node this is, of several with a static rendezvous; None lets them find their order.
        rdzv_endpoint: `host:port` where nodes meet; needed for several.
        rdzv_id: tells runs apart that meet at one endpoint.
        max_restarts: how often the ranks are started again after a failure; resuming is the run folder's matter.
    """

    node_rank: int | None = None
    rdzv_endpoint: str | None = None
    rdzv_id: str = "megatron-bridge"
    max_restarts: int = 0

    def problems(self, job: Job) -> Iterator[str]:
        if job.nodes > 1 and self.rdzv_endpoint is None:
            yield f"--nodes {job.nodes} needs a place where they meet: --launch rdzv_endpoint=HOST:PORT"
        if self.node_rank is not None and not 0 <= self.node_rank < job.nodes:
            yield f"node_rank={self.node_rank} must lie between 0 and {job.nodes - 1}: --nodes {job.nodes}"

    def describe(self, job: Job) -> str:
        return shlex.join(self.words(job))

    def words(self, job: Job) -> list[str]:
        """The command line that starts the ranks of this node."""
        return [
            *(sys.executable, "-m", "torch.distributed.run"),
            f"--nproc-per-node={job.ranks_per_node}",
            f"--max-restarts={self.max_restarts}",
            *self._meeting(job),
            *("-m", "megatron.bridge.cli", *job.restartable),
        ]

    def _meeting(self, job: Job) -> list[str]:
        if job.nodes == 1 and self.rdzv_endpoint is None:
            return ["--standalone"]
        found = [f"--nnodes={job.nodes}", f"--rdzv-endpoint={self.rdzv_endpoint}", f"--rdzv-id={self.rdzv_id}"]
        if self.node_rank is None:
            return [*found, "--rdzv-backend=c10d"]
        return [*found, "--rdzv-backend=static", f"--node-rank={self.node_rank}"]

    def launch(self, job: Job) -> None:
        words = self.words(job)
        sys.stdout.flush()
        os.execv(words[0], words)
