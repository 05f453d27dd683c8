"""Megatron-Core is imported once; ranks are forked from this process."""

import pytest
import torch

from megatron.bridge.testing import import_engine


@pytest.fixture(scope="session", autouse=True)
def _engine():
    import_engine()
    # Forked ranks must not inherit a pool of OpenMP threads.
    torch.set_num_threads(1)
