"""What lies beside the tensors of a checkpoint: the run's configuration, and the Hugging Face files of its model.

With the latter a checkpoint can be exported by itself: `AutoBridge.from_megatron_checkpoint(folder)`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.training.hf_side import bridge_of, hf_start, kept_hf_files
from megatron.bridge.training.run_config import to_yaml

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

RUN_CONFIG = "run_config.yaml"


def side_files(cfg: "ConfigContainer", scratch: Path) -> dict[str, Any]:
    """Name -> text or folder; `scratch` is an empty folder to write into.

    The Hugging Face files come from the `AutoBridge` that made the provider, else from the run's last checkpoint, or
    the one that it started from; a model that never had any gets none.
    """
    from megatron.bridge.conversion.hf import copy_companions
    from megatron.bridge.conversion.megatron_checkpoint import HF_FILES, describing_files

    files: dict[str, Any] = {RUN_CONFIG: to_yaml(cfg)}
    if cfg.checkpoint.save_hf:
        return files  # the whole folder comes with the weights
    bridge = getattr(cfg.model, "bridge", None) or (hf_start(cfg) and bridge_of(cfg))
    if bridge:
        return files | {HF_FILES: describing_files(bridge, scratch)}
    kept = kept_hf_files(cfg)
    if kept is None:
        return files
    # Of a checkpoint that holds the whole folder, not its weights.
    copy_companions(kept, scratch / HF_FILES)
    return files | {HF_FILES: scratch / HF_FILES}
