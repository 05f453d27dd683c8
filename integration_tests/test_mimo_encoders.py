"""A model put together of parts: an encoder of another package beside one of ours, at placements of every mode."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from megatron.bridge.data.provider import DatasetBuildContext, DatasetProvider
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo import Encoder, MimoParallelismConfig, MimoProvider, ModuleParallelismConfig, collate
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

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(index)
        tokens = torch.randint(1, SOUND, (LENGTH + 1,), generator=draw)
        inputs: dict[str, Any] = {}
        if index % 3:
            tokens[1:5] = SOUND
            inputs["sounds"] = {"samples": torch.randn(1, 32, generator=draw)}
        if index % 4 != 1:
            tokens[7:11] = IMAGE
            inputs["images"] = {"pixel_values": torch.randn(1, 3, 8, 8, generator=draw)}
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

    def build_train_valid_test_datasets(self, context: DatasetBuildContext) -> Any:
        return _Mixed(), None, None


def config(layouts: dict[str, dict[str, int]], **checkpoint: Any) -> Any:
    """A run of a tower, `Waves` and a Llama; sequence parallelism wherever the language model is divided."""
    from megatron.bridge.mimo.towers import SiglipTower
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

    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32}
    tower = SiglipTower(token_id=IMAGE, hf_config={**sizes, "num_hidden_layers": 1, "num_attention_heads": 2})
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
    encoders = {"images": tower, "sounds": Waves(token_id=SOUND)}
    return ConfigContainer(
        model=MimoProvider(language=language, encoders=encoders, placement=placement),
        dataset=MixedData(),
        train=TrainingConfig(train_iters=STEPS, global_batch_size=8, micro_batch_size=4 // replicas),
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, adam_eps=1e-5),
        scheduler=SchedulerConfig(lr_warmup_iters=1),
        tokenizer=TokenizerConfig(vocab_size=24),
        logger=LoggerConfig(progress=False),
        checkpoint=CheckpointConfig(**checkpoint),
    )


def losses(layouts: dict[str, dict[str, int]], start: Path, *, make: bool = False) -> dict[int, float]:
    """Losses of a run that starts from the weights in `start`, which `make` writes first."""
    from megatron.bridge.mimo.mimo_step import forward_step
    from megatron.bridge.training.checkpoint import save_checkpoint
    from megatron.bridge.training.setup import distributed, setup
    from megatron.bridge.training.train import train

    cfg = config(layouts, **({} if make else {"pretrained_checkpoint": str(start)}))
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
    ],
    3: [{"images": {}, "sounds": {"rank_offset": 1}, "text": {"rank_offset": 2}}],
}


@pytest.mark.timeout(600)
def test_two_encoders_train_alike_wherever_they_stand(tmp_path: Path) -> None:
    expected = run_ranks(1, lambda: losses(ALONE, tmp_path / "start", make=True), timeout=200)[0]
    assert len(expected) == STEPS
    assert expected[1] != expected[STEPS]
    for ranks, placements in PLACEMENTS.items():

        def work(placements: list[dict[str, dict[str, int]]] = placements) -> list[dict[int, float]]:
            return [losses(each, tmp_path / "start") for each in placements]

        for found in run_ranks(ranks, work, timeout=300):
            assert found == [pytest.approx(expected, abs=1e-5)] * len(placements)


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
