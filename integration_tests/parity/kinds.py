"""One step of models of every kind, beside one rank with the same weights and samples.

The update is nearly the gradient itself (Adam's, with a large epsilon), so that equal weights after it are equal
gradients: small differences do not grow as they do over many steps of random models.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

from zoo.exhibits import exhibits

from megatron.bridge import AutoBridge
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import run_ranks, save_random_model
from parity.curves import Curve, Difference, curve, run_config
from parity.layouts import ONE, Layout, plain_layouts

# Names of the family tests' configurations: what the models are.
KINDS: Mapping[str, str] = {
    "mamba2": "state space",
    "mamba": "state space, the first Mamba",
    "nemotron-h-moe": "state space, attention and experts by turns",
    "falcon-h1": "state space beside attention",
    "qwen3-next-moe": "linear attention and experts",
    "gpt_oss": "attention sinks, experts with biases",
    "llama4_text": "experts by turns",
    "youtu": "multi-latent attention",
    "gemma2": "soft caps",
    "gemma3": "two ropes",
    "small": "Gemma 4: shared keys and values, inputs per layer",
    "experts": "Gemma 4: experts beside MLPs",
    "llava": "vision-language, on text",
    "qwen2_5_vl": "vision-language, on text",
}
LAYOUTS = plain_layouts((ONE, "sp2", "pp2"))
# Below the placeholders of images, which stand for none here.
_TOKENS = 90


def one_step(names: Collection[str], folder: Path) -> dict[str, dict[str, Difference]]:
    """Layout -> model -> its difference from one rank after a step.

    Args:
        names: of `KINDS`.
        folder: to be filled with the models.
    """
    configs = {each.name: each.config for those in exhibits().values() for each in those}
    for name in names:
        save_random_model(configs[name], folder / name)
    found = {
        layout: run_ranks(each.ranks, _steps, folder, list(names), each, timeout=1200)[0]
        for layout, each in LAYOUTS.items()
    }
    one = found.pop(ONE)
    return {
        layout: {name: Difference.between(step, one[name]) for name, step in steps.items()}
        for layout, steps in found.items()
    }


def _steps(folder: Path, names: list[str], layout: Layout) -> dict[str, Curve]:
    return {name: _step(folder / name, layout) for name in names}


def _step(folder: Path, layout: Layout) -> Curve:
    bridge = AutoBridge.from_hf_pretrained(folder)
    cfg = run_config(bridge, {}, layout)
    cfg.train = dataclasses.replace(cfg.train, train_iters=1, global_batch_size=4)
    cfg.optimizer.lr, cfg.optimizer.adam_eps, cfg.optimizer.weight_decay = 0.1, 0.1, 0.0
    cfg.scheduler.lr_warmup_iters = 0
    cfg.tokenizer.vocab_size = min(_TOKENS, cfg.model.vocab_size)
    try:
        return curve(bridge, cfg)
    except BridgeError as error:
        raise BridgeError(f"{folder.name}: {error}") from error
