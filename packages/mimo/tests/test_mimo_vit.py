"""Megatron-Core's ViT sees what transformers' towers see, however it is divided, and refuses what it cannot be."""

import re
from typing import Any

import pytest
import torch
import transformers

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.live import TensorsInMemory, load_weights
from megatron.bridge.conversion.table import WeightTable
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo import MimoParallelismConfig, ModuleParallelismConfig
from megatron.bridge.mimo.sharded_parts import sharded_state
from megatron.bridge.mimo.towers import ClipTower, SiglipTower
from megatron.bridge.mimo.vision_half import VisionHalf
from megatron.bridge.mimo.vit import ParallelViT
from megatron.bridge.mimo.vit_weights import vit_rules
from megatron.bridge.testing import run_ranks

# Imported once, before ranks are forked.
WARM = [getattr(transformers, f"{name}Model") for name in ("Llava", "LlavaNext", "LlavaOnevision", "AyaVision")]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"image_size": 28, "patch_size": 7}
TOWERS = [
    ClipTower(token_id=1, hf_config=SIZES, feature_layer=-2),
    ClipTower(token_id=1, hf_config=SIZES | {"hidden_act": "gelu", "layer_norm_eps": 1e-3}),
    SiglipTower(token_id=1, hf_config=SIZES),
    SiglipTower(token_id=1, hf_config=SIZES | {"vision_use_head": False}, feature_layer=1),
]


def seen(tower: Any, pixels: torch.Tensor, config: Any, groups: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of random weights, and the gradient of the pixels."""
    torch.manual_seed(7)
    module = tower.build_on(config, groups, initialized=True)
    assert isinstance(module, ParallelViT) == (tower.implementation == "megatron")
    leaf = pixels.clone().requires_grad_()
    found = torch.stack(list(tower.encode(module, {"pixel_values": leaf})))
    found.square().sum().backward()
    assert leaf.grad is not None
    return found.detach(), leaf.grad


def placed() -> tuple[Any, Any]:
    """Configuration and groups of an encoder that all ranks divide."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron.bridge import platform
    from megatron.bridge.mimo.module_groups import build_module_groups

    platform.initialize_distributed()
    layout = ModuleParallelismConfig(tensor_parallel=platform.world_size())
    modules = {"images": layout, "text": layout}
    groups = build_module_groups(MimoParallelismConfig(llm_module_name="text", module_parallelisms=modules))
    ranks = layout.tensor_parallel
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=ranks, kv_channels=1, tensor_model_parallel_size=ranks
    )
    return config, groups["images"].here


def compared(towers: list[Any]) -> list[tuple[float, float]]:
    """How far each tower is from transformers', of the same random weights; called on every rank."""
    config, groups = placed()
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    apart = []
    for tower in towers:
        tower.implementation = "transformers"
        theirs = seen(tower, pixels, config, groups)
        tower.implementation = "megatron"
        ours = seen(tower, pixels, config, groups)
        with pytest.raises(BridgeError, match=r"images of \(28, 35\) pixels in a tower for \(28, 28\); resize them"):
            seen(tower, torch.zeros(1, 3, 28, 35), config, groups)
        with pytest.raises(BridgeError, match="has no option 'interpolate_pos_encoding' .True.; use impl"):
            tower.build_on(config, groups, initialized=False)(pixels, interpolate_pos_encoding=True)
        apart.append(tuple(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)))
    return apart


@pytest.mark.parametrize("ranks", [1, 2])
def test_features_and_gradients_are_those_of_transformers(ranks: int) -> None:
    for found in run_ranks(ranks, lambda: compared(TOWERS), timeout=200):
        assert len(found) == len(TOWERS)
        for tower, (features, gradient) in zip(TOWERS, found, strict=True):
            assert max(features, gradient) < 1e-5, (tower, features, gradient)


def megatron(**changes: Any) -> ClipTower:
    return ClipTower(token_id=1, hf_config=SIZES | changes, implementation="megatron")


@pytest.mark.parametrize(
    ("tower", "ranks", "told"),
    [
        (megatron(num_attention_heads=2), 4, "tensor_parallel=4 does not divide num_attention_heads=2 of its tower"),
        (megatron(intermediate_size=50), 4, "tensor_parallel=4 does not divide intermediate_size=50 of its tower"),
        (megatron(image_size=30), 1, "image_size=30 must be one number that patch_size=7 divides"),
        (megatron(num_channels=1), 1, "num_channels=1 of the tower's configuration must be 3"),
        (megatron(attention_dropout=0.1), 1, "attention_dropout=0.1 of the tower's configuration must be 0.0"),
        (megatron(hidden_act="mish"), 1, "hidden_act='mish' is not among silu, "),
        (ClipTower(token_id=1, hf_config=SIZES, feature_layer=0, implementation="megatron"), 1, "3 layers, not of 0"),
        (ClipTower(token_id=1, hf_config=SIZES, feature_layer=4, implementation="megatron"), 1, "3 layers, not of 4"),
        (ClipTower(token_id=1, hf_config=SIZES, implementation="megatrn"), 1, "'megatrn' is unknown.*'megatron'"),
    ],
)
def test_what_the_vit_cannot_be_is_refused_with_the_remedy(tower: ClipTower, ranks: int, told: str) -> None:
    (problem,) = tower.problems(ranks)
    assert re.search(told, problem), problem
    assert "set implementation='transformers'" in problem or "set one of 'transformers'" in problem
    tower.implementation = "transformers"
    assert not list(tower.problems(ranks))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (transformers.Qwen2_5_VLConfig, "clip_vision_model and siglip_vision_model, and the tower is 'qwen2_5_vl"),
        (transformers.VipLlavaConfig, r"must be those of one of the 24 layers, not of \(-2, -5, -8, -11, 6\)"),
    ],
)
def test_halves_with_other_towers_are_refused(config: Any, told: str) -> None:
    architecture = config.__name__.replace("Config", "ForConditionalGeneration")
    bridge = AutoBridge.from_hf_config(config(architectures=[architecture]))
    (problem,) = VisionHalf.of(bridge, implementation="megatron").problems(1)
    assert re.search(told, problem), problem


CLIP, SIGLIP = (SIZES | {"model_type": f"{kind}_vision_model"} for kind in ("clip", "siglip"))
TEXT = {"hidden_size": 64, "num_hidden_layers": 1, "eos_token_id": 2}
TILES = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
TREE = "vision_tower."
HALVES: dict[str, dict[str, Any]] = {
    "Llava": {"vision_config": CLIP},
    "LlavaNext": {"vision_config": CLIP, **TILES},
    "LlavaOnevision": {"vision_config": SIGLIP | {"vision_use_head": False}, **TILES},
    "AyaVision": {"vision_config": SIGLIP},
}


def half_of(name: str) -> VisionHalf:
    text = TEXT | {"model_type": "cohere2" if name == "AyaVision" else "llama"}
    made = getattr(transformers, f"{name}Config")(text_config=text, **HALVES[name])
    made.architectures = [f"{name}ForConditionalGeneration"]
    return VisionHalf.of(AutoBridge.from_hf_config(made))


def compared_halves() -> tuple[dict[str, float], dict[str, tuple[int, ...]]]:
    """How far each half is from transformers', and the checkpoint's shapes of one that has a weight of its own."""
    config, groups = placed()
    apart, shapes = {}, {}
    for name, half in ((name, half_of(name)) for name in HALVES):
        theirs = half.build_on(config, groups, initialized=True)
        expected = torch.stack(list(half.encode(theirs, half.ghost())))
        half.implementation = "megatron"
        assert not list(half.problems(groups.tp.size()))
        ours = half.build_on(config, groups, initialized=False)
        weights = theirs.state_dict()
        ours.load_state_dict({name: each for name, each in weights.items() if not name.startswith(TREE)}, strict=False)
        tower: Any = ours.vision_tower
        source = TensorsInMemory(
            {name.removeprefix(TREE): each for name, each in weights.items() if name.startswith(TREE)}
        )
        load_weights(tower, WeightTable.of(vit_rules(tower.hf_config, tower.feature_layers)), source, groups=groups)
        found = torch.stack(list(half.encode(ours, half.ghost())))
        apart[name] = float((found - expected).abs().max() / expected.abs().max())
        if name == "LlavaNext":
            state = sharded_state(ours, "x.", (), {"dp_cp_group": groups.dp_cp}, groups.tp)
            kept = [name for name in ours.state_dict() if not name.endswith("_extra_state")]
            shapes = {name: state[f"x.{name}"].global_shape for name in kept}
    return apart, shapes


def test_halves_see_what_transformers_models_see_and_keep_their_weights_whole() -> None:
    (one, shapes), (two, again) = (run_ranks(ranks, compared_halves, timeout=200)[0] for ranks in (1, 2))
    assert one.keys() == two.keys() == HALVES.keys()
    assert max(*one.values(), *two.values()) < 1e-5, (one, two)
    assert shapes == again
    assert shapes["image_newline"] == (64,)
    assert shapes["vision_tower.decoder.layers.1.mlp.linear_fc1.weight"] == (2, 48, 32)
    assert shapes["vision_tower.unused.encoder.layers.2.mlp.fc1.weight"] == (48, 32)
