"""Batches for the modules on a rank: collation of samples with items, and iterators that know the rank's part."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.documents import BOUNDS, stacked_bounds
from megatron.bridge.mimo.places import ITEMS
from megatron.bridge.mimo.slices import MODALITIES

if TYPE_CHECKING:
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from torch import Tensor

    from megatron.bridge.mimo.provider import MimoProvider

    type Batch = Mapping[str, Any]


@dataclass(kw_only=True)
class MimoDataConfig:
    """What `get_data_iterator` draws.

    Attributes:
        dataset: map-style; see `collate` for its samples.
        base_batch_size: samples of a micro-batch on one replica of the language model.
        num_microbatches: micro-batches of a step.
        seq_length: tokens of a sample.
        consumed_samples: where to begin.
    """

    dataset: Any
    base_batch_size: int
    num_microbatches: int = 1
    seq_length: int
    consumed_samples: int = 0


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch of samples that may have any number of items.

    Args:
        samples: dicts of tensors of one shape, and `modality_inputs`: by modality the encoder's inputs for the items of
            the sample, by name, with their number along the first axis. Where inputs differ in it (patches of images of
            several sizes), `items` says how many there are. A sample without items leaves the modality out. A packed
            sample has `cu_seqlens` [documents + 1], where each document begins and the last one ends, and its `items`
            say how many each document has.

    Returns:
        Tensors [samples, ...], and by modality the items of all samples, with `items`, how many each sample has. Of
        packed samples `cu_seqlens` [samples, most documents + 1] and `items` [samples, most documents], which end with
        documents of no token where a sample has fewer.

    Raises:
        BridgeError: nothing says how many items a sample or a document has; or some samples are packed and some not.
    """
    from torch.utils.data import default_collate

    apart = {MODALITIES, BOUNDS}
    batch: dict[str, Any] = default_collate(
        [{key: value for key, value in sample.items() if key not in apart} for sample in samples]
    )
    bounds = stacked_bounds(samples)
    documents = None if bounds is None else [len(sample[BOUNDS]) - 1 for sample in samples]
    batch[MODALITIES] = items_together([sample.get(MODALITIES) or {} for sample in samples], documents)
    return batch if bounds is None else {**batch, BOUNDS: bounds}


def items_together(
    given: "Sequence[Mapping[str, Batch]]", documents: Sequence[int] | None = None
) -> dict[str, dict[str, "Tensor"]]:
    """The items of several samples one after another, by modality, with `items`, how many each sample has.

    Args:
        given: `modality_inputs` of each sample.
        documents: of each packed sample; `items` are of each document then, [samples, most documents].

    Raises:
        BridgeError: see `collate`.
    """
    import torch

    names = dict.fromkeys(name for each in given for name in each)
    return {
        name: {
            **{
                key: torch.cat([each[name][key] for each in given if name in each])
                for key in next(each[name] for each in given if name in each)
                if key != ITEMS
            },
            ITEMS: _counts(name, [each.get(name) for each in given], documents),
        }
        for name in names
    }


def _counts(name: str, given: "Sequence[Batch | None]", documents: Sequence[int] | None) -> "Tensor":
    """Items of each sample, or of each document of packed samples."""
    import torch

    if documents is None:
        return torch.tensor([_items(name, number, inputs) for number, inputs in enumerate(given)])
    found = torch.zeros(len(given), max(documents), dtype=torch.long)
    for number, (inputs, own) in enumerate(zip(given, documents, strict=True)):
        if inputs is not None:
            found[number, :own] = _items_of_documents(name, number, inputs, own)
    return found


def _items_of_documents(name: str, number: int, inputs: "Batch", documents: int) -> "Tensor":
    """How many items each document of a packed sample has, [documents]."""
    import torch

    counts = torch.as_tensor(inputs[ITEMS] if ITEMS in inputs else _items(name, number, inputs)).reshape(-1)
    if len(counts) != documents:
        raise BridgeError(
            f"sample {number} of the batch has {documents} documents and does not say which of them its {name} belong "
            f"to; give modality_inputs[{name!r}][{ITEMS!r}], the number that each document has"
        )
    return counts


def _items(name: str, number: int, inputs: "Batch | None") -> int:
    """How many items a sample has."""
    if inputs is None:
        return 0
    sizes = {key: len(value) for key, value in inputs.items() if key != ITEMS}
    if ITEMS in inputs:
        return int(inputs[ITEMS])
    if len(set(sizes.values())) != 1:
        told = ", ".join(f"{key}: {size}" for key, size in sizes.items())
        raise BridgeError(
            f"sample {number} of the batch has {name} whose inputs differ along the first axis ({told}); say how many "
            f"there are: modality_inputs[{name!r}][{ITEMS!r}]"
        )
    return sizes.popitem()[1]


def get_data_iterator(
    model_config: "MimoProvider",
    data_config: MimoDataConfig,
    module_to_grid_map: "Mapping[str, HyperCommGrid] | None" = None,
) -> Iterator["Batch"]:
    """Micro-batches of this rank: the part of its module with the fewest replicas; all modules see the same samples.

    A micro-batch of all ranks has `base_batch_size` samples for each replica of the language model, and a module with
    N replicas takes an Nth of them.

    Args:
        model_config: the provider, whose model is built.
        data_config: what to draw.
        module_to_grid_map: nothing: the model knows its grids.

    Raises:
        BridgeError: some module's replicas cannot divide the samples.
    """
    from megatron.bridge.data.loaders import build_data_iterator
    from megatron.bridge.mimo.slices import loading_place

    if problems := model_config.batch_problems(data_config.base_batch_size):
        raise BridgeError("the batch cannot be divided:\n  " + "\n  ".join(problems))
    rank, size = loading_place(model_config.engine.runtime.modules)
    samples = data_config.base_batch_size * model_config.llm_layout.data_parallel
    return build_data_iterator(
        data_config.dataset,
        micro_batch_size=samples // size,
        global_batch_size=samples,
        dp_rank=rank,
        dp_size=size,
        consumed_samples=data_config.consumed_samples,
    )


def get_data_iterator_colocated(
    model_config: "MimoProvider",
    data_config: MimoDataConfig,
    module_to_grid_map: "Mapping[str, HyperCommGrid] | None" = None,
) -> Iterator["Batch"]:
    """`get_data_iterator` for a colocated placement: the forward step takes each module's part out of a batch.

    Raises:
        BridgeError: the placement is of another mode.
    """
    if model_config.placement.mode == "heterogeneous":
        raise BridgeError(
            "get_data_iterator_colocated is for modules on the same ranks, and this placement is heterogeneous; use "
            "get_data_iterator"
        )
    return get_data_iterator(model_config, data_config, module_to_grid_map)


def get_batch(data_iterator: Iterator["Batch"]) -> "Batch":
    """The next micro-batch."""
    return next(data_iterator)
