"""The test kit: what this project runs on itself, offered to plugin authors."""

from megatron.bridge.platform.engine import import_engine
from megatron.bridge.platform.launch import RankFailed, run_ranks
from megatron.bridge.testing.adapters import AdapterMismatch, check_adapter
from megatron.bridge.testing.families import FamilyMismatch, check_family
from megatron.bridge.testing.hf_models import random_model, save_random_model
from megatron.bridge.testing.live_bytes import LiveBytes

__all__ = [
    "AdapterMismatch",
    "FamilyMismatch",
    "LiveBytes",
    "RankFailed",
    "check_adapter",
    "check_family",
    "import_engine",
    "random_model",
    "run_ranks",
    "save_random_model",
]
