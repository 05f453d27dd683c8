"""Activations computed again change nothing, and a deterministic run is the same run each time."""

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from megatron.bridge.testing import run_ranks
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.determinism import ENVIRONMENT
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.validation import ConfigError

STEPS = 3
TP: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 1e-2,
}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "num_layers": 2}
FULL: dict[str, Any] = {"recompute_granularity": "full", "recompute_num_layers": 1}
SELECTIVE: dict[str, Any] = {"recompute_granularity": "selective"}
WAYS: dict[str, dict[str, Any]] = {
    "full, uniform": FULL | {"recompute_method": "uniform"},
    "full, block": FULL | {"recompute_method": "block"},
    "attention": SELECTIVE | {"recompute_modules": ["core_attn"]},
    "MLP": SELECTIVE | {"recompute_modules": ["mlp"]},
}


class Calls(Callback):
    """Counts the forward passes of the first layer's modules."""

    def __init__(self) -> None:
        self.of = dict.fromkeys(("core_attention", "mlp", "router"), 0)

    def on_train_start(self, run: Any) -> None:
        for name, module in run.model[0].named_modules():
            own = name.rsplit(".", 1)[-1]
            if ".layers.0." in name and own in self.of:
                module.register_forward_pre_hook(partial(self._count, own))

    def _count(self, name: str, module: Any, inputs: Any) -> None:
        self.of[name] += 1


def _losses(make_run: Callable[..., Any], model: dict[str, Any], callbacks: tuple[Callback, ...] = ()) -> list[float]:
    run = make_run(DROPOUT | model, train_iters=STEPS, global_batch_size=4)
    return list(pretrain(run, forward_step, callbacks).losses.values())


@pytest.mark.parametrize("layout", ["one rank", "TP2 with experts"])
def test_losses_are_those_without(layout: str, make_run: Callable[..., Any]) -> None:
    model, ranks, ways = {}, 1, WAYS
    if layout != "one rank":
        experts = SELECTIVE | {"recompute_modules": ["moe"]}
        model, ranks, ways = TP | EXPERTS, 2, {"full, uniform": WAYS["full, uniform"], "experts": experts}

    def work() -> dict[str, tuple[list[float], dict[str, int]]]:
        found = {}
        for name, way in ({"kept": {}} | ways).items():
            calls = Calls()
            found[name] = _losses(make_run, model | way, (calls,)), calls.of
        return found

    found = run_ranks(ranks, work, timeout=150)[0]
    losses, once = found["kept"]
    for name in ways:
        again, calls = found[name]
        assert again == pytest.approx(losses, rel=1e-6), name
        twice = {"attention": ["core_attention"], "MLP": ["mlp"], "experts": ["router"]}.get(name, [*once])
        assert calls == {module: count * (2 if module in twice else 1) for module, count in once.items()}, name


def test_what_needs_transformer_engine_is_refused(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    absent = "transformer_engine"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find_spec(name))
    with pytest.raises(ConfigError, match="names 'layernorm', which Megatron-Core computes again only where"):
        make_run(SELECTIVE | {"recompute_modules": ["layernorm", "mlp"]}).validate(1)


def test_a_deterministic_run_is_the_same_each_time(make_run: Callable[..., Any]) -> None:
    class Looks(Callback):
        seen = False

        def on_step_end(self, run: Any, result: Any) -> None:
            self.seen = torch.are_deterministic_algorithms_enabled() and ENVIRONMENT.items() <= os.environ.items()

    def work() -> tuple[list[list[float]], bool, bool]:
        looks = Looks()
        model = EXPERTS | {"deterministic_mode": True}
        losses = [_losses(make_run, model, (looks,)) for _ in range(2)]
        return losses, looks.seen, torch.are_deterministic_algorithms_enabled()

    for (first, second), within, after in run_ranks(2, work, timeout=100):
        assert first == second  # bit for bit
        assert (within, after) == (True, False)
