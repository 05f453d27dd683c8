"""What a complete Hugging Face folder has besides weights: configuration, tokenizer, templates, code, licence."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.bridge.conversion.hf.errors import HFFolderError, listing
from megatron.bridge.conversion.hf.names import CONFIG, holds_weights

_TEMPLATES = "additional_chat_templates"
# Files of a training run that describe other weights than the ones beside them.
_RUN_STATE = frozenset({"trainer_state.json", "training_args.bin"})
# Kinds of text that companions are made of; a large file of another kind is taken for weights in a format unknown here.
_TEXT_SUFFIXES = frozenset(
    (
        ".json",
        ".jsonl",
        ".jinja",
        ".txt",
        ".py",
        ".md",
        ".model",
        ".tiktoken",
        ".spm",
        ".vocab",
        ".bpe",
        ".yaml",
        ".yml",
    )
)
_LARGE_BYTES = 64 * 2**20


def companion_files(folder: str | Path) -> list[Path]:
    """The files that belong to the model in `folder` and are not weights, relative to it, sorted.

    All files at the top: configurations, tokenizer, chat template, processor, remote code, licence, model card; in
    sub-folders: remote code and additional chat templates. Left out: weights in any format and their indexes, the
    state of a training run, hidden files, and files above 64 MiB of no known kind.

    Raises:
        HFFolderError: the folder has no `config.json`, so it is no Hugging Face model folder.
    """
    root = Path(folder)
    if not (root / CONFIG).is_file():
        raise HFFolderError(f"{root} has no {CONFIG}: it is not the folder of a Hugging Face model")
    return sorted(path.relative_to(root) for path in _visible_files(root) if _is_companion(path, root))


def copy_companions(source: str | Path, target: str | Path) -> list[Path]:
    """Copy the companion files of `source` into the folder `target`; returns them, relative.

    Raises:
        HFFolderError: a file of that name with other contents is there (nothing is copied then), or cannot be written.
    """
    source, target = Path(source), Path(target)
    files = companion_files(source)
    differing = [
        str(file)
        for file in files
        if (target / file).exists() and (target / file).read_bytes() != (source / file).read_bytes()
    ]
    if differing:
        raise HFFolderError(
            f"{target} has other files of the same name than {source}:{listing(differing)}\n"
            "copy the companions first and replace them afterwards"
        )
    try:
        for file in files:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            # The contents of links, since a hub cache is made of them.
            shutil.copyfile(source / file, target / file)
    except OSError as error:
        raise HFFolderError(f"{error.filename} cannot be copied to {target}: {error.strerror}") from error
    return files


def write_config(folder: str | Path, config: Mapping[str, Any]) -> Path:
    """Write `config` as the folder's `config.json`, in place of one that is there; returns its path.

    Raises:
        HFFolderError: a value that JSON has no form for, named by its key, or a folder that cannot be written.
    """
    path = Path(folder) / CONFIG
    try:
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        culprits = [f"{key} = {value!r}" for key, value in config.items() if not _has_json_form(value)]
        raise HFFolderError(f"{path} cannot hold these values: {error}{listing(culprits)}") from error
    unfinished = path.with_name(f".{CONFIG}.partial-{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise HFFolderError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _visible_files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from _visible_files(path)
        else:
            yield path


def _is_companion(path: Path, root: Path) -> bool:
    if holds_weights(path) or path.name in _RUN_STATE:
        return False
    within = path.relative_to(root).parts[:-1]
    if within and within[0] != _TEMPLATES and path.suffix != ".py":
        return False
    return path.suffix.lower() in _TEXT_SUFFIXES or path.stat().st_size <= _LARGE_BYTES


def _has_json_form(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
