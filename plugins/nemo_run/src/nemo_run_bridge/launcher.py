"""The launcher `nemo_run`: ranks are started by one of NeMo-Run's executors. NeMo-Run is loaded when it is used."""

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.training.launching.base import EVERYTHING, Job, Launcher, Sight
from megatron.bridge.training.secrets import is_secret_name
from nemo_run_bridge.tasks import script

# NeMo-Run's executors by our names, and their fields for the numbers of ranks and nodes.
EXECUTORS = {
    "local": ("LocalExecutor", "ntasks_per_node", None),
    "slurm": ("SlurmExecutor", "ntasks_per_node", "nodes"),
    "docker": ("DockerExecutor", "ntasks_per_node", None),
    "skypilot": ("SkypilotExecutor", "torchrun_nproc_per_node", "num_nodes"),
    "kubeflow": ("KubeflowExecutor", "nprocs_per_node", "num_nodes"),
    "lepton": ("LeptonExecutor", "nprocs_per_node", "nodes"),
}


@dataclass(kw_only=True)
class NeMoRunLauncher(Launcher):
    """The command as a `run.Script`, given to an executor of NeMo-Run, which starts its ranks by torchrun.

    Attributes:
        executor: where it runs: local, slurm, docker, skypilot, kubeflow or lepton.
        options: fields of that executor: `{account: me, partition: batch, time: 04:00:00}`.
        env: environment variables of the ranks; no secrets, which would stand in files.
        detach: return when the job is in other hands; otherwise wait for its end.
    """

    executor: str = "local"
    options: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    detach: bool = False

    def sight(self) -> Sight:
        return EVERYTHING if self.executor == "local" else frozenset()

    def problems(self, job: Job) -> Iterator[str]:
        if self.executor not in EXECUTORS:
            near = did_you_mean(self.executor, EXECUTORS)
            yield f"executor={self.executor!r} is unknown{near} (known: {', '.join(EXECUTORS)})"
            return
        name, ranks, nodes = EXECUTORS[self.executor]
        if nodes is None and job.nodes > 1:
            yield f"--nodes {job.nodes}: the executor {self.executor!r} is of one machine; see executor=slurm"
        known = {each.name for each in dataclasses.fields(self._class())}
        for option in self.options:
            if option not in known:
                yield f"options: NeMo-Run's {name} has no field {option!r}{did_you_mean(option, known)}"
            elif option in (ranks, nodes):
                yield f"options: {option!r} is what --nproc and --nodes say; leave it out"
        for setting in (*self.env, *self.options):
            if is_secret_name(setting):
                yield f"{setting!r} is a secret and would stand in a file; export it where ranks start"

    def describe(self, job: Job) -> str:
        """NeMo-Run's own dry run."""
        import nemo_run

        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            nemo_run.run(script(job.restartable), self.made(job), name=job.name, dryrun=True)
        return told.getvalue()

    def launch(self, job: Job) -> None:
        import nemo_run

        with nemo_run.Experiment(job.name) as experiment:
            experiment.add(script(job.restartable), executor=self.made(job), name=job.name, tail_logs=not self.detach)
            experiment.run(detach=self.detach, tail_logs=not self.detach)
        # Leaving the block waits for the end.
        if not self.detach:
            _expect_success(experiment)

    def made(self, job: Job) -> Any:
        """NeMo-Run's executor.

        Raises:
            BridgeError: it refuses these options.
        """
        import nemo_run

        name, ranks, nodes = EXECUTORS[self.executor]
        sizes = {ranks: job.ranks_per_node} | ({} if nodes is None else {nodes: job.nodes})
        # Nothing is packed: ranks find Megatron Bridge installed. NeMo-Run itself would want a git repository.
        defaults: dict[str, Any] = {"launcher": "torchrun", "packager": nemo_run.Packager()}
        if self.executor == "slurm":
            defaults["tunnel"] = nemo_run.LocalTunnel(job_dir=str(job.run_folder or Path.cwd()))
        try:
            return self._class()(**{**defaults, **self.options, **sizes, "env_vars": dict(self.env)})
        except (TypeError, ValueError, AssertionError) as error:
            raise BridgeError(f"NeMo-Run's {name} refuses these options: {error}") from error

    def _class(self) -> Any:
        import nemo_run

        return getattr(nemo_run, EXECUTORS[self.executor][0])


def _expect_success(experiment: Any) -> None:
    """Refuse a job that has not ended well: NeMo-Run itself only prints that."""
    failed = {job.id: job.state.name for job in experiment.jobs if job.state.name != "SUCCEEDED"}
    if failed:
        told = ", ".join(f"{name} is {state}" for name, state in failed.items())
        raise BridgeError(f"the job has not ended well: {told}; `nemo experiment logs` shows why")
