"""Where a Hugging Face model comes from: a folder on this machine, or the hub. Weights are fetched only when used."""

import json
import os
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.conversion.hf.errors import HFFolderError, listing
from megatron.bridge.conversion.hf.names import CONFIG, INDEX, SINGLE_FILE, WEIGHT_SUFFIXES
from megatron.bridge.errors import did_you_mean

if TYPE_CHECKING:
    from megatron.bridge.conversion.hf.weights import HFWeights


class HFSource:
    """A Hugging Face model, by local folder or hub id.

    A folder that exists comes before a hub id of the same name. Nothing is looked up before `folder` or `weights` is
    asked for, and both are of one commit, whatever is pushed to the hub in between.

    Args:
        path_or_id: a folder, or a hub id such as `meta-llama/Llama-3.2-1B`.
        revision: branch, tag or commit on the hub.
    """

    def __init__(self, path_or_id: str | Path, revision: str | None = None) -> None:
        self.path_or_id = os.fspath(path_or_id)
        self.revision = revision

    def __repr__(self) -> str:
        return f"HFSource({self.path_or_id!r}" + (f", revision={self.revision!r})" if self.revision else ")")

    @cached_property
    def is_local(self) -> bool:
        """Whether the model is a folder of this machine.

        Raises:
            HFFolderError: it is spelled like a path and nothing is there, is no folder, or comes with a revision.
        """
        path = Path(self.path_or_id).expanduser()
        if path.exists():
            if not path.is_dir():
                raise HFFolderError(f"{path} is a file; give the folder that holds it")
            if self.revision is not None:
                raise HFFolderError(f"{path} is a local folder and has no revision {self.revision!r}; leave it out")
            return True
        if _spelled_like_path(self.path_or_id):
            siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            raise HFFolderError(f"there is no folder {path}{did_you_mean(path.name, siblings)}")
        return False

    @cached_property
    def folder(self) -> Path:
        """The folder with configuration, tokenizer and code; from the hub it comes without the weights.

        Raises:
            HFFolderError: it cannot be found or fetched, or has no `config.json`.
        """
        if self.is_local:
            folder = Path(self.path_or_id).expanduser()
        else:
            folder = self._fetch(self.revision, ignore=[f"*{suffix}" for suffix in sorted(WEIGHT_SUFFIXES)])
        if not (folder / CONFIG).is_file():
            raise HFFolderError(f"{self._named} has no {CONFIG} (looked in {folder}): it is not a Hugging Face model")
        return folder

    @cached_property
    def weights(self) -> "HFWeights":
        """The proven index of the weights; from the hub, the files it needs are fetched now.

        Raises:
            HFFolderError: they cannot be fetched, or the folder is not whole.
        """
        # Not before it is needed: it imports torch, which reading a configuration does not need.
        from megatron.bridge.conversion.hf.weights import HFWeights

        folder = self.folder
        if not self.is_local:
            # The folder is named by the commit it was made of.
            self._fetch(folder.name, allow=_weight_files(folder))
        return HFWeights(folder)

    @cached_property
    def weight_names(self) -> Collection[str] | None:
        """Names of all weights, from the index where there is one; None for a folder that holds a configuration only.

        Raises:
            HFFolderError: as for `weights`, or the index is damaged.
        """
        if (index := self.folder / INDEX).is_file():
            return _weight_map(index).keys()
        if self.is_local and not (self.folder / SINGLE_FILE).is_file():
            return None
        return self.weights

    @property
    def _named(self) -> str:
        if self.is_local:
            return self.path_or_id
        return f"{self.path_or_id!r}" + (f" at revision {self.revision!r}" if self.revision else "")

    def _fetch(self, revision: str | None, *, allow: list[str] | None = None, ignore: list[str] | None = None) -> Path:
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(self.path_or_id, revision=revision, allow_patterns=allow, ignore_patterns=ignore)
            )
        # The hub client's own, its HTTP library's (which changed between its versions) and the file system's errors.
        except Exception as error:
            wanted = f". Wanted were:{listing(allow)}" if allow else ""
            raise HFFolderError(f"{self._named} {_reason(error)}{wanted}") from error


def _spelled_like_path(text: str) -> bool:
    return Path(text).is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or text.endswith("/")


def _weight_files(folder: Path) -> list[str]:
    """The files to fetch: those of the index, since a repository may hold the same weights in other files as well."""
    index = folder / INDEX
    return sorted(set(_weight_map(index).values())) if index.is_file() else [SINGLE_FILE]


def _weight_map(index: Path) -> dict[str, str]:
    """Weight name -> file, as an index says."""
    try:
        return dict(json.loads(index.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HFFolderError(f"{index} is damaged ({type(error).__name__}: {error}); fetch it again") from error


def _reason(error: Exception) -> str:
    """What went wrong and what to do about it, to follow the name of the model."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return "is neither a folder here nor a valid hub id (`name` or `owner/name`); check the spelling"
    if isinstance(error, errors.GatedRepoError):
        return "is gated: accept its terms on its hub page, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "is neither a folder here nor on the hub; check the spelling, or log in (`hf auth login`) if it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "is not on the hub; check the revision on the model's page"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            "is no folder here, the hub cannot be reached and its cache on this machine lacks files of it; "
            "fetch it where there is a network (`hf download`), or give a local folder"
        )
    return f"cannot be fetched from the hub: {type(error).__name__}: {error}"
