"""Mock text for smoke tests and benchmarks: Megatron-Core's counting sequences, no file needed."""

from dataclasses import dataclass

from megatron.bridge.data.datasets.gpt import GPTDatasetConfig


@dataclass(kw_only=True)
class MockGPTDatasetConfig(GPTDatasetConfig):
    """`GPTDatasetConfig(mock=True)` under a name of its own."""

    mock: bool | None = True
