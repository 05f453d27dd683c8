"""What an `SFTDatasetConfig` asks for, checked: files, format, template, where tokenized rows go. Torch-free."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.data.instruction.prepare import Preparation
from megatron.bridge.data.instruction.rendering import Renderer
from megatron.bridge.data.instruction.rows import find_row_files
from megatron.bridge.data.instruction.store import holds_store, write_store
from megatron.bridge.data.instruction.templates import prompt_template
from megatron.bridge.data.instruction.truncation import check_truncation
from megatron.bridge.data.splits import SPLIT_NAMES, parse_split
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.data.datasets.sft import SFTDatasetConfig
    from megatron.bridge.data.provider import DatasetBuildContext

_FIRST_ROWS = 8
# Part of the name of stored samples: raised when the same rows and settings come to mean other tokens.
_ENCODING = 1


@dataclass(frozen=True)
class SFTSource:
    """Files that are tokenized into one folder, and the shares of train, valid and test in them."""

    files: Sequence[Path]
    folder: Path
    shares: tuple[float, float, float]


@dataclass(frozen=True)
class SFTPlan:
    """A checked configuration."""

    config: SFTDatasetConfig
    sources: Sequence[SFTSource]
    tokenizer: Any
    renderer: Renderer
    pad: int

    def prepare(self) -> None:
        """Tokenize the rows of every source that has not been."""
        for source in self.sources:
            if not holds_store(source.folder):
                preparation = self.preparation()
                write_store(source.folder, preparation.samples(source.files), preparation.counts)

    def preparation(self, **more: Any) -> Preparation:
        """What reads and encodes the rows; `more` goes to it too."""
        length = self.config.conversation_length()
        return Preparation(
            self.config.form(),
            self.renderer,
            self.tokenizer,
            longest=None if length is None else length + 1,
            truncation=self.config.truncation,
            **{"skip_bad_rows": self.config.skip_bad_rows, **more},
        )


def plan_sft(config: SFTDatasetConfig, context: DatasetBuildContext, *, try_rows: bool = True) -> SFTPlan:
    """Check everything that can be without reading all rows; the first ones are encoded as a proof (`try_rows`).

    Raises:
        BridgeError: names the field at fault and the remedy.
    """
    tokenizer = _chat_tokenizer(context)
    _check_numbers(config)
    check_truncation(config.truncation)
    config.form()
    renderer = Renderer(
        prompt_template(config.prompt_template, tokenizer, config.custom_template), tokenizer, config.loss
    )
    wrapped = context.tokenizer
    assert wrapped is not None
    pad = wrapped.pad if wrapped.pad >= 0 else wrapped.eod
    sources = [
        SFTSource(files, _folder(config, files, renderer, wrapped.fingerprint), shares)
        for files, shares in _files(config, context)
    ]
    plan = SFTPlan(config, sources, tokenizer, renderer, pad)
    for source in sources if try_rows else ():
        _try_first_rows(plan, source)
    return plan


def _chat_tokenizer(context: DatasetBuildContext) -> Any:
    tokenizer = getattr(context.tokenizer, "hf_tokenizer", None)
    if tokenizer is None:
        raise BridgeError("instruction data need a Hugging Face tokenizer; set tokenizer.tokenizer_model to its folder")
    return tokenizer


def _check_numbers(config: SFTDatasetConfig) -> None:
    if config.sequence_length is not None and config.sequence_length < 1:
        raise BridgeError(f"dataset.sequence_length={config.sequence_length} must be at least 1")
    if config.skip_bad_rows < 0:
        raise BridgeError(f"dataset.skip_bad_rows={config.skip_bad_rows} must not be negative")


def _files(
    config: SFTDatasetConfig, context: DatasetBuildContext
) -> list[tuple[Sequence[Path], tuple[float, float, float]]]:
    """Groups of files, and which shares of each go to which split."""
    apart = {name: getattr(config, f"{name}_data_paths") for name in SPLIT_NAMES}
    given = [name for name, paths in apart.items() if paths is not None]
    if (config.data_paths is None) == (not given):
        raise BridgeError(
            "dataset.data_paths (divided by dataset.split) or dataset.train_data_paths, valid_data_paths and "
            "test_data_paths: set one or the other"
        )
    wanted = [name for name, count in zip(SPLIT_NAMES, context.samples, strict=True) if count != 0]
    if config.data_paths is not None:
        shares = parse_split(config.split)
        _check_shares(config, dict(zip(SPLIT_NAMES, shares, strict=True)), wanted)
        return [(find_row_files(config.data_paths), shares)]
    missing = [name for name in wanted if name not in given]
    if missing:
        raise BridgeError(f"the run asks for {missing[0]} samples, and dataset.{missing[0]}_data_paths is not set")
    whole = {"train": (1.0, 0.0, 0.0), "valid": (0.0, 1.0, 0.0), "test": (0.0, 0.0, 1.0)}
    return [(find_row_files(apart[name], f"dataset.{name}_data_paths"), whole[name]) for name in wanted]


def _check_shares(config: SFTDatasetConfig, shares: dict[str, float], wanted: Sequence[str]) -> None:
    for name in wanted:
        if shares[name] == 0:
            raise BridgeError(
                f"the run asks for {name} samples, and dataset.split={config.split!r} has none; change one"
            )


def _folder(config: SFTDatasetConfig, files: Sequence[Path], renderer: Renderer, fingerprint: str | None) -> Path:
    """Where the tokenized rows lie: the name changes with all that the tokens depend on."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    settings = [config.dataset_format, config.loss, config.conversation_length(), config.truncation]
    settings += [config.skip_bad_rows, config.paired]
    identity = json.dumps([_ENCODING, stats, settings, renderer.template.jinja, fingerprint])
    base = Path(config.path_to_cache) if config.path_to_cache else files[0].parent / "cache"
    return base / f"sft-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _try_first_rows(plan: SFTPlan, source: SFTSource) -> None:
    preparation = plan.preparation()
    found = list(itertools.islice(preparation.samples(source.files), _FIRST_ROWS))
    if not found and preparation.counts.rows == 0:
        raise BridgeError(f"there is no row in {', '.join(map(str, source.files))}")
