"""Overlapping communication with computation: one section for the fields of model, optimizer and DDP that say so."""

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


@dataclass(kw_only=True)
class CommOverlapConfig:
    """What is communicated while something is computed. None leaves a setting to the section that it is written into.

    Attributes:
        tp_comm_overlap: tensor-parallel communication within the layers; needs Transformer Engine, a GPU and
            `model.sequence_parallel`.
        overlap_p2p_comm: activations between the stages of an interleaved pipeline.
        overlap_grad_reduce: the reduction of gradients over data-parallel ranks, during the backward pass.
        overlap_param_gather: the gathering of parameters of the distributed optimizer, during the forward pass.
        align_param_gather: let all pipeline stages gather at the same time.
        delay_wgrad_compute: compute weight gradients later, where communication leaves time; needs Transformer Engine.
        bucket_size: parameters that are reduced at a time.
    """

    tp_comm_overlap: bool | None = None
    overlap_p2p_comm: bool | None = None
    overlap_grad_reduce: bool | None = None
    overlap_param_gather: bool | None = None
    align_param_gather: bool | None = None
    delay_wgrad_compute: bool | None = None
    bucket_size: int | None = None


# Which sections each setting is written into.
_HOMES: Mapping[str, tuple[str, ...]] = {
    "tp_comm_overlap": ("model",),
    "overlap_p2p_comm": ("model",),
    "overlap_grad_reduce": ("ddp",),
    "overlap_param_gather": ("ddp", "optimizer"),
    "align_param_gather": ("ddp",),
    "delay_wgrad_compute": ("model", "ddp"),
    "bucket_size": ("ddp",),
}
_WITH_ENGINE = ("tp_comm_overlap", "delay_wgrad_compute")


def apply_overlap(cfg: "ConfigContainer") -> None:
    """Write the section into those that Megatron-Core reads. May be done again."""
    for field in dataclasses.fields(cfg.comm_overlap):
        value = getattr(cfg.comm_overlap, field.name)
        if value is not None:
            for home in _HOMES[field.name]:
                setattr(getattr(cfg, home), field.name, value)
            if field.name == "overlap_p2p_comm":
                # Megatron-Core overlaps single sends only.
                cfg.model.batch_p2p_comm = not value


def overlap_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """Why the layout cannot overlap what is asked."""
    model, ddp = cfg.model, cfg.ddp
    if getattr(model, "tp_comm_overlap", False) and not model.sequence_parallel:
        yield "comm_overlap.tp_comm_overlap=True needs model.sequence_parallel=true; set it, or leave the overlap out"
    if cfg.comm_overlap.overlap_p2p_comm and not getattr(model, "virtual_pipeline_model_parallel_size", None):
        yield (
            "comm_overlap.overlap_p2p_comm=True is for interleaved pipelines; set "
            "model.virtual_pipeline_model_parallel_size, or leave it out"
        )
    if ddp.overlap_param_gather and not (ddp.use_distributed_optimizer and ddp.overlap_grad_reduce):
        yield (
            "overlap_param_gather=True needs ddp.use_distributed_optimizer=true and overlap_grad_reduce=true; set both "
            "(the former in the section optimizer, too)"
        )
    if ddp.bucket_size is not None and ddp.bucket_size <= 0:
        yield f"bucket_size={ddp.bucket_size} must be greater than 0; leave it out for Megatron-Core's choice"


def engine_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """What this machine lacks for it."""
    asked = [name for name in _WITH_ENGINE if getattr(cfg.model, name, False)]
    if not asked:
        return
    from megatron.bridge.platform import cuda_available

    lacking = [] if cuda_available() else ["a GPU"]
    lacking += [] if importlib.util.find_spec("transformer_engine") else ["Transformer Engine"]
    if lacking:
        yield f"comm_overlap: {' and '.join(asked)} need {' and '.join(lacking)}, which is not here; leave it out"
