"""What each module on a rank gets of a batch: the samples of its own replica, with all that belongs to them."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.documents import BOUNDS, checked_bounds
from megatron.bridge.mimo.encoders import Encoder
from megatron.bridge.mimo.module_groups import LANGUAGE
from megatron.bridge.mimo.places import ITEMS, PLACES, items_of, places_of
from megatron.bridge.mimo.token_positions import decided_positions

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


def common_place(modules: "Mapping[str, ModuleGroups]") -> tuple[int, int]:
    """Which part of a global micro-batch this rank reads where all ranks read equal parts, of how many.

    The parts are as many as the replicas of every module can divide among themselves, wherever it stands; the part of
    `loading_place` lies in this one.
    """
    size = math.gcd(*(place.layout.data_parallel for place in modules.values()))
    rank, loaded = loading_place(modules)
    return rank * size // loaded, size


def batch_part(batch: "Batch", encoders: "Mapping[str, Encoder]", rank: int, size: int) -> dict[str, Any]:
    """Part `rank` of `size` of the samples of a batch, with their items, as a batch of its own.

    Raises:
        BridgeError: see `encoder_inputs`.
    """
    texts = {name: sample_slice(value, rank, size) for name, value in batch.items() if name != MODALITIES}
    given = batch.get(MODALITIES) or {}
    inputs = {name: encoder_inputs(name, encoders[name], batch, rank, size) for name in given if name in encoders}
    items = {name: {key: each for key, each in own.items() if key != PLACES} for name, own in inputs.items()}
    return {**texts, MODALITIES: items}


def own_batch(model: "BridgeMimoModel", batch: "Batch") -> dict[str, Any]:
    """What the model on this rank is called with, of a batch that was loaded for its `loading_place`.

    Args:
        model: this rank's modules.
        batch: `tokens`, `labels`, `loss_mask`, `position_ids`, each [samples, sequence], and `modality_inputs`; of
            packed samples `cu_seqlens` [samples, documents + 1] too.

    Raises:
        BridgeError: the samples cannot be divided, lack what belongs to them, or have what no module takes.
    """
    _refuse_others(batch)
    batch = {**batch, BOUNDS: checked_bounds(batch.get(BOUNDS), batch[TOKENS])}
    _, loaded = loading_place(model.module_groups)

    def part(place: "ModuleGroups") -> tuple[int, int]:
        parts = place.layout.data_parallel // loaded
        return int(place.here.dp.rank()) % parts, parts

    encoders = {name: module.encoder for name, module in model.encoders().items()}
    inputs = {
        name: encoder_inputs(name, encoder, batch, *part(model.module_groups[name]))
        for name, encoder in encoders.items()
    }
    if model.module_groups[LANGUAGE].groups is None:
        # The tokens say whose features are whose.
        tokens = sample_slice(batch[TOKENS], *part(model.module_groups[next(iter(encoders))]))
        return {"input_ids": tokens, MODALITIES: inputs}
    own = part(model.module_groups[LANGUAGE])
    return {**_texts(batch, *own, model.deciding), MODALITIES: inputs}


def _texts(batch: "Batch", rank: int, size: int, deciding: "tuple[str, Encoder] | None") -> dict[str, Any]:
    """What the language model's replica takes of a batch."""
    names = [name for name in (TOKENS, *_OF_LANGUAGE, BOUNDS) if batch.get(name) is not None]
    own = {name: sample_slice(batch[name], rank, size) for name in names}
    if deciding is not None:
        seen = encoder_inputs(*deciding, batch, rank, size)
        own["position_ids"] = decided_positions(*deciding, own[TOKENS], own.get(BOUNDS), seen)
    return {"input_ids": own.pop(TOKENS), **own}


def _refuse_others(batch: "Batch") -> None:
    others = sorted(batch.keys() - {TOKENS, MODALITIES, BOUNDS, *_OF_LANGUAGE})
    if others:
        raise BridgeError(
            f"the batch has {', '.join(others)}, of which no module knows what to do; attention masks are for models "
            f"that are trained as one. Leave them out: what tokens see is said by {BOUNDS}"
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

    Of packed samples these are numbers of each document.

    Args:
        name: of the modality.
        encoder: of the modality.
        batch: `tokens` [samples, sequence], `modality_inputs`, by modality and then by input, and perhaps `cu_seqlens`.
        rank, size: the replica, among those that the batch is divided among.

    Raises:
        BridgeError: the batch has tokens of the modality and no items, or does not say whose items they are.
    """
    tokens = batch[TOKENS]
    given = dict((batch.get(MODALITIES) or {}).get(name) or {})
    counts = given.pop(ITEMS, None)
    places = places_of(tokens, encoder.token_id, batch.get(BOUNDS))
    number = encoder.count(given)
    if not number and int(places.sum()):
        sample = int(places.nonzero()[0, 0])
        raise BridgeError(
            f"sample {sample} has {int(places[sample].sum())} {name} tokens (id {encoder.token_id}), and the batch has "
            f"no {name}: modality_inputs[{name!r}][{encoder.input_names[0]!r}] is missing"
        )
    items = items_of(name, counts, places, number)
    part = sample_slice(items, rank, size)
    start = int(items[: rank * len(part)].sum())
    own = encoder.take(given, start, start + int(part.sum())) if number else {}
    return {**own, ITEMS: part, PLACES: sample_slice(places, rank, size)}
