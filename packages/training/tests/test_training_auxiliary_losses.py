"""Losses of routers and prediction layers are reported as they are, wherever the layers and the tokens lie."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge.testing import run_ranks
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.loggers.jsonl import METRICS_FILE
from megatron.bridge.training.pretrain import pretrain

EXPERTS: dict[str, Any] = {
    "num_layers": 4,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_layer_freq": [0, 0, 1, 1],
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [1e-2, 1e-3],
    "moe_z_loss_coeff": 1e-3,
}
PREDICTION: dict[str, Any] = {"mtp_num_layers": 2, "num_layers": 2}
TP: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP: dict[str, Any] = {"pipeline_model_parallel_size": 2}
EP: dict[str, Any] = {"expert_model_parallel_size": 2}
CP: dict[str, Any] = {"context_parallel_size": 2}
SETTINGS: dict[str, Any] = {"train_iters": 2, "micro_batch_size": 2, "lr": 1e-9, "min_lr": 0.0}
ROUTER_LOSSES = ("load_balancing_loss", "seq_load_balancing_loss", "z_loss")


class DirectLosses(Callback):
    """Computes the losses of each step from what goes through the modules; for one rank."""

    def __init__(self) -> None:
        self.routers: dict[str, list[torch.Tensor]] = {name: [] for name in ROUTER_LOSSES}
        self.logits: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []
        self.steps: list[dict[str, float]] = []

    def on_train_start(self, run: Any) -> None:
        for name, module in run.model[0].named_modules():
            if name.endswith("router"):
                module.register_forward_pre_hook(self._routed)
            if name.endswith("output_layer"):
                module.register_forward_hook(lambda module, inputs, output: self.logits.append(output[0].detach()))

    def on_batch(self, run: Any, batch: dict[str, torch.Tensor]) -> None:
        self.labels.append(batch["labels"])

    def _routed(self, router: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        logits = (inputs[0] @ router.weight.T).detach().float()  # [sequence, micro batch, experts]
        self.routers["load_balancing_loss"].append(_balance(logits.flatten(0, 1)))
        by_sequence = [_balance(logits[:, index]) for index in range(logits.shape[1])]
        self.routers["seq_load_balancing_loss"].append(torch.stack(by_sequence).mean())
        self.routers["z_loss"].append(logits.logsumexp(dim=-1).square().mean())

    def on_step_end(self, run: Any, result: Any) -> None:
        found = {name: torch.stack(values).mean().item() for name, values in self.routers.items() if values}
        layers = run.cfg.model.mtp_num_layers or 0
        for layer in range(layers):
            # A micro-batch's prediction layers come first, each one token further ahead; then its ordinary loss.
            calls = zip(self.logits[layer :: layers + 1], self.labels, strict=True)
            losses = [_cross_entropy(logits, labels, layer + 1) for logits, labels in calls]
            found[f"mtp_{layer + 1}_loss"] = torch.stack(losses).mean().item()
        self.steps.append(found)
        for values in (*self.routers.values(), self.logits, self.labels):
            values.clear()


def _balance(logits: torch.Tensor) -> torch.Tensor:
    """The load-balancing loss of [tokens, experts] (arXiv:2101.03961, with the top 2 of a token each counted)."""
    scores = logits.softmax(dim=-1)
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(2, dim=1).indices, 1.0)
    return scores.shape[1] * (chosen.mean(dim=0) / 2 * scores.mean(dim=0)).sum()


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ahead: int) -> torch.Tensor:
    predicted = logits.transpose(0, 1)[:, :-ahead].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(predicted, labels[:, ahead:].flatten())


def _logged(folder: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return [{name: value for name, value in record.items() if name.endswith("_loss")} for record in records]


def _train(make_run: Any, initial: Path, folder: Path, model: dict[str, Any], layouts: list[dict[str, Any]]) -> None:
    for number, layout in enumerate(layouts):
        settings = SETTINGS | {"pretrained_checkpoint": str(initial), "folder": str(folder / str(number))}
        pretrain(make_run(model | layout, **settings), forward_step)


@pytest.mark.parametrize(
    ("model", "layouts", "shown"),
    [
        (EXPERTS, [{}, EP, TP, PP, CP], ["balance", "seq balance", "z"]),
        (PREDICTION, [{}, TP, PP], ["mtp 1", "mtp 2"]),
    ],
    ids=["experts", "prediction layers"],
)
def test_reported_losses_are_those_computed_directly(
    model: dict[str, Any],
    layouts: list[dict[str, Any]],
    shown: list[str],
    make_run: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    direct = DirectLosses()

    def alone() -> list[dict[str, float]]:
        pretrain(make_run(model, train_iters=1, save=str(tmp_path / "initial"), lr=1e-9, min_lr=0.0), forward_step)
        start = {"pretrained_checkpoint": str(tmp_path / "initial"), "folder": str(tmp_path / "alone")}
        pretrain(make_run(model, progress=True, **SETTINGS, **start), forward_step, [direct])
        return direct.steps

    expected = run_ranks(1, alone, timeout=120)[0]
    assert len(expected) == 2
    assert len(expected[0]) == len(shown)
    assert _logged(tmp_path / "alone") == [pytest.approx(step, rel=1e-5) for step in expected]
    told = capfd.readouterr().out
    assert all(f"| {name} " in told for name in shown)
    run_ranks(2, _train, make_run, tmp_path / "initial", tmp_path / "two", model, layouts, timeout=200)
    run_ranks(4, _train, make_run, tmp_path / "initial", tmp_path / "four", model, [PP | TP], timeout=100)
    folders = [tmp_path / "two" / str(number) for number in range(len(layouts))] + [tmp_path / "four" / "0"]
    for folder in folders:
        assert _logged(folder) == [pytest.approx(step, rel=1e-5) for step in expected], folder
