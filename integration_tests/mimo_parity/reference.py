"""A tiny LLaVA, its samples, and what three steps of plain transformers and torch do to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IMAGE_TOKEN, SEQUENCE, FEATURES = 100, 48, 16
TEXT = {
    **{"model_type": "llama", "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
TOWER = {
    **{"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 7, "num_channels": 3},
}
LR, DECAY, CLIP, BETAS = 1e-3, 0.01, 1.0, (0.9, 0.95)
# Gradients that are zero but for rounding (biases of keys) must not become whole steps.
EPS = 1e-5


@dataclass(frozen=True)
class Outcome:
    """What training did.

    Attributes:
        losses, norms: of each step: mean per token, and of the gradient before clipping.
        gradients: of the first step, by transformers' name.
        weights: after the last step.
        logits: of the first micro-batch before any step, [samples, sequence, vocabulary].
    """

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    logits: Tensor


def llava_config(*, tied: bool = False) -> Any:
    """Two layers each; every image is 16 features."""
    from transformers import LlavaConfig

    config = LlavaConfig(text_config=TEXT, vision_config=TOWER, image_token_id=IMAGE_TOKEN, tie_word_embeddings=tied)
    config.architectures = ["LlavaForConditionalGeneration"]
    return config


def batch(number: int, samples: int, *, uneven: bool) -> dict[str, Any]:
    """One global micro-batch: random text and images; with `uneven` 0 to 2 images in a sample, else one in each."""
    draw = torch.Generator().manual_seed(1000 + number)
    tokens = torch.randint(3, IMAGE_TOKEN, (samples, SEQUENCE + 1), generator=draw)
    items = torch.randint(0, 3, (samples,), generator=draw) if uneven else torch.ones(samples, dtype=torch.long)
    for sample, count in enumerate(items.tolist()):
        tokens[sample, 3 : 3 + count * FEATURES] = IMAGE_TOKEN
    labels = tokens[:, 1:].clone()
    mask = ((labels != IMAGE_TOKEN) & (torch.rand(labels.shape, generator=draw) < 0.8)).float()
    size = TOWER["image_size"]
    images = torch.randn(int(items.sum()), 3, size, size, generator=draw)
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": labels.masked_fill(labels == IMAGE_TOKEN, 0),
        "loss_mask": mask,
        "position_ids": torch.arange(SEQUENCE).expand(samples, -1).contiguous(),
        "modality_inputs": {"images": {"pixel_values": images, "items": items}},
    }


def train_transformers(
    folder: Path, *, uneven: bool, steps: int, microbatches: int, samples: int, frozen: tuple[str, ...] = ()
) -> Outcome:
    """Train transformers' model by torch alone.

    Args:
        folder: of the model.
        uneven: see `batch`.
        steps, microbatches, samples: optimizer steps, micro-batches in each, samples in each of them.
        frozen: weights whose names begin so stay.
    """
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.eval()  # no dropout; gradients are computed all the same
    named = dict(model.named_parameters())
    for name, each in named.items():
        each.requires_grad_(not name.startswith(frozen))
    trained = {name: each for name, each in named.items() if each.requires_grad}
    groups = [
        {"params": [each for each in trained.values() if each.dim() > 1], "weight_decay": DECAY},
        {"params": [each for each in trained.values() if each.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    with torch.no_grad():
        before = _logits(model, batch(0, samples, uneven=uneven))
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        optimizer.zero_grad()
        batches = [batch(step * microbatches + each, samples, uneven=uneven) for each in range(microbatches)]
        total, counted = sum(_loss(model, each) for each in batches), sum(each["loss_mask"].sum() for each in batches)
        loss = total / counted
        loss.backward()
        for each in trained.values():  # Megatron-Core's gradients are zero where torch has none
            each.grad = torch.zeros_like(each) if each.grad is None else each.grad
        if step == 0:
            gradients = {name: each.grad.clone() for name, each in trained.items()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(trained.values()), CLIP)))
        optimizer.step()
        losses.append(loss.item())
    return Outcome(losses, norms, gradients, {name: each.detach().clone() for name, each in named.items()}, before)


def _loss(model: Any, batch: dict[str, Any]) -> Tensor:
    logits = _logits(model, batch).flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, batch["labels"].flatten(), reduction="none")
    return (losses * batch["loss_mask"].flatten()).sum()


def _logits(model: Any, batch: dict[str, Any]) -> Tensor:
    pixels = batch["modality_inputs"]["images"]["pixel_values"]
    found: Tensor = model(input_ids=batch["tokens"], pixel_values=pixels if len(pixels) else None).logits
    return found
