"""One step of models of every kind, beside one rank with the same weights and samples.

The update is nearly the gradient itself (Adam's, with a large epsilon), so that equal weights after it are equal
gradients: small differences do not grow as they do over many steps of random models.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from zoo.exhibits import exhibits

from megatron.bridge import AutoBridge
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import run_ranks, save_random_model
from parity.curves import Curve, Difference, curve, run_config
from parity.layouts import ONE, Layout, plain_layouts
from parity.models import MODELS

# A configuration of the family tests, or a model of the other table -> what is particular in it.
KINDS: Mapping[str, str] = {
    "mamba2": "state space",
    "mamba": "state space, the first Mamba",
    "nemotron-h-moe": "state space, attention and experts by turns",
    "falcon-h1": "state space beside attention",
    "qwen3-next-moe": "linear attention, experts",
    "gpt_oss": "attention sinks, experts with biases",
    "llama4_text": "chunks of attention, experts by turns",
    "youtu": "multi-latent attention",
    "DeepSeek-V3-MTP": "multi-latent attention, experts, prediction layers",
    "gemma2": "soft caps, norms on both sides",
    "gemma3": "two ropes, windows",
    "small": "Gemma 4: shared keys and values, inputs per layer",
    "experts": "Gemma 4: experts beside MLPs",
    "llava": "vision-language, on text",
    "qwen2_5_vl": "vision-language, on text",
}
# What every run of the tests takes.
OFTEN = ("mamba2", "DeepSeek-V3-MTP")
LAYOUTS = plain_layouts((ONE, "sp2", "pp2"))
# Below the placeholders of images, which stand for none here.
_TOKENS = 90

type Fields = Mapping[str, Any]


def one_step(names: Collection[str], folder: Path) -> dict[str, dict[str, Difference]]:
    """Model -> layout -> its difference from one rank after a step.

    Args:
        names: of `KINDS`.
        folder: to be filled with the models.
    """
    models = _saved(names, folder)
    steps = {layout: run_ranks(each.ranks, _steps, models, each, timeout=1200)[0] for layout, each in LAYOUTS.items()}
    one = steps.pop(ONE)
    return {
        name: {layout: Difference.between(found[name], one[name]) for layout, found in steps.items()} for name in names
    }


def _saved(names: Collection[str], root: Path) -> dict[str, tuple[Path, Fields]]:
    """By name, where a model's random weights are, and fields for its provider."""
    configs = {each.name: each.config for those in exhibits().values() for each in those}
    for name in names:
        if name in MODELS:
            MODELS[name].save(root / name)
        else:
            save_random_model(configs[name], root / name)
    return {name: (root / name, MODELS[name].fields if name in MODELS else {}) for name in names}


def _steps(models: Mapping[str, tuple[Path, Fields]], layout: Layout) -> dict[str, Curve]:
    return {name: _step(name, folder, fields, layout) for name, (folder, fields) in models.items()}


def _step(name: str, folder: Path, fields: Fields, layout: Layout) -> Curve:
    bridge = AutoBridge.from_hf_pretrained(folder)
    cfg = run_config(bridge, fields, layout)
    cfg.train.train_iters, cfg.scheduler.lr_warmup_iters = 1, 0
    cfg.optimizer.lr, cfg.optimizer.adam_eps, cfg.optimizer.weight_decay = 0.1, 0.1, 0.0
    cfg.tokenizer.vocab_size = min(_TOKENS, cfg.model.vocab_size)
    try:
        return curve(bridge, cfg)
    except BridgeError as error:
        raise BridgeError(f"{name}: {error}") from error
