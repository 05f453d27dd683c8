"""Ranks started by Kubernetes: a manifest is shown and applied; `--dry-run` shows it only. Torch-free."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field

import click

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.launching.base import Job, Launcher, Sight
from megatron.bridge.training.secrets import is_secret_name

_VARIABLE = re.compile(r"[A-Za-z_]\w*")


@dataclass(kw_only=True)
class KubernetesLauncher(Launcher):
    """An indexed Job with a pod for each node, in which torchrun starts the ranks; a Service lets pods find each other.

    It needs no operator. Where a pod fails, the others fail for want of it; all are started again, and the run goes on
    from its checkpoint: the run folder lies on a volume that all pods mount.

    Attributes:
        image: container image of the ranks, with `megatron-bridge` in it.
        namespace: None leaves it to kubectl.
        claims: persistent volume claims that are mounted: name -> path in the pods.
        gpus_per_node: None for as many as there are ranks on a node; 0 for none.
        gpu: name of the resource that GPUs are.
        cpus, memory: what each pod asks for, e.g. `32` and `512Gi`; None asks for nothing.
        shared_memory: size of /dev/shm, which loaders and NCCL use.
        env: further environment variables. No secrets: those belong into `secrets`.
        secrets: names of Secrets, all of whose values become environment variables.
        node_selector: labels of the nodes to use.
        queue: of Kueue, under which the Job waits.
        restarts: how often each pod may fail, on average, before the Job is given up.
        port: on the first pod, where ranks meet.
    """

    image: str | None = None
    namespace: str | None = None
    claims: dict[str, str] = field(default_factory=dict)
    gpus_per_node: int | None = None
    gpu: str = "nvidia.com/gpu"
    cpus: str | None = None
    memory: str | None = None
    shared_memory: str = "16Gi"
    env: dict[str, str] = field(default_factory=dict)
    secrets: list[str] = field(default_factory=list)
    node_selector: dict[str, str] = field(default_factory=dict)
    queue: str | None = None
    restarts: int = 3
    port: int = 29400

    def sight(self) -> Sight:
        return frozenset()

    def problems(self, job: Job) -> Iterator[str]:
        if self.image is None:
            yield "--launcher kubernetes needs the ranks' container image: --launch image=REGISTRY/NAME:TAG"
        if job.run_folder is None:
            yield "--launcher kubernetes needs --run-folder, on a volume that all pods mount"
        elif not any(job.run_folder.is_relative_to(path) for path in self.claims.values()):
            yield (
                f"--run-folder {job.run_folder} is on no volume: checkpoints would go with the pods; mount a claim: "
                f"--launch 'claims={{NAME: {job.run_folder.parent}}}'"
            )
        if self.restarts < 0:
            yield f"restarts={self.restarts} must not be negative"
        for path in self.claims.values():
            if not path.startswith("/"):
                yield f"claims: {path!r} is no path in a pod; it begins with /"
        for name in self.env:
            if not _VARIABLE.fullmatch(name):
                yield f"env: {name!r} is no name of an environment variable"
            elif is_secret_name(name):
                yield f"env: {name!r} is a secret and would stand in the manifest; name a Secret in secrets"

    def describe(self, job: Job) -> str:
        from megatron.bridge.training.launching.kubernetes_manifest import manifest

        return manifest(self, job)

    def launch(self, job: Job) -> None:
        kubectl = shutil.which("kubectl")
        if kubectl is None:
            raise BridgeError(
                "there is no kubectl on this machine; give the command where it is, or keep what --dry-run prints"
            )
        text = self.describe(job)
        click.echo(text)
        click.echo(_applied(kubectl, text))


def _applied(kubectl: str, text: str) -> str:
    ended = subprocess.run([kubectl, "apply", "-f", "-"], input=text, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise BridgeError(f"kubectl refused the manifest (exit code {ended.returncode}): {ended.stderr.strip()}")
    return ended.stdout.strip()
