"""Adapters made by Hugging Face peft compute, learn and come back here as they do there, at every parallel layout."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.adapters import adapted
from megatron.bridge.conversion.logits import megatron_logits
from megatron.bridge.testing import import_engine, random_model, run_ranks, save_random_model
from megatron.bridge.testing.layouts import layout_fields, ranks_of

VOCABULARY, STEPS, RATE = 131, 20, 1e-2
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}
MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SHARED, architectures=["LlamaForCausalLM"]),
    "qwen3 moe": Qwen3MoeConfig(
        **_SHARED,
        architectures=["Qwen3MoeForCausalLM"],
        head_dim=8,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
    ),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
METHODS: dict[str, dict[str, peft.PeftConfig]] = {
    "llama": {
        "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=[*ATTENTION, *MLP, "lm_head", "embed_tokens"]),
        "lora on q and v": peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"]),
        "lora of two ranks": peft.LoraConfig(
            r=4, rank_pattern={"o_proj": 2}, alpha_pattern={"layers.0.mlp.up_proj": 3}, target_modules=["o_proj", *MLP]
        ),
        "dora": peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=[*ATTENTION, *MLP]),
        "ia3": peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj", "up_proj"], feedforward_modules=["down_proj"]
        ),
    },
    "qwen3 moe": {
        "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, target_parameters=EXPERTS),
        "lora on half of the experts": peft.LoraConfig(r=2, target_modules=["o_proj"], target_parameters=EXPERTS[:1]),
        "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=ATTENTION),
        "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    },
}
# Megatron-Core trains a mixture of experts over tensor-parallel ranks with sequence parallelism only.
LAYOUTS = {"llama": ("single", "tp2", "sp2", "pp2"), "qwen3 moe": ("single", "sp2", "pp2", "ep2")}
CASES = [(model, layout) for model, layouts in LAYOUTS.items() for layout in layouts]


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(3))
    return tokens[:, :-1], tokens[:, 1:]


@dataclass
class Reference:
    """What peft makes of a model with an adapter: logits, gradients of its weights, and losses of 20 steps."""

    folder: Path
    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]
    losses: list[float]


def _reference(config: PretrainedConfig, method: peft.PeftConfig, folder: Path) -> Reference:
    model = peft.get_peft_model(random_model(config), method)
    torch.manual_seed(5)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.add_(torch.randn_like(each), alpha=0.05)
    model.save_pretrained(folder, save_embedding_layers=False)
    tokens, labels = _batch()
    with torch.no_grad():
        logits = model(tokens).logits
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], RATE, weight_decay=0.0)
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            named = {name: each for name, each in model.named_parameters() if each.requires_grad}
            state = {name: each.grad.clone() for name, each in named.items()}
            # peft's files have no adapter's name, and the magnitudes without the module that holds them.
            gradients = {
                name.replace(".default", "").replace("vector.weight", "vector"): each for name, each in state.items()
            }
        optimizer.step()
    return Reference(folder, logits, gradients, losses)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import_engine("megatron.bridge.models.gpt_provider", "megatron.bridge.peft.weight_decomposed")
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("bases")
    for name, config in MODELS.items():
        save_random_model(config, root / name)
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Reference]]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: {kind: _reference(MODELS[name], method, root / name / kind) for kind, method in methods.items()}
        for name, methods in METHODS.items()
    }


def _schedule(chunks: list[Any]) -> list[Any]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tokens, labels = _batch()
    positions = torch.arange(tokens.shape[1]).expand(1, -1)

    def forward_step(rows: Iterator[Any], model: Any) -> Any:
        row, targets = next(rows)
        loss = model(row, positions, None, labels=targets)
        return loss, lambda output: (output.mean(), output.detach().mean())

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(list(zip(tokens.split(1), labels.split(1), strict=True))),
        model=chunks,
        num_microbatches=2,
        seq_length=tokens.shape[1],
        micro_batch_size=1,
        forward_only=False,
    )


def _gradients(bridge: AutoBridge, chunks: list[Any]) -> dict[str, torch.Tensor]:
    """Gradients under the names that peft has for their weights: exported as if they were the weights."""
    layers = adapted([chunk.module for chunk in chunks])
    kept = {}
    for each in layers:
        for parameter in each.layer.adapters["default"].parameters():
            kept[parameter] = parameter.data
            parameter.data = parameter.main_grad.clone()
    found = dict(bridge.export_adapter_weights([chunk.module for chunk in chunks]))
    found = {name: tensor.clone() for name, tensor in found.items()}
    for parameter, data in kept.items():
        parameter.data = data
    return found


def _train(bridge: AutoBridge, provider: Any, model: list[Any]) -> tuple[dict[str, torch.Tensor], list[float]]:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron.bridge.models.wrapping import with_ddp

    chunks = with_ddp(model, model[0].config, None)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=RATE, weight_decay=0.0, clip_grad=0.0, adam_beta2=0.999), chunks
    )
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    gradients: dict[str, torch.Tensor] = {}
    losses = []
    for step in range(STEPS):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        found = _schedule(chunks)
        losses.append(sum(loss.item() for loss in found) / 2 if found else 0.0)
        if step == 0:
            gradients = _gradients(bridge, chunks)
        optimizer.step()
    return gradients, losses


def _work(base: Path, layout: str, adapters: dict[str, Path], out: Path) -> dict[str, Any]:
    bridge = AutoBridge.from_hf_pretrained(base)
    fields = layout_fields(layout)
    found = {}
    for kind, folder in adapters.items():
        provider = bridge.to_megatron_provider()
        for name, value in {**fields, "layer_spec": "torch", "gradient_accumulation_fusion": False}.items():
            setattr(provider, name, value)
        model = provider.provide_distributed_model(wrap_with_ddp=False)
        bridge.load_hf_adapter(model, folder, training=True)
        logits = megatron_logits(model, _batch()[0])[..., :VOCABULARY]
        saved = bridge.save_hf_adapter(model, out / layout / kind)
        weights = load_file(saved / "adapter_model.safetensors")
        merged = dict(bridge.export_hf_weights(model, cpu=True))
        apart = dict(bridge.export_hf_weights(model, cpu=True, merge_adapter_weights=False))
        gradients, losses = _train(bridge, provider, model)
        found[kind] = {
            "logits": logits,
            "weights": weights,
            "merged": merged,
            "apart": apart,
            "gradients": gradients,
            "losses": losses,
            "saved": saved,
        }
    return found


@pytest.fixture(scope="module")
def results(
    folders: dict[str, Path], references: dict[str, dict[str, Reference]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Any]]:
    out = tmp_path_factory.mktemp("exports")
    found = {}
    for model, layout in CASES:
        adapters = {kind: reference.folder for kind, reference in references[model].items()}
        work = partial(_work, folders[model], layout, adapters, out / model)
        # The last rank has the losses, under pipeline parallelism too.
        found[model, layout] = run_ranks(ranks_of(layout_fields(layout)), work, timeout=280)[-1]
    return found


def _close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str) -> None:
    assert ours.shape == theirs.shape, what
    difference = (ours - theirs).abs().max().item()
    assert difference <= tolerance * max(theirs.abs().max().item(), 1e-6), f"{what}: {difference}"


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_logits_gradients_and_losses_are_those_of_peft(
    model: str, layout: str, results: Any, references: dict[str, dict[str, Reference]]
) -> None:
    for kind, reference in references[model].items():
        ours = results[model, layout][kind]
        _close(ours["logits"], reference.logits, 1e-5, f"{kind}: logits")
        assert ours["gradients"].keys() == reference.gradients.keys(), kind
        largest = max(each.abs().max().item() for each in reference.gradients.values())
        for name, gradient in reference.gradients.items():
            difference = (ours["gradients"][name] - gradient).abs().max().item()
            assert difference <= 1e-4 * largest, f"{kind}: gradient of {name}: {difference} of {largest}"
        assert ours["losses"] == pytest.approx(reference.losses, abs=1e-4), kind
        assert reference.losses[-1] < reference.losses[0] - 0.01, kind


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_an_adapter_comes_back_bit_for_bit(
    model: str, layout: str, results: Any, references: dict[str, dict[str, Reference]]
) -> None:
    for kind, reference in references[model].items():
        written = load_file(reference.folder / "adapter_model.safetensors")
        ours = results[model, layout][kind]["weights"]
        assert ours.keys() == written.keys(), kind
        for name, tensor in written.items():
            assert torch.equal(ours[name], tensor), f"{kind}: {name}"


@pytest.mark.parametrize("model", list(MODELS))
def test_peft_loads_what_was_written(model: str, results: Any, references: dict[str, dict[str, Reference]]) -> None:
    layout = LAYOUTS[model][1]
    for kind, reference in references[model].items():
        loaded = peft.PeftModel.from_pretrained(random_model(MODELS[model]), results[model, layout][kind]["saved"])
        with torch.no_grad():
            _close(loaded(_batch()[0]).logits, reference.logits, 1e-6, kind)


@pytest.mark.parametrize(("model", "layout"), [("llama", "tp2"), ("qwen3 moe", "ep2")])
def test_merged_weights_compute_what_the_adapter_does(
    model: str,
    layout: str,
    results: Any,
    references: dict[str, dict[str, Reference]],
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    from safetensors.torch import save_file

    plain = load_file(folders[model] / "model.safetensors")
    for kind, reference in references[model].items():
        ours = results[model, layout][kind]
        assert ours["apart"].keys() == plain.keys()
        assert all(torch.equal(ours["apart"][name], tensor) for name, tensor in plain.items()), kind
        folder = tmp_path / kind
        folder.mkdir()
        save_file({name: each.contiguous() for name, each in ours["merged"].items()}, folder / "model.safetensors")
        (folder / "config.json").write_text((folders[model] / "config.json").read_text())
        merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            _close(merged(_batch()[0]).logits, reference.logits, 1e-5, kind)


def test_targets_are_written_short(results: Any) -> None:
    config = json.loads((results["llama", "tp2"]["lora on q and v"]["saved"] / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, True)
    config = json.loads((results["qwen3 moe", "ep2"]["lora"]["saved"] / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj", "gate.weight"]
