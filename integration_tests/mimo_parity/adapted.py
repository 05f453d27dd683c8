"""Adapters on both modules, here and in Hugging Face peft, which reads what this side began with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.bridge.testing import run_ranks
from mimo_parity.cases import Case

# Settings of a case that put adapters on its modules.
METHODS = ("adapters", "encoder_adapters", "dora")
_LANGUAGE = ["linear_qkv", "linear_proj", "linear_fc2"]
_TOWER = {"Qwen2.5-VL": ["qkv", "down_proj", "*.merger.mlp.2"]}
_CLIP = ["q_proj", "v_proj", "fc2", "linear_1"]


def method_of(settings: Sequence[str]) -> str | None:
    """The one of `METHODS` that is set."""
    return next((each for each in METHODS if each in settings), None)


def adapt(provider: Any, case: Case) -> Any:
    """Give the encoder its method; the hook that applies the language model's is returned, None without adapters."""
    from megatron.bridge.peft import DoRA, LoRA

    chosen = method_of(case.settings)
    if chosen is None:
        return None
    method = DoRA if chosen == "dora" else LoRA
    # Both matrices begin with values, and so have gradients at once; their product is zero.
    begin: dict[str, Any] = {"init_lora_weights": "orthogonal"}
    layers = _TOWER.get(case.subject, _CLIP)
    if "vit" in case.settings:
        begin |= {"separate_parts": True, "exclude_modules": ["*.unused.*"]}
    provider.adapters = {"images": method(dim=2, alpha=6, target_modules=layers, **begin)}
    if chosen == "encoder_adapters":
        provider.frozen_language = True
        return None

    def hook(chunks: list[Any]) -> None:
        chunks[0].bridge = provider.bridge
        # peft has a pair of matrices for each of q, k and v.
        begin["exclude_modules"] = []
        language = method(dim=4, alpha=8, target_modules=_LANGUAGE, **{**begin, "separate_parts": True})
        provider.engine.adapt(language, chunks)

    return hook


def begun(case: Case, folder: Path, start: Path) -> Path:
    """Write the adapters that every placement of `case` begins with, as peft's folder."""
    from megatron.bridge.mimo.hf_adapter import save_hf_adapter
    from mimo_parity.placed import provider_of

    alone, chosen = (1, 1, 1), tuple(each for each in (*METHODS, "vit") if each in case.settings)
    one = Case("one rank", "homogeneous", alone, alone, settings=chosen, subject=case.subject)

    def work() -> None:
        provider = provider_of(one, folder)
        (model,) = provider.provide_distributed_model(wrap_with_ddp=False, pre_wrap_hook=adapt(provider, one))
        save_hf_adapter(provider.bridge, model, start)
        provider.engine.stop()

    run_ranks(1, work, timeout=200)
    return start


def in_peft(model: Any, start: Path) -> Any:
    """transformers' model with the adapters in `start`, which are trained."""
    import peft

    return peft.PeftModel.from_pretrained(model, start, is_trainable=True)


def file_name(name: str) -> str:
    """What peft's files call one of its parameters."""
    own = ".default.weight"
    return name.removesuffix(own) + ("" if "lora_magnitude_vector" in name else ".weight") if own in name else name


def gradients_in_files(bridge: Any, model: Any, folder: Path) -> dict[str, Any]:
    """What adapters hold, by the names of peft's files, on every rank. Collective."""
    import torch.distributed as dist
    from safetensors.torch import load_file

    from megatron.bridge.mimo.hf_adapter import save_hf_adapter

    save_hf_adapter(bridge, model, folder)
    dist.barrier()
    return load_file(folder / "adapter_model.safetensors")
