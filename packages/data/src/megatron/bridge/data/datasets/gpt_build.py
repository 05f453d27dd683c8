"""Builds Megatron-Core's GPT datasets from a plan, on one rank or many. Imports megatron.core."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig as CoreGPTDatasetConfig

from megatron.bridge.data.datasets.gpt_sources import DataPlan, SplitPlan, check_vocabulary, plan_splits
from megatron.bridge.data.sidecar import data_identity
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.data.datasets.gpt import GPTDatasetConfig
    from megatron.bridge.data.provider import DatasetBuildContext, Split

_NUM_SPLITS = 3


@dataclass(frozen=True)
class _Prepared:
    plan: DataPlan
    cache: Path | None


def build_splits(config: GPTDatasetConfig, context: DatasetBuildContext) -> tuple[Split, Split, Split]:
    """The wanted datasets, built on every rank."""
    prepared = _prepare_together(config, context)
    built: list[Split] = [None] * _NUM_SPLITS
    with _quiet_about_mock_cache(config.uses_mock):
        for split in prepared.plan.splits:
            built[split.index] = _build_split(config, prepared, split)
    train, valid, test = built
    return train, valid, test


def _prepare_together(config: GPTDatasetConfig, context: DatasetBuildContext) -> _Prepared:
    """Check everything before Megatron-Core's barriers: a rank that failed between them would keep the rest waiting."""
    prepared, problem = None, None
    try:
        prepared = _prepare(config, context)
    except BridgeError as error:
        problem = str(error)
    for rank, found in enumerate(_gather(problem)):
        if found is not None:
            raise BridgeError(found if found == problem else f"rank {rank}: {found}")
    assert prepared is not None
    return prepared


def _gather(problem: str | None) -> list[str | None]:
    if not torch.distributed.is_initialized():
        return [problem]
    problems: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    return problems


def _prepare(config: GPTDatasetConfig, context: DatasetBuildContext) -> _Prepared:
    plan = plan_splits(config, context)
    if config.uses_mock:
        return _Prepared(plan, None)
    cache = _cache_folder(config, plan)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        _make_writable(cache)
        for prefix, source in plan.sources.items():
            if source.sidecar is None:
                check_vocabulary(prefix, _scanned_max_token_id(prefix, plan, cache), plan.tokenizer)
    return _Prepared(plan, cache)


def _cache_folder(config: GPTDatasetConfig, plan: DataPlan) -> Path:
    # Megatron-Core names cached indices after paths and settings, not after the data: without the digest, data that
    # were made anew at the same path would be read with the old indices.
    identities = [data_identity(prefix, source.sidecar) for prefix, source in plan.sources.items()]
    digest = hashlib.sha256("\n".join(identities).encode()).hexdigest()[:16]
    base = config.path_to_cache or Path(next(iter(plan.sources))).parent / "cache"
    return Path(base) / digest


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BridgeError(
            f"sample indices cannot be written to {str(folder)!r}: {error.strerror}; "
            "set dataset.path_to_cache to a folder that can be written"
        ) from error


def _scanned_max_token_id(prefix: str, plan: DataPlan, cache: Path) -> int:
    """Data of other tools have no side-car: read them through once, and keep the answer in the cache."""
    record = cache / f"{hashlib.sha256(prefix.encode()).hexdigest()[:16]}-max_token_id.json"
    try:
        return int(json.loads(record.read_text("utf-8")))
    except (OSError, ValueError):
        largest = plan.sources[prefix].corpus.max_token_id()
        record.write_text(json.dumps(largest), "utf-8")
        return largest


def _build_split(config: GPTDatasetConfig, prepared: _Prepared, split: SplitPlan) -> Split:
    core = _core_config(config, prepared, split)
    # One split at a time, so that its cached indices do not depend on which others are wanted.
    assert core.split_matrix is not None
    core.split_matrix = [bounds if at == split.index else None for at, bounds in enumerate(core.split_matrix)]
    sizes: list[int | None] = [0] * _NUM_SPLITS
    sizes[split.index] = split.samples
    kind = MockGPTDataset if config.uses_mock else GPTDataset
    built: Split = BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, core).build()[split.index]
    return built


def _core_config(config: GPTDatasetConfig, prepared: _Prepared, split: SplitPlan) -> CoreGPTDatasetConfig:
    return CoreGPTDatasetConfig(
        random_seed=config.random_seed,
        sequence_length=prepared.plan.sequence_length,
        blend=_core_blend(prepared.plan, split),
        split=None if config.uses_mock else ",".join(repr(share) for share in split.shares),
        path_to_cache=None if prepared.cache is None else str(prepared.cache),
        tokenizer=prepared.plan.tokenizer,  # used by its attributes only
        reset_position_ids=config.reset_position_ids,
        reset_attention_mask=config.reset_attention_mask,
        eod_mask_loss=config.eod_mask_loss,
        create_attention_mask=config.reset_attention_mask,
    )


def _core_blend(plan: DataPlan, split: SplitPlan) -> tuple[list[str], list[float] | None] | None:
    if split.blend is None:
        return None
    prefixes, weights = split.blend.prefixes, split.blend.weights
    if weights is None and len(prefixes) > 1 and split.samples is not None:
        # Left to itself Megatron-Core stops an unweighted blend after one pass, whatever was asked.
        weights = tuple(float(plan.sources[prefix].corpus.tokens) for prefix in prefixes)
    return list(prefixes), None if weights is None else list(weights)


@contextmanager
def _quiet_about_mock_cache(mock: bool) -> Iterator[None]:
    """Mock data have no files to cache beside; Megatron-Core warns about it once per split."""
    logger = logging.getLogger("megatron.core.datasets.gpt_dataset")
    before = logger.level
    if mock:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
