"""One rank trains as a plain torch loop does, and context ranks weigh every token the same.

Every layout beside one rank is in `integration_tests/test_parity.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron.bridge.testing import run_ranks
from megatron.bridge.training.data import batches_per_chunk, build_datasets
from megatron.bridge.training.gpt_step import context_parallel_loss, forward_step
from megatron.bridge.training.setup import distributed, setup
from megatron.bridge.training.train import train

STEPS = 20
TOLERANCE = 1e-5


def test_the_loop_is_a_plain_torch_loop(make_run: Callable[..., Any], initial_weights: Path) -> None:
    """The same model, data, loss and schedule with torch.optim.AdamW and nothing of Megatron's engine."""

    def work() -> tuple[list[float], list[float], float]:
        cfg = make_run(train_iters=STEPS, pretrained_checkpoint=str(initial_weights), lr_decay_style="constant")
        with distributed(cfg):
            run = setup(cfg)
            reference = cfg.model.provide_distributed_model(wrap_with_ddp=False)[0]
            reference.load_state_dict(run.model[0].module.state_dict())
            batches = batches_per_chunk(cfg, build_datasets(cfg)[0], 1, cfg.train.global_batch_size)[0]
            expected = _plain_loop(cfg, reference, batches)
            result = train(run, forward_step)
            assert all(group["fused"] for group in run.optimizer.param_groups)
            trained = run.model[0].module.state_dict()
            furthest = max(
                (trained[name] - value).abs().max().item()
                for name, value in reference.state_dict().items()
                if isinstance(value, torch.Tensor)
            )
        return list(result.losses.values()), expected, furthest

    losses, expected, furthest = run_ranks(1, work, timeout=120)[0]
    assert losses == pytest.approx(expected, rel=TOLERANCE)
    assert furthest < TOLERANCE


def _plain_loop(cfg: Any, model: torch.nn.Module, data: Any) -> list[float]:
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    plain = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": decayed, "weight_decay": cfg.optimizer.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.optimizer.lr, betas=(0.9, 0.999))
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = cfg.optimizer.lr * min(1.0, step / cfg.scheduler.lr_warmup_iters)
        batches = [next(data) for _ in range(cfg.train.global_batch_size)]
        batch = {name: torch.cat([part[name] for part in batches]) for name in batches[0]}
        logits = model(batch["tokens"], batch["position_ids"], None)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optimizer.clip_grad)
        optimizer.step()
        losses.append(loss.item())
    return losses


def _mean_over_context_ranks() -> tuple[float, float]:
    """(the gradient that data-parallel averaging gives, that of the mean over the tokens that count)"""
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    rank = parallel_state.get_context_parallel_rank()
    # Three tokens of the sequence count on the first rank, one on the second.
    mask, factors = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 1.0]]), torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
    mine = slice(3 * rank, 3 * rank + 3)
    weight = torch.ones((), requires_grad=True)
    total, tokens, report = context_parallel_loss(mask[:, mine], (weight * factors)[:, mine])
    (total / tokens).backward()
    gradient = weight.grad
    assert gradient is not None
    torch.distributed.all_reduce(gradient)
    assert report["lm loss"].tolist() == [[7.0, 3.0], [32.0, 1.0]][rank]
    return gradient.item() / 2, ((factors * mask).sum() / mask.sum()).item()


def test_every_token_weighs_the_same_though_context_ranks_hold_different_numbers() -> None:
    for averaged, expected in run_ranks(2, _mean_over_context_ranks):
        assert averaged == pytest.approx(expected)
