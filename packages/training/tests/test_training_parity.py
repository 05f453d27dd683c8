"""Every claimed layout trains as one rank does, and one rank trains as a plain torch loop does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron.bridge.conversion import dist_checkpoint
from megatron.bridge.testing import run_ranks
from megatron.bridge.training.data import batches_per_chunk, build_datasets
from megatron.bridge.training.gpt_step import context_parallel_loss, forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.setup import distributed, setup
from megatron.bridge.training.train import train

STEPS = 20
TOLERANCE = 1e-5

TP = {"tensor_model_parallel_size": 2}
PP = {"pipeline_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
VPP = PP | {"virtual_pipeline_model_parallel_size": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}
# name -> (model fields, settings)
ONE_RANK: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one rank": ({}, {}),
    "one rank, distributed optimizer": ({}, DISTRIBUTED),
    "one rank, per-token loss": ({"calculate_per_token_loss": True}, {}),
}
TWO_RANKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "TP2": (TP, {}),
    "TP2 + sequence parallel": (TP | {"sequence_parallel": True}, {}),
    "PP2": (PP, {}),
    "PP2 x VPP2": (VPP, {}),
    "CP2": (CP, {}),
    "CP2, per-token loss": (CP | {"calculate_per_token_loss": True}, {}),
    "CP2, distributed optimizer": (CP, DISTRIBUTED),
    "DP2": ({}, {}),
    "DP2, overlapped": ({}, {"overlap_grad_reduce": True}),
    "DP2, distributed optimizer": ({}, DISTRIBUTED),
    "DP2, distributed optimizer, overlapped": (
        {},
        DISTRIBUTED | {"overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "DP2, per-token loss": ({"calculate_per_token_loss": True}, {"micro_batch_size": 2}),
}
FOUR_RANKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "TP2 x PP2": (TP | PP, {}),
    "TP2 x CP2, SP": (TP | CP | {"sequence_parallel": True}, {}),
    "PP2 x CP2": (PP | CP, {}),
    "TP2 x DP2, SP, distributed optimizer": (TP | {"sequence_parallel": True}, DISTRIBUTED),
}


@pytest.fixture(scope="module")
def runs(make_run: Any, initial_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """name -> losses and gradient norms of 20 steps, and all weights after them."""
    folder = tmp_path_factory.mktemp("parity")

    def work(layouts: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, (model, settings) in layouts.items():
            target = str(folder / name)
            cfg = make_run(
                model, train_iters=STEPS, pretrained_checkpoint=str(initial_weights), save=target, **settings
            )
            result = pretrain(cfg, forward_step)
            found[name] = {"losses": list(result.losses.values()), "norms": list(result.grad_norms.values())}
        return found

    results = {
        **run_ranks(1, work, ONE_RANK, timeout=200)[0],
        **run_ranks(2, work, TWO_RANKS, timeout=300)[1],
        **run_ranks(4, work, FOUR_RANKS, timeout=300)[3],
    }
    weights = run_ranks(1, lambda: {name: _weights(folder / name) for name in results}, timeout=100)[0]
    return {name: results[name] | {"weights": weights[name]} for name in results}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from megatron.core.dist_checkpointing.serialization import load_plain_tensors

    loaded = load_plain_tensors(str(dist_checkpoint.resolve(folder)))
    return {
        name: value
        for name, value in loaded.items()
        if isinstance(value, torch.Tensor) and not name.startswith("optimizer.")
    }


@pytest.mark.parametrize("name", [*list(ONE_RANK)[1:], *TWO_RANKS, *FOUR_RANKS])
def test_a_layout_trains_as_one_rank_does(name: str, runs: dict[str, dict[str, Any]]) -> None:
    one, other = runs["one rank"], runs[name]
    assert len(one["losses"]) == STEPS
    assert one["losses"][-1] < one["losses"][0] - 0.5
    assert one["losses"] == pytest.approx(other["losses"], rel=TOLERANCE)
    assert one["norms"] == pytest.approx(other["norms"], rel=TOLERANCE)
    assert one["weights"].keys() == other["weights"].keys()
    furthest = max((one["weights"][key] - other["weights"][key]).abs().max().item() for key in one["weights"])
    assert furthest < TOLERANCE


def test_the_loop_is_a_plain_torch_loop(make_run: Callable[..., Any], initial_weights: Path) -> None:
    """The same model, data, loss and schedule with torch.optim.AdamW and nothing of Megatron's engine."""

    def work() -> tuple[list[float], list[float], float]:
        cfg = make_run(train_iters=STEPS, pretrained_checkpoint=str(initial_weights), lr_decay_style="constant")
        with distributed(cfg):
            run = setup(cfg)
            reference = cfg.model.provide_distributed_model(wrap_with_ddp=False)[0]
            reference.load_state_dict(run.model[0].module.state_dict())
            expected = _plain_loop(cfg, reference, batches_per_chunk(cfg, build_datasets(cfg)[0], 1, 0)[0])
            result = train(run, forward_step)
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
