"""What several of Megatron-LM's arguments mean together for batches, data, tokenizer and checkpoints."""

from collections.abc import Callable

from megatron.bridge.training.migration.translating import Translating

_NEEDED = (
    "num-layers",
    "hidden-size",
    "num-attention-heads",
    "seq-length",
    "max-position-embeddings",
    "micro-batch-size",
    "lr",
)


def _missing(t: Translating) -> None:
    """What Megatron-LM itself would ask for."""
    for name in _NEEDED:
        others = ("encoder-seq-length",) if name == "seq-length" else ()
        if not t.has(name, *others):
            t.problems.append(f"--{name} is missing, without which Megatron-LM does not train")


def _batch(t: Translating) -> None:
    if t.has("global-batch-size"):
        return
    sizes = ("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size")
    parts = 1
    for name in sizes:
        parts *= t.number(name, 1)
    micro = t.number("micro-batch-size", 1)
    if t.world_size is None:
        t.problems.append(
            "--global-batch-size is not given: Megatron-LM takes --micro-batch-size times the data-parallel ranks; "
            "give it, or say how many ranks there are: --world-size N"
        )
    elif t.world_size % parts:
        t.problems.append(f"{t.world_size} ranks are not divided by TP x PP x CP = {parts}")
    else:
        t.values["train.global_batch_size"] = micro * (t.world_size // parts)


def _data(t: Translating) -> None:
    from_paths = [name for name in ("data-path", "train-data-path", "valid-data-path", "test-data-path") if t.has(name)]
    if t.has("mock-data") and from_paths:
        t.problems.append(f"--mock-data and --{from_paths[0]} are both given; keep one")
    elif not t.has("mock-data") and not from_paths:
        t.notes.append("no data is named: set dataset.data_paths, or dataset.mock=true for a try")


def _tokenizer(t: Translating) -> None:
    kind = t.word("tokenizer-type")
    if t.tokenizer is not None:
        t.values |= {"tokenizer.tokenizer_type": "huggingface", "tokenizer.tokenizer_model": t.tokenizer}
        t.notes.append(f"--tokenizer-type {kind}: {t.tokenizer} takes its place; its ids must be those of the data")
    elif kind == "HuggingFaceTokenizer":
        t.values |= {"tokenizer.tokenizer_type": "huggingface", "tokenizer.tokenizer_model": t.word("tokenizer-model")}
    elif kind == "NullTokenizer":
        t.values["tokenizer.tokenizer_type"] = "null"
        t.values["tokenizer.vocab_size"] = t.number("vocab-size")
        if t.has("null-tokenizer-eod-id"):
            t.values["tokenizer.eod_id"] = t.number("null-tokenizer-eod-id")
    elif kind:
        t.problems.append(
            f"--tokenizer-type {kind} is not read here; name the Hugging Face folder of the same tokenizer: "
            "--tokenizer FOLDER. Its ids must be those of the data"
        )


def _checkpoints(t: Translating) -> None:
    form = t.word("ckpt-format", "torch_dist")
    if form != "torch_dist":
        t.problems.append(f"--ckpt-format {form} is not written here; torch_dist is, and convert reads others")
    load, save = t.word("load"), t.word("save")
    if save and load == save and not t.has("finetune"):
        t.run_folder = save
        t.notes.append(
            f"--load and --save are both {save}: it begins there or goes on; so does --run-folder with --resume"
        )
        load = save = ""
    if save:
        t.values["checkpoint.save"] = save
    if load:
        t.values["checkpoint.pretrained_checkpoint" if t.has("finetune") else "checkpoint.load"] = load
    if t.has("pretrained-checkpoint"):
        t.values["checkpoint.pretrained_checkpoint"] = t.word("pretrained-checkpoint")


RUN_TOGETHER: tuple[Callable[[Translating], None], ...] = (
    _missing,
    _batch,
    _data,
    _tokenizer,
    _checkpoints,
)
