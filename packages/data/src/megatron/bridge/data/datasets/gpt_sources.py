"""What a `GPTDatasetConfig` means for a run: which files feed which split, proven to suffice. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.bridge.data.indexed import IndexedCorpus, open_corpus
from megatron.bridge.data.sidecar import Sidecar, read_sidecar
from megatron.bridge.data.splits import SPLIT_NAMES, Blend, document_range, parse_blend, parse_split
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.data.datasets.gpt import GPTDatasetConfig
    from megatron.bridge.data.provider import DatasetBuildContext
    from megatron.bridge.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Source:
    """One prefix: its index, and its side-car when it has one."""

    corpus: IndexedCorpus
    sidecar: Sidecar | None


@dataclass(frozen=True)
class SplitPlan:
    """One wanted split: `samples` of them (None: one pass) drawn from `blend` within `shares` of the documents."""

    index: int
    samples: int | None
    blend: Blend | None
    shares: tuple[float, float, float]

    @property
    def name(self) -> str:
        """`train`, `valid` or `test`."""
        return SPLIT_NAMES[self.index]


@dataclass(frozen=True)
class DataPlan:
    """Every wanted split, and the prefixes that feed them."""

    sequence_length: int
    tokenizer: Tokenizer
    splits: tuple[SplitPlan, ...]
    sources: Mapping[str, Source]


def plan_splits(config: GPTDatasetConfig, context: DatasetBuildContext) -> DataPlan:
    """Resolve the configuration against what lies on disk.

    Raises:
        BridgeError: names the field or file at fault and the remedy.
    """
    length = _sequence_length(config)
    if context.tokenizer is None:
        raise BridgeError("a GPT dataset needs a tokenizer, for its end-of-document id; set the tokenizer section")
    splits = tuple(_wanted_splits(config, context))
    prefixes = dict.fromkeys(prefix for split in splits if split.blend for prefix in split.blend.prefixes)
    sources = {prefix: Source(open_corpus(prefix), read_sidecar(prefix)) for prefix in prefixes}
    for source in sources.values():
        if source.sidecar is not None:
            _check_sidecar(source.corpus.prefix, source.sidecar, context.tokenizer)
    for split in splits:
        _check_enough_text(split, sources, length, config.split if config.data_paths else None)
    return DataPlan(length, context.tokenizer, splits, sources)


def check_vocabulary(prefix: str, max_token_id: int, tokenizer: Tokenizer) -> None:
    """Refuse data whose largest id has no row in the embedding."""
    if max_token_id >= tokenizer.vocab_size:
        raise BridgeError(
            f"the data at {prefix!r} hold the token id {max_token_id}, but the vocabulary of the tokenizer "
            f"{tokenizer.name!r} ends at {tokenizer.vocab_size - 1}: they were made with another tokenizer; "
            "set tokenizer.tokenizer_model to that one, raise tokenizer.vocab_size, or preprocess again"
        )


def _sequence_length(config: GPTDatasetConfig) -> int:
    if config.sequence_length is None:
        raise BridgeError("dataset.sequence_length is not set; set it, usually to the model's seq_length")
    if config.sequence_length < 1:
        raise BridgeError(f"dataset.sequence_length={config.sequence_length} must be at least 1")
    return config.sequence_length


def _wanted_splits(config: GPTDatasetConfig, context: DatasetBuildContext) -> Iterator[SplitPlan]:
    blends, shares = _blends(config)
    for index, samples in enumerate(context.samples):
        if samples == 0:
            continue
        if samples is not None and samples < 0:
            raise BridgeError(f"{SPLIT_NAMES[index]}_samples={samples} must not be negative")
        blend = blends[index]
        given = config.uses_mock or (blend is not None and shares[index][index] > 0)
        if not given and index == 0:
            raise BridgeError(_no_training_data(config))
        if not given:
            continue
        if blend is not None and blend.weights is not None and samples is None:
            raise BridgeError(
                f"the {SPLIT_NAMES[index]} split blends by weight, so one pass over it is not defined; "
                "give a number of samples, or prefixes without weights"
            )
        yield SplitPlan(index, samples, blend, shares[index])


type _Shares = tuple[float, float, float]


def _blends(config: GPTDatasetConfig) -> tuple[list[Blend | None], list[_Shares]]:
    """Blend and document shares of train, valid and test."""
    per_split = (config.train_data_paths, config.valid_data_paths, config.test_data_paths)
    named = [f"dataset.{name}_data_paths" for name, paths in zip(SPLIT_NAMES, per_split, strict=True) if paths]
    given = (["dataset.data_paths"] if config.data_paths else []) + named
    if config.uses_mock:
        if given:
            raise BridgeError(f"dataset.mock=true would ignore {' and '.join(given)}; drop one or the other")
        return [None, None, None], [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    if config.data_paths and named:
        raise BridgeError(f"dataset.data_paths and {' and '.join(named)} exclude each other; drop one or the other")
    if config.data_paths:
        return [parse_blend(config.data_paths, "dataset.data_paths")] * 3, [parse_split(config.split)] * 3
    if not named:
        raise BridgeError(
            "no data: set dataset.data_paths to prefixes made by `megatron-bridge data preprocess`, "
            "or dataset.mock=true for mock data"
        )
    blends = [
        parse_blend(paths, f"dataset.{name}_data_paths") if paths else None
        for name, paths in zip(SPLIT_NAMES, per_split, strict=True)
    ]
    return blends, [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]


def _no_training_data(config: GPTDatasetConfig) -> str:
    if config.data_paths:
        return f"dataset.split={config.split!r} leaves nothing to train on; give train a share above 0"
    return "training samples are asked for, but dataset.train_data_paths is not set"


def _check_sidecar(prefix: str, sidecar: Sidecar, tokenizer: Tokenizer) -> None:
    check_vocabulary(prefix, sidecar.max_token_id, tokenizer)
    if tokenizer.fingerprint is not None and tokenizer.fingerprint != sidecar.tokenizer_fingerprint:
        raise BridgeError(
            f"the data at {prefix!r} were made with the tokenizer {sidecar.tokenizer!r} (vocabulary "
            f"{sidecar.tokenizer_fingerprint}), the run uses {tokenizer.name!r} (vocabulary {tokenizer.fingerprint}): "
            "the same ids mean different text; set tokenizer.tokenizer_model to the first, or preprocess again"
        )


def _check_enough_text(split: SplitPlan, sources: Mapping[str, Source], length: int, shares: str | None) -> None:
    for prefix in split.blend.prefixes if split.blend else ():
        corpus = sources[prefix].corpus
        documents = len(corpus.lengths)
        first, end = document_range(split.shares, split.index, documents)
        tokens = corpus.tokens_between(first, end)
        if tokens < length + 1:
            divided = f" by dataset.split={shares!r}, which divides by document" if shares else ""
            raise BridgeError(
                f"not enough text: the {split.name} split of {prefix!r} has {tokens} tokens in {end - first} of "
                f"{documents} documents{divided}; one sample needs dataset.sequence_length + 1 = {length + 1} tokens. "
                "Add text, lower dataset.sequence_length, give the split a larger share, or preprocess with smaller "
                "documents (--document paragraph)"
            )
