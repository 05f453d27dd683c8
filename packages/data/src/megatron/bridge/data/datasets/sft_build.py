"""Builds the instruction datasets of a plan, on one rank or many. Imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron.bridge.conversion.rank_agreement import on_every_rank, on_rank_zero
from megatron.bridge.data.datasets.sft_plan import SFTPlan, SFTSource, plan_sft
from megatron.bridge.data.datasets.sft_samples import PackedSFTDataset, PairDataset, SampleSettings, SFTDataset
from megatron.bridge.data.instruction.store import EncodedStore
from megatron.bridge.data.packing import Packs, pack
from megatron.bridge.data.splits import SPLIT_NAMES, document_range
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from megatron.bridge.data.datasets.sft import SFTDatasetConfig
    from megatron.bridge.data.provider import DatasetBuildContext, Split

_LISTED = 20


def build_splits(config: SFTDatasetConfig, context: DatasetBuildContext) -> tuple[Split, Split, Split]:
    """The wanted datasets, built on every rank."""
    if torch.distributed.is_initialized():
        plan = on_every_rank(lambda: plan_sft(config, context), "the dataset")
        on_rank_zero(plan.prepare, "the dataset")
    else:
        plan = plan_sft(config, context)
        plan.prepare()
    if config.sequence_length is None:
        raise BridgeError("dataset.sequence_length is not set; it is the number of tokens per sample")
    built: list[Split] = [None] * len(SPLIT_NAMES)
    for source in plan.sources:
        store = EncodedStore(source.folder)
        for split, samples in enumerate(context.samples):
            if samples != 0 and source.shares[split] > 0:
                built[split] = _build_split(plan, source, store, split, context)
    train, valid, test = built
    return train, valid, test


def _build_split(
    plan: SFTPlan, source: SFTSource, store: EncodedStore, split: int, context: DatasetBuildContext
) -> Split:
    config, name = plan.config, SPLIT_NAMES[split]
    members = members_of_split(store.pieces, source.shares, split)
    if len(members) == 0:
        raise BridgeError(
            f"dataset.split={config.split!r} leaves no row for {name}: there are {len(np.unique(store.pieces))}; "
            "give it a larger share, or more rows"
        )
    assert config.sequence_length is not None
    settings = SampleSettings(
        length=config.sequence_length,
        samples=context.samples[split],
        seed=config.random_seed if name == "train" else None,
        pad=plan.pad,
    )
    notices = _notices(store) if name == "train" else []
    if config.paired:
        return _build_pairs(store, members, settings, notices, context.document_multiple)
    if not config.packing:
        return SFTDataset(store, members, settings, notices)
    multiple = context.document_multiple
    rounded = -(-(store.lengths[members] - 1) // multiple) * multiple
    packs = pack(rounded, config.sequence_length)
    notices.append(f"{name}: {len(members):,} conversations in {len(packs):,} packs, {packs.efficiency:.1%} full")
    return PackedSFTDataset(store, members, settings, notices, packs=packs, multiple=multiple)


def _build_pairs(
    store: EncodedStore, members: NDArray[np.int64], settings: SampleSettings, notices: list[str], multiple: int
) -> Split:
    """Both conversations of a row in one sample; a row that has lost one is left out, and counted."""
    pieces, counts = np.unique(store.pieces[members], return_counts=True)
    whole = members[np.isin(store.pieces[members], pieces[counts == 2])]
    if len(whole) == 0:
        raise BridgeError(f"no row gives two conversations that can be used; {len(pieces)} give others")
    if lost := int((counts != 2).sum()):
        notices.append(f"{lost:,} rows have lost one of their two answers and are left out")
    tokens = int((store.lengths[whole] - 1).sum())
    packs = Packs(np.arange(len(whole)), np.arange(0, len(whole) + 1, 2), settings.length, tokens)
    return PairDataset(store, whole, settings, notices, packs=packs, multiple=multiple)


def members_of_split(pieces: NDArray[np.int64], shares: tuple[float, float, float], split: int) -> NDArray[np.int64]:
    """Which samples belong to a split: whole pieces, dealt out in an order that depends on their number alone."""
    found, piece_of = np.unique(pieces, return_inverse=True)
    if shares[split] == 1.0:
        return np.arange(len(pieces))
    first, last = document_range(shares, split, len(found))
    place = np.random.default_rng(len(found)).permutation(len(found))
    return np.flatnonzero((place[piece_of] >= first) & (place[piece_of] < last))


def _notices(store: EncodedStore) -> list[str]:
    """What is to be told of the rows, once."""
    counts = store.counts
    told = [f"{counts.rows:,} rows, {counts.samples:,} conversations"]
    if counts.truncated:
        told.append(f"{counts.truncated:,} conversations were cut to dataset.sequence_length")
    if counts.dropped:
        told.append(f"{counts.dropped:,} conversations are longer than dataset.sequence_length and were dropped")
    if counts.bad:
        more = len(counts.bad) - _LISTED
        listed = [*counts.bad[:_LISTED], *([f"... and {more} more"] if more > 0 else [])]
        told.append(f"{len(counts.bad):,} rows were skipped:\n  " + "\n  ".join(listed))
    return told
