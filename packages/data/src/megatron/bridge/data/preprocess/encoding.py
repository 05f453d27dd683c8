"""Bytes of documents to ids, in this process or in several; the order of the results is that of the input."""

import json
import multiprocessing
import os
import signal
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.bridge.data.indexed import token_dtype
from megatron.bridge.data.preprocess.fast_tokenizer import FastTokenizer
from megatron.bridge.data.preprocess.sources import RawBatch, RawDocument
from megatron.bridge.errors import BridgeError, did_you_mean

_EXCERPT = 60
# Batches that wait per worker: enough to keep it busy, few enough to bound memory.
_AHEAD = 2


@dataclass(frozen=True)
class EncodedBatch:
    """Ids of a batch as bytes of the corpus' dtype, each document closed by the end-of-document id.

    Attributes:
        lengths: ids per document, end included.
        max_token_id: the largest id; -1 when there is none.
        skipped_empty: documents without text, which leave nothing.
        read_bytes: how much of the source files the batch took.
    """

    ids: bytes
    lengths: array[int]
    max_token_id: int
    skipped_empty: int
    read_bytes: int


class BatchEncoder:
    """Decodes, parses and tokenizes batches.

    Args:
        tokenizer: what to tokenize with; no special token is added but the end of each document.
        json_key: where the text of a JSON object is.
    """

    def __init__(self, tokenizer: FastTokenizer, json_key: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(tokenizer.definition)
        # A folder may carry truncation for inference; a corpus is never cut.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._end = [tokenizer.eod]
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._json_key = json_key

    def __call__(self, batch: RawBatch) -> EncodedBatch:
        """The ids of `batch`; refuses the first document that is no text."""
        texts = [self._text(raw) for raw in batch.documents]
        kept = [(text, raw) for text, raw in zip(texts, batch.documents, strict=True) if text]
        documents = [encoding.ids + self._end for encoding in self._encode(kept)]
        lengths = array("i", map(len, documents))
        ids = np.fromiter((token for document in documents for token in document), self._dtype, sum(lengths))
        return EncodedBatch(
            ids=ids.tobytes(),
            lengths=lengths,
            max_token_id=int(ids.max()) if len(ids) else -1,
            skipped_empty=len(texts) - len(kept),
            read_bytes=batch.read_bytes,
        )

    def _encode(self, kept: list[tuple[str, RawDocument]]) -> list[Any]:
        try:
            return list(self._tokenizer.encode_batch_fast([text for text, _ in kept], add_special_tokens=False))
        except (TypeError, UnicodeEncodeError):
            for text, raw in kept:
                _refuse_lone_surrogate(text, raw)
            raise

    def _text(self, raw: RawDocument) -> str:
        try:
            text = raw.data.decode("utf-8")
        except UnicodeDecodeError as error:
            bad = raw.data[error.start : error.start + 1].hex()
            raise BridgeError(
                f"{raw.origin} is not UTF-8: byte 0x{bad} at offset {error.start} ({error.reason}); "
                "convert it first, e.g. with iconv"
            ) from error
        return _text_of_json(text, raw, self._json_key) if raw.is_json else text


def encode_batches(
    batches: Iterable[RawBatch], tokenizer: FastTokenizer, json_key: str, workers: int
) -> Iterator[EncodedBatch]:
    """Encode in order. One worker is this process, with the threads of the `tokenizers` library.

    Raises:
        BridgeError: a document that is refused (the first one, in order), or a worker that died.
    """
    if workers < 1:
        raise BridgeError(f"--workers={workers} must be at least 1")
    if workers == 1:
        yield from map(BatchEncoder(tokenizer, json_key), batches)
        return
    # Fresh processes: forking one that has threads, of torch or of the tokenizers library, can deadlock.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer, json_key))
    try:
        yield from _in_order(pool, batches, workers * _AHEAD)
    except BrokenProcessPool as error:
        raise BridgeError(
            "a worker process died: it was killed (out of memory?), or the calling script lacks "
            '`if __name__ == "__main__":`; use fewer workers or --workers 1'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, batches: Iterable[RawBatch], ahead: int) -> Iterator[EncodedBatch]:
    waiting: deque[Future[EncodedBatch]] = deque()
    for batch in batches:
        waiting.append(pool.submit(_encode_in_worker, batch))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_encoder: BatchEncoder | None = None


def _start_worker(tokenizer: FastTokenizer, json_key: str) -> None:
    global _encoder  # noqa: PLW0603  # the one thing a pool can hand to the tasks of a worker process
    # Ctrl-C reaches the whole process group; the parent alone decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = BatchEncoder(tokenizer, json_key)


def _encode_in_worker(batch: RawBatch) -> EncodedBatch:
    assert _encoder is not None
    return _encoder(batch)


def _text_of_json(line: str, raw: RawDocument, key: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BridgeError(
            f"{raw.origin} is not JSON: {error}; it starts with {line[:_EXCERPT]!r}. Repair or remove the line"
        ) from error
    if not isinstance(row, dict):
        raise BridgeError(f"{raw.origin} holds {_kind(row)}, not an object; it starts with {line[:_EXCERPT]!r}")
    if key not in row:
        raise BridgeError(
            f"{raw.origin} has no key {key!r}{did_you_mean(key, row)} (it has: {', '.join(map(repr, row)) or 'none'}); "
            "choose with --json-key"
        )
    text = row[key]
    if not isinstance(text, str):
        raise BridgeError(f"{raw.origin}: the value of {key!r} is {_kind(text)}, not a string; choose with --json-key")
    return text


def _kind(value: object) -> str:
    names = {list: "an array", dict: "an object", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _refuse_lone_surrogate(text: str, raw: RawDocument) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BridgeError(
            f"{raw.origin}: character {error.start} is half of a surrogate pair (\\u{ord(text[error.start]):04x}), "
            "which is no text; repair the line"
        ) from error
