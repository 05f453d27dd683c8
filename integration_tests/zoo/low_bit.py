"""Low-bit sources: a case's folder with its matrices in FP8 blocks, read at a layout that cuts them."""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron.bridge import AutoBridge
from megatron.bridge.testing.families import FamilyCase, expect_same_weights

BLOCK = 16
_IN_A_LAYER = re.compile(r"\.\d+\..*weight$")


def in_fp8(case: FamilyCase, folder: Path) -> FamilyCase:
    """The case with the layers' matrices in float8, a scale per block; its weights are what torch makes of those."""
    shutil.copytree(case.folder, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (folder / "config.json").write_text(json.dumps(config))
    stored, meant = {}, {}
    for name, weight in case.weights.items():
        stored[name], meant[name] = weight.contiguous(), weight
        if _IN_A_LAYER.search(name) and weight.dim() == 2 and min(weight.shape) >= BLOCK:
            stored[name], stored[f"{name}_scale_inv"] = quantised(weight)
            meant[name] = stored[name].float() * spread(stored[f"{name}_scale_inv"], weight.shape)
    save_file(stored, folder / "model.safetensors")
    return dataclasses.replace(case, folder=folder, weights=meant)


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8 weight, one scale per block), the largest value of a block being float8's largest."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    largest = padded.view(rows, BLOCK, columns, BLOCK).abs().amax((1, 3))
    scale = largest.clamp(min=1e-6) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / spread(scale, weight.shape)).to(torch.float8_e4m3fn), scale


def spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A scale for every element."""
    return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]


def read_low_bit(case: FamilyCase, fields: Mapping[str, Any]) -> None:
    """Import the folder and compare what comes out with what it means. To be run in every rank of the layout.

    Raises:
        FamilyMismatch: names the weights that differ.
    """
    bridge = AutoBridge.from_hf_pretrained(case.folder)
    model = bridge.to_megatron_model(**fields, layer_spec="torch")
    expect_same_weights(case, bridge.export_hf_weights(model))
