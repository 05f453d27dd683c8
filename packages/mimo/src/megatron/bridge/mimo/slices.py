"""What each module on a rank gets of a batch: the samples of its own replica, with all that belongs to them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.encoders import Encoder
from megatron.bridge.mimo.module_groups import LANGUAGE
from megatron.bridge.mimo.places import ITEMS, PLACES, items_of_samples, places_of

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.mimo.model import BridgeMimoModel
    from megatron.bridge.mimo.module_groups import ModuleGroups

    type Batch = Mapping[str, Any]

TOKENS, MODALITIES = "tokens", "modality_inputs"
# What the language model takes besides, each [samples, sequence].
_OF_LANGUAGE = ("labels", "loss_mask", "position_ids")


def loading_place(modules: "Mapping[str, ModuleGroups]") -> tuple[int, int]:
    """Which part of a global micro-batch this rank loads, of how many: that of its module with the fewest replicas.

    Another module on the rank has more of them, and takes a part of this part.
    """
    here = [place for place in modules.values() if place.groups is not None]
    fewest = min(here, key=lambda place: place.layout.data_parallel)
    return int(fewest.here.dp.rank()), fewest.layout.data_parallel


def own_batch(model: "BridgeMimoModel", batch: "Batch") -> dict[str, Any]:
    """What the model on this rank is called with, of a batch that was loaded for its `loading_place`.

    Args:
        model: this rank's modules.
        batch: `tokens`, `labels`, `loss_mask`, `position_ids`, each [samples, sequence], and `modality_inputs`.

    Raises:
        BridgeError: the samples cannot be divided, lack what belongs to them, or have what no module takes.
    """
    _refuse_others(batch)
    _, loaded = loading_place(model.module_groups)

    def part(place: "ModuleGroups") -> tuple[int, int]:
        parts = place.layout.data_parallel // loaded
        return int(place.here.dp.rank()) % parts, parts

    encoders = {name: module.encoder for name, module in model.encoders().items()}
    inputs = {
        name: encoder_inputs(name, encoder, batch, *part(model.module_groups[name]))
        for name, encoder in encoders.items()
    }
    # A rank without the language model needs the tokens to know whose features are whose.
    reader = LANGUAGE if model.module_groups[LANGUAGE].groups is not None else next(iter(encoders))
    own = part(model.module_groups[reader])
    tokens = sample_slice(batch[TOKENS], *own)
    texts = {name: sample_slice(batch[name], *own) for name in _OF_LANGUAGE if name in batch and reader == LANGUAGE}
    if model.deciding is not None and reader == LANGUAGE:
        name, encoder = model.deciding
        seen = encoder_inputs(name, encoder, batch, *own)
        texts["position_ids"] = encoder.positions(tokens, {key: seen[key] for key in seen.keys() - {ITEMS, PLACES}})
    return {"input_ids": tokens, **texts, MODALITIES: inputs}


def _refuse_others(batch: "Batch") -> None:
    others = sorted(batch.keys() - {TOKENS, MODALITIES, *_OF_LANGUAGE})
    if others:
        raise BridgeError(
            f"the batch has {', '.join(others)}, of which no module knows what to do; packed documents and attention "
            "masks are for models that are trained as one. Leave them out: every sample is one document"
        )


def sample_slice(value: "Tensor", rank: int, size: int) -> "Tensor":
    """Part `rank` of `size` equal parts of the samples.

    Raises:
        BridgeError: the samples cannot be divided so.
    """
    samples = len(value)
    if samples % size:
        raise BridgeError(
            f"{samples} samples cannot be divided among {size} data-parallel replicas; make micro_batch_size a "
            f"multiple of {size}"
        )
    each = samples // size
    return value[rank * each : (rank + 1) * each]


def encoder_inputs(name: str, encoder: Encoder, batch: "Batch", rank: int, size: int) -> dict[str, Any]:
    """What an encoder's replica takes of a batch: the items of its samples, `items` and `places` of each sample.

    Args:
        name: of the modality.
        encoder: of the modality.
        batch: `tokens` [samples, sequence] and `modality_inputs`, by modality and then by input.
        rank, size: the replica, among those that the batch is divided among.

    Raises:
        BridgeError: the batch has tokens of the modality and no items, or does not say whose items they are.
    """
    import torch

    tokens = batch[TOKENS]
    given = dict((batch.get(MODALITIES) or {}).get(name) or {})
    counts = given.pop(ITEMS, None)
    places = places_of(tokens, encoder.token_id)
    number = encoder.count(given)
    if not number and int(places.sum()):
        sample = int(places.nonzero()[0])
        raise BridgeError(
            f"sample {sample} has {int(places[sample])} {name} tokens (id {encoder.token_id}), and the batch has no "
            f"{name}: modality_inputs[{name!r}][{encoder.input_names[0]!r}] is missing"
        )
    items = torch.tensor(items_of_samples(name, counts, len(tokens), number))
    part = sample_slice(items, rank, size)
    start = int(items[: rank * len(part)].sum())
    own = encoder.take(given, start, start + int(part.sum())) if number else {}
    return {**own, ITEMS: part, PLACES: sample_slice(places, rank, size)}
