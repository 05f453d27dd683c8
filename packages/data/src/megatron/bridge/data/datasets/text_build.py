"""From text to the prefixes that `gpt` reads: which are there already, and how the others are made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.data.datasets.gpt import GPTDatasetConfig
from megatron.bridge.data.indexed import idx_path
from megatron.bridge.data.preprocess.sources import DOCUMENT_KINDS, find_files
from megatron.bridge.data.splits import SPLIT_NAMES, parse_blend
from megatron.bridge.errors import BridgeError, did_you_mean

if TYPE_CHECKING:
    from megatron.bridge.data.datasets.text import TextDatasetConfig
    from megatron.bridge.data.provider import DatasetBuildContext
    from megatron.bridge.data.tokenizers import Tokenizer

_FIELDS = ("data_paths", *(f"{name}_data_paths" for name in SPLIT_NAMES))


@dataclass(frozen=True)
class TextPlan:
    """What `gpt` will read, and the texts (prefix -> source) that are to be tokenized for it."""

    config: GPTDatasetConfig
    missing: dict[str, str]


def plan_texts(config: TextDatasetConfig, context: DatasetBuildContext) -> TextPlan:
    """Where the tokens of each text lie or will lie.

    Raises:
        BridgeError: no text, an absent one, a tokenizer that has no folder, or an unknown kind of document.
    """
    if config.uses_mock:
        raise BridgeError("dataset.mock=true needs no text; use the dataset 'gpt' or 'mock'")
    if context.tokenizer is None or context.tokenizer.fingerprint is None:
        raise BridgeError("text is tokenized with tokenizer.tokenizer_model; set it to a Hugging Face folder")
    if config.document not in DOCUMENT_KINDS:
        near = did_you_mean(config.document, DOCUMENT_KINDS)
        raise BridgeError(f"dataset.document={config.document!r} is none of {', '.join(DOCUMENT_KINDS)}{near}")
    prefixes: dict[str, str] = {}
    given = {name: _prefixed(config, name, context.tokenizer, prefixes) for name in _FIELDS}
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(GPTDatasetConfig)}
    missing = {prefix: source for prefix, source in prefixes.items() if not idx_path(prefix).is_file()}
    return TextPlan(GPTDatasetConfig(**(shared | given)), missing)


def tokenize_together(config: TextDatasetConfig, context: DatasetBuildContext) -> GPTDatasetConfig:
    """The configuration of `gpt` for `config`, once rank 0 has tokenized what was missing. Collective.

    Raises:
        BridgeError: (on every rank) a text is refused.
    """
    import torch.distributed as dist

    from megatron.bridge.conversion.rank_agreement import on_rank_zero

    if dist.is_initialized():
        on_rank_zero(lambda: _tokenize(config, context), "dataset")
    else:
        _tokenize(config, context)
    return plan_texts(config, context).config


def _tokenize(config: TextDatasetConfig, context: DatasetBuildContext) -> None:
    from megatron.bridge.data.preprocess import preprocess_corpus
    from megatron.bridge.data.preprocess.progress import progress_bar

    assert context.tokenizer is not None
    for prefix, source in plan_texts(config, context).missing.items():
        with progress_bar(f"tokenize {source}") as report:
            preprocess_corpus(
                [source],
                prefix,
                context.tokenizer.name,
                globs=config.globs if Path(source).is_dir() else (),
                json_key=config.json_key,
                document=config.document,
                workers=config.workers,
                report=report,
            )


def _prefixed(config: TextDatasetConfig, name: str, tokenizer: Tokenizer, prefixes: dict[str, str]) -> list[str] | None:
    """One field of the configuration with a prefix in the place of each text; weights stay."""
    entries = getattr(config, name)
    if not entries:
        return None
    blend = parse_blend(entries, f"dataset.{name}")
    made = [_prefix(config, source, tokenizer) for source in blend.prefixes]
    prefixes.update(zip(made, blend.prefixes, strict=True))
    if blend.weights is None:
        return made
    return [entry for pair in zip(map(repr, blend.weights), made, strict=True) for entry in pair]


def _prefix(config: TextDatasetConfig, source: str, tokenizer: Tokenizer) -> str:
    """A path that is another one when the text, the tokenizer or the way to read the text is."""
    files = find_files([source], config.globs if Path(source).is_dir() else ())
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    identity = json.dumps([stats, tokenizer.fingerprint, tokenizer.eod, config.json_key, config.document])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    base = config.path_to_cache or Path(source).absolute().parent / "cache"
    return str(Path(base) / "tokens" / digest / Path(source).name)
