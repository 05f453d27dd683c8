"""Experts with biases and prediction layers train as on one rank, wherever their parts are."""

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

TOLERANCE = 1e-5
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "add_bias_linear": True,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
}
# kind -> (model fields, steps)
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "experts": (EXPERTS, 10),
    "prediction": ({"mtp_num_layers": 2}, 20),
}
PP = {"pipeline_model_parallel_size": 2}
WITHOUT_SP = {"tensor_model_parallel_size": 2}
TP = WITHOUT_SP | {"sequence_parallel": True}
DISTRIBUTED = {"use_distributed_optimizer": True}
# (kind, name) -> (ranks, model fields, settings)
LAYOUTS: dict[tuple[str, str], tuple[int, dict[str, Any], dict[str, Any]]] = {
    ("experts", "ETP2, distributed optimizer"): (2, {"expert_tensor_parallel_size": 2}, DISTRIBUTED),
    ("experts", "TP2, divided"): (2, TP, {}),
    ("prediction", "TP2"): (2, WITHOUT_SP, {}),
    ("prediction", "TP2, sequence parallel"): (2, TP, {}),
    ("prediction", "PP2"): (2, PP, {}),
}
# What only a kind's weights are called.
MARKS = {"experts": "experts.experts.linear_fc2.bias", "prediction": "mtp.layers.1."}


@pytest.fixture(scope="module")
def initial(make_run: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of random weights for each kind, from which every layout starts."""
    folders = {kind: tmp_path_factory.mktemp("initial") for kind in KINDS}

    def work(kind: str) -> None:
        cfg = make_run(KINDS[kind][0], save=str(folders[kind]))
        save_checkpoint(0, setup(cfg).model, None, None, cfg)

    for kind in KINDS:
        run_ranks(1, work, kind, timeout=120)
    return folders


@pytest.fixture(scope="module")
def run(make_run: Any, initial: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that trains a kind at a layout: (losses, gradient norms, weights after them)."""
    folder = tmp_path_factory.mktemp("trained")

    def trained(kind: str, name: str, ranks: int, model: dict[str, Any], settings: dict[str, Any]) -> Any:
        fields, steps = KINDS[kind]
        target = folder / kind / name

        def work() -> Any:
            cfg = make_run(
                fields | model,
                train_iters=steps,
                pretrained_checkpoint=str(initial[kind]),
                save=str(target),
                **settings,
            )
            result = pretrain(cfg, forward_step)
            return list(result.losses.values()), list(result.grad_norms.values())

        losses, norms = run_ranks(ranks, work, timeout=200)[-1]
        return losses, norms, run_ranks(1, lambda: _weights(target), timeout=100)[0]

    return trained


@pytest.fixture(scope="module")
def one_rank(run: Any) -> dict[str, Any]:
    return {kind: run(kind, "one rank", 1, {}, {}) for kind in KINDS}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from megatron.core.dist_checkpointing.serialization import load_plain_tensors

    loaded = load_plain_tensors(str(dist_checkpoint.resolve(folder)))
    return {
        name: value
        for name, value in loaded.items()
        if isinstance(value, torch.Tensor) and not name.startswith("optimizer.")
    }


@pytest.mark.parametrize(("kind", "name"), LAYOUTS)
def test_a_layout_trains_as_one_rank_does(kind: str, name: str, run: Any, one_rank: Any) -> None:
    losses, norms, weights = one_rank[kind]
    other_losses, other_norms, other_weights = run(kind, name, *LAYOUTS[kind, name])
    assert len(losses) == KINDS[kind][1]
    assert losses[-1] < losses[0] - 0.2
    assert losses == pytest.approx(other_losses, rel=TOLERANCE)
    assert norms == pytest.approx(other_norms, rel=TOLERANCE)
    assert weights.keys() == other_weights.keys()
    # Biases begin as zeros.
    assert any(MARKS[kind] in key and value.any() for key, value in weights.items())
    assert max((weights[key] - other_weights[key]).abs().max().item() for key in weights) < TOLERANCE
