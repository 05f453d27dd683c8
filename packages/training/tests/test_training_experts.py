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
BIASED = EXPERTS | {"add_bias_linear": True, "moe_shared_expert_intermediate_size": None}
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
BIASED_LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "biases, ETP2": (2, {"expert_tensor_parallel_size": 2}, DISTRIBUTED),
    "biases, TP2": (2, TP, {}),
}


@pytest.fixture(scope="module")
def initial(make_run: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Checkpoints of random weights from which every layout starts, by whether there are biases."""
    folders = {biased: tmp_path_factory.mktemp("experts") for biased in (False, True)}

    def work(biased: bool) -> None:
        cfg = make_run(BIASED if biased else EXPERTS, save=str(folders[biased]))
        save_checkpoint(0, setup(cfg).model, None, None, cfg)

    for biased in folders:
        run_ranks(1, work, biased, timeout=120)
    return folders


@pytest.fixture(scope="module")
def run(make_run: Any, initial: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that trains at a layout: (losses, gradient norms, weights after them)."""
    folder = tmp_path_factory.mktemp("trained")

    def trained(name: str, ranks: int, model: dict[str, Any], settings: dict[str, Any]) -> Any:
        biased = name.startswith("biases")

        def work() -> Any:
            cfg = make_run(
                (BIASED if biased else EXPERTS) | model,
                train_iters=STEPS,
                pretrained_checkpoint=str(initial[biased]),
                save=str(folder / name),
                **settings,
            )
            result = pretrain(cfg, forward_step)
            return list(result.losses.values()), list(result.grad_norms.values())

        losses, norms = run_ranks(ranks, work, timeout=200)[-1]
        return losses, norms, run_ranks(1, lambda: _weights(folder / name), timeout=100)[0]

    return trained


@pytest.fixture(scope="module")
def one_rank(run: Any) -> dict[bool, Any]:
    return {False: run("one rank", 1, {}, {}), True: run("biases, one rank", 1, {}, {})}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from megatron.core.dist_checkpointing.serialization import load_plain_tensors

    loaded = load_plain_tensors(str(dist_checkpoint.resolve(folder)))
    return {
        name: value
        for name, value in loaded.items()
        if isinstance(value, torch.Tensor) and not name.startswith("optimizer.")
    }


@pytest.mark.parametrize("name", LAYOUTS | BIASED_LAYOUTS)
def test_experts_train_as_on_one_rank(name: str, run: Any, one_rank: Any) -> None:
    losses, norms, weights = one_rank[name in BIASED_LAYOUTS]
    other_losses, other_norms, other_weights = run(name, *(LAYOUTS | BIASED_LAYOUTS)[name])
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.2
    assert losses == pytest.approx(other_losses, rel=TOLERANCE)
    assert norms == pytest.approx(other_norms, rel=TOLERANCE)
    assert weights.keys() == other_weights.keys()
    assert any(".experts.experts." in name for name in weights)
    assert (name in BIASED_LAYOUTS) == any(weights[key].any() for key in weights if key.endswith("linear_fc2.bias"))
    assert max((weights[key] - other_weights[key]).abs().max().item() for key in weights) < TOLERANCE
