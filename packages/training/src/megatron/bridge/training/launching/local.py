"""Ranks on this machine, forked from this process, which has imported what they need. Torch-free until launched."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.bridge.training.launching.base import Job, Launcher


@dataclass(kw_only=True)
class LocalLauncher(Launcher):
    """One rank is this process; several are forked from it.

    Attributes:
        threads: of torch in each rank; None divides the cores among the ranks.
    """

    threads: int | None = None

    def problems(self, job: Job) -> Iterator[str]:
        if job.nodes > 1:
            yield f"--nodes {job.nodes}: the launcher 'local' starts ranks on this machine only; see --launcher slurm"

    def describe(self, job: Job) -> str:
        ranks = "this process" if job.ranks_per_node == 1 else f"{job.ranks_per_node} ranks forked from this process"
        return f"{ranks}: {shlex.join(('megatron-bridge', *job.arguments))}"

    def launch(self, job: Job) -> None:
        from megatron.bridge.platform.launch import run_ranks, share_of_cores, signals_left_to_ranks

        if job.ranks_per_node == 1:
            job.work()
            return
        with signals_left_to_ranks():
            run_ranks(
                job.ranks_per_node,
                job.work,
                timeout=None,
                collective_timeout=job.timeout_seconds,
                threads=self.threads or share_of_cores(job.ranks_per_node),
            )
