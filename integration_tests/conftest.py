"""What the integration tests share: a warm process to fork from, the command line in a forked child, small models."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron.bridge.cli.root import run
from megatron.bridge.testing import import_engine, save_random_model

REPOSITORY = Path(__file__).parents[1]
SECONDS = 240.0  # for one command; a hang must not take the whole session's time


@dataclass(frozen=True)
class Outcome:
    """How a command ended: `code` is its exit code, `out` and `err` are what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def _warm() -> None:
    """Import once what every child needs; a fork of this process starts in milliseconds."""
    import_engine()
    import transformers.models.llama.modeling_llama
    import transformers.models.seed_oss.modeling_seed_oss

    import megatron.bridge.conversion.verify
    import megatron.bridge.training.pretrain
    import megatron.bridge.training.setup
    import megatron.bridge.training.train  # noqa: F401

    # Forked ranks must not inherit a pool of OpenMP threads.
    torch.set_num_threads(1)


def in_child(function: Callable[[], int], folder: Path, outputs: Path) -> Outcome:
    """Run `function` in a fork of this process with `folder` as its working directory."""
    outputs.mkdir(parents=True, exist_ok=True)
    out, err = outputs / "stdout", outputs / "stderr"
    child = multiprocessing.get_context("fork").Process(target=_child, args=(function, folder, out, err))
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
        pytest.fail(f"no end after {SECONDS:.0f} s\n{out.read_text()}\n{err.read_text()}")
    assert child.exitcode is not None
    return Outcome(child.exitcode, out.read_text("utf-8"), err.read_text("utf-8"))


def _child(function: Callable[[], int], folder: Path, out: Path, err: Path) -> None:
    os.chdir(folder)
    for number, file in ((1, out), (2, err)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    # pytest has its own files in the place of these.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    try:
        code = function()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the parent's exit handlers; what the command started has ended by now.
    os._exit(code)


@pytest.fixture
def cli(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """`cli("convert", "import", ..., folder=...)`: the command line in a forked child."""

    def call(*args: str | Path, folder: Path) -> Outcome:
        return in_child(lambda: run([str(arg) for arg in args]), folder, tmp_path_factory.mktemp("outputs"))

    return call


def save_small_llama(folder: Path, **changes: object) -> None:
    """A random Llama of 4 heads with the tokenizer of `save_small_tokenizer`, in fp32."""
    from transformers import LlamaConfig

    values = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "dtype": "float32",
    }
    save_random_model(LlamaConfig(**(values | changes)), folder)


def save_small_tokenizer(folder: Path) -> None:
    """A BPE of 512 tokens trained on this repository's own prose."""
    from megatron.bridge.data.tokenizers import train_bpe_tokenizer

    train_bpe_tokenizer(prose(), 512, folder)


def prose() -> list[str]:
    """Text that every checkout has: the packages' Markdown and sources."""
    return [file.read_text("utf-8") for file in sorted(REPOSITORY.glob("packages/*/src/**/*.py"))]
