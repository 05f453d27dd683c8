"""The same training at a MIMO placement, and how far it is from the reference."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mimo_parity.cases import Case
from mimo_parity.reference import BETAS, CLIP, DECAY, EPS, LR, SEQUENCE, Outcome, batch


@dataclass(frozen=True)
class Distance:
    """Largest differences from the reference: absolute for losses and logits, relative for the rest.

    `changed` is the number of weights that an export right after the import does not give back bit for bit.
    """

    changed: int
    logits: float
    loss: float
    norm: float
    gradient: float
    weight: float

    def __str__(self) -> str:
        figures = (f"{name} {value:.1e}" for name, value in vars(self).items())
        return " ".join(figures)


def train_placed(
    case: Case, folder: Path, reference: Outcome, *, steps: int, microbatches: int, samples: int
) -> Distance:
    """Train at `case` and compare. Called on every rank of its world."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    from megatron.bridge.mimo import MimoProvider
    from megatron.bridge.mimo.conversion import export_hf_weights
    from megatron.bridge.mimo.optimizer import build_optimizer
    from megatron.bridge.mimo.predict import logits
    from megatron.bridge.mimo.slices import loading_place
    from megatron.bridge.mimo.step import forward_step

    provider = MimoProvider.from_hf_pretrained(str(folder), case.placement())
    provider.language.sequence_parallel = "sequence_parallel" in case.settings
    provider.encoders["images"].frozen = "frozen" in case.settings
    sharded = "distributed" in case.settings
    overlap = "overlap" in case.settings
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=sharded, overlap_grad_reduce=overlap)
    (model,) = provider.provide_distributed_model(ddp_config=ddp)
    runtime = provider.engine.runtime
    settings = OptimizerConfig(
        **{"optimizer": "adam", "lr": LR, "weight_decay": DECAY, "clip_grad": CLIP, "adam_eps": EPS},
        **{"adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "use_distributed_optimizer": sharded},
    )
    optimizer = build_optimizer(model, settings)
    model.config.grad_scale_func = optimizer.scale_loss
    for group in optimizer.param_groups:  # as Megatron-Core's schedule does
        group["weight_decay"] = DECAY * group["wd_mult"]

    def data(step: int) -> Iterator[Any]:
        rank, size = loading_place(model.module_groups)
        for number in range(microbatches):
            yield part_of(batch(step * microbatches + number, samples, uneven=case.uneven), rank, size)

    changed = _changed(folder, dict(export_hf_weights(provider.bridge, model)))
    rank, size = loading_place(model.module_groups)
    first = part_of(batch(0, samples, uneven=case.uneven), rank, size)
    apart = _logit_difference(reference.logits, logits(runtime, [first]), model)
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = runtime.forward_backward(
            forward_step, data(step), microbatches, seq_length=SEQUENCE, micro_batch_size=samples
        )
        sums = torch.zeros(2, dtype=torch.float64)
        for report in reports:
            sums += report["lm loss"]
        total = runtime.total(sums)
        losses.append(float(total[0] / total[1]))
        if step == 0 and not sharded:
            with gradients_for_weights(model):
                gradients = {name: each.clone() for name, each in export_hf_weights(provider.bridge, model)}
        _, norm, _ = optimizer.step()
        norms.append(float(norm))
    weights = dict(export_hf_weights(provider.bridge, model))
    distance = _distance(reference, Outcome(losses, norms, gradients, weights, reference.logits), changed, apart)
    provider.engine.stop()
    return distance


def part_of(whole: dict[str, Any], rank: int, size: int) -> dict[str, Any]:
    """What a loader for part `rank` of `size` gives of a global micro-batch."""
    each = len(whole["tokens"]) // size
    own = slice(rank * each, (rank + 1) * each)
    images = whole["modality_inputs"]["images"]
    items = images["items"]
    first = int(items[: own.start].sum())
    pixels = images["pixel_values"][first : first + int(items[own].sum())]
    texts = {name: value[own] for name, value in whole.items() if name != "modality_inputs"}
    return {**texts, "modality_inputs": {"images": {"pixel_values": pixels, "items": items[own]}}}


class gradients_for_weights:
    """Within the block the trained parameters hold their reduced gradients, so that these can be exported."""

    def __init__(self, model: Any) -> None:
        self._trained = [each for each in model.parameters() if hasattr(each, "main_grad")]
        self._rest = [each for each in model.parameters() if not hasattr(each, "main_grad")]

    def __enter__(self) -> None:
        self._saved = [each.data for each in (*self._trained, *self._rest)]
        for each in self._trained:
            each.data = each.main_grad
        for each in self._rest:
            each.data = torch.zeros_like(each)

    def __exit__(self, *_: object) -> None:
        for each, value in zip((*self._trained, *self._rest), self._saved, strict=True):
            each.data = value


def _changed(folder: Path, exported: dict[str, torch.Tensor]) -> int:
    from safetensors.torch import load_file

    held = {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}
    same = [name for name in held if name in exported and held[name].equal(exported[name])]
    return len(held.keys() | exported.keys()) - len(same)


def _logit_difference(reference: torch.Tensor, found: list[torch.Tensor], model: Any) -> float:
    from megatron.bridge.mimo.module_groups import LANGUAGE
    from megatron.bridge.mimo.slices import sample_slice

    if not found:
        return 0.0
    replicas = model.module_groups[LANGUAGE].here.dp
    own = sample_slice(reference, replicas.rank(), replicas.size())
    return float((found[0] - own).abs().max())


def _distance(reference: Outcome, found: Outcome, changed: int, apart: float) -> Distance:
    def worst(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> float:
        least = 1e-3 * max((float(each.abs().max()) for each in theirs.values()), default=0.0)
        return max((_relative(each, ours[spelled(name, ours)], least) for name, each in theirs.items()), default=0.0)

    return Distance(
        changed=changed,
        logits=apart,
        loss=max(abs(a - b) for a, b in zip(reference.losses, found.losses, strict=True)),
        norm=max(abs(a - b) / a for a, b in zip(reference.norms, found.norms, strict=True)),
        gradient=worst(reference.gradients, found.gradients) if found.gradients else 0.0,
        weight=worst(reference.weights, found.weights),
    )


def spelled(name: str, ours: dict[str, torch.Tensor]) -> str:
    """transformers' name of a parameter as its files spell it."""
    if name in ours:
        return name
    inner = name.removeprefix("model.")
    for other in (inner, inner.replace("language_model.", "language_model.model.", 1), f"language_model.{name}"):
        if other in ours:
            return other
    raise KeyError(name)


def _relative(one: torch.Tensor, other: torch.Tensor, least: float) -> float:
    """Largest difference relative to the largest value; where all are below `least`, they are rounding alone."""
    return float((one - other.reshape(one.shape)).abs().max()) / max(float(one.abs().max()), least)
