"""A model put together of parts: an encoder of another package beside one of ours, at placements of every mode."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from megatron.bridge.conversion.dist_checkpoint import tensor_index
from megatron.bridge.data.provider import DatasetBuildContext, DatasetProvider
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo import Encoder, MimoParallelismConfig, MimoProvider, ModuleParallelismConfig, collate
from megatron.bridge.peft import CanonicalLoRA, DoRA, LoRA
from megatron.bridge.testing import run_ranks

SOUND, IMAGE, LENGTH, STEPS = 20, 21, 24, 3


@dataclass(kw_only=True)
class Waves(Encoder):
    """Sound as frames of 8 samples, each through one linear layer: what a third party would write."""

    input_names = ("samples",)
    width = 24

    def build(self, config: Any, *, initialized: bool) -> torch.nn.Module:
        return torch.nn.Linear(8, self.width, dtype=config.params_dtype)

    def encode(self, module: torch.nn.Module, inputs: Any) -> Any:
        return list(module(inputs["samples"].unflatten(1, (-1, 8))))

    def ghost(self) -> Any:
        return {"samples": torch.zeros(1, 32)}


class _Mixed(Dataset[Any]):
    collate = staticmethod(collate)

    def __init__(self, published: bool) -> None:
        self.published = published

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(index)
        tokens = torch.randint(1, SOUND, (LENGTH + 1,), generator=draw)
        inputs: dict[str, Any] = {}
        if index % 3:
            tokens[1:5] = SOUND
            sound = torch.randn(1, 4, 16, generator=draw)
            inputs["sounds"] = {"input_features": sound} if self.published else {"samples": sound.flatten(1)[:, :32]}
        if index % 4 != 1:
            tokens[7:11] = IMAGE
            side = 16 if self.published else 8
            inputs["images"] = {"pixel_values": torch.randn(1, 3, side, side, generator=draw)}
        labels = tokens[1:]
        return {
            "tokens": tokens[:-1],
            "labels": labels.clamp(max=SOUND - 1),
            "loss_mask": (labels < SOUND).float(),
            "position_ids": torch.arange(LENGTH),
            "modality_inputs": inputs,
        }


@dataclass(kw_only=True)
class MixedData(DatasetProvider):
    """Samples with a picture, a sound, both or none."""

    published: bool = False

    def build_train_valid_test_datasets(self, context: DatasetBuildContext) -> Any:
        return _Mixed(self.published), None, None


def encoders(published: bool) -> dict[str, Encoder]:
    """A tower and `Waves`; or, as `published`, a divided tower with a pixel shuffle and Whisper's with a resampler."""
    from megatron.bridge.mimo.projectors import PixelShuffle, Resampler
    from megatron.bridge.mimo.towers import SiglipTower, WhisperTower

    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    if not published:
        return {"images": SiglipTower(token_id=IMAGE, hf_config=sizes), "sounds": Waves(token_id=SOUND)}
    whisper = {"num_mel_bins": 4, "max_source_positions": 8, "d_model": 16, "encoder_layers": 1}
    whisper |= {"encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    few = Resampler(latents=4, depth=1, heads=2, head_dim=8, query_groups=1, intermediate_size=32)
    larger = sizes | {"image_size": 16}
    shuffle = PixelShuffle(norm=True)
    return {
        "images": SiglipTower(token_id=IMAGE, hf_config=larger, projector=shuffle, implementation="megatron"),
        "sounds": WhisperTower(token_id=SOUND, hf_config=whisper, projector=few),
    }


def config(layouts: dict[str, dict[str, int]], published: bool = False, **checkpoint: Any) -> Any:
    """A run of two encoders and a Llama; sequence parallelism wherever the language model is divided."""
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training.config import (
        CheckpointConfig,
        ConfigContainer,
        LoggerConfig,
        OptimizerConfig,
        SchedulerConfig,
        TokenizerConfig,
        TrainingConfig,
    )

    language = GPTModelProvider(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        vocab_size=24,
        make_vocab_size_divisible_by=4,
        seq_length=LENGTH,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    modules = {name: ModuleParallelismConfig(**each) for name, each in layouts.items()}
    language.sequence_parallel = modules["text"].tensor_parallel > 1
    replicas = modules["text"].data_parallel
    placement = MimoParallelismConfig(llm_module_name="text", module_parallelisms=modules)
    return ConfigContainer(
        model=MimoProvider(language=language, encoders=encoders(published), placement=placement),
        dataset=MixedData(published=published),
        train=TrainingConfig(train_iters=STEPS, global_batch_size=8, micro_batch_size=4 // replicas),
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, adam_eps=1e-5),
        scheduler=SchedulerConfig(lr_warmup_iters=1),
        tokenizer=TokenizerConfig(vocab_size=24),
        logger=LoggerConfig(progress=False),
        checkpoint=CheckpointConfig(**checkpoint),
    )


def adapt(cfg: Any, *, only_build: bool) -> None:
    """Adapters on towers and projectors: on an MLP that ranks divide, on a resampler, on a tower that is one layer."""
    from megatron.bridge.mimo.projectors import Resampler

    few = Resampler(latents=4, depth=1, heads=2, head_dim=8, query_groups=1, intermediate_size=32)
    cfg.model.encoders["sounds"].projector = few
    if only_build:
        return
    begin: dict[str, Any] = {"init_lora_weights": "orthogonal", "dim": 2}
    layers = ["q_proj", "fc1", "linear_fc1", "linear_fc2"]
    cfg.model.adapters = {
        "images": DoRA(target_modules=layers, lora_plus_ratio=8, **begin),
        "sounds": CanonicalLoRA(target_modules=["tower", "re:input_projections[.]0[.].*[qk]_proj"], **begin),
    }
    cfg.peft = LoRA(target_modules=["linear_qkv"], **begin)
    cfg.optimizer.lr = 1e-2
    cfg.train.exit_interval = None if cfg.checkpoint.save is None else 2


def losses(
    layouts: dict[str, dict[str, int]],
    start: Path,
    *,
    published: bool = False,
    make: bool = False,
    adapted: bool | None = None,
    **checkpoint: Any,
) -> dict[int, float]:
    """Losses of a run that starts from the weights in `start`, which `make` writes first.

    Args:
        adapted: `adapt` it; False builds the same modules, to be adapted later.
        checkpoint: fields of the checkpoint section.
    """
    from megatron.bridge.mimo.mimo_step import forward_step
    from megatron.bridge.training.checkpoint import save_checkpoint
    from megatron.bridge.training.setup import distributed, setup
    from megatron.bridge.training.train import train

    cfg = config(layouts, published, **({} if make else {"pretrained_checkpoint": str(start)}), **checkpoint)
    if adapted is not None:
        adapt(cfg, only_build=not adapted)
    with distributed(cfg):
        run = setup(cfg)
        if make:
            cfg.checkpoint.save = str(start)
            save_checkpoint(0, run.model, None, None, cfg)
            cfg.checkpoint.save = None
        return train(run, forward_step).losses


ALONE: dict[str, dict[str, int]] = {"images": {}, "sounds": {}, "text": {}}
# number of ranks -> placements
PLACEMENTS: dict[int, list[dict[str, dict[str, int]]]] = {
    2: [
        {"images": {"tensor_parallel": 2}, "sounds": {"data_parallel": 2}, "text": {"data_parallel": 2}},
        {"images": {"data_parallel": 2}, "sounds": {"tensor_parallel": 2}, "text": {"tensor_parallel": 2}},
        {"images": {"data_parallel": 2}, "sounds": {"tensor_parallel": 2}, "text": {"context_parallel": 2}},
    ],
    3: [{"images": {}, "sounds": {"rank_offset": 1}, "text": {"rank_offset": 2}}],
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("published", [False, True], ids=["own", "published"])
def test_two_encoders_train_alike_wherever_they_stand(published: bool, tmp_path: Path) -> None:
    expected = run_ranks(1, lambda: losses(ALONE, tmp_path / "start", published=published, make=True), timeout=200)[0]
    assert len(expected) == STEPS
    assert expected[1] != expected[STEPS]
    for ranks, placements in PLACEMENTS.items():

        def work(placements: list[dict[str, dict[str, int]]] = placements) -> list[dict[int, float]]:
            return [losses(each, tmp_path / "start", published=published) for each in placements]

        for found in run_ranks(ranks, work, timeout=300):
            assert found == [pytest.approx(expected, abs=1e-5)] * len(placements)


@pytest.mark.timeout(600)
def test_adapters_on_two_encoders_train_alike_wherever_they_stand(tmp_path: Path) -> None:
    start, place = tmp_path / "start", str(tmp_path / "saved")

    def run(layouts: dict[str, dict[str, int]], **more: Any) -> dict[int, float]:
        return losses(layouts, start, adapted=True, **more)

    def alone() -> Any:
        losses(ALONE, start, make=True, adapted=False)
        return run(ALONE), run(ALONE, save=place)

    expected, first = run_ranks(1, alone, timeout=200)[0]
    assert first == {step: loss for step, loss in expected.items() if step < STEPS}
    assert abs(expected[1] - expected[STEPS]) > 5e-4
    kept = [name for name in tensor_index(place) if not name.startswith("optimizer.")]
    assert all(".adapters." in name for name in kept)
    for encoder in ("images", "sounds"):
        modules = {name.split(".")[2] for name in kept if name.startswith(f"modality_submodules.{encoder}.")}
        assert modules == {"encoders", "input_projections"}, encoder
    for found in run_ranks(2, lambda: run(PLACEMENTS[2][1]), timeout=200):
        assert found == pytest.approx(expected, abs=1e-5)
    for found in run_ranks(3, lambda: run(PLACEMENTS[3][0], load=place), timeout=200):
        assert found == {STEPS: pytest.approx(expected[STEPS], abs=1e-5)}


def test_problems_of_modules_are_told_together_before_anything_is_built() -> None:
    provider = config(ALONE).model
    provider.language.fp16 = True
    provider.placement.module_parallelisms["images"].context_parallel = 1
    provider.encoders["video"] = provider.encoders.pop("sounds")
    with pytest.raises(BridgeError, match=r"the placement has the encoders \['images', 'sounds'\], and the model \['i"):
        provider.finalize(1)
    provider.encoders["sounds"] = provider.encoders.pop("video")
    with pytest.raises(BridgeError, match="fp16=True: modules would each have a loss scale of their own; use bf16"):
        provider.finalize(1)


def test_a_tower_that_its_ranks_do_not_divide_is_refused_before_anything_is_built() -> None:
    provider = config({name: {"tensor_parallel": 4} for name in ALONE}, published=True).model
    with pytest.raises(BridgeError, match="'images': tensor_parallel=4 does not divide num_attention_heads=2 of its"):
        provider.finalize(4)


def test_a_batch_that_a_module_cannot_divide_is_refused_by_the_configuration() -> None:
    cfg = config({"images": {"data_parallel": 8}, "sounds": {"data_parallel": 8}, "text": {"tensor_parallel": 8}})
    cfg.model.num_attention_heads = 8
    with pytest.raises(
        BridgeError, match=r"which 'images' cannot divide among data_parallel=8; set micro_batch_size=8"
    ):
        cfg.validate(8)


def test_an_encoder_that_is_wider_than_it_says_is_refused() -> None:
    def work() -> str:
        provider = config(ALONE).model
        provider.encoders["sounds"].build = lambda config, initialized: torch.nn.Linear(8, 40)
        provider.encoders["sounds"].encode = lambda module, inputs: [module(inputs["samples"].view(-1, 8))]
        (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
        with pytest.raises(BridgeError, match="'sounds': the encoder's features have width 40, and it says 24"):
            model.encoders()["sounds"]()
        return "refused"

    assert run_ranks(1, work, timeout=120) == ["refused"]


def test_a_checkpoint_of_other_modules_is_refused_by_their_names_before_anything_is_loaded(tmp_path: Path) -> None:
    def work() -> list[str]:
        from megatron.bridge.training.checkpoint import load_weights

        losses(ALONE, tmp_path / "start", make=True)
        told = []
        for renamed, dropped in (("video", None), (None, "sounds")):
            provider = config(ALONE).model
            for kept in (provider.encoders, provider.placement.module_parallelisms):
                if renamed is not None:
                    kept[renamed] = kept.pop("sounds")
                if dropped is not None:
                    kept.pop(dropped)
            (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
            before = {name: each.clone() for name, each in model.saved_parameters()}
            with pytest.raises(BridgeError) as refused:
                load_weights([model], None, str(tmp_path / "start"))
            assert all(each.equal(before[name]) for name, each in model.saved_parameters())
            provider.engine.stop()
            told.append(str(refused.value))
        return told

    other, fewer = run_ranks(1, work, timeout=200)[0]
    assert "the model has what the checkpoint lacks: modality_submodules.video." in other
    assert "the checkpoint has what the model lacks: modality_submodules.sounds." in other
    assert "the checkpoint has what the model lacks: modality_submodules.sounds." in fewer
    assert "the model has what" not in fewer


def test_whispers_tower_hears_what_transformers_hears() -> None:
    from transformers import WhisperConfig, WhisperModel

    tower = encoders(published=True)["sounds"]
    sizes: dict[str, Any] = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}
    ids = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    whole = WhisperModel(WhisperConfig(**tower.hf_config, **sizes, **ids)).eval()
    module = tower.build(SimpleNamespace(params_dtype=torch.float32), initialized=True).eval()
    module.load_state_dict(whole.encoder.state_dict())
    sounds = torch.randn(3, 4, 16)
    expected = whole.encoder(sounds).last_hidden_state
    assert torch.stack(list(tower.encode(module, {"input_features": sounds}))).equal(expected)
    assert expected.shape == (3, tower.features_per_item, tower.width)
    assert len(tower.encode(module, tower.ghost())) == 1


def test_packed_text_is_refused_before_any_process_group_exists() -> None:
    cfg = config(ALONE)
    cfg.dataset.packing = True
    with pytest.raises(
        BridgeError, match="dataset.packing=true packs text alone; .* megatron.bridge.mimo.PackedSamples"
    ):
        cfg.validate(1)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("apart", [{}, {"data_parallel": 2}], ids=["homogeneous", "colocated"])
def test_a_sequence_that_cannot_be_cut_is_refused_before_any_process_group_exists(apart: dict[str, int]) -> None:
    sizes = {"context_parallel": 2}
    cfg = config({name: sizes if name == "text" else apart or sizes for name in ALONE})
    cfg.validate(2)
    cfg.model.language.seq_length = LENGTH + 1
    with pytest.raises(
        BridgeError, match="model.seq_length=25 is not divided by 2 x model.context_parallel_size=2; 24"
    ):
        cfg.validate(2)
    assert not torch.distributed.is_initialized()


def test_a_projector_that_does_not_fit_its_tower_is_refused_before_anything_is_built() -> None:
    from megatron.bridge.mimo.projectors import PixelShuffle

    provider = config(ALONE).model
    provider.encoders["images"].projector = PixelShuffle(factor=3)
    with pytest.raises(BridgeError, match="'images': its items have 4 features, which are no square with sides that"):
        provider.finalize(1)
