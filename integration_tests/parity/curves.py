"""Curves of a few steps: through the bridge and the training loop at a layout, and in plain torch over transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron.bridge import AutoBridge
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import run_ranks
from megatron.bridge.training import config as c
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.data import batches_per_chunk, build_datasets
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.setup import distributed
from parity.layouts import Layout
from parity.models import SEQUENCE, Model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from megatron.bridge.training.state import RunState, TrainResult

STEPS = 20
BATCH = 4
WARM_UP = 2
SECTIONS = ("train", "optimizer", "ddp")
_NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


@dataclass(frozen=True)
class Curve:
    """Losses and gradient norms before clipping by step, and the weights at the end, as files name them."""

    losses: list[float]
    norms: list[float]
    weights: "dict[str, Tensor]"


@dataclass(frozen=True)
class Difference:
    """The largest relative differences of losses and gradient norms, and the largest difference of weights."""

    loss: float
    norm: float
    weight: float

    @classmethod
    def between(cls, one: Curve, other: Curve) -> "Difference":
        """What is between two curves of the same model."""
        assert one.weights.keys() == other.weights.keys()
        assert len(one.losses) == len(other.losses) > 0
        return cls(
            _furthest(one.losses, other.losses),
            _furthest(one.norms, other.norms),
            max(float((value - other.weights[name]).abs().max()) for name, value in one.weights.items()),
        )


def _furthest(these: list[float], those: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(these, those, strict=True))


def at_layouts(model: Model, folder: Path, layouts: Mapping[str, Layout]) -> dict[str, Curve | str]:
    """Train the model in `folder` at each layout; where it is refused, why. As many ranks share their processes."""
    curves: dict[str, Curve | str] = {}
    for ranks in sorted({each.ranks for each in layouts.values()}):
        some = {name: each for name, each in layouts.items() if each.ranks == ranks}
        curves |= run_ranks(ranks, _curves, model, folder, some, timeout=1200)[0]
    return {name: curves[name] for name in layouts}


def _curves(model: Model, folder: Path, layouts: Mapping[str, Layout]) -> dict[str, Curve | str]:
    curves: dict[str, Curve | str] = {}
    for name, layout in layouts.items():
        try:
            bridge = AutoBridge.from_hf_pretrained(folder)
            curves[name] = curve(bridge, run_config(bridge, model.fields, layout))
        except BridgeError as error:
            # A refusal is every rank's, before any waits for another.
            curves[name] = str(error)
    return curves


def curve(bridge: AutoBridge, cfg: c.ConfigContainer) -> Curve:
    """Train as `cfg` says."""
    weights = _Weights(bridge)
    result = pretrain(cfg, callbacks=[weights])
    return Curve(list(result.losses.values()), list(result.grad_norms.values()), weights.held)


class _Weights(Callback):
    """Takes the weights out at the end."""

    def __init__(self, bridge: AutoBridge) -> None:
        self._bridge = bridge
        self.held: dict[str, Tensor] = {}

    def on_train_end(self, run: "RunState", result: "TrainResult") -> None:
        self.held = {name: value.clone() for name, value in self._bridge.export_hf_weights(run.model)}


def run_config(bridge: AutoBridge, fields: Mapping[str, Any], layout: Layout) -> c.ConfigContainer:
    """`STEPS` steps of a model at a layout; `fields` are its provider's."""
    provider = bridge.to_megatron_provider()
    for name, value in {**_NO_DROPOUT, **fields, **layout.fields}.items():
        setattr(provider, name, value)
    provider.seq_length = SEQUENCE
    cfg = c.ConfigContainer(
        model=provider,
        dataset=c.GPTDatasetConfig(mock=True, sequence_length=SEQUENCE, split="90,10,0"),
        train=c.TrainingConfig(train_iters=STEPS, global_batch_size=BATCH, micro_batch_size=1),
        optimizer=c.OptimizerConfig(lr=3e-3, min_lr=3e-4, weight_decay=0.1, clip_grad=1.0),
        scheduler=c.SchedulerConfig(lr_decay_style="constant", lr_warmup_iters=WARM_UP),
        tokenizer=c.TokenizerConfig(vocab_size=provider.vocab_size),
        logger=c.LoggerConfig(progress=False),
    )
    for name, value in layout.settings.items():
        owners = [section for section in SECTIONS if hasattr(getattr(cfg, section), name)]
        assert owners, name
        for owner in owners:
            setattr(getattr(cfg, owner), name, value)
    return cfg


def in_plain_torch(model: Model, folder: Path) -> Curve:
    """The same steps by transformers' model and `torch.optim.AdamW`, with nothing of this project but the data."""
    return run_ranks(1, lambda: _plain(model, folder), timeout=200)[0]


def _plain(model: Model, folder: Path) -> Curve:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    cfg = run_config(AutoBridge.from_hf_pretrained(folder), model.fields, Layout())
    with distributed(cfg):
        cfg.model.initialize_model_parallel(0)
        data = batches_per_chunk(cfg, build_datasets(cfg)[0], 1, cfg.train.global_batch_size)[0]
        network = AutoModelForCausalLM.from_pretrained(folder).eval()  # without dropout
        losses, norms = _steps(network, cfg.optimizer, data)
        network.save_pretrained(folder / "plain")
    return Curve(losses, norms, load_file(folder / "plain/model.safetensors"))


def _steps(network: Any, settings: Any, data: "Iterator[dict[str, Tensor]]") -> tuple[list[float], list[float]]:
    optimizer = torch.optim.AdamW(_groups(network, settings.weight_decay), lr=settings.lr, betas=(0.9, 0.999))
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, step / WARM_UP)
        rows = [next(data) for _ in range(BATCH)]
        tokens, labels = (torch.cat([row[name] for row in rows]) for name in ("tokens", "labels"))
        loss = torch.nn.functional.cross_entropy(network(tokens).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip_grad)))
        optimizer.step()
        losses.append(float(loss))
    return losses, norms


def _groups(network: Any, decay: float) -> list[dict[str, Any]]:
    """Matrices decay; gains and biases do not."""
    parameters = list(network.parameters())
    return [
        {"params": [each for each in parameters if each.dim() > 1], "weight_decay": decay},
        {"params": [each for each in parameters if each.dim() == 1], "weight_decay": 0.0},
    ]
