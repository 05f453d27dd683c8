"""The tensors of a Hugging Face folder: every name proven on opening, every byte read on demand."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from megatron.bridge.conversion.hf.errors import HFFolderError, listing
from megatron.bridge.conversion.hf.names import INDEX, PICKLED, SHARD_PATTERN, SINGLE_FILE
from megatron.bridge.conversion.hf.safetensors_header import read_header
from megatron.bridge.errors import did_you_mean


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it; `file` is relative to the folder."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    file: str


class HFWeights(Mapping[str, TensorInfo]):
    """The safetensors weights of a folder, by tensor name, in the order of the files.

    Opening reads the headers only and proves that the folder is whole: every file that the index names is there and
    as long as its header says, and index and files name the same tensors, each once.

    Args:
        folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`.
        window_bytes: how many bytes may be read before the mappings behind them are given up. A mapping then goes
            away with the last tensor that was read from it, so memory follows what the caller keeps.

    Raises:
        HFFolderError: naming the files or tensors at fault, all those of the first kind of fault found.
    """

    def __init__(self, folder: str | Path, window_bytes: int = 64 * 2**20) -> None:
        self.folder = Path(folder)
        self._window_bytes = window_bytes
        self._mapped_bytes = 0
        self._handles: dict[str, Any] = {}
        self._lock = Lock()
        weight_map = _weight_map(self.folder)
        files = [SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values()))
        self._tensors = _read_headers(self.folder, files)
        if weight_map is not None:
            _compare(self.folder / INDEX, weight_map, self._tensors)

    @property
    def files(self) -> tuple[str, ...]:
        """The weight files, relative to the folder."""
        return tuple(dict.fromkeys(info.file for info in self._tensors.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self._tensors.values())

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The tensor, or the part of it that `slices` select (one per leading dimension, step 1), on the CPU.

        The result is a view of a private mapping of the file: nothing is copied, only the pages that are used are
        read, and writing to it leaves the file alone. It may be strided. Safe in several threads and after a fork.

        Raises:
            HFFolderError: no tensor of that name, slices that do not fit its shape, or the file cannot be read now.
        """
        info = self._tensors.get(name)
        if info is None:
            raise HFFolderError(f"{self.folder} has no tensor {name!r}{did_you_mean(name, self._tensors)}")
        if slices is not None:
            _check_slices(self.folder, name, info, slices)
        handle = self._handle(info)
        try:
            # Scalars and tensors without elements have nothing to slice.
            if not slices or info.nbytes == 0:
                whole: torch.Tensor = handle.get_tensor(name)
                return whole[slices] if slices else whole
            part: torch.Tensor = handle.get_slice(name)[slices]
            return part
        except SafetensorError as error:
            raise HFFolderError(f"{self.folder / info.file} cannot give {name!r}: {error}") from error

    def _handle(self, info: TensorInfo) -> Any:
        with self._lock:
            # Pages of a mapping count as this process's memory until it is unmapped, so none is kept for long.
            if self._mapped_bytes > self._window_bytes:
                self._handles.clear()
                self._mapped_bytes = 0
            self._mapped_bytes += info.nbytes
            handle = self._handles.get(info.file)
            if handle is None:
                path = self.folder / info.file
                try:
                    handle = self._handles[info.file] = safe_open(path, framework="pt", device="cpu")
                except (OSError, SafetensorError) as error:
                    raise HFFolderError(f"{path} was changed or removed after it was opened: {error}") from error
            return handle


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file of the index, or None when there is but one file."""
    if not folder.is_dir():
        raise HFFolderError(f"{folder} is not a folder; give one that holds {SINGLE_FILE} or {INDEX}")
    single, index = (folder / SINGLE_FILE).exists(), (folder / INDEX).exists()
    if not single and not index:
        raise _no_weights(folder)
    weight_map = _read_index(folder / INDEX) if index else None
    named = {SINGLE_FILE} if weight_map is None else set(weight_map.values())
    present = {path.name for path in folder.iterdir() if SHARD_PATTERN.fullmatch(path.name)}
    unnamed = sorted((present | ({SINGLE_FILE} if single else set())) - named)
    if unnamed:
        owner = INDEX if index else SINGLE_FILE
        raise HFFolderError(
            f"{folder} holds weight files that {owner} knows nothing of:{listing(unnamed)}\n"
            "remove them if they are left-overs, or restore the index they belong to"
        )
    return weight_map


def _no_weights(folder: Path) -> HFFolderError:
    pickled = [name for name in PICKLED if (folder / name).exists()]
    if pickled:
        return HFFolderError(
            f"{folder} holds pickled weights ({pickled[0]}), which can run code when opened; load them once in "
            "transformers and save_pretrained() them to a new folder, which writes safetensors"
        )
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        return HFFolderError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX} to say which of its files are the model:{listing(shards)}"
            f"\nrestore {INDEX}"
        )
    return HFFolderError(f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX} is there")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HFFolderError(f"{path} is damaged ({type(error).__name__}: {error}); fetch or write it again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise HFFolderError(f"{path} is damaged: its weight_map is not a table of tensor names; fetch it again")
    for name, file in weight_map.items():
        parts = PurePosixPath(file) if isinstance(file, str) and file else None
        if parts is None or parts.is_absolute() or ".." in parts.parts:
            raise HFFolderError(f"{path} places {name!r} in {file!r}, which is no file of this folder; fetch it again")
    return weight_map


def _read_headers(folder: Path, files: list[str]) -> dict[str, TensorInfo]:
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise HFFolderError(
            f"{folder} lacks {len(absent)} of the {len(files)} files that {INDEX} names:{listing(absent)}\n"
            "fetch the missing files"
        )
    tensors: dict[str, TensorInfo] = {}
    twice: list[str] = []
    faults: list[str] = []
    for file in files:
        try:
            stored = read_header(folder / file)
        except HFFolderError as fault:
            faults.append(str(fault))
            continue
        twice += (f"{name!r} in {tensors[name].file} and {file}" for name in stored.keys() & tensors.keys())
        for name, (shape, dtype, begin, end) in stored.items():
            tensors[name] = TensorInfo(shape, dtype, end - begin, file)
    if faults:
        raise HFFolderError("\n".join(faults))
    if twice:
        raise HFFolderError(f"{folder} holds tensors twice:{listing(sorted(twice))}\nremove the file that is stale")
    return tensors


def _compare(index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    misplaced = [
        f"{name!r} in {file}" + (f" (it is in {tensors[name].file})" if name in tensors else "")
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file != file
    ]
    if misplaced:
        raise HFFolderError(f"{index} names tensors that are not where it says:{listing(misplaced)}\nfetch both again")
    unindexed = [f"{name!r} of {info.file}" for name, info in tensors.items() if name not in weight_map]
    if unindexed:
        raise HFFolderError(f"{index} lacks tensors that its files hold:{listing(unindexed)}\nfetch both again")


def _check_slices(folder: Path, name: str, info: TensorInfo, slices: tuple[slice, ...]) -> None:
    fits = len(slices) <= len(info.shape) and all(
        part.step in (None, 1) and 0 <= (part.start or 0) <= (size if part.stop is None else part.stop) <= size
        for part, size in zip(slices, info.shape, strict=False)
    )
    if not fits:
        raise HFFolderError(f"{slices} do not fit {name!r} of {folder}, whose shape is {list(info.shape)}")
