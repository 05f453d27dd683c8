"""Slurm: bash runs the script; under its `srun` two ranks train, are told to stop, and go on when queued again."""

import json
import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from megatron.bridge.cli.root import run
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import run_ranks
from megatron.bridge.training.cli import train
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.launching.slurm import SCRIPT
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.recipe_registry import RECIPES
from megatron.bridge.training.validation import ConfigError

RECIPE = "slurm_test_recipe"
SECRET = "hunter2-hunter2-hunter2"
_COMMANDS = {
    "sbatch": 'echo "$@" >> sbatch.calls; echo "Submitted batch job 1"',
    "scontrol": 'echo "$@" >> scontrol.calls; if [[ $1 == show ]]; then echo 127.0.0.1; echo 127.0.0.2; fi',
    # Waits for the test to run the ranks, and ends as they did.
    "srun": 'env -0 > srun.env; printf "%s\\0" "$@" > srun.part; mv srun.part srun.words\n'
    "while [[ ! -f srun.code ]]; do sleep 0.05; done; code=$(cat srun.code); rm srun.code; exit $code",
}


@dataclass(frozen=True)
class FakeSlurm:
    """Its commands on a PATH of their own, in the working folder; `srun` has this warm process fork the ranks."""

    folder: Path

    def calls(self, command: str) -> list[str]:
        file = self.folder / f"{command}.calls"
        return file.read_text().splitlines() if file.exists() else []

    def run(self, script: Path, ranks: int, **more: str) -> tuple[int, list[str]]:
        """Run a batch script as Slurm would; its exit code, and what it gave to srun."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # The script makes the port of the number of the job.
        job = {"SLURM_JOB_ID": str(port - 20000), "SLURM_JOB_NODELIST": "node[1-2]", **more}
        batch = subprocess.Popen(["bash", str(script)], cwd=self.folder, env={**os.environ, **job})
        words = self._asked(batch)
        given = dict(entry.split("=", 1) for entry in (self.folder / "srun.env").read_text().split("\0")[:-1])
        options, words = words[: words.index("-m")], words[words.index("-m") + 2 :]
        started = [_rank(number, ranks, given, words) for number in range(ranks)]
        (self.folder / "srun.code").write_text(str(max(map(_joined, started))))
        return batch.wait(60), options

    def _asked(self, batch: "subprocess.Popen[bytes]") -> list[str]:
        file = self.folder / "srun.words"
        while not file.exists():
            assert batch.poll() is None
            time.sleep(0.02)
        words = file.read_text().split("\0")[:-1]
        file.unlink()
        return words


def _rank(number: int, ranks: int, given: Mapping[str, str], words: list[str]) -> BaseProcess:
    step = {"SLURM_PROCID": number, "SLURM_NTASKS": ranks, "SLURM_LOCALID": number, "SLURM_STEP_ID": 0}

    def work() -> None:
        os.environ.update(given)
        os.environ.update({name: str(value) for name, value in step.items()} | {"SLURM_STEP_NODELIST": "node[1-2]"})
        os._exit(run(words))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def _joined(process: BaseProcess) -> int:
    process.join(100)
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in _COMMANDS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    return FakeSlurm(tmp_path)


class Counting(torch.utils.data.Dataset[Any]):
    """At its sample 25, in the fourth step, Slurm tells the ranks to stop when they run for the first time."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 25 and os.environ.get("SLURM_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        text = (torch.arange(17) * 7 + index) % 100
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": torch.ones(16), "position_ids": torch.arange(16)}


@pytest.fixture
def recipe(make_run: Callable[..., Any]) -> Iterator[Callable[[], Any]]:
    def made() -> Any:
        cfg = make_run(train_iters=6)
        cfg.dataset.build_train_valid_test_datasets = lambda context: (Counting(), None, None)
        return cfg

    RECIPES.register(RECIPE, made)
    yield made
    RECIPES.unregister(RECIPE)


def _launch(*words: str) -> Result:
    return CliRunner().invoke(train, ["--recipe", RECIPE, "--launcher", "slurm", *words], catch_exceptions=False)


def _requeued(slurm: FakeSlurm) -> int:
    return sum(call.startswith("requeue ") for call in slurm.calls("scontrol"))


def _records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_job_stops_before_its_time_limit_and_goes_on_when_it_is_queued_again(
    slurm: FakeSlurm, recipe: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    folder = slurm.folder / "run"
    done = _launch("--nproc", "2", "--run-folder", "run", "--launch", "time=00:30:00", "--launch", "gpus_per_node=0")
    assert done.exit_code == 0, done.output
    script = folder / SCRIPT
    assert script.read_text() in done.output
    assert "Submitted batch job 1" in done.output
    assert slurm.calls("sbatch") == [str(script)]

    code, options = slurm.run(script, 2, SLURM_RESTART_COUNT="0")
    assert code == 0
    assert options == ["--kill-on-bad-exit=1", sys.executable]
    assert _requeued(slurm) == 1
    assert (folder / "stopped_by.txt").read_text() == "SIGTERM\n"
    assert slurm.run(script, 2, SLURM_RESTART_COUNT="1")[0] == 0
    assert _requeued(slurm) == 1

    whole = run_ranks(2, lambda: pretrain(recipe(), forward_step).losses)[0]
    assert {record["iteration"]: record["loss"] for record in _records(folder / "metrics.jsonl")} == whole
    starts = _records(folder / "starts.jsonl")
    assert [(record["event"], record["iteration"]) for record in starts] == [
        ("start", 0), ("end", 4), ("start", 4), ("end", 6)
    ]  # fmt: skip
    assert starts[0]["command"][:4] == ["megatron-bridge", "train", "--recipe", RECIPE]
    assert starts[0]["world_size"] == 2
    assert {"torch", "megatron-core", "megatron-bridge-training", "python"} <= starts[0]["versions"].keys()
    assert starts[0]["config"]["train"]["train_iters"] == 6
    assert "train_iters: 6" in (folder / "run_config.yaml").read_text()
    for rank in (0, 1):
        log = (folder / "logs" / f"rank_0000{rank}.log").read_text()
        assert log.count(f"start of rank {rank}") == 2
        assert "stopped by SIGTERM after step 4 of 6" in log
    assert (folder / "checkpoints" / "iter_0000006").is_dir()
    for file in folder.rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes(), file


def test_what_the_script_says(slurm: FakeSlurm, recipe: Callable[[], Any]) -> None:
    settings = (
        "partition=batch", "account=me", "cpus_per_task=4", "container_image=/images/it's.sqsh", "requeue=false",
        "container_mounts=[/data:/data, /models]", "env={NCCL_DEBUG: INFO, A: 'b c'}", "setup=[module load cuda]",
        "sbatch=[--qos=high]", "srun=[--mpi=none]", "signal_before=300", "time=1-12",
    )  # fmt: skip
    words = [word for setting in settings for word in ("--launch", setting)]
    # Within the image the data may be there: what is not seen here is not checked here.
    absent = ("dataset.mock=false", "dataset.data_paths=[/data/not/here]")
    done = _launch("--dry-run", "--nodes", "2", "--nproc", "4", "--run-folder", "a run", *words, *absent)
    assert done.exit_code == 0, done.output
    assert not (slurm.folder / "a run").exists()
    script = slurm.folder / "script"
    script.write_text(done.output)
    subprocess.run(["bash", "-n", str(script)], check=True)
    for line in (
        "--partition=batch", "--account=me", "--cpus-per-task=4", "--nodes=2", "--ntasks-per-node=4", "--no-requeue",
        "--gpus-per-node=4", "--signal=TERM@300", "--time=1-12", "--qos=high", f"--chdir={slurm.folder}",
        f"--output='{slurm.folder}/a run/logs/slurm-%j.out'",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in done.output
    assert "export NCCL_DEBUG=INFO\nexport A='b c'\nmodule load cuda\n" in done.output
    (started,) = [line for line in done.output.replace("\\\n", "").splitlines() if line.startswith("srun")]
    words = shlex.split(started)
    assert words[:5] == [
        "srun", "--kill-on-bad-exit=1", "--container-image=/images/it's.sqsh",
        f"--container-workdir={slurm.folder}", "--container-mounts=/data:/data,/models",
    ]  # fmt: skip
    assert words[5:9] == ["--mpi=none", "python", "-m", "megatron.bridge.cli"]
    assert words[9:15] == ["train", "--recipe", RECIPE, "--run-folder", "a run", "--resume"]
    assert "scontrol requeue" not in done.output


def test_a_script_that_fails_is_not_queued_again(slurm: FakeSlurm, recipe: Callable[[], Any]) -> None:
    # The ranks get another world than the configuration was checked for.
    assert _launch("--nproc", "2", "--run-folder", "run").exit_code == 0
    code, _ = slurm.run(slurm.folder / "run" / SCRIPT, 3)
    assert code == 1
    assert _requeued(slurm) == 0
    assert "is not a multiple of" in (slurm.folder / "run" / "logs" / "rank_00002.log").read_text()


def test_what_cannot_be_queued_is_refused_at_once(slurm: FakeSlurm, recipe: Callable[[], Any]) -> None:
    wrong = ("time=soon", "signal_before=-1", "container_mounts=[/a]", "env={HF_TOKEN: abc, 1X: b}", "sbatch=[qos]")
    with pytest.raises(ConfigError) as caught:
        _launch(*[word for setting in wrong for word in ("--launch", setting)])
    for said in (
        "7 problems", "needs --run-folder", "time='soon'", "signal_before=-1", "nothing would be mounted",
        "'HF_TOKEN' is a secret", "'1X' is no name", "'qos' is no option",
    ):  # fmt: skip
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match="no field 'partitoin'; did you mean 'partition'"):
        _launch("--run-folder", "run", "--launch", "partitoin=gpu")
    # The data are not where the job will look for them either.
    with pytest.raises(ConfigError, match="nowhere"):
        _launch("--run-folder", "run", "dataset.mock=false", "dataset.data_paths=[nowhere]")
    assert not (slurm.folder / "run").exists()


def test_without_sbatch_the_script_is_written_on_request(
    slurm: FakeSlurm, recipe: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BridgeError, match="there is no sbatch on this machine"):
        _launch("--run-folder", "run")
    assert _launch("--run-folder", "run", "--launch", "submit=false").exit_code == 0
    assert (slurm.folder / "run" / SCRIPT).is_file()
