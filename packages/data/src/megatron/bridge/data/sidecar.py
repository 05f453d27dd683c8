"""`PREFIX.json`, written beside preprocessed data: what they hold, and which tokenizer made them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron.bridge.data.indexed import bin_path, idx_path
from megatron.bridge.errors import BridgeError

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What preprocessing recorded.

    Attributes:
        documents, tokens: how many lie in the `.bin`; tokens include one end token per document.
        skipped_empty: source documents without any text, which were left out.
        max_token_id: the largest id; data fit an embedding of more rows than this.
        tokenizer, tokenizer_fingerprint: name and vocabulary digest of the tokenizer.
        vocab_size, eod: its size, and the id that ends each document.
        sources: files and folders, as given; files: how many files were read in them.
        bin_bytes, bin_sha256: size and digest of the `.bin`, so that a side-car of other data is noticed.
    """

    documents: int
    tokens: int
    skipped_empty: int
    max_token_id: int
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    eod: int
    sources: Sequence[str]
    files: int
    bin_bytes: int
    bin_sha256: str

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n"


def sidecar_path(prefix: str) -> Path:
    """`PREFIX.json`."""
    return Path(f"{prefix}.json")


def read_sidecar(prefix: str) -> Sidecar | None:
    """The side-car of a prefix, or None when the data were made by another tool and have none.

    Raises:
        BridgeError: unreadable, of another version, or of other data than the `.bin` beside it.
    """
    path = sidecar_path(prefix)
    if not path.is_file():
        return None
    remedy = "delete it when the data were made by another tool, or preprocess again with --overwrite"
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        version = record.pop("format")
    except (ValueError, KeyError, AttributeError) as error:
        raise BridgeError(f"{path} is no side-car of preprocessed data ({error!r}); {remedy}") from error
    if version != _FORMAT or record.keys() != {field.name for field in fields(Sidecar)}:
        raise BridgeError(f"{path} is of side-car format {version!r}, this version reads {_FORMAT}; {remedy}")
    sidecar = Sidecar(**record)
    found = bin_path(prefix).stat().st_size
    if found != sidecar.bin_bytes:
        raise BridgeError(
            f"{path} describes {sidecar.bin_bytes} bytes of data, {bin_path(prefix)} has {found}: "
            f"they do not belong together; {remedy}"
        )
    return sidecar


def data_identity(prefix: str, sidecar: Sidecar | None) -> str:
    """A digest that changes when the data at `prefix` change: cached sample indices are kept apart by it."""
    if sidecar is not None:
        return hashlib.sha256(f"{sidecar.bin_sha256}\n{sidecar.documents}".encode()).hexdigest()[:16]
    stats = [path.stat() for path in (bin_path(prefix), idx_path(prefix))]
    return hashlib.sha256(repr([(stat.st_size, stat.st_mtime_ns) for stat in stats]).encode()).hexdigest()[:16]
