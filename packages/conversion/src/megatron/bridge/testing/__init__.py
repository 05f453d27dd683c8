"""The test kit: what this project runs on itself, offered to plugin authors."""

from megatron.bridge.platform.launch import RankFailed, run_ranks

__all__ = ["RankFailed", "run_ranks"]
