"""The same training at a MIMO placement, and how far it is from the reference."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mimo_parity.adapted import adapt, gradients_in_files, method_of
from mimo_parity.cases import Case
from mimo_parity.reference import BETAS, CLIP, DECAY, EPS, LR, RATES, SEQUENCE, Outcome, batch


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
    from megatron.bridge.mimo.conversion import export_hf_weights
    from megatron.bridge.mimo.predict import logits
    from megatron.bridge.mimo.slices import loading_place
    from megatron.bridge.mimo.step import forward_step
    from megatron.bridge.peft.adapted_layer import without_adapters

    provider = provider_of(case, folder)
    encoder = provider.encoders["images"]
    hook = adapt(provider, case)
    (model,) = provider.provide_distributed_model(ddp_config=_ddp(case), pre_wrap_hook=hook)
    runtime = provider.engine.runtime
    optimizer = _optimizer(case, provider, model)

    def part(number: int) -> dict[str, Any]:
        whole = batch(case.subject, number, samples, uneven=case.uneven, packing=case.packing)
        return part_of(whole, encoder, *loading_place(model.module_groups))

    def data(step: int) -> Iterator[Any]:
        return (part(step * microbatches + number) for number in range(microbatches))

    with without_adapters(model):
        changed = _changed(folder, dict(export_hf_weights(provider.bridge, model)))
    first = part(0)
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
        if step == 0 and not _sharded(case):
            with gradients_for_weights(model):
                gradients = _by_name(case, provider.bridge, model, folder)
        _, norm, _ = optimizer.step()
        norms.append(float(norm))
    weights = dict(export_hf_weights(provider.bridge, model))
    distance = _distance(reference, Outcome(losses, norms, gradients, weights, reference.logits), changed, apart)
    provider.engine.stop()
    return distance


def _by_name(case: Case, bridge: Any, model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What the weights hold, by transformers' names; of adapters by peft's."""
    from megatron.bridge.mimo.conversion import export_hf_weights

    if method_of(case.settings):
        return gradients_in_files(bridge, model, folder.parent / f"{folder.name} {case.mode} {case.name}")
    return {name: each.clone() for name, each in export_hf_weights(bridge, model)}


def _sharded(case: Case) -> bool:
    return "distributed" in case.settings


def _ddp(case: Case) -> Any:
    from megatron.core.distributed import DistributedDataParallelConfig

    return DistributedDataParallelConfig(
        use_distributed_optimizer=_sharded(case),
        overlap_grad_reduce="overlap" in case.settings,
        grad_reduce_in_fp32=case.subject == "bf16",
    )


def _optimizer(case: Case, provider: Any, model: Any) -> Any:
    """The model's, with the rates that a schedule would have set."""
    from megatron.core.optimizer import OptimizerConfig

    settings = OptimizerConfig(
        **{"optimizer": "adam", "lr": LR, "weight_decay": DECAY, "clip_grad": CLIP, "adam_eps": EPS, "min_lr": 0.0},
        **{"adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "use_distributed_optimizer": _sharded(case)},
        **{"bf16": case.subject == "bf16", "params_dtype": provider.params_dtype},
    )
    optimizer = provider.engine.build_optimizer(settings, [model], None)
    model.config.grad_scale_func = optimizer.scale_loss
    for group in optimizer.param_groups:  # as Megatron-Core's schedule does
        group["lr"], group["weight_decay"] = group["max_lr"], group.get("start_wd", DECAY) * group["wd_mult"]
    return optimizer


def provider_of(case: Case, folder: Path) -> Any:
    """What builds the case's model."""
    from megatron.bridge.mimo import MimoProvider, ModuleOptimizerConfig

    tower = "megatron" if "vit" in case.settings else "transformers"
    provider = MimoProvider.from_hf_pretrained(str(folder), case.placement(), tower_implementation=tower)
    provider.language.sequence_parallel = "sequence_parallel" in case.settings
    provider.encoders["images"].frozen = "frozen" in case.settings
    provider.frozen_language = "frozen_language" in case.settings
    if "rates" in case.settings:
        (projector, tower) = (ModuleOptimizerConfig(lr=lr, weight_decay=decay) for lr, decay in RATES.values())
        provider.optimizers = {"images": tower, "images.projector": projector}
    return provider


def part_of(whole: dict[str, Any], encoder: Any, rank: int, size: int) -> dict[str, Any]:
    """What a loader for part `rank` of `size` gives of a global micro-batch."""
    each = len(whole["tokens"]) // size
    own = slice(rank * each, (rank + 1) * each)
    images = dict(whole["modality_inputs"]["images"])
    items = images.pop("items")
    first = int(items[: own.start].sum())
    inputs = encoder.take(images, first, first + int(items[own].sum()))
    texts = {name: value[own] for name, value in whole.items() if name != "modality_inputs"}
    return {**texts, "modality_inputs": {"images": {**inputs, "items": items[own]}}}


class gradients_for_weights:
    """Within the block the trained parameters hold their reduced gradients, so that these can be exported."""

    def __init__(self, model: Any) -> None:
        self._trained = [each for each in model.parameters() if hasattr(each, "main_grad")]
        self._rest = [each for each in model.parameters() if not hasattr(each, "main_grad")]

    def __enter__(self) -> None:
        self._saved = [each.data for each in (*self._trained, *self._rest)]
        for each in self._trained:
            each.data = each.main_grad.to(each.dtype)  # another type would take the hooks of autograd off
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
    return float((found[0].float() - own.float()).abs().max())


def _distance(reference: Outcome, found: Outcome, changed: int, apart: float) -> Distance:
    def worst(theirs: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]) -> float:
        assert theirs.keys() == ours.keys()
        least = 1e-3 * max(float(each.abs().max()) for each in theirs.values())
        return max(_relative(each.float(), ours[name].float(), least) for name, each in theirs.items())

    return Distance(
        changed=changed,
        logits=apart,
        loss=max(abs(a - b) for a, b in zip(reference.losses, found.losses, strict=True)),
        norm=max(abs(a - b) / a for a, b in zip(reference.norms, found.norms, strict=True)),
        gradient=worst(reference.gradients, found.gradients) if found.gradients else 0.0,
        weight=worst(reference.weights, found.weights),
    )


def _relative(one: torch.Tensor, other: torch.Tensor, least: float) -> float:
    """Largest difference relative to the largest value; where all are below `least`, they are rounding alone."""
    return float((one - other.reshape(one.shape)).abs().max()) / max(float(one.abs().max()), least)
