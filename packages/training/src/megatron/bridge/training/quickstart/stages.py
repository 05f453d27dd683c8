"""The work of each step. Those that need a parallel model run in every rank and return something on rank 0."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.training.quickstart.journal import QuickstartOptions

if TYPE_CHECKING:
    from megatron.bridge.conversion.verify import Certificate
    from megatron.bridge.training.state import TrainResult

PROMPTS = ("import ", "def __init__(self", "    return ")


@dataclass(frozen=True)
class Paths:
    """Where everything of a quickstart is."""

    root: Path
    hf: Path

    @property
    def megatron(self) -> Path:
        """The converted weights."""
        return self.root / "megatron"

    @property
    def data(self) -> Path:
        """Prefix of the indexed text."""
        return self.root / "data" / "text"

    @property
    def checkpoints(self) -> Path:
        """The run's checkpoints and metrics."""
        return self.root / "run"

    @property
    def export(self) -> Path:
        """The trained model in Hugging Face format."""
        return self.root / "exported"


def make_model(folder: Path, positions: int) -> str:
    """The small Llama; returns the proof."""
    import torch

    from megatron.bridge.data.standard_library import python_stdlib_files, python_stdlib_texts
    from megatron.bridge.training.quickstart.small_llama import VOCAB_SIZE, make_small_llama

    torch.set_num_threads(1)
    parameters = make_small_llama(folder, python_stdlib_texts(), positions)
    files = len(python_stdlib_files())
    return f"Llama of {parameters / 1e6:.1f} M parameters; BPE of {VOCAB_SIZE:,} tokens from {files} source files"


def convert(paths: Paths, options: QuickstartOptions) -> "Certificate":
    """Hugging Face -> Megatron checkpoint, read back and compared with transformers."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.conversion.verify import verify

    AutoBridge.import_ckpt(paths.hf, paths.megatron, overwrite=True, **options.layout)
    return verify(paths.hf, megatron_path=paths.megatron, **options.layout)


def preprocess(paths: Paths, text: Path | None) -> Any:
    """Tokenize the text; returns what was counted."""
    from megatron.bridge.data.preprocess import preprocess_corpus
    from megatron.bridge.data.preprocess.progress import progress_bar
    from megatron.bridge.data.standard_library import python_stdlib_files

    paths.data.parent.mkdir(exist_ok=True)
    inputs = python_stdlib_files() if text is None else [text]
    document = "paragraph" if text is not None and text.is_file() else "file"
    globs = ("**/*",) if text is not None and text.is_dir() else ()
    with progress_bar("preprocess") as report:
        return preprocess_corpus(
            inputs, paths.data, paths.hf, document=document, globs=globs, overwrite=True, report=report
        )


def train(paths: Paths, options: QuickstartOptions, until: int) -> "TrainResult":
    """Train from the converted weights, or from the last checkpoint, until step `until`."""
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    return pretrain(training_config(paths, options, until), forward_step)


def training_config(paths: Paths, options: QuickstartOptions, until: int) -> Any:
    """The run's configuration; `until` is where this call stops, the schedule is that of the whole run."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.conversion.checkpoint_layout import latest_iteration
    from megatron.bridge.training import config as c

    bridge = AutoBridge.from_hf_pretrained(paths.hf)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.seq_length = options.seq_length
    for name, size in options.layout.items():
        setattr(provider, name, size)
    resumes = latest_iteration(paths.checkpoints) is not None
    return c.ConfigContainer(
        model=provider,
        dataset=c.GPTDatasetConfig(data_paths=[str(paths.data)], sequence_length=options.seq_length, split="97,3,0"),
        tokenizer=c.TokenizerConfig(tokenizer_model=str(paths.hf)),
        train=c.TrainingConfig(
            train_iters=until, global_batch_size=options.batch, micro_batch_size=_micro_batch(options.batch)
        ),
        optimizer=c.OptimizerConfig(
            optimizer="adam", lr=options.lr, min_lr=options.lr / 10, weight_decay=0.1, adam_beta2=0.95, clip_grad=1.0
        ),
        scheduler=c.SchedulerConfig(lr_decay_iters=options.steps, lr_warmup_iters=max(1, options.steps // 16)),
        logger=c.LoggerConfig(log_interval=10),
        checkpoint=c.CheckpointConfig(
            save=str(paths.checkpoints),
            load=str(paths.checkpoints) if resumes else None,
            pretrained_checkpoint=None if resumes else str(paths.megatron),
        ),
    )


def _micro_batch(batch: int, largest: int = 8) -> int:
    return max(size for size in range(1, largest + 1) if batch % size == 0)


def export(paths: Paths, options: QuickstartOptions) -> int:
    """Trained checkpoint -> Hugging Face folder; returns its number of files."""
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_megatron_checkpoint(paths.checkpoints)
    bridge.export_ckpt(paths.checkpoints, paths.export, overwrite=True, **options.layout)
    return sum(1 for file in paths.export.rglob("*") if file.is_file())


def prove_export(paths: Paths, options: QuickstartOptions) -> "Certificate":
    """The exported folder in plain transformers against the trained checkpoint in Megatron."""
    from megatron.bridge.conversion.verify import verify

    return verify(paths.export, megatron_path=paths.checkpoints, **options.layout)


def generate(folder: Path, tokens: int = 32) -> list[str]:
    """A few lines from the exported model, by transformers alone; greedy, so that they are the same each time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    lines = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, repetition_penalty=1.3)
        lines.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return lines
