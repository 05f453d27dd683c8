"""A mixture of experts trains as on one rank, wherever its experts are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge.conversion import dist_checkpoint
from megatron.bridge.testing import run_ranks
from megatron.bridge.training.checkpoint import save_checkpoint
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.setup import setup

STEPS = 10
TOLERANCE = 1e-5
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
}
EP = {"expert_model_parallel_size": 2}
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
DISTRIBUTED = {"use_distributed_optimizer": True}
# name -> (ranks, model fields, settings)
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "DP2": (2, {}, {}),
    "EP2": (2, EP, {}),
    "EP2, distributed optimizer": (2, EP, DISTRIBUTED),
    "TP2, experts divided": (2, TP, {}),
    "TP2, experts whole": (2, TP | EP | {"expert_tensor_parallel_size": 1}, {}),
    "PP2 x EP2": (4, EP | {"pipeline_model_parallel_size": 2}, {}),
    "TP2 x EP2": (4, TP | EP, {}),
    "DP2 x EP2, distributed optimizer": (4, EP, DISTRIBUTED),
}


@pytest.fixture(scope="module")
def initial(make_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights from which every layout starts."""
    folder = tmp_path_factory.mktemp("experts")

    def work() -> None:
        cfg = make_run(EXPERTS, save=str(folder))
        save_checkpoint(0, setup(cfg).model, None, None, cfg)

    run_ranks(1, work, timeout=120)
    return folder


@pytest.fixture(scope="module")
def run(make_run: Any, initial: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that trains at a layout: (losses, gradient norms, weights after them)."""
    folder = tmp_path_factory.mktemp("trained")

    def trained(name: str, ranks: int, model: dict[str, Any], settings: dict[str, Any]) -> Any:
        def work() -> Any:
            cfg = make_run(
                EXPERTS | model,
                train_iters=STEPS,
                pretrained_checkpoint=str(initial),
                save=str(folder / name),
                **settings,
            )
            result = pretrain(cfg, forward_step)
            return list(result.losses.values()), list(result.grad_norms.values())

        losses, norms = run_ranks(ranks, work, timeout=200)[-1]
        return losses, norms, run_ranks(1, lambda: _weights(folder / name), timeout=100)[0]

    return trained


@pytest.fixture(scope="module")
def one_rank(run: Any) -> Any:
    return run("one rank", 1, {}, {})


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from megatron.core.dist_checkpointing.serialization import load_plain_tensors

    loaded = load_plain_tensors(str(dist_checkpoint.resolve(folder)))
    return {
        name: value
        for name, value in loaded.items()
        if isinstance(value, torch.Tensor) and not name.startswith("optimizer.")
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_experts_train_as_on_one_rank(name: str, run: Any, one_rank: Any) -> None:
    losses, norms, weights = one_rank
    other_losses, other_norms, other_weights = run(name, *LAYOUTS[name])
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.2
    assert losses == pytest.approx(other_losses, rel=TOLERANCE)
    assert norms == pytest.approx(other_norms, rel=TOLERANCE)
    assert weights.keys() == other_weights.keys()
    assert any(".experts.experts." in name for name in weights)
    assert max((weights[key] - other_weights[key]).abs().max().item() for key in weights) < TOLERANCE
