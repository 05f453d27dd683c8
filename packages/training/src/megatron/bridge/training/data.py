"""From the configuration's dataset to the iterators of this rank."""

import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron.bridge.data.epochs import Reshuffled
from megatron.bridge.data.loaders import build_data_iterator
from megatron.bridge.data.streamed import LoaderPlace, StreamedBatches, StreamedDataset
from megatron.bridge.errors import BridgeError
from megatron.bridge.training.engine import engine_of
from megatron.bridge.training.run_data import dataset_context, run_tokenizer

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.state import Batches, RunState


def build_datasets(cfg: "ConfigContainer") -> tuple[Any, Any]:
    """The training and validation sets; the model takes the tokenizer's vocabulary when it has none of its own."""
    tokenizer = run_tokenizer(cfg)
    if cfg.model.vocab_size is None:
        cfg.model.vocab_size = tokenizer.vocab_size
    if getattr(cfg.dataset, "sequence_length", 0) is None:
        cfg.dataset.sequence_length = cfg.model.seq_length  # type: ignore[attr-defined]
    train, valid, _ = cfg.dataset.build_train_valid_test_datasets(dataset_context(cfg, tokenizer))
    return _in_order(cfg, train), valid


def _in_order(cfg: "ConfigContainer", train: Any) -> Any:
    return Reshuffled(train, cfg.rng.seed) if cfg.dataset.dataloader_type == "cyclic" else train


def batches_per_chunk(
    cfg: "ConfigContainer",
    dataset: Any,
    num_chunks: int,
    batch_size: int | Callable[[int], int],
    consumed_samples: int = 0,
) -> list["Batches"]:
    """One iterator per model chunk, each over the same micro-batches; None where the pipeline stage needs no data.

    Args:
        cfg: the run's configuration.
        dataset: to draw from.
        num_chunks: of this rank's model.
        batch_size: sequences per step, or a function that gives them from the samples drawn before.
        consumed_samples: where to begin.
    """
    engine = engine_of(cfg)
    own = engine.loading_place(cfg)
    if isinstance(dataset, StreamedDataset):
        read = engine.stream_place(cfg)
        place = LoaderPlace(micro_batch_size=read.micro_batch_size, dp_rank=read.rank, dp_size=read.size)
        return [engine.of_stream(cfg, dataset.batches(place)) if read.needed else None for _ in range(num_chunks)]
    return [
        build_data_iterator(
            dataset,
            micro_batch_size=own.micro_batch_size,
            global_batch_size=batch_size,
            dp_rank=own.rank,
            dp_size=own.size,
            consumed_samples=consumed_samples,
            num_workers=cfg.dataset.num_workers,
            seed=cfg.rng.seed,
        )
        if own.needed
        else None
        for _ in range(num_chunks)
    ]


def training_batches(run: "RunState", dataset: Any) -> list["Batches"]:
    """The training data from where the run stands, one iterator per model chunk; `run.streams` keeps them, too."""
    sizes = run.cfg.train.batch_sizes.at
    run.streams = batches_per_chunk(run.cfg, dataset, len(run.model), sizes, run.progress.consumed_samples)
    if run.progress.iteration > 0:
        load_stream_states(run.cfg, run.streams, run.progress.stream_states)
    return run.streams


def stream_states(cfg: "ConfigContainer", data: list["Batches"]) -> list[bytes]:
    """By data-parallel rank, where its stream stands. Empty where the samples drawn say it already. Collective."""
    from megatron.bridge.conversion.rank_agreement import gather

    mine = next((pickle.dumps(each.state_dict()) for each in data if isinstance(each, StreamedBatches)), None)
    own = engine_of(cfg).stream_place(cfg)
    states = {rank: state for rank, state in gather((own.rank, mine)) if state is not None}
    return [states[rank] for rank in sorted(states)]


def load_stream_states(cfg: "ConfigContainer", data: list["Batches"], states: Sequence[bytes]) -> None:
    """Put this rank's streams where `stream_states` found them.

    Raises:
        BridgeError: the states are of another number of data-parallel ranks.
    """
    own = engine_of(cfg).stream_place(cfg)
    streams = [each for each in data if isinstance(each, StreamedBatches)]
    if streams and len(states) != own.size:
        raise BridgeError(
            f"the checkpoint holds the position of {len(states)} data-parallel ranks in the data, and there are "
            f"{own.size}; such data are divided among the ranks, so resume with as many, or begin anew with "
            "checkpoint.pretrained_checkpoint"
        )
    for stream in streams:
        stream.load_state_dict(pickle.loads(states[own.rank]))
