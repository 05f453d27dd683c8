"""Vision-language recipes with a layout for each half: they build offline at their real sizes, and tiny ones train."""

import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron.bridge.errors import BridgeError
from megatron.bridge.recipes.mimo import vision_language as recipes
from megatron.bridge.testing import import_engine, run_ranks, save_random_model

# Parts of names: LLaVA's tower, its projector, Qwen's both, and the language model.
KINDS = ("vision_tower.", "multi_modal_projector.", "visual.blocks.", "visual.merger.", "layers.0.self_attn.q_proj.")
# Language model frozen, tower frozen -> what is trained all the same.
TRAINED = {
    (True, True): {"multi_modal_projector."},
    (False, True): {"multi_modal_projector.", "layers.0.self_attn.q_proj."},
    (False, False): {"visual.blocks.", "visual.merger.", "layers.0.self_attn.q_proj."},
}
ALL = ("llava15_7b_mimo_align_config", "llava15_7b_mimo_finetune_config", "qwen25_vl_7b_mimo_finetune_config")


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    import torch

    import_engine()
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_builds_offline_at_its_real_size(name: str) -> None:
    cfg = getattr(recipes, name)()
    cfg.validate(8, sight=frozenset())
    assert cfg.model.num_layers in (28, 32)
    assert cfg.model.placement.mode == "colocated"
    with pytest.raises(BridgeError, match="'images'"):
        getattr(recipes, name)().validate(6, sight=frozenset())


@pytest.mark.parametrize("name", ALL)
def test_a_sample_has_as_many_tokens_as_its_image_has_features(name: str) -> None:
    cfg = getattr(recipes, name)()
    train, _, _ = cfg.dataset.build_train_valid_test_datasets(None)
    sample = train[3]
    images = sample["modality_inputs"]["images"]
    encoder = cfg.model.encoders["images"]
    assert int((sample["tokens"] == encoder.token_id).sum()) == cfg.dataset.tokens_per_image
    assert encoder.count(images) == 1
    assert images["pixel_values"].shape[1:] == encoder.ghost()["pixel_values"].shape[1:]
    assert sample["labels"].max() < cfg.model.vocab_size


def tiny(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Any:
    """The recipe with a tiny model on two ranks, for two steps in float32; its weights come from `folder`."""
    import torch

    from megatron.bridge.recipes.base.description import Description
    from megatron.bridge.recipes.base.shrunk import shrunk

    whole = recipes.SIZES[name.partition("_mimo")[0]]
    small = shrunk(Description("pretrain", whole.hf_config, whole.home, {})).hf_config
    monkeypatch.setattr(recipes, "SIZES", {name.partition("_mimo")[0]: type(whole)("", "", "1M", "", small)})
    layouts = {"images": {"data_parallel": 2}, "language_module": {"tensor_parallel": 2}}
    save_random_model(recipes._hf_config(name.partition("_mimo")[0]), folder)
    cfg = getattr(recipes, name)(layouts, str(folder), seq_length=32)
    cfg.model.language.bf16, cfg.model.language.params_dtype = False, torch.float32
    cfg.model.language.pipeline_dtype = torch.float32
    cfg.dataset.text_tokens, cfg.dataset.tokens_per_image = 400, 4
    cfg.dataset.inputs = {"pixel_values": (1, 3, 28, 28)}
    if cfg.dataset.grid is not None:
        cfg.dataset.grid, cfg.dataset.inputs = (1, 4, 4), {"pixel_values": (16, 3 * 2 * 14 * 14)}
    cfg.train.train_iters, cfg.train.global_batch_size, cfg.logger.progress = 2, 4, False
    cfg.scheduler.lr_warmup_fraction = 0.5
    return cfg


@pytest.mark.parametrize("name", ALL)
def test_a_tiny_variant_trains_what_it_says(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cfg = tiny(name, monkeypatch, tmp_path / "hf")
    cfg.checkpoint.hf_save_path = str(tmp_path / "trained")

    def losses() -> list[float]:
        from megatron.bridge.mimo.mimo_step import forward_step
        from megatron.bridge.training.pretrain import pretrain

        return [*pretrain(cfg, forward_step).losses.values()]

    first, second = run_ranks(2, losses, timeout=200)[0]
    assert first == pytest.approx(math.log(512), abs=1.5)
    assert second != first
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "trained"))
    changed = {kind for name in after if not after[name].equal(before[name]) for kind in KINDS if kind in name}
    assert changed == TRAINED[cfg.model.frozen_language, cfg.model.encoders["images"].frozen]
