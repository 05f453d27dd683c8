"""Runs with a PEFT method: only what it adds trains and is saved, alike at every layout, and resumes exactly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge.conversion import dist_checkpoint
from megatron.bridge.peft import BitFit, LoRA
from megatron.bridge.testing import run_ranks
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.overrides import apply_overrides, apply_yaml
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.run_config import to_yaml
from megatron.bridge.training.setup import distributed, setup
from megatron.bridge.training.validation import ConfigError

STEPS = 8
TP, PP, SP = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {"sequence_parallel": True}
DISTRIBUTED = {"use_distributed_optimizer": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one rank": (1, {}, {}),
    "recomputed": (1, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, {}),
    "TP2": (2, TP, {}),
    "TP2, SP": (2, TP | SP, {}),
    "PP2 x VPP2": (2, PP | {"virtual_pipeline_model_parallel_size": 2}, {}),
    "DP2, distributed optimizer": (2, {}, DISTRIBUTED),
}
type MakeRun = Callable[..., ConfigContainer]


def _method() -> LoRA:
    layers = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer"]
    return LoRA(dim=4, alpha=8, target_modules=layers)


@pytest.fixture(scope="module")
def runs(make_run: MakeRun, initial_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """name -> losses, gradient norms and what the last checkpoint holds."""
    folder = tmp_path_factory.mktemp("peft")

    def work(names: list[str]) -> dict[str, Any]:
        found = {}
        for name in names:
            _, model, settings = LAYOUTS[name]
            places = {"pretrained_checkpoint": str(initial_weights), "save": str(folder / name)}
            cfg = make_run(model, train_iters=STEPS, **places, **settings)
            cfg.peft = _method()
            result = pretrain(cfg, forward_step)
            found[name] = {"losses": list(result.losses.values()), "norms": list(result.grad_norms.values())}
        return found

    results: dict[str, Any] = {}
    for ranks in (1, 2):
        names = [name for name, (count, *_) in LAYOUTS.items() if count == ranks]
        results |= run_ranks(ranks, work, names, timeout=250)[ranks - 1]
    weights = run_ranks(1, lambda: {name: _weights(folder / name) for name in results}, timeout=100)[0]
    return {name: results[name] | {"weights": weights[name], "folder": folder / name} for name in results}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from megatron.core.dist_checkpointing.serialization import load_plain_tensors

    loaded = load_plain_tensors(str(dist_checkpoint.resolve(folder)))
    return {
        name: value
        for name, value in loaded.items()
        if isinstance(value, torch.Tensor) and not name.startswith("optimizer.")
    }


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_a_layout_trains_as_one_rank_does(name: str, runs: dict[str, Any]) -> None:
    one, other = runs["one rank"], runs[name]
    assert len(one["losses"]) == STEPS
    assert one["losses"][-1] < one["losses"][0]
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-5)
    assert one["norms"] == pytest.approx(other["norms"], rel=1e-4)
    assert one["weights"].keys() == other["weights"].keys()
    furthest = max((one["weights"][key] - other["weights"][key]).abs().max().item() for key in one["weights"])
    assert furthest < 1e-4


def test_checkpoints_hold_the_adapters_alone(runs: dict[str, Any]) -> None:
    weights = runs["one rank"]["weights"]
    assert all(".adapters." in name for name in weights)
    # 4 layers of 4 linear layers, and the output layer: A and B each.
    assert len(weights) == 2 * (4 * 4 + 1)


@pytest.mark.parametrize("layout", ["one rank", "TP2, SP", "DP2, distributed optimizer"])
def test_a_resumed_run_is_the_uninterrupted_one(
    layout: str, make_run: MakeRun, initial_weights: Path, runs: dict[str, Any], tmp_path: Path
) -> None:
    ranks, model, settings = LAYOUTS[layout]

    def work() -> list[float]:
        places = {"save": str(tmp_path / "run"), "pretrained_checkpoint": str(initial_weights)}
        cfg = make_run(model, train_iters=4, lr_decay_iters=40, **places, **settings)
        cfg.peft = _method()
        pretrain(cfg, forward_step)
        cfg = make_run(model, train_iters=STEPS, load=str(tmp_path / "run"), **places, **settings)
        cfg.peft = _method()
        return list(pretrain(cfg, forward_step).losses.values())

    assert run_ranks(ranks, work, timeout=200)[-1] == runs[layout]["losses"][4:]


def test_adapters_load_at_another_layout(
    make_run: MakeRun, initial_weights: Path, runs: dict[str, Any], tmp_path: Path
) -> None:
    def work(layout: dict[str, Any], steps: int, load: str | None) -> list[float]:
        start = {"pretrained_checkpoint": str(initial_weights), "load": load, "save": str(tmp_path / f"to {steps}")}
        cfg = make_run(layout, train_iters=steps, lr_decay_iters=40, **start)
        cfg.peft = _method()
        return list(pretrain(cfg, forward_step).losses.values())

    run_ranks(2, work, TP | SP, 4, None, timeout=100)
    losses = run_ranks(2, work, PP, STEPS, str(tmp_path / "to 4"), timeout=100)[1]
    assert losses == pytest.approx(runs["one rank"]["losses"][4:], rel=1e-5)


def test_lora_plus_gives_b_its_own_rate(make_run: MakeRun, initial_weights: Path) -> None:
    def work() -> dict[str, float]:
        cfg = make_run(train_iters=2, pretrained_checkpoint=str(initial_weights), lr_warmup_iters=0)
        cfg.peft = LoRA(dim=4, lora_plus_ratio=16.0)
        with distributed(cfg):
            run = setup(cfg)
            names = {each: name for name, each in run.model[0].named_parameters()}
            rates: dict[str, float] = {}
            for group in run.optimizer.param_groups:
                for each in group["params"]:
                    rates[names[each].rpartition(".")[2]] = group["lr"]
            return rates

    (rates,) = run_ranks(1, work, timeout=60)
    assert rates["lora_B"] == pytest.approx(16 * rates["lora_A"])


def test_another_method_saves_what_it_trains(make_run: MakeRun, initial_weights: Path, tmp_path: Path) -> None:
    def work() -> list[str]:
        cfg = make_run({"add_qkv_bias": True}, train_iters=1, save=str(tmp_path / "first"))
        pretrain(cfg, forward_step)
        start = {"pretrained_checkpoint": str(tmp_path / "first"), "save": str(tmp_path / "second")}
        cfg = make_run({"add_qkv_bias": True}, train_iters=1, **start)
        cfg.peft = BitFit()
        pretrain(cfg, forward_step)
        return sorted(_weights(tmp_path / "second"))

    assert run_ranks(1, work, timeout=60) == [["decoder.layers.self_attention.linear_qkv.bias"]]


def test_a_stage_without_adapters_trains_along(make_run: MakeRun, initial_weights: Path, tmp_path: Path) -> None:
    def work() -> tuple[list[float], list[str]]:
        cfg = make_run(PP, train_iters=2, pretrained_checkpoint=str(initial_weights), save=str(tmp_path / "run"))
        cfg.peft = LoRA(dim=2, layers_to_transform="2-3")
        losses = list(pretrain(cfg, forward_step).losses.values())
        return losses, sorted(_weights(tmp_path / "run"))

    losses, names = run_ranks(2, work, timeout=60)[1]
    assert losses[1] != losses[0]
    assert len(names) == 2 * 2 * 4


def test_the_section_by_name_in_yaml_and_back(make_run: MakeRun, tmp_path: Path) -> None:
    cfg = make_run()
    apply_overrides(cfg, ["peft=lora", "peft.lora_rank=8", "peft.target_modules=[linear_qkv]"])
    cfg.peft.settle()
    assert cfg.peft == LoRA(dim=8, target_modules=["linear_qkv"])
    (tmp_path / "run.yaml").write_text(to_yaml(cfg))
    again = make_run()
    apply_yaml(again, tmp_path / "run.yaml")
    assert again.peft == cfg.peft
    apply_overrides(again, ["peft=null"])
    assert again.peft is None
    (tmp_path / "short.yaml").write_text("peft: {name: lora, dim: 4}\n")
    apply_yaml(again, tmp_path / "short.yaml")
    assert again.peft == LoRA(dim=4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["peft=lorra"], "peft: no PEFT method is called 'lorra'.*did you mean 'lora'"),
        (["peft=qlora"], "no PEFT method is called 'qlora': bitsandbytes and torchao.*use lora, with model.bf16=true"),
        (["peft=lora", "peft.dimm=3"], "unknown key 'peft.dimm'.*did you mean 'dim'"),
        (["peft=lora", "peft.dim=many"], "peft.dim: expected int"),
        (["peft.dim=3"], "peft is None, which has no fields"),
    ],
)
def test_wrong_overrides_are_refused(make_run: MakeRun, overrides: list[str], message: str) -> None:
    cfg = make_run()
    with pytest.raises(ConfigError, match=message):
        apply_overrides(cfg, overrides)
    assert cfg.peft is None


def test_a_run_that_cannot_be_is_refused_before_anything_is_built(make_run: MakeRun) -> None:
    cfg = make_run()
    cfg.peft = LoRA(lora_rank=0, dropout=1.5, init_lora_weights="pisa")
    with pytest.raises(ConfigError) as refusal:
        cfg.validate(1)
    message = str(refusal.value)
    for part in ("peft: dim=0", "dropout=1.5", "'pisa'", "nothing gives them"):
        assert part in message
