"""The manifest for Kubernetes: what it asks for, that torchrun understands its command, and what is refused."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from torch.distributed.run import get_args_parser

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.cli import train
from megatron.bridge.training.launching.kubernetes_manifest import job_name
from megatron.bridge.training.recipe_registry import RECIPES

RECIPE = "kubernetes_test_recipe"
WHOLE = ["--launch", "image=registry/bridge:1", "--launch", "claims={runs: /data}", "--run-folder", "/data/runs/one"]


@pytest.fixture(autouse=True)
def _recipe(make_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    RECIPES.register(RECIPE, lambda: make_run(train_iters=2))
    yield
    RECIPES.unregister(RECIPE)


def _launch(*words: str) -> Result:
    return CliRunner().invoke(train, ["--recipe", RECIPE, "--launcher", "kubernetes", *words], catch_exceptions=False)


def test_a_dry_run_prints_the_manifest() -> None:
    further = ["gpus_per_node=4", "namespace=team", "queue=team", "memory=64Gi", "secrets=[wandb]", "env={A: '1'}"]
    shown = _launch("--dry-run", "--nodes", "2", "--nproc", "2", *WHOLE, *(w for f in further for w in ("--launch", f)))
    service, job = yaml.safe_load_all(shown.output)
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    name = job["metadata"]["name"]
    assert service["metadata"]["name"] == name == job["spec"]["template"]["spec"]["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert (job["spec"]["completions"], job["spec"]["parallelism"], job["spec"]["completionMode"]) == (2, 2, "Indexed")
    assert job["metadata"]["namespace"] == service["metadata"]["namespace"] == "team"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry/bridge:1"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4, "memory": "64Gi"}
    assert container["env"] == [{"name": "A", "value": "1"}]
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    volumes = {volume["name"]: volume for volume in job["spec"]["template"]["spec"]["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/data"]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"


def test_torchrun_understands_the_command_and_goes_on_after_a_restart() -> None:
    _, job = yaml.safe_load_all(_launch("--dry-run", "--nodes", "2", "--nproc", "2", *WHOLE, "rng.seed=5").output)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    program, *words = container["command"]
    assert program == "torchrun"
    # As Kubernetes fills it in for the second pod.
    given = get_args_parser().parse_args([word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in words])
    assert (given.nnodes, given.nproc_per_node, given.node_rank) == ("2", "2", 1)
    assert given.master_addr == f"{job['metadata']['name']}-0.{job['spec']['template']['spec']['subdomain']}"
    assert (given.module, given.training_script) == (True, "megatron.bridge.cli")
    rest = given.training_script_args
    assert rest[:3] == ["train", "--recipe", RECIPE]
    assert "--resume" in rest
    assert rest[-1] == "rng.seed=5"


def test_kubectl_is_given_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BridgeError, match="there is no kubectl"):
        _launch("--nproc", "2", *WHOLE)
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\n/bin/cat > {tmp_path}/given\necho job created\n')
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin")
    done = _launch("--nproc", "2", *WHOLE)
    assert "job created" in done.output
    assert (tmp_path / "words").read_text() == "apply -f -\n"
    assert [part["kind"] for part in yaml.safe_load_all((tmp_path / "given").read_text())] == ["Service", "Job"]
    kubectl.write_text("#!/bin/sh\necho no such namespace >&2\nexit 3\n")
    with pytest.raises(BridgeError, match=r"kubectl refused the manifest \(exit code 3\): no such namespace"):
        _launch("--nproc", "2", *WHOLE)


def test_what_cannot_start_is_refused_at_once() -> None:
    settings = ["restarts=-1", "claims={work: work}", "env={WANDB_API_KEY: x, 1A: y}"]
    with pytest.raises(BridgeError) as refusal:
        _launch("--run-folder", "/elsewhere/run", *(word for each in settings for word in ("--launch", each)))
    told = str(refusal.value)
    for why in (
        "needs the ranks' container image",
        "/elsewhere/run is on no volume",
        "restarts=-1",
        "'work' is no path in a pod",
        "'WANDB_API_KEY' is a secret",
        "'1A' is no name of an environment variable",
    ):
        assert why in told
    with pytest.raises(BridgeError, match="needs --run-folder"):
        _launch("--nproc", "2", "--launch", "image=a")


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("llama32_1b_pretrain_config", "llama32-1b-pretrain-config"), ("A.b__" * 30, ("a-b-" * 13)[:-1])],
)
def test_names_are_those_that_kubernetes_takes(recipe: str, name: str) -> None:
    assert job_name(recipe) == name
