"""The text of a Kubernetes manifest: an indexed Job, and a headless Service that names its pods. Torch-free."""

import re
from typing import TYPE_CHECKING, Any

import yaml

from megatron.bridge.training.launching.base import Job

if TYPE_CHECKING:
    from megatron.bridge.training.launching.kubernetes import KubernetesLauncher

# Kubernetes gives pods of an indexed Job this variable, and names them NAME-INDEX.
_INDEX = "JOB_COMPLETION_INDEX"
_LONGEST = 52  # a pod's name is a label, of at most 63 characters, and index and suffix come behind


def manifest(kubernetes: "KubernetesLauncher", job: Job) -> str:
    """YAML for `kubectl apply`."""
    name = job_name(job.name)
    parts = [_service(kubernetes, name), _job(kubernetes, job, name)]
    head = f"# Written by `megatron-bridge {job.arguments[0]} --launcher kubernetes`.\n"
    return head + yaml.safe_dump_all(parts, sort_keys=False, width=120)


def job_name(name: str) -> str:
    """A recipe's name as Kubernetes takes names: lower case, hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_LONGEST].rstrip("-")


def _metadata(kubernetes: "KubernetesLauncher", name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "labels": {"app.kubernetes.io/name": "megatron-bridge"}}
    if kubernetes.namespace is not None:
        found["namespace"] = kubernetes.namespace
    return found


def _service(kubernetes: "KubernetesLauncher", name: str) -> dict[str, Any]:
    """It has no address of its own: pods are found by their names."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(kubernetes, name),
        # Ranks look for each other before they are ready.
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": name}},
    }


def _job(kubernetes: "KubernetesLauncher", job: Job, name: str) -> dict[str, Any]:
    metadata = _metadata(kubernetes, name)
    if kubernetes.queue is not None:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = kubernetes.queue
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completionMode": "Indexed",
            "completions": job.nodes,
            "parallelism": job.nodes,
            "backoffLimit": kubernetes.restarts * job.nodes,
            "template": {"spec": _pod(kubernetes, job, name)},
        },
    }


def _pod(kubernetes: "KubernetesLauncher", job: Job, name: str) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}}
        for number, claim in enumerate(kubernetes.claims)
    ]
    volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": kubernetes.shared_memory}})
    pod: dict[str, Any] = {
        "subdomain": name,
        "restartPolicy": "Never",
        "containers": [_container(kubernetes, job, name)],
        "volumes": volumes,
    }
    if kubernetes.node_selector:
        pod["nodeSelector"] = dict(kubernetes.node_selector)
    return pod


def _container(kubernetes: "KubernetesLauncher", job: Job, name: str) -> dict[str, Any]:
    mounts = [{"name": f"claim-{number}", "mountPath": path} for number, path in enumerate(kubernetes.claims.values())]
    found: dict[str, Any] = {
        "name": "ranks",
        "image": kubernetes.image,
        "command": _command(kubernetes, job, name),
        "env": [{"name": variable, "value": value} for variable, value in kubernetes.env.items()],
        "envFrom": [{"secretRef": {"name": secret}} for secret in kubernetes.secrets],
        "resources": {"limits": _limits(kubernetes, job)},
        "volumeMounts": [*mounts, {"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    return {key: value for key, value in found.items() if value not in ([], {"limits": {}})}


def _command(kubernetes: "KubernetesLauncher", job: Job, name: str) -> list[str]:
    return [
        *("torchrun", f"--nnodes={job.nodes}", f"--nproc-per-node={job.ranks_per_node}"),
        *(f"--node-rank=$({_INDEX})", f"--master-addr={name}-0.{name}", f"--master-port={kubernetes.port}"),
        *("-m", "megatron.bridge.cli", *job.restartable),
    ]


def _limits(kubernetes: "KubernetesLauncher", job: Job) -> dict[str, Any]:
    gpus = job.ranks_per_node if kubernetes.gpus_per_node is None else kubernetes.gpus_per_node
    asked = {kubernetes.gpu: gpus or None, "cpu": kubernetes.cpus, "memory": kubernetes.memory}
    return {resource: amount for resource, amount in asked.items() if amount is not None}
