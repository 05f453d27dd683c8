"""`finetune`: one call from a pretrained model and instruction data to a tuned model."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.state import TrainResult

_EVALUATIONS = 10


def finetune(cfg: "ConfigContainer", forward_step: Any = None, callbacks: "Sequence[Callback]" = ()) -> "TrainResult":
    """Train on from weights that exist. As `pretrain`, and: every trained token of a step counts the same.

    Answers differ in length; without that, tokens of micro-batches with short answers would count more.

    Args:
        cfg: the run. Its weights come from `checkpoint.pretrained_checkpoint`, from `checkpoint.load`, or from the
            Hugging Face folder that the provider was made from.
        forward_step: as for `pretrain`.
        callbacks: e.g. `KeepBest`, `GenerationSamples`, `ExportHF`.

    Raises:
        BridgeError: there are no weights to start from, or what `pretrain` refuses.
    """
    from megatron.bridge.training.pretrain import pretrain

    check_start(cfg)
    cfg.model.calculate_per_token_loss = True
    return pretrain(cfg, forward_step, callbacks)


def check_start(cfg: "ConfigContainer") -> None:
    """Refuse a run without weights to start from."""
    start = cfg.checkpoint.load or cfg.checkpoint.pretrained_checkpoint
    if start is None and not getattr(cfg.model, "loads_weights", False):
        raise BridgeError(
            "there are no weights to tune; set checkpoint.pretrained_checkpoint (a Megatron checkpoint), or make the "
            "provider by AutoBridge.from_hf_pretrained(...).to_megatron_provider(); pretrain() starts from random ones"
        )


def finetune_config(
    model: str | Path,
    data: Sequence[str],
    *,
    valid_data: Sequence[str] = (),
    sequence_length: int = 2048,
    trust_remote_code: bool = False,
    pairs: bool = False,
    **dataset: Any,
) -> "ConfigContainer":
    """A configuration for tuning all weights of `model` on `data`; change what you like, then `plan_length`.

    Args:
        model: a Hugging Face folder or hub id, or a Megatron checkpoint that holds the Hugging Face files.
        data: files of rows, or datasets on disk.
        valid_data: the same to evaluate on; where there are none, one row of twenty is kept back.
        sequence_length: tokens per sample, at most the model's.
        trust_remote_code: let the model folder's own Python code run.
        pairs: rows hold a better and a worse answer, for `dpo`.
        dataset: further fields of `SFTDatasetConfig`, e.g. `dataset_format="alpaca"`.

    Raises:
        BridgeError: the model cannot be found or expressed.
    """
    from megatron.bridge.data import PreferenceDatasetConfig
    from megatron.bridge.training import config as c

    kind = PreferenceDatasetConfig if pairs else c.SFTDatasetConfig
    provider, folder, checkpoint = _start(model, trust_remote_code)
    provider.seq_length = min(sequence_length, provider.seq_length)
    apart = {"train_data_paths": list(data), "valid_data_paths": list(valid_data)}
    paths = apart if valid_data else {"data_paths": list(data), "split": "95,5,0"}
    return c.ConfigContainer(
        model=provider,
        dataset=kind(**{**paths, "sequence_length": provider.seq_length, "packing": True, **dataset}),
        tokenizer=c.TokenizerConfig(
            tokenizer_model=folder, vocab_size=provider.vocab_size, trust_remote_code=trust_remote_code
        ),
        # How long to train follows from the data: `plan_length`.
        train=c.TrainingConfig(global_batch_size=16),
        optimizer=c.OptimizerConfig(optimizer="adam", lr=1e-5, min_lr=1e-6, weight_decay=0.01, clip_grad=1.0),
        scheduler=c.SchedulerConfig(lr_decay_style="cosine", lr_warmup_fraction=0.03),
        checkpoint=c.CheckpointConfig(pretrained_checkpoint=checkpoint),
    )


def _start(model: str | Path, trust_remote_code: bool) -> tuple[Any, str, str | None]:
    """The provider, the folder of the tokenizer, and the checkpoint to load (None where the provider loads weights)."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.conversion.megatron_checkpoint import hf_files

    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        bridge = AutoBridge.from_megatron_checkpoint(path, trust_remote_code=trust_remote_code)
        return bridge.to_megatron_provider(load_weights=False), str(hf_files(path)), str(path)
    bridge = AutoBridge.from_hf_pretrained(model, trust_remote_code=trust_remote_code)
    return bridge.to_megatron_provider(), str(model), None


def plan_length(cfg: "ConfigContainer", epochs: float) -> None:
    """Set `train.train_iters` to `epochs` passes over the data, and ten evaluations of the validation split.

    What is set already stays. Tokenizes the data (once: they are kept in the cache) to count samples.

    Raises:
        BridgeError: the data are refused.
    """
    from megatron.bridge.data.provider import DatasetBuildContext
    from megatron.bridge.training.problems.layout import chunks_of_sequence
    from megatron.bridge.training.run_data import run_tokenizer

    if epochs <= 0:
        raise BridgeError(f"epochs={epochs:g} must be greater than 0")
    train, batch = cfg.train, cfg.train.global_batch_size
    context = DatasetBuildContext(
        train_samples=None,
        valid_samples=None,
        tokenizer=run_tokenizer(cfg),
        document_multiple=chunks_of_sequence(cfg.model),
    )
    tuned, evaluated, _ = cfg.dataset.build_train_valid_test_datasets(context)
    if train.train_iters is None and train.train_samples is None:
        train.train_iters = max(1, math.ceil(epochs * len(tuned) / batch))  # type: ignore[arg-type]
    if train.eval_interval is None:
        train.eval_interval = max(1, train.total_iters // _EVALUATIONS)
        train.eval_iters = math.ceil(len(evaluated) / batch)  # type: ignore[arg-type]
