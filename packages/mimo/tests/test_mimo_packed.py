"""Packed samples with images: what is packed, what modules get of it, what is refused by sample and document."""

from typing import Any

import pytest
import torch

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo import Encoder, PackedSamples, collate
from megatron.bridge.mimo.documents import bounds_in_one_row, checked_bounds, one_row
from megatron.bridge.mimo.places import refuse_misplaced
from megatron.bridge.mimo.slices import encoder_inputs
from megatron.bridge.mimo.token_positions import decided_positions

IMAGE, FEATURES, LENGTH, PAD = 9, 2, 12, 3


class Pixels(Encoder):
    """Two features for each image; positions are those of text, then as many again for each image's number."""

    input_names = ("pixels",)
    width = 4
    decides_positions = True

    def build(self, config: Any, *, initialized: bool) -> torch.nn.Module:
        return torch.nn.Linear(4, 4)

    def encode(self, module: torch.nn.Module, inputs: Any) -> Any:
        return list(module(inputs["pixels"]))

    def ghost(self) -> Any:
        return {"pixels": torch.zeros(1, FEATURES, 4)}

    def sizes(self, inputs: Any) -> Any:
        return [FEATURES] * self.count(inputs)

    def positions(self, tokens: Any, inputs: Any) -> Any:
        seen = sum(int(each) for each in inputs["pixels"][:, 0, 0]) if inputs else 0
        return torch.stack([torch.arange(tokens.shape[1]), torch.full((tokens.shape[1],), seen)])[:, None]


ENCODER = Pixels(token_id=IMAGE)


def document(number: int, length: int, images: int = 0) -> dict[str, Any]:
    """Text that says whose it is, behind its images; pixels say it too."""
    text = torch.arange(length + 1) % 5 + 10 * (number + 1)
    tokens = text[:-1].clone()
    tokens[: images * FEATURES] = IMAGE
    found = {"tokens": tokens, "labels": text[1:], "loss_mask": (tokens != IMAGE).float()}
    if images:
        pixels = torch.full((images, FEATURES, 4), 100.0 * number) + torch.arange(images).view(-1, 1, 1)
        found["modality_inputs"] = {"images": {"pixels": pixels}}
    return found


SIZES = [(7, 1), (3, 0), (5, 2), (12, 3), (2, 0), (4, 1), (6, 0), (5, 0)]
DOCUMENTS = [document(number, *size) for number, size in enumerate(SIZES)]


def test_every_document_is_in_one_sample_whole_with_its_images() -> None:
    packed = PackedSamples(DOCUMENTS, LENGTH, pad=PAD)
    assert sorted(number for sample in range(len(packed)) for number in packed.documents(sample)) == list(range(8))
    for index in range(len(packed)):
        sample, numbers = packed[index], packed.documents(index)
        bounds = sample["cu_seqlens"].tolist()
        assert bounds[0] == 0
        assert bounds[-1] == LENGTH
        taken = 0
        images = sample["modality_inputs"].get("images", {"items": torch.zeros(len(bounds) - 1)})
        for place, number in enumerate(numbers):
            rows, own = slice(bounds[place], bounds[place + 1]), DOCUMENTS[number]
            for name in ("tokens", "labels", "loss_mask"):
                assert sample[name][rows].equal(own[name])
            assert sample["position_ids"][rows].tolist() == list(range(len(own["tokens"])))
            count = int(images["items"][place])
            assert count == SIZES[number][1]
            if count:
                assert images["pixels"][taken : taken + count].equal(own["modality_inputs"]["images"]["pixels"])
            taken += count
        if len(bounds) - 1 > len(numbers):  # what is left
            rest = slice(bounds[-2], LENGTH)
            assert sample["tokens"][rest].eq(PAD).all()
            assert not sample["loss_mask"][rest].any()
            assert int(images["items"][-1]) == 0


def test_no_prediction_across_documents_counts() -> None:
    packed = PackedSamples(DOCUMENTS, LENGTH)
    for sample in (packed[index] for index in range(len(packed))):
        # Labels of a document say whose they are, up to its last token.
        counted = sample["loss_mask"] > 0
        assert (sample["labels"] // 10 == sample["tokens"] // 10)[counted].all()


def test_the_order_and_the_company_are_the_seeds() -> None:
    documents = [document(number % 20, 4 + number % 3) for number in range(40)]

    def plan(seed: int | None) -> list[list[int]]:
        packed = PackedSamples(documents, LENGTH, seed=seed)
        return [packed.documents(index) for index in range(len(packed))]

    assert plan(3) == plan(3)
    assert plan(3) != plan(4)
    assert {frozenset(each) for each in plan(3)} != {frozenset(each) for each in plan(4)}
    assert plan(None) == plan(None) != plan(3)


def test_efficiency_is_told_and_lengths_need_not_be_read() -> None:
    class Counted(list[Any]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            self.reads += 1
            return super().__getitem__(index)

    counted = Counted(DOCUMENTS)
    packed = PackedSamples(counted, LENGTH, lengths=[size for size, _ in SIZES])
    assert counted.reads == 0
    filled = sum(size for size, _ in SIZES)
    assert packed.efficiency == filled / (len(packed) * LENGTH)
    assert packed.notices == [f"8 samples in {len(packed)} packs, {packed.efficiency:.1%} full"]
    with pytest.raises(BridgeError, match="lengths has 2 numbers for 8 samples"):
        PackedSamples(counted, LENGTH, lengths=[1, 2])
    wrong = PackedSamples(counted, LENGTH, lengths=[8, *(size for size, _ in SIZES[1:])])
    with pytest.raises(BridgeError, match=r"sample 0 has .*'tokens': \[7\].*a document of 8 tokens needs"):
        [wrong[index] for index in range(len(wrong))]


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(BridgeError, match="a document has 12 tokens; those that are packed have from 1 to 8"):
        PackedSamples(DOCUMENTS, 8)
    masked = PackedSamples([DOCUMENTS[0] | {"attention_mask": torch.ones(7)}], LENGTH)
    with pytest.raises(BridgeError, match="sample 0 has attention_mask, which cannot be packed"):
        masked[0]


def packs() -> dict[str, Any]:
    """Two samples: documents of 7 and 5 tokens with 1 and 2 images, and one of 12 with 3."""
    packed = PackedSamples([DOCUMENTS[number] for number in (0, 2, 3)], LENGTH, seed=None)
    order = sorted(range(2), key=lambda index: -len(packed.documents(index)))
    return collate([packed[index] for index in order])


def test_samples_with_any_number_of_documents_become_one_batch() -> None:
    batch = packs()
    assert batch["cu_seqlens"].tolist() == [[0, 7, 12], [0, 12, 12]]
    assert batch["modality_inputs"]["images"]["items"].tolist() == [[1, 2], [3, 0]]
    halves = [encoder_inputs("images", ENCODER, batch, part, 2) for part in range(2)]
    assert [half["items"].tolist() for half in halves] == [[[1, 2]], [[3, 0]]]
    assert [half["places"].tolist() for half in halves] == [[[2, 4]], [[6, 0]]]
    assert [half["pixels"][:, 0, 0].tolist() for half in halves] == [[0, 200, 201], [300, 301, 302]]


def test_several_packed_samples_are_one_row_to_megatron_core() -> None:
    batch = packs()
    bounds = checked_bounds(batch["cu_seqlens"], batch["tokens"])
    assert bounds is not None
    assert bounds_in_one_row(bounds, LENGTH).tolist() == [[0, 7, 12, 24]]
    row = one_row(batch["tokens"])
    assert row is not None
    assert row.equal(batch["tokens"].view(1, -1))
    assert one_row(torch.arange(24).view(3, 2, 4)).tolist() == torch.arange(24).view(3, 1, 8).tolist()  # type: ignore[union-attr]


def test_positions_are_decided_for_each_document_by_its_own_items() -> None:
    batch = packs()
    bounds = checked_bounds(batch["cu_seqlens"], batch["tokens"])
    seen = encoder_inputs("images", ENCODER, batch, 0, 1)
    found = decided_positions("images", ENCODER, batch["tokens"], bounds, seen)
    assert found.shape == (2, 2, LENGTH)
    assert found[0].tolist() == [[*range(7), *range(5)], [*range(12)]]
    assert found[1].tolist() == [[0] * 7 + [401] * 5, [903] * 12]


def test_a_document_that_begins_inside_an_image_is_refused_by_sample_and_document() -> None:
    batch = packs()
    batch["cu_seqlens"][0, 1] = 8  # one token of the second document's first image
    bounds = checked_bounds(batch["cu_seqlens"], batch["tokens"])
    seen = encoder_inputs("images", ENCODER, batch, 0, 1)
    told = "document 0 of sample 0 has 3 images tokens .* its 1 images have 2 features; .* all of an item's in one"
    with pytest.raises(BridgeError, match=told):
        refuse_misplaced("images", IMAGE, seen["places"], seen["items"], [FEATURES] * 6)
    with pytest.raises(BridgeError, match=told):
        decided_positions("images", ENCODER, batch["tokens"], bounds, seen)


def test_documents_whose_items_are_not_told_are_refused() -> None:
    sample = PackedSamples(DOCUMENTS[:1] + DOCUMENTS[2:3], LENGTH)[0]
    del sample["modality_inputs"]["images"]["items"]
    with pytest.raises(BridgeError, match="sample 0 of the batch has 2 documents and does not say which of them its"):
        collate([sample])
    batch = packs()
    batch["modality_inputs"]["images"]["items"] = torch.tensor([3, 3])
    with pytest.raises(BridgeError, match=r"\[3, 3\] must have one number for each document, \[2, 2\], and add up"):
        encoder_inputs("images", ENCODER, batch, 0, 1)
    del batch["modality_inputs"]["images"]["items"]
    with pytest.raises(BridgeError, match="the number that each document of packed samples has"):
        encoder_inputs("images", ENCODER, batch, 0, 1)


def test_samples_that_are_not_all_packed_are_refused() -> None:
    packed = PackedSamples(DOCUMENTS, LENGTH)
    with pytest.raises(BridgeError, match="sample 1 of the batch has no cu_seqlens, and others have"):
        collate([packed[0], {name: each for name, each in packed[0].items() if name != "cu_seqlens"}])


@pytest.mark.parametrize("bounds", [[[0, 7, 11], [0, 12, 12]], [[1, 7, 12], [0, 12, 12]], [[0, 7, 12], [0, 13, 12]]])
def test_bounds_that_do_not_divide_the_sample_are_refused(bounds: list[list[int]]) -> None:
    with pytest.raises(BridgeError, match=r"sample [01]: cu_seqlens=.* must ascend from 0 to its 12 tokens"):
        checked_bounds(torch.tensor(bounds), torch.zeros(2, LENGTH))
    with pytest.raises(BridgeError, match=r"cu_seqlens of shape \[3\] must be \[2 samples, documents \+ 1\]"):
        checked_bounds(torch.tensor([0, 7, 12]), torch.zeros(2, LENGTH))


def test_documents_are_filled_up_for_ranks_that_share_them() -> None:
    packed = PackedSamples(DOCUMENTS, LENGTH, pad=PAD, multiple=4)
    samples = [packed[index] for index in range(len(packed))]
    assert {int(bound) % 4 for sample in samples for bound in sample["cu_seqlens"]} == {0}
    trained = torch.cat([sample["labels"][sample["loss_mask"] > 0] for sample in samples])
    own = torch.cat([each["labels"][each["loss_mask"] > 0] for each in DOCUMENTS])
    assert trained.sort().values.equal(own.sort().values)
    assert packed.efficiency == sum(length for length, _ in SIZES) / (LENGTH * len(packed))
    with pytest.raises(BridgeError, match="sequence_length=12 is no multiple of 8, which documents are filled .* 8 wo"):
        PackedSamples(DOCUMENTS, LENGTH, multiple=8)
