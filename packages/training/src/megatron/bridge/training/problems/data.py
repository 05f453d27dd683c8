"""What is wrong with the data, and with how they suit the model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.problems.lengths import has_length
from megatron.bridge.training.run_data import dataset_context, run_tokenizer

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def data_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """Lengths and vocabularies that contradict each other, and what the dataset itself finds."""
    asked = getattr(cfg.dataset, "sequence_length", cfg.model.seq_length)
    if asked is not None and asked != cfg.model.seq_length:
        yield (
            f"dataset.sequence_length={asked} and model.seq_length={cfg.model.seq_length} differ; set both to the "
            "length of the sequences to train on"
        )
    known, embedded = cfg.tokenizer.vocab_size, cfg.model.vocab_size
    if known is not None and embedded is not None and known > embedded:
        yield f"tokenizer.vocab_size={known} is larger than model.vocab_size={embedded}: ids would have no embedding"
    if getattr(cfg.dataset, "packing", False):
        yield from _packing(cfg)
    if not has_length(cfg):
        return
    try:
        cfg.dataset.validate(dataset_context(cfg, run_tokenizer(cfg)))
    except BridgeError as error:
        yield str(error)


def _packing(cfg: "ConfigContainer") -> Iterator[str]:
    model = cfg.model
    if cfg.train.micro_batch_size != 1:
        yield (
            f"dataset.packing=true takes train.micro_batch_size=1, not {cfg.train.micro_batch_size}; set it, and "
            "raise dataset.sequence_length and model.seq_length instead"
        )
    if getattr(model, "mtp_num_layers", None):
        yield "dataset.packing=true does not go with prediction layers; set model.mtp_num_layers=null or packing=false"
    if getattr(model, "layer_spec", None) == "local":
        yield "dataset.packing=true needs model.layer_spec 'torch' or 'transformer_engine'; 'local' cannot attend so"
