"""The launcher and the tasks, with NeMo-Run itself; `just nemo-run` runs them where it is installed."""

import dataclasses
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import nemo_run
import pytest
from nemo_run_bridge.launcher import EXECUTORS, NeMoRunLauncher
from nemo_run_bridge.spelled import read, spelled
from nemo_run_bridge.tasks import partial, script

from megatron.bridge.cli.root import run
from megatron.bridge.errors import BridgeError
from megatron.bridge.training.launching import LAUNCHERS, Job

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "seq_length": 16,
        "max_position_embeddings": 16,
    },
    "dataset": {"mock": True, "sequence_length": 16, "num_workers": 0},
    "train": {"train_iters": 3, "global_batch_size": 4},
    "optimizer": {"lr": 0.001},
    "tokenizer": {"vocab_size": 128},
}


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "nemo"))
    monkeypatch.setattr("nemo_run.config._NEMORUN_HOME", str(tmp_path / "nemo"), raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # which NeMo-Run's tunnel reads
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")


def job(*words, nodes=1, ranks=2, folder=None):
    return Job(name="a_job", arguments=words, restartable=words, work=print, nodes=nodes, ranks_per_node=ranks,
               run_folder=folder)  # fmt: skip


def test_it_is_offered_as_a_launcher():
    assert LAUNCHERS["nemo_run"] is NeMoRunLauncher


def test_every_executor_and_its_sizes_are_nemo_runs():
    for name, *sizes in EXECUTORS.values():
        known = {each.name for each in dataclasses.fields(getattr(nemo_run, name))}
        assert {size for size in sizes if size is not None} <= known, name


def test_dry_runs_are_nemo_runs_own(tmp_path):
    local = "".join(NeMoRunLauncher(env={"A": "b"}).describe(job("train", "--recipe", "x")).split())
    assert "'torchrun'" in local
    assert "'megatron.bridge.cli','train','--recipe','x'" in local
    slurm = NeMoRunLauncher(executor="slurm", options={"account": "me", "partition": "gpu", "time": "01:00:00"})
    shown = slurm.describe(job("train", nodes=2, ranks=4, folder=tmp_path))
    for line in ("#SBATCH --account=me", "#SBATCH --nodes=2", "#SBATCH --partition=gpu", "#SBATCH --time=01:00:00"):
        assert line in shown
    assert "--nproc-per-node 4" in " ".join(shown.split())


def test_what_cannot_start_is_refused():
    def problems(launcher, **sizes):
        return " ".join(launcher.problems(job("train", **sizes)))

    assert "did you mean 'slurm'" in problems(NeMoRunLauncher(executor="slrm"))
    assert "is of one machine" in problems(NeMoRunLauncher(), nodes=2)
    assert "has no field 'acount'; did you mean 'account'" in problems(
        NeMoRunLauncher(executor="slurm", options={"acount": "me"})
    )
    assert "is what --nproc and --nodes say" in problems(NeMoRunLauncher(options={"ntasks_per_node": 3}))
    assert "'WANDB_API_KEY' is a secret" in problems(NeMoRunLauncher(env={"WANDB_API_KEY": "x"}))
    assert problems(NeMoRunLauncher()) == ""


@pytest.mark.parametrize("words", [["plain=1"], ["x=[1, 2]", "a b", "$HOME", 'y="z"', "'"], []])
def test_words_arrive_as_they_were_given(words):
    assert read(spelled(words)) == words
    task = script(["train", *words])
    assert all(shlex.quote(word) == word for word in task.args)
    assert (task.args if task.path == "megatron.bridge.cli" else read(task.args[0])) == ["train", *words]


def test_spelled_words_run_the_command_line():
    words = [sys.executable, "-m", "nemo_run_bridge.spelled", spelled(["plugins", "--group", "no such group"])]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert "no such group" in ended.stderr + ended.stdout


def test_two_ranks_train_and_a_failure_is_one(tmp_path):
    (tmp_path / "small.yaml").write_text(json.dumps(SMALL))
    words = ["train", "--recipe", "megatron_lm", "--config", str(tmp_path / "small.yaml"), "--launcher", "nemo_run"]
    words += ["--nproc", "2", "--run-folder", str(tmp_path / "run")]
    assert run([*words, "train.rampup_batch_size=[2, 2, 4]"]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["iteration"] == 3
    with pytest.raises(BridgeError, match="has not ended well: a_job is FAILED"):
        NeMoRunLauncher().launch(job("no_such_command", ranks=1))


def test_a_partial_names_what_it_trains():
    task = partial("megatron_lm", ["train.train_iters=2"], run_folder="run")
    assert (task.recipe, task.overrides, task.run_folder) == ("megatron_lm", ["train.train_iters=2"], "run")
    nemo_run.run(task, nemo_run.LocalExecutor(ntasks_per_node=2, launcher="torchrun"), name="partial", dryrun=True)


@pytest.mark.parametrize("name", ["script", "partial"])
def test_the_examples_say_what_they_would_start(name):
    example = EXAMPLES / f"pretrain_llama3_8b_nemo_run_{name}.py"
    words = [sys.executable, str(example), "--nproc-per-node=2", "--dry-run", "train.train_iters=10"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "torchrun" in ended.stdout
