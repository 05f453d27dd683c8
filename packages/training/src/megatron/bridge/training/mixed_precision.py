"""Precision by name: which fields of model, optimizer and gradient reduction make it, and which machines can run it.

Sources: mixed precision (arXiv:1710.03740), FP8 formats (arXiv:2209.05433), MXFP8 (OCP Microscaling 1.0), NVFP4
(arXiv:2509.25149); recipes in 8 and 4 bits are Transformer Engine's.
"""

import dataclasses
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError, did_you_mean

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


@dataclass(kw_only=True)
class MixedPrecisionConfig:
    """In which precision a run computes; set, it decides about the fields of `model` and `ddp` that say so too.

    Attributes:
        precision: a name in `PRECISIONS`; None leaves the precision to the fields of `model`.
        grad_reduce_in_fp32: add up gradients over ranks in fp32; None takes the precision's own choice.
    """

    precision: str | None = None
    grad_reduce_in_fp32: bool | None = None


@dataclass(frozen=True)
class Precision:
    """A precision by name.

    Args:
        dtype: of weights and activations, by torch's name.
        model: further fields of the model.
        grad_reduce_in_fp32: see `MixedPrecisionConfig`.
        capability: lowest compute capability of a GPU that has it, where a GPU and Transformer Engine are needed.
    """

    dtype: str
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    grad_reduce_in_fp32: bool = True
    capability: tuple[int, int] | None = None


_EDGES = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}
_DELAYED = {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("float32"),
    "bf16_mixed": Precision("bfloat16"),
    "fp16_mixed": Precision("float16"),
    "bf16_with_fp8_delayed_scaling_mixed": Precision(
        "bfloat16", {"fp8": "hybrid", "fp8_recipe": "delayed", **_DELAYED}, capability=(8, 9)
    ),
    "bf16_with_fp8_current_scaling_mixed": Precision(
        "bfloat16", {"fp8": "hybrid", "fp8_recipe": "tensorwise", **_EDGES}, capability=(8, 9)
    ),
    "bf16_with_fp8_subchannel_scaling_mixed": Precision(
        "bfloat16", {"fp8": "e4m3", "fp8_recipe": "blockwise"}, capability=(9, 0)
    ),
    "bf16_with_mxfp8_mixed": Precision("bfloat16", {"fp8": "e4m3", "fp8_recipe": "mxfp8"}, capability=(10, 0)),
    "bf16_with_nvfp4_mixed": Precision("bfloat16", {"fp4": "e2m1", "fp4_recipe": "nvfp4"}, capability=(10, 0)),
}
_SHORT = {
    "bf16": "bf16_mixed",
    "fp16": "fp16_mixed",
    "fp8": "bf16_with_fp8_current_scaling_mixed",
    "mxfp8": "bf16_with_mxfp8_mixed",
    "nvfp4": "bf16_with_nvfp4_mixed",
}
# What a precision leaves unset goes back to what Megatron-Core has without being told.
_RESET = ("fp8", "fp8_recipe", "fp4", "fp4_recipe", *_EDGES, *_DELAYED)


def precision_of(name: str) -> Precision:
    """The precision that a name means.

    Raises:
        BridgeError: none has this name.
    """
    known = {**PRECISIONS, **{short: PRECISIONS[name] for short, name in _SHORT.items()}}
    if name not in known:
        raise BridgeError(
            f"mixed_precision.precision={name!r} is unknown{did_you_mean(name, known)}; there are {', '.join(known)}"
        )
    return known[name]


def apply_precision(cfg: "ConfigContainer") -> None:
    """Write the run's precision into the sections that Megatron-Core reads. May be done again.

    Raises:
        BridgeError: the name is unknown.
    """
    import torch

    if isinstance(cfg.mixed_precision, str):
        cfg.mixed_precision = MixedPrecisionConfig(precision=cfg.mixed_precision)
    wanted = cfg.mixed_precision
    if wanted.grad_reduce_in_fp32 is not None:
        cfg.ddp.grad_reduce_in_fp32 = wanted.grad_reduce_in_fp32
    if wanted.precision is None:
        return
    precision = precision_of(wanted.precision)
    defaults = {field.name: field.default for field in dataclasses.fields(cfg.model) if field.name in _RESET}
    low = {"bf16": precision.dtype == "bfloat16", "fp16": precision.dtype == "float16"}
    dtype = getattr(torch, precision.dtype)
    for name, value in {**defaults, **low, "params_dtype": dtype, "pipeline_dtype": dtype, **precision.model}.items():
        setattr(cfg.model, name, value)
    if wanted.grad_reduce_in_fp32 is None:
        cfg.ddp.grad_reduce_in_fp32 = precision.grad_reduce_in_fp32


def precision_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """Why this machine cannot run the precision."""
    name = cfg.mixed_precision.precision
    needed = None if name is None else precision_of(name).capability
    if needed is None:
        return
    from megatron.bridge.platform import describe

    asked = f"mixed_precision.precision={name!r} needs"
    devices = describe()["cuda_devices"]
    if not devices:
        yield f"{asked} a GPU of compute capability {needed[0]}.{needed[1]}, and there is none; use 'bf16_mixed'"
        return
    if importlib.util.find_spec("transformer_engine") is None:
        yield f"{asked} Transformer Engine, which is not there: uv pip install 'megatron-bridge-models[te]'"
    for device in devices:
        major, _, minor = device["capability"].partition(".")
        if (int(major), int(minor)) < needed:
            yield f"{asked} compute capability {needed[0]}.{needed[1]}; {device['name']} has {device['capability']}"
