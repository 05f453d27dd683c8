"""Adapters that begin here compute the same in peft, come back bit for bit, and merge into the weights."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_peft_parity import MODELS
from transformers import Mamba2Config, Qwen2Config

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.logits import megatron_logits
from megatron.bridge.errors import BridgeError
from megatron.bridge.peft import IA3, CanonicalLoRA, DoRA, LoRA
from megatron.bridge.testing import import_engine, run_ranks, save_random_model
from megatron.bridge.testing.adapters import (
    AdapterCase,
    AdapterResult,
    batch,
    expect_merged,
    expect_that_peft_loads,
)
from megatron.bridge.testing.layouts import layout_fields, ranks_of

MAMBA = Mamba2Config(
    vocab_size=131,
    hidden_size=64,
    num_hidden_layers=2,
    num_heads=8,
    head_dim=16,
    state_size=8,
    n_groups=2,
    bos_token_id=0,
    eos_token_id=1,
    architectures=["Mamba2ForCausalLM"],
    dtype="float32",
)
# Its q, k and v have biases, which (IA)^3 scales too.
QWEN2 = Qwen2Config(
    vocab_size=131,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    architectures=["Qwen2ForCausalLM"],
    dtype="float32",
)
CONFIGS = MODELS | {"mamba2": MAMBA, "qwen2": QWEN2}
METHODS: dict[str, dict[str, Any]] = {
    "llama": {
        "lora": LoRA(dim=4, dropout=0.1, use_rslora=True, rank_pattern={"linear_proj": 2}),
        "pissa": LoRA(dim=4, init_lora_weights="pissa", target_modules=["linear_qkv", "linear_fc2"]),
        "olora": LoRA(dim=4, init_lora_weights="olora", target_modules=["linear_proj", "linear_fc1"]),
        "canonical lora": CanonicalLoRA(dim=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]),
        "dora": DoRA(dim=4),
        "ia3": IA3(),
    },
    "qwen3 moe": {
        "lora": LoRA(dim=4),
        "lora shared by the experts": LoRA(dim=4, share_experts=True),
    },
    "mamba2": {"lora": LoRA(dim=4, target_modules=["in_proj"])},
    "qwen2": {"ia3": IA3()},
}
LAYOUTS = {"llama": "tp2", "qwen3 moe": "ep2", "mamba2": "single", "qwen2": "tp2"}


def _made(bridge: AutoBridge, layout: str) -> Any:
    return bridge.to_megatron_model(**layout_fields(layout), layer_spec="torch")


def _stir(model: Any) -> None:
    """No special values, the same on every rank."""
    for name, each in model[0].named_parameters():
        if ".adapters." in name:
            torch.manual_seed(11)
            each.data.add_(torch.randn_like(each), alpha=0.05)


def _work(base: Path, layout: str, config: Any, methods: dict[str, Any], out: Path) -> dict[str, Any]:
    bridge = AutoBridge.from_hf_pretrained(base)
    found = {}
    for name, method in methods.items():
        model = method(_made(bridge, layout), training=False)
        _stir(model)
        logits = megatron_logits(model, batch(config)[0])[..., : config.vocab_size]
        saved = bridge.save_hf_adapter(model, out / name)
        merged = dict(bridge.export_hf_weights(model, cpu=True))
        apart = dict(bridge.export_hf_weights(model, cpu=True, merge_adapter_weights=False))
        again = _made(bridge, layout)
        bridge.load_hf_adapter(again, saved)
        back = megatron_logits(again, batch(config)[0])[..., : config.vocab_size]
        written = bridge.save_hf_adapter(again, out / f"{name} again")
        result = AdapterResult(logits, {}, [], load_file(saved / "adapter_model.safetensors"), merged, apart, saved)
        found[name] = result, back, load_file(written / "adapter_model.safetensors")
    return found


@pytest.mark.parametrize("model", list(METHODS))
def test_what_begins_here_is_the_same_in_peft_and_comes_back(model: str, tmp_path: Path) -> None:
    import_engine("megatron.bridge.models.gpt_provider", "megatron.bridge.peft.weight_decomposed")
    torch.set_num_threads(1)
    config, layout = CONFIGS[model], LAYOUTS[model]
    save_random_model(config, tmp_path / "base")
    work = partial(_work, tmp_path / "base", layout, config, METHODS[model], tmp_path / "adapters")
    found = run_ranks(ranks_of(layout_fields(layout)), work, timeout=250)[0]
    assert found.keys() == METHODS[model].keys()
    for name, (result, back, written) in found.items():
        case = AdapterCase(name, config, result.saved, result.logits, {}, [])
        expect_that_peft_loads(case, result)
        expect_merged(case, result, tmp_path / "base", tmp_path / "merged" / name)
        torch.testing.assert_close(back, result.logits, rtol=0, atol=1e-5 * result.logits.abs().max().item())
        assert written.keys() == result.weights.keys(), name
        assert all(torch.equal(written[own], tensor) for own, tensor in result.weights.items()), name


def _train(base: Path, layout: str, iters: int, load: Path | None, save: Path) -> list[float]:
    from megatron.bridge.data import MockGPTDatasetConfig
    from megatron.bridge.training import config as c
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    provider = AutoBridge.from_hf_pretrained(base).to_megatron_provider()
    for name, value in {**layout_fields(layout), "layer_spec": "torch", "seq_length": 16}.items():
        setattr(provider, name, value)
    cfg = c.ConfigContainer(
        model=provider,
        dataset=MockGPTDatasetConfig(sequence_length=16),
        tokenizer=c.TokenizerConfig(vocab_size=131),
        train=c.TrainingConfig(train_iters=iters, global_batch_size=2),
        optimizer=c.OptimizerConfig(optimizer="adam", lr=1e-2, min_lr=1e-2, clip_grad=0.5),
        scheduler=c.SchedulerConfig(lr_decay_style="constant"),
        checkpoint=c.CheckpointConfig(save=str(save), load=None if load is None else str(load)),
        logger=c.LoggerConfig(progress=False),
        peft=LoRA(dim=4, share_experts=True, target_modules=["linear_fc1", "linear_fc2"]),
    )
    return list(pretrain(cfg, forward_step).losses.values())


def test_experts_that_share_train_and_are_kept_as_one(tmp_path: Path) -> None:
    """Two steps with the experts on two ranks, and two more on one: as four on one, clipping and optimizer included."""
    import_engine("megatron.bridge.models.gpt_provider", "megatron.bridge.training.pretrain")
    torch.set_num_threads(1)
    base, whole, half = (tmp_path / name for name in ("base", "whole", "half"))
    save_random_model(MODELS["qwen3 moe"], base)

    def on_one_rank() -> tuple[list[float], list[float], list[tuple[int, ...]]]:
        from megatron.core.dist_checkpointing.serialization import load_plain_tensors

        from megatron.bridge.conversion import dist_checkpoint

        held = load_plain_tensors(str(dist_checkpoint.resolve(half)))
        shapes = [
            tuple(each.shape) for name, each in held.items() if ".adapters." in name and not name.startswith("opt")
        ]
        return _train(base, "single", 4, None, whole), _train(base, "single", 4, half, half), shapes

    begun = run_ranks(2, _train, base, "ep2", 2, None, half, timeout=100)[0]
    ((expected, ended, shapes),) = run_ranks(1, on_one_rank, timeout=100)
    assert begun + ended == pytest.approx(expected, abs=1e-5)
    assert expected[-1] != expected[0]
    # 2 layers, A and B of both linear layers, once instead of once for each of four experts.
    assert len(shapes) == 2 * 2 * 2
    assert sum(rows * columns for rows, columns in shapes) == 2 * 4 * ((32 + 48) + (24 + 32))


def test_experts_that_share_must_be_divided_as_all_else_is(tmp_path: Path) -> None:
    import_engine("megatron.bridge.models.gpt_provider", "megatron.bridge.peft.low_rank")
    torch.set_num_threads(1)
    save_random_model(MODELS["qwen3 moe"], tmp_path / "base")

    def work() -> None:
        bridge = AutoBridge.from_hf_pretrained(tmp_path / "base")
        method = LoRA(dim=4, share_experts=True, target_modules=["linear_fc1"])
        with pytest.raises(BridgeError, match="set model.expert_tensor_parallel_size=2, or let each expert"):
            method(_made(bridge, "tp2ep2etp1"))

    run_ranks(2, work, timeout=100)


def test_what_state_space_layers_cannot_have_is_refused(tmp_path: Path) -> None:
    import_engine("megatron.bridge.models.gpt_provider", "megatron.bridge.peft.low_rank")
    torch.set_num_threads(1)
    save_random_model(MAMBA, tmp_path / "base")

    def work() -> int:
        bridge = AutoBridge.from_hf_pretrained(tmp_path / "base")
        with pytest.raises(BridgeError, match=r"layers.0.mixer.in_proj \(state space.*exclude_modules=\['in_proj'\]"):
            LoRA(dim=4, target_modules=["in_proj"])(_made(bridge, "tp2"))
        method = LoRA(dim=4, target_modules=["out_proj"])
        method(_made(bridge, "tp2"))
        return len(method.report.bindings)

    assert run_ranks(2, work, timeout=100) == [2, 2]

    def exported() -> None:
        bridge = AutoBridge.from_hf_pretrained(tmp_path / "base")
        model = LoRA(dim=4, target_modules=["out_proj"])(_made(bridge, "single"))
        with pytest.raises(BridgeError, match="peft refuses LoRA on out_proj of state-space models"):
            bridge.save_hf_adapter(model, tmp_path / "adapter")

    run_ranks(1, exported, timeout=100)
