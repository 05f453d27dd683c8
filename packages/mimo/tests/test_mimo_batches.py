"""What modules get of a batch: collation, slices that follow their samples, refusals that name the sample."""

from typing import Any

import pytest
import torch

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo import Encoder
from megatron.bridge.mimo.data import collate
from megatron.bridge.mimo.places import refuse_misplaced
from megatron.bridge.mimo.slices import encoder_inputs, own_batch, sample_slice

IMAGE, FEATURES = 9, 2


class Pixels(Encoder):
    """Features are the pixels; an encoder as another package would write one."""

    input_names = ("pixels",)
    width = 4

    def build(self, config: Any, *, initialized: bool) -> torch.nn.Module:
        return torch.nn.Linear(4, 4)

    def encode(self, module: torch.nn.Module, inputs: Any) -> Any:
        return list(module(inputs["pixels"]))

    def ghost(self) -> Any:
        return {"pixels": torch.zeros(1, FEATURES, 4)}


def sample(images: int, first: int = 0) -> dict[str, Any]:
    tokens = torch.tensor([1, *[IMAGE] * (images * FEATURES), *[2] * (8 - images * FEATURES)])
    found: dict[str, Any] = {"tokens": tokens, "loss_mask": torch.ones(9)}
    if images:
        pixels = torch.arange(first, first + images).float().view(-1, 1, 1).expand(-1, FEATURES, 4)
        found["modality_inputs"] = {"images": {"pixels": pixels}}
    return found


def test_samples_with_any_number_of_images_become_one_batch() -> None:
    batch = collate([sample(0), sample(2, 10), sample(1, 20)])
    assert batch["tokens"].shape == batch["loss_mask"].shape == (3, 9)
    images = batch["modality_inputs"]["images"]
    assert images["items"].tolist() == [0, 2, 1]
    assert images["pixels"][:, 0, 0].tolist() == [10.0, 11.0, 20.0]


def test_a_batch_without_any_image_has_no_modality() -> None:
    assert collate([sample(0), sample(0)])["modality_inputs"] == {}


def test_images_follow_their_samples_into_every_slice() -> None:
    counts = [1, 0, 2, 1]
    batch = collate([sample(count, 10 * number) for number, count in enumerate(counts)])
    halves = [encoder_inputs("images", Pixels(token_id=IMAGE), batch, part, 2) for part in range(2)]
    assert [half["items"].tolist() for half in halves] == [[1, 0], [2, 1]]
    assert [half["places"].tolist() for half in halves] == [[2, 0], [4, 2]]
    assert [half["pixels"][:, 0, 0].tolist() for half in halves] == [[0.0], [20.0, 21.0, 30.0]]


def test_one_item_in_each_sample_needs_no_numbers() -> None:
    batch = collate([sample(1, 5), sample(1, 6)])
    del batch["modality_inputs"]["images"]["items"]
    part = encoder_inputs("images", Pixels(token_id=IMAGE), batch, 1, 2)
    assert part["items"].tolist() == [1]
    assert float(part["pixels"][0, 0, 0]) == 6


def test_items_that_nobody_owns_are_refused() -> None:
    batch = collate([sample(2), sample(1)])
    del batch["modality_inputs"]["images"]["items"]
    with pytest.raises(BridgeError, match="3 images for 2 samples and does not say whose they are"):
        encoder_inputs("images", Pixels(token_id=IMAGE), batch, 0, 1)
    batch["modality_inputs"]["images"]["items"] = torch.tensor([1, 1])
    with pytest.raises(BridgeError, match=r"\[1, 1\] must have one number for each of 2 samples and add up to the 3"):
        encoder_inputs("images", Pixels(token_id=IMAGE), batch, 0, 1)


def test_a_missing_modality_is_refused_by_the_sample_that_lacks_it() -> None:
    batch = collate([sample(0), sample(2)])
    del batch["modality_inputs"]["images"]
    with pytest.raises(BridgeError, match=r"sample 1 has 4 images tokens .*\['pixels'\] is missing"):
        encoder_inputs("images", Pixels(token_id=IMAGE), batch, 0, 1)


def test_tokens_that_do_not_match_the_features_are_refused_by_sample() -> None:
    places, items = torch.tensor([2, 4]), torch.tensor([1, 2])
    refuse_misplaced("images", IMAGE, places, items, [2, 2, 2])
    with pytest.raises(BridgeError, match="sample 1 has 4 images tokens .* its 2 images have 5 features"):
        refuse_misplaced("images", IMAGE, places, items, [2, 2, 3])
    with pytest.raises(BridgeError, match="sample 1 has 4 images tokens .* its images are missing from the batch"):
        refuse_misplaced("images", IMAGE, places, torch.tensor([1, 0]), [2])


def test_samples_that_replicas_cannot_divide_are_refused() -> None:
    with pytest.raises(BridgeError, match="3 samples cannot be divided among 2 data-parallel replicas"):
        sample_slice(torch.zeros(3, 4), 0, 2)


def test_samples_whose_inputs_are_no_items_say_how_many_items_they_have() -> None:
    def patches(*grids: int) -> dict[str, Any]:
        images = {"pixels": torch.zeros(sum(grids), 4), "grid": torch.tensor(grids)}
        return {"tokens": torch.ones(3), "modality_inputs": {"images": images}}

    samples = [patches(4, 6), patches(2)]
    with pytest.raises(BridgeError, match=r"sample 0 .* \(pixels: 10, grid: 2\); say how many there are"):
        collate(samples)
    for sample in samples:
        images = sample["modality_inputs"]["images"]
        images["items"] = torch.tensor(len(images["grid"]))
    images = collate(samples)["modality_inputs"]["images"]
    assert images["items"].tolist() == [2, 1]
    assert images["grid"].tolist() == [4, 6, 2]
    assert images["pixels"].shape == (12, 4)


def test_what_no_module_takes_is_refused() -> None:
    batch = collate([sample(0)]) | {"attention_mask": torch.ones(1, 9)}
    with pytest.raises(BridgeError, match="the batch has attention_mask, of which no module knows what to do"):
        own_batch(None, batch)  # type: ignore[arg-type]  # it is not asked
