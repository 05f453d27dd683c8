"""The text of a batch script for Slurm. Torch-free."""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.training.launching.base import Job
from megatron.bridge.training.run_folder import LOGS, STOPPED_BY

if TYPE_CHECKING:
    from megatron.bridge.training.launching.slurm import SlurmLauncher

_BODY = """\
# Written by `megatron-bridge {command} --launcher slurm`.
set -euo pipefail

{preparation}hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${{hosts%%$'\\n'*}}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

code=0
{srun} \\
    {ranks} || code=$?
{afterwards}exit "$code"
"""
_REQUEUE = """\
# Ranks that were told to stop have saved and ended well, with work left to do.
if [[ $code -eq 0 && $(cat {stopped_by} 2>/dev/null || true) == SIGTERM ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
"""


def script(slurm: "SlurmLauncher", job: Job) -> str:
    """A script for sbatch that runs `job`, and queues itself again when it was told to stop."""
    stopped_by = shlex.quote(str(_folder(job) / STOPPED_BY))
    head = "\n".join(f"#SBATCH {option}" for option in _options(slurm, job))
    body = _BODY.format(
        command=job.arguments[0],
        preparation="".join(f"{line}\n" for line in _preparation(slurm)),
        srun=shlex.join(_srun(slurm)),
        ranks=shlex.join((*_program(slurm), *job.restartable)),
        afterwards=_REQUEUE.format(stopped_by=stopped_by) if slurm.requeue else "",
    )
    return f"#!/bin/bash\n{head}\n{body}"


def _folder(job: Job) -> Path:
    return job.run_folder or Path("RUN_FOLDER")  # which a dry run may lack


def _options(slurm: "SlurmLauncher", job: Job) -> Iterator[str]:
    gpus = job.ranks_per_node if slurm.gpus_per_node is None else slurm.gpus_per_node
    named = {
        "job-name": job.name,
        "partition": slurm.partition,
        "account": slurm.account,
        "time": slurm.time,
        "nodes": job.nodes,
        "ntasks-per-node": job.ranks_per_node,
        "gpus-per-node": gpus or None,
        "cpus-per-task": slurm.cpus_per_task,
        "chdir": Path.cwd(),
        "output": _folder(job) / LOGS / "slurm-%j.out",
        "open-mode": "append",
        "signal": f"TERM@{slurm.signal_before}" if slurm.signal_before else None,
    }
    yield from (f"--{name}={shlex.quote(str(value))}" for name, value in named.items() if value is not None)
    yield "--requeue" if slurm.requeue else "--no-requeue"
    yield from slurm.sbatch


def _preparation(slurm: "SlurmLauncher") -> Iterator[str]:
    yield from (f"export {name}={shlex.quote(value)}" for name, value in slurm.env.items())
    yield from slurm.setup


def _srun(slurm: "SlurmLauncher") -> Iterator[str]:
    # Without it the ranks that are left wait for a dead one until a collective's time-out.
    yield from ("srun", "--kill-on-bad-exit=1")
    if slurm.container_image is not None:
        yield f"--container-image={slurm.container_image}"
        yield f"--container-workdir={Path.cwd()}"
        if slurm.container_mounts:
            yield f"--container-mounts={','.join(slurm.container_mounts)}"
    yield from slurm.srun


def _program(slurm: "SlurmLauncher") -> tuple[str, ...]:
    python = slurm.python or (sys.executable if slurm.container_image is None else "python")
    return (python, "-m", "megatron.bridge.cli")
