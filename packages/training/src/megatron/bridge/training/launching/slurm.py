"""Ranks started by Slurm: an sbatch script is written into the run folder, shown, and submitted. Torch-free."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.launching.base import Job, Launcher, Sight
from megatron.bridge.training.secrets import is_secret_name

SCRIPT = "job.sbatch"
# minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds
_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")
_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(kw_only=True)
class SlurmLauncher(Launcher):
    """Writes `job.sbatch` into the run folder and gives it to `sbatch`. `srun` starts the ranks.

    Before the time limit Slurm sends SIGTERM to the ranks; they save and end, and the job is queued again, to go on
    from the checkpoint.

    Attributes:
        partition, account: where the job runs and who pays; None leaves it to the cluster.
        time: limit, as sbatch reads it, e.g. `04:00:00`; None leaves it to the partition.
        gpus_per_node: None for as many as there are ranks on a node; 0 for none.
        cpus_per_task: CPUs of each rank; None leaves it to the cluster.
        signal_before: seconds before the time limit at which ranks are told to stop; Slurm may be a minute early.
        requeue: queue the job again when it was told to stop, and let Slurm do so when a node fails.
        container_image: the ranks run in this image (pyxis), with its own `megatron-bridge`.
        container_mounts: `from:to` paths; the run folder and the working folder are to be among them.
        env: further environment variables of the ranks. No secrets: those belong into the environment of `sbatch`.
        setup: shell lines before the start, e.g. `module load cuda`.
        sbatch: further options of sbatch, e.g. `--qos=high`.
        srun: further options of srun.
        python: interpreter on the nodes; None for this one, or for the one in the container.
        submit: give the script to sbatch; otherwise it is written only.
    """

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    signal_before: int = 120
    requeue: bool = True
    container_image: str | None = None
    container_mounts: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    sbatch: list[str] = field(default_factory=list)
    srun: list[str] = field(default_factory=list)
    python: str | None = None
    submit: bool = True

    def sight(self) -> Sight:
        return frozenset() if self.container_image is not None else frozenset({"files"})

    def problems(self, job: Job) -> Iterator[str]:
        if job.run_folder is None:
            yield "--launcher slurm needs --run-folder, which all nodes see: script, logs and checkpoints go there"
        if self.time is not None and not _TIME.fullmatch(self.time):
            yield f"time={self.time!r} is no time limit of Slurm; write it like 04:00:00 or 2-12:00:00"
        if self.signal_before < 0:
            yield f"signal_before={self.signal_before} must not be negative; 0 sends no signal"
        if self.container_mounts and self.container_image is None:
            yield "container_mounts is set, but container_image is not: nothing would be mounted"
        for name in self.env:
            if not _NAME.fullmatch(name):
                yield f"env: {name!r} is no name of an environment variable"
            elif is_secret_name(name):
                yield f"env: {name!r} is a secret and would stand in the script; export it where sbatch is called"
        for option in (*self.sbatch, *self.srun):
            if not option.startswith("-") or "\n" in option:
                yield f"{option!r} is no option of sbatch or srun; write it like --qos=high"

    def describe(self, job: Job) -> str:
        from megatron.bridge.training.launching.slurm_script import script

        return script(self, job)

    def launch(self, job: Job) -> None:
        assert job.run_folder is not None
        sbatch = shutil.which("sbatch") if self.submit else None
        if self.submit and sbatch is None:
            raise BridgeError(
                "there is no sbatch on this machine; give the command where Slurm is, or write the script only, with "
                "--launch submit=false, and submit it there"
            )
        file = self._write(job)
        click.echo(f"{file.read_text('utf-8')}\nwritten: {file}")
        if sbatch is not None:
            click.echo(_submitted(sbatch, file))

    def _write(self, job: Job) -> Path:
        assert job.run_folder is not None
        file = job.run_folder / SCRIPT
        try:
            # sbatch does not make the folder of its output, and the job would end without a word.
            (job.run_folder / "logs").mkdir(parents=True, exist_ok=True)
            file.write_text(self.describe(job), "utf-8")
        except OSError as error:
            raise BridgeError(f"{file} cannot be written: {error.strerror}; choose another --run-folder") from error
        return file


def _submitted(sbatch: str, file: Path) -> str:
    ended = subprocess.run([sbatch, str(file)], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise BridgeError(f"sbatch refused {file} (exit code {ended.returncode}): {ended.stderr.strip()}")
    return ended.stdout.strip()
