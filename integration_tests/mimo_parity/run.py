"""The same model in the training package's own loop: its configuration, and random samples with images as data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from megatron.bridge.data.provider import DatasetBuildContext, DatasetProvider
from megatron.bridge.mimo.data import collate
from mimo_parity.cases import Case
from mimo_parity.placed import part_of, provider_of
from mimo_parity.reference import SEQUENCE, batch


class _Samples(Dataset[Any]):
    collate = staticmethod(collate)

    def __init__(self, count: int, first: int) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        whole = batch("plain", self.first + index, 1, uneven=True)
        images = whole["modality_inputs"]["images"]["pixel_values"]
        sample = {name: value[0] for name, value in whole.items() if name != "modality_inputs"}
        return sample | ({"modality_inputs": {"images": {"pixel_values": images}}} if len(images) else {})


@dataclass(kw_only=True)
class RandomImages(DatasetProvider):
    """Random text with 0 to 2 images in a sample."""

    def build_train_valid_test_datasets(self, context: DatasetBuildContext) -> Any:
        return _Samples(1000, 0), _Samples(64, 5000), None


def run_of(case: Case, folder: Path, **checkpoint: Any) -> Any:
    """A run of a few steps at `case`; `checkpoint` are fields of its checkpoint section."""
    from megatron.bridge.training.config import (
        CheckpointConfig,
        ConfigContainer,
        DistributedDataParallelConfig,
        LoggerConfig,
        OptimizerConfig,
        SchedulerConfig,
        TokenizerConfig,
        TrainingConfig,
    )

    provider = provider_of(case, folder)
    provider.seq_length = SEQUENCE
    sharded = "distributed" in case.settings
    return ConfigContainer(
        model=provider,
        dataset=RandomImages(),
        train=TrainingConfig(
            train_iters=4, global_batch_size=8, micro_batch_size=4 // case.language[2], eval_interval=4, eval_iters=1
        ),
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, adam_eps=1e-5, use_distributed_optimizer=sharded),
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=sharded, overlap_grad_reduce="overlap" in case.settings
        ),
        scheduler=SchedulerConfig(lr_warmup_iters=1),
        tokenizer=TokenizerConfig(vocab_size=128),
        logger=LoggerConfig(progress=False),
        checkpoint=CheckpointConfig(**checkpoint),
    )


def weights_of(cfg: Any, model: list[Any]) -> dict[str, torch.Tensor]:
    """The trained weights by Hugging Face names, on every rank. Collective."""
    from megatron.bridge.mimo.conversion import export_hf_weights

    return {name: each.clone() for name, each in export_hf_weights(cfg.model.bridge, model[0])}


@dataclass(frozen=True)
class Trained:
    """What a run came to: losses of its steps, the validation loss, the weights, and those that `parted` finds."""

    losses: dict[int, float]
    valid_loss: float | None
    weights: dict[str, torch.Tensor]
    parted: list[str]


def train_case(case: Case, folder: Path, *, stop: int | None = None, **checkpoint: Any) -> Trained:
    """Train by the package's own loop; called on every rank of the case's world.

    Args:
        case: where.
        folder: of the Hugging Face model.
        stop: step to stop after.
        checkpoint: see `run_of`.
    """
    cfg = run_of(case, folder, **checkpoint)
    cfg.train.exit_interval = stop
    return trained(cfg)


def trained(cfg: Any, callbacks: Sequence[Any] = ()) -> Trained:
    """Run a configuration to its end; called on every rank of its world."""
    from megatron.bridge.mimo.mimo_step import forward_step
    from megatron.bridge.training.setup import distributed, setup
    from megatron.bridge.training.train import train

    with distributed(cfg):
        run = setup(cfg, callbacks)
        result = train(run, forward_step)
        return Trained(result.losses, result.valid_loss, weights_of(cfg, run.model), parted(run.model[0]))


def parted(model: Any) -> list[str]:
    """The weights of the language model that its tensor-parallel ranks should hold alike, and do not. Collective."""
    import torch.distributed as dist

    from megatron.bridge.conversion.live_weights import unwrap
    from megatron.bridge.mimo.module_groups import LANGUAGE

    if model.language_model is None:
        return []
    group, found = model.module_groups[LANGUAGE].here.tp, []
    for name, weight in unwrap(model.language_model).named_parameters():
        copies = [torch.empty_like(weight) for _ in range(group.size())]
        dist.all_gather(copies, weight.detach(), group=group)
        if not getattr(weight, "tensor_model_parallel", False) and not all(each.equal(weight) for each in copies):
            found.append(name)
    return found


def failing_step(case: Case, folder: Path, *, rank: int, dies: bool) -> str:
    """A step in which `rank` dies or raises; what the others raise is returned, or raised where one `dies`."""
    import os

    from megatron.bridge import platform
    from megatron.bridge.errors import BridgeError
    from megatron.bridge.mimo import MimoProvider
    from megatron.bridge.mimo.slices import loading_place
    from megatron.bridge.mimo.step import forward_step

    provider = MimoProvider.from_hf_pretrained(str(folder), case.placement())
    (model,) = provider.provide_distributed_model()
    runtime = provider.engine.runtime

    def step(data_iterator: Any, model: Any) -> Any:
        if platform.rank() == rank and dies:
            os._exit(3)
        if platform.rank() == rank:
            raise ValueError("broken on purpose")
        return forward_step(data_iterator, model)

    place = loading_place(model.module_groups)
    wholes = [batch(case.subject, number, 4, uneven=case.uneven) for number in range(2)]
    data = iter([part_of(whole, provider.encoders["images"], *place) for whole in wholes])
    try:
        runtime.forward_backward(step, data, 2, seq_length=SEQUENCE, micro_batch_size=4)
    except BridgeError as error:
        if dies:
            raise
        return str(error)
    raise AssertionError("the step went well")
