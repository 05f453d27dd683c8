"""Sections that write into others: each field has its effect, or is refused with what it lacks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.bridge.testing import run_ranks
from megatron.bridge.training import comm_overlap
from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config import ValidationConfig
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.overrides import apply_overrides
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.validation import ConfigError

INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CommOverlapConfig)])
def test_every_overlap_is_written_into_its_sections(field: str, make_run: Callable[..., Any]) -> None:
    values: dict[str, Any] = {"bucket_size": 1000}
    cfg = make_run({"sequence_parallel": True})
    setattr(cfg.comm_overlap, field, values.get(field, True))
    comm_overlap.apply_overlap(cfg)
    homes = comm_overlap._HOMES[field]
    assert homes
    for home in homes:
        assert getattr(getattr(cfg, home), field) == values.get(field, True)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ValidationConfig)])
def test_the_section_on_validation_decides(field: str, make_run: Callable[..., Any]) -> None:
    cfg = make_run()
    apply_overrides(cfg, [f"validation.{field}=7"])
    cfg.validate(1)
    assert getattr(cfg.train, field) == 7


@pytest.mark.parametrize(
    ("model", "overrides", "world", "said"),
    [
        ({}, ["comm_overlap.tp_comm_overlap=true"], 1, "needs model.sequence_parallel=true"),
        ({}, ["comm_overlap.tp_comm_overlap=true"], 1, "tp_comm_overlap need a GPU and Transformer Engine"),
        ({}, ["comm_overlap.delay_wgrad_compute=true"], 1, "delay_wgrad_compute need a GPU"),
        ({}, ["comm_overlap.overlap_p2p_comm=true"], 1, "is for interleaved pipelines"),
        ({}, ["comm_overlap.overlap_param_gather=true"], 1, "needs ddp.use_distributed_optimizer=true"),
        ({}, ["comm_overlap.bucket_size=0"], 1, "bucket_size=0 must be greater than 0"),
        ({}, ["dist.distributed_backend=nccl"], 1, "'nccl' needs a GPU"),
        ({}, ["rng.te_rng_tracker=true"], 1, "rng.te_rng_tracker=True needs Transformer Engine"),
        ({}, ["validation.eval_interval=0"], 1, "eval_interval=0 must be greater than 0"),
    ],
)
def test_what_cannot_be_had_is_refused(
    model: dict[str, Any], overrides: list[str], world: int, said: str, make_run: Callable[..., Any]
) -> None:
    if torch.cuda.is_available() and ("GPU" in said or "Engine" in said):
        pytest.skip("this machine has what is said to be lacking")
    cfg = make_run(model)
    apply_overrides(cfg, overrides)
    with pytest.raises(ConfigError, match=said):
        cfg.validate(world)


def test_overlap_changes_no_loss(make_run: Callable[..., Any]) -> None:
    def work(overrides: list[str], layout: dict[str, int]) -> dict[int, float]:
        cfg = make_run(layout, train_iters=3, use_distributed_optimizer=True)
        apply_overrides(cfg, [f"comm_overlap.{each}" for each in overrides])
        apply_overrides(cfg, ["dist.distributed_backend=gloo"])
        return pretrain(cfg, forward_step).losses

    data_parallel = ["overlap_grad_reduce=true", "overlap_param_gather=true", "bucket_size=5000"]
    for overrides, layout in ((data_parallel, {}), (["overlap_p2p_comm=true"], INTERLEAVED)):
        plain, overlapped = (run_ranks(2, work, each, layout)[0] for each in ([], overrides))
        # Buckets add up the gradient norm in another order.
        assert overlapped == pytest.approx(plain, rel=1e-6)
