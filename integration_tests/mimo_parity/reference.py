"""The samples, and what three steps of plain transformers and torch do to a model."""

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimo_parity.adapted import file_name, in_peft
from mimo_parity.subjects import IMAGE_TOKEN, SUBJECTS

SEQUENCE = 48
LR, DECAY, CLIP, BETAS = 1e-3, 0.01, 1.0, (0.9, 0.95)
# Gradients that are zero but for rounding (biases of keys) must not become whole steps.
EPS = 1e-5
_TOWERS = ("model.vision_tower", "model.visual.")
_LANGUAGE = ("model.language_model", "lm_head")
# Part of a name -> learning rate and weight decay, where settings of single modules are compared.
RATES = {"multi_modal_projector": (5e-4, 0.0), "vision_tower": (1e-4, 0.05)}


@dataclass(frozen=True)
class Outcome:
    """What training did.

    Attributes:
        losses, norms: of each step: mean per token, and of the gradient before clipping.
        gradients: of the first step, by the names of transformers' files; zero for weights that are not trained.
        weights: after the last step.
        logits: of the first micro-batch before any step, [samples, sequence, vocabulary].
    """

    losses: list[float]
    norms: list[float]
    gradients: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    logits: Tensor


def batch(subject: str, number: int, samples: int, *, uneven: bool, packing: int = 0) -> dict[str, Any]:
    """One global micro-batch of random text and images.

    With `uneven` there are 0 to 2 images in a sample, else one in each; with `packing` samples are of several
    documents, whose lengths are multiples of it.
    """
    if packing:
        return _packed(subject, number, samples, packing)
    return _whole(subject, samples, SEQUENCE, torch.Generator().manual_seed(1000 + number), uneven=uneven)


def _packed(subject: str, number: int, samples: int, multiple: int) -> dict[str, Any]:
    from megatron.bridge.mimo import PackedSamples, collate

    draw = torch.Generator().manual_seed(1000 + number)
    documents = []
    for length in (35, 30, 26, 25, 22, 21, 19, 12, 10, 7, 5):
        whole = _whole(subject, 1, -(-length // multiple) * multiple, draw, uneven=True)
        texts = {name: value[0] for name, value in whole.items() if name != "modality_inputs"}
        inputs = whole["modality_inputs"] if int(whole["modality_inputs"]["images"]["items"]) else {}
        documents.append(texts | {"modality_inputs": inputs})
    packs = PackedSamples(documents, SEQUENCE, seed=number)
    return collate([packs[index] for index in range(samples)])


def documents_of(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each document of a packed batch as a batch of its own, padding too."""
    images = dict(batch["modality_inputs"]["images"])
    items, first = images.pop("items"), 0
    rows = [0, *(images["image_grid_thw"].prod(1) if "image_grid_thw" in images else items.new_ones(int(items.sum())))]
    places = torch.tensor(rows).cumsum(0)
    for sample, (edges, counts) in enumerate(zip(batch["cu_seqlens"].tolist(), items.tolist(), strict=True)):
        for (start, stop), count in zip(itertools.pairwise(edges), counts, strict=True):
            if start == stop:
                continue
            own = {name: each[int(places[first]) : int(places[first + count])] for name, each in images.items()}
            if "image_grid_thw" in own:
                own["image_grid_thw"] = images["image_grid_thw"][first : first + count]
            first += count
            texts = {name: batch[name][sample, None, start:stop] for name in ("tokens", "labels", "loss_mask")}
            yield texts | {"modality_inputs": {"images": {**own, "items": torch.tensor([count])}}}


def _whole(subject: str, samples: int, length: int, draw: torch.Generator, *, uneven: bool) -> dict[str, Any]:
    """Samples of one document, [samples, length]; those that are short have as many images as there is room for."""
    tokens = torch.randint(3, IMAGE_TOKEN, (samples, length + 1), generator=draw)
    items = torch.randint(0, 3, (samples,), generator=draw) if uneven else torch.ones(samples, dtype=torch.long)
    items = items.clamp(max=(length - 2) // 17)
    inputs, sizes = SUBJECTS[subject].draw(int(items.sum()), draw)
    left = list(sizes)
    for sample, count in enumerate(items.tolist()):
        place = 3
        for _ in range(count):
            size = left.pop(0)
            tokens[sample, place : place + size] = IMAGE_TOKEN
            place += size + 1  # text stands between images
    labels = tokens[:, 1:].clone()
    mask = ((labels != IMAGE_TOKEN) & (torch.rand(labels.shape, generator=draw) < 0.8)).float()
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": labels.masked_fill(labels == IMAGE_TOKEN, 0),
        "loss_mask": mask,
        "position_ids": torch.arange(length).expand(samples, -1).contiguous(),
        "modality_inputs": {"images": {**inputs, "items": items}},
    }


def train_transformers(
    subject: str,
    folder: Path,
    *,
    uneven: bool,
    steps: int,
    microbatches: int,
    samples: int,
    packing: int = 0,
    settings: tuple[str, ...] = (),
    start: Path | None = None,
) -> Outcome:
    """Train transformers' model by torch alone; bfloat16 weights with masters in float32.

    Args:
        subject: the model.
        folder: of it.
        uneven, packing: see `batch`.
        steps, microbatches, samples: optimizer steps, micro-batches in each, samples in each of them.
        settings: see `Case`.
        start: the adapters that are trained, as peft's folder; None for the model's own weights.
    """
    model = load(folder)
    frozen = (*(_TOWERS if "frozen" in settings else ()), *(_LANGUAGE if "frozen_language" in settings else ()))
    for name, each in model.named_parameters():
        each.requires_grad_(not (frozen and name.startswith(frozen)))
    model = model if start is None else in_peft(model, start)

    def parts(number: int) -> list[dict[str, Any]]:
        """What the model is run on by itself."""
        whole = batch(subject, number, samples, uneven=uneven, packing=packing)
        return [*documents_of(whole)] if packing else [whole]

    with torch.no_grad():
        rows = [logits(model, each).flatten(0, 1) for each in parts(0)]
        before = torch.cat(rows).unflatten(0, (samples, SEQUENCE))
    batches = [
        [part for each in range(microbatches) for part in parts(step * microbatches + each)] for step in range(steps)
    ]
    losses, norms, first = train(model, batches, by_module="rates" in settings, leaves="vit" in settings)
    if start is not None:
        model = model.merge_and_unload()
    named = dict(model.named_parameters())
    if start is not None:
        gradients = {file_name(name): each for name, each in first.items()}
        return Outcome(losses, norms, gradients, saved(model, {name: named[name].detach() for name in named}), before)
    gradients = saved(model, {name: first.get(name, torch.zeros_like(each)) for name, each in named.items()})
    weights = saved(model, {name: each.detach() for name, each in named.items()})
    return Outcome(losses, norms, gradients, weights, before)


def train(
    model: Any, batches: Sequence[Sequence[dict[str, Any]]], *, by_module: bool = False, leaves: bool = False
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Train the parameters that ask for gradients on the batches of each step.

    Args:
        model: transformers'.
        batches: of each step.
        by_module: with the settings of `RATES`.
        leaves: a weight that no feature depends on is left alone, as torch does; otherwise it decays, as
            Megatron-Core's optimizer has it.

    Returns:
        Losses, norms of the gradients, and the gradients of the first step.
    """
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    masters = {name: each if each.dtype == torch.float32 else each.detach().float() for name, each in trained.items()}
    optimizer = torch.optim.AdamW(_groups(masters, by_module), lr=LR, betas=BETAS, eps=EPS)
    losses, norms, first = [], [], {}
    for step, each_step in enumerate(batches):
        loss, summed = _gradients(model, trained, each_step)
        if step == 0:
            first = {name: each.clone() for name, each in summed.items()}
        for name, each in masters.items():
            each.grad = summed[name] if not leaves or summed[name].any() else None
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(masters.values()), CLIP)))
        optimizer.step()
        for name, each in trained.items():
            each.data.copy_(masters[name].data)
        losses.append(loss)
    return losses, norms, first


def load(folder: Path) -> Any:
    """transformers' model of a folder, in the precision of its files."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()  # no dropout; there are gradients


def saved(model: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`values` of the model's parameters as transformers would write them to files."""
    from safetensors.torch import load_file

    kept = {name: each.data for name, each in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        for name, each in model.named_parameters():
            each.data = values[name].clone()
        model.save_pretrained(folder)
        for name, each in model.named_parameters():
            each.data = kept[name]
        return {name: each for file in Path(folder).glob("*.safetensors") for name, each in load_file(file).items()}


def _groups(trained: Mapping[str, Tensor], by_module: bool) -> list[dict[str, Any]]:
    groups = []
    for name, each in trained.items():
        own = next((value for part, value in RATES.items() if by_module and part in name), (LR, DECAY))
        groups.append({"params": [each], "lr": own[0], "weight_decay": own[1] if each.dim() > 1 else 0.0})
    return groups


def _gradients(
    model: Any, trained: Mapping[str, Any], batches: Sequence[dict[str, Any]]
) -> tuple[float, dict[str, Tensor]]:
    """Loss per token over all batches, and its gradients in float32; Megatron-Core's are zero where torch has none."""
    counted = sum(each["loss_mask"].sum() for each in batches)
    summed = {name: torch.zeros_like(each, dtype=torch.float32) for name, each in trained.items()}
    total = 0.0
    for each in batches:
        model.zero_grad()
        loss = _loss(model, each) / counted
        loss.backward()
        total += loss.item()
        for name, parameter in trained.items():
            if parameter.grad is not None:
                summed[name] += parameter.grad.float()
    return total, summed


def _loss(model: Any, batch: dict[str, Any]) -> Tensor:
    found = logits(model, batch).flatten(0, 1).float()
    losses = torch.nn.functional.cross_entropy(found, batch["labels"].flatten(), reduction="none")
    return (losses * batch["loss_mask"].flatten()).sum()


def logits(model: Any, batch: dict[str, Any]) -> Tensor:
    """transformers' logits of a batch, [samples, sequence, vocabulary]."""
    inputs = dict(batch["modality_inputs"]["images"])
    given = {name: each for name, each in inputs.items() if name != "items"} if int(inputs["items"].sum()) else {}
    if "image_grid_thw" in given:
        given["mm_token_type_ids"] = (batch["tokens"] == IMAGE_TOKEN).int()
    found: Tensor = model(input_ids=batch["tokens"], **given).logits
    return found
