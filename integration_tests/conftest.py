"""What the integration tests share: a warm process to fork from, and the command line in a forked child."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.bridge.cli.root import run
from megatron.bridge.testing import import_engine

# The modules beside the tests: pytest's import mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent))

from forked import Outcome, in_child

# What the children would otherwise import one by one.
WARM = (
    "megatron.bridge.conversion.verify",
    "megatron.bridge.training.pretrain",
    "megatron.bridge.training.setup",
    "megatron.bridge.training.train",
    "transformers.models.cohere_compass.modeling_cohere_compass",
    "transformers.models.llama.modeling_llama",
)


@pytest.fixture(scope="session", autouse=True)
def _warm() -> None:
    """Import once what every child needs; a fork of this process starts in milliseconds."""
    import_engine()
    for module in WARM:
        importlib.import_module(module)
    # Forked ranks must not inherit a pool of OpenMP threads.
    torch.set_num_threads(1)


@pytest.fixture
def cli(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """`cli("convert", "import", ..., folder=...)`: the command line in a forked child."""

    def call(*args: str | Path, folder: Path) -> Outcome:
        return in_child(lambda: run([str(arg) for arg in args]), folder, tmp_path_factory.mktemp("outputs"))

    return call
