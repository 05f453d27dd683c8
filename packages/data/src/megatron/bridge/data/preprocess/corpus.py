"""The whole of preprocessing, top to bottom: find the text, tokenize it, write `.bin`, `.idx` and side-car."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from megatron.bridge.data.indexed import IndexedDatasetWriter, token_dtype
from megatron.bridge.data.preprocess.encoding import EncodedBatch, encode_batches
from megatron.bridge.data.preprocess.fast_tokenizer import FastTokenizer, load_fast_tokenizer
from megatron.bridge.data.preprocess.progress import Progress
from megatron.bridge.data.preprocess.sources import find_files, read_batches
from megatron.bridge.data.preprocess.staging import StagedFiles, check_output, staged_output
from megatron.bridge.data.sidecar import Sidecar
from megatron.bridge.errors import BridgeError


def preprocess_corpus(
    inputs: Sequence[str | Path],
    output: str | Path,
    tokenizer: str | Path,
    *,
    globs: Sequence[str] = (),
    json_key: str = "text",
    document: str = "file",
    workers: int = 1,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> Sidecar:
    """Write `OUTPUT.bin`, `OUTPUT.idx` and `OUTPUT.json`, readable by Megatron-Core's `GPTDataset`.

    The result does not depend on `workers`. On any failure nothing is left behind.

    Args:
        inputs: text files, JSONL files (`.jsonl`, `.ndjson`), either also as `.gz`, Parquet files, folders of them, and
            Hugging Face datasets on disk.
        output: prefix of the three files.
        tokenizer: Hugging Face folder or hub id; its eos_token ends every document.
        globs: which files of a folder; by default `.txt`, `.jsonl`, `.jsonl.gz` and `.parquet` at any depth.
        json_key: key of the text in each JSON object, or its column.
        document: what a document of a text file is: `file`, `paragraph` or `line`.
        workers: processes that tokenize.
        overwrite: replace existing output.
        trust_remote_code: allow the tokenizer folder's own Python code to run.
        report: called at the start and after every batch.

    Raises:
        BridgeError: names the file and line, key, folder or option at fault.
    """
    prefix = str(output)
    check_output(prefix, overwrite)
    files = find_files(inputs, globs)
    fast = load_fast_tokenizer(tokenizer, trust_remote_code)
    batches = encode_batches(read_batches(files, document, json_key), fast, json_key, workers)
    with staged_output(prefix) as staged:
        try:
            sidecar = _write(batches, staged, fast, inputs, files, report or _unreported)
            staged.sidecar.write_text(sidecar.to_json(), "utf-8")
        except OSError as error:
            raise BridgeError(f"{prefix!r} cannot be written: {error.strerror or error}") from error
    return sidecar


def _unreported(progress: Progress) -> None:
    """Nobody watches."""


def _write(
    batches: Iterable[EncodedBatch],
    staged: StagedFiles,
    tokenizer: FastTokenizer,
    inputs: Sequence[str | Path],
    files: Sequence[Path],
    report: Callable[[Progress], None],
) -> Sidecar:
    total = sum(path.stat().st_size for path in files)
    report(Progress(0, total, 0, 0))
    done = documents = tokens = skipped = written = 0
    largest = -1
    digest = hashlib.sha256()
    with IndexedDatasetWriter(staged.bin, staged.idx, token_dtype(tokenizer.vocab_size)) as writer:
        for batch in batches:
            writer.add_documents(batch.ids, batch.lengths)
            digest.update(batch.ids)
            documents += len(batch.lengths)
            tokens += sum(batch.lengths)
            written += len(batch.ids)
            skipped += batch.skipped_empty
            done += batch.read_bytes
            largest = max(largest, batch.max_token_id)
            report(Progress(done, total, documents, tokens))
        if not documents:
            raise BridgeError(
                f"the input holds no text ({', '.join(map(str, files[:3]))}: {total} bytes, every document is empty); "
                "give files with text in them"
            )
    return Sidecar(
        documents=documents,
        tokens=tokens,
        skipped_empty=skipped,
        max_token_id=largest,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        sources=[str(entry) for entry in inputs],
        files=len(files),
        bin_bytes=written,
        bin_sha256=digest.hexdigest(),
    )
