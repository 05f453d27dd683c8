"""Precisions by name: what they set, that they train, and where they are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.bridge.testing import run_ranks
from megatron.bridge.training.config import MixedPrecisionConfig
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.mixed_precision import PRECISIONS, apply_precision
from megatron.bridge.training.overrides import apply_overrides
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.validation import ConfigError


@pytest.mark.parametrize(("name", "dtype"), [("bf16_mixed", torch.bfloat16), ("fp16_mixed", torch.float16)])
def test_a_precision_trains_as_fp32_does_to_its_own_digits(
    name: str, dtype: torch.dtype, make_run: Callable[..., Any]
) -> None:
    def work() -> tuple[list[float], list[float], set[torch.dtype]]:
        losses = []
        for precision in ("fp32", name):
            # A scale that tiny gradients bear from the first step on.
            cfg = make_run(train_iters=8, seed=3, initial_loss_scale=2.0**10)
            cfg.mixed_precision = precision
            losses.append(list(pretrain(cfg, forward_step).losses.values()))
        return losses[0], losses[1], {cfg.model.params_dtype}

    for full, mixed, dtypes in run_ranks(2, work):
        assert dtypes == {dtype}
        assert mixed != full
        assert mixed == pytest.approx(full, rel=0.02)
        assert mixed[-1] < mixed[0] - 0.1


def test_every_precision_says_all_and_takes_back_what_another_said(make_run: Callable[..., Any]) -> None:
    for name in PRECISIONS:
        fresh, used = make_run(), make_run()
        for other in (*PRECISIONS, name):
            used.mixed_precision = MixedPrecisionConfig(precision=other)
            apply_precision(used)
        fresh.mixed_precision = MixedPrecisionConfig(precision=name)
        apply_precision(fresh)
        assert fresh == used
        assert fresh.ddp.grad_reduce_in_fp32
    assert fresh.model.fp4 == "e2m1"
    assert fresh.model.fp8 is None


def test_an_override_names_a_precision(make_run: Callable[..., Any]) -> None:
    cfg = make_run()
    apply_overrides(cfg, ["mixed_precision.precision=bf16_mixed", "mixed_precision.grad_reduce_in_fp32=false"])
    cfg.validate(1)
    assert cfg.model.params_dtype == torch.bfloat16
    assert not cfg.ddp.grad_reduce_in_fp32


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
@pytest.mark.parametrize("name", ["fp8", "bf16_with_mxfp8_mixed", "nvfp4", "bf16_with_fp8_delayed_scaling_mixed"])
def test_eight_and_four_bits_are_refused_without_a_gpu(name: str, make_run: Callable[..., Any]) -> None:
    cfg = make_run()
    cfg.mixed_precision = MixedPrecisionConfig(precision=name)
    with pytest.raises(ConfigError, match=rf"precision='{name}' needs a GPU of compute capability .*use 'bf16_mixed'"):
        cfg.validate(1)


def test_a_name_that_is_none_is_refused(make_run: Callable[..., Any]) -> None:
    cfg = make_run()
    cfg.mixed_precision = "bf16_mixd"
    with pytest.raises(ConfigError, match=r"'bf16_mixd' is unknown; did you mean 'bf16_mixed'"):
        cfg.validate(1)
