"""LLaVA-1.5 (arXiv:2310.03744) and Qwen2.5-VL (arXiv:2502.13923) at their real sizes, each half with its own layout.

LLaVA's settings are those of the hyperparameters in the README of haotian-liu/LLaVA; the layouts are ours, for one
machine with eight GPUs. Images are mock until `cfg.dataset` is set: any dataset whose `collate` is
`megatron.bridge.mimo.collate`.
"""

from collections.abc import Mapping
from typing import Any

import torch

from megatron.bridge.mimo import (
    MimoParallelismConfig,
    MimoProvider,
    ModuleOptimizerConfig,
    ModuleParallelismConfig,
)
from megatron.bridge.recipes.mimo.mock_images import MockImages
from megatron.bridge.recipes.vision_language import SIZES
from megatron.bridge.training.config import (
    ConfigContainer,
    DistributedDataParallelConfig,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
)

# Weights of a rank go eight ways for what sees, four ways for what speaks.
EIGHT_GPUS = {"images": {"data_parallel": 8}, "language_module": {"tensor_parallel": 4, "data_parallel": 2}}
# LLaVA-1.5 was aligned on 558,000 pairs and tuned on 665,000 samples, once.
_ALIGNED, _TUNED = 558_000, 665_000

type Layouts = Mapping[str, Mapping[str, int]]


def llava15_7b_mimo_align_config(
    layouts: Layouts = EIGHT_GPUS, hf_path: str | None = None, seq_length: int = 2048
) -> ConfigContainer:
    """The first stage of LLaVA-1.5: the projector alone is trained.

    Args:
        layouts: sizes by module.
        hf_path: folder or hub id that the weights are taken from; None for random ones.
        seq_length: tokens of a sample, 576 of them of its image.
    """
    cfg = _llava(layouts, hf_path, seq_length, batch=256, lr=1e-3, samples=_ALIGNED)
    cfg.model.frozen_language = True
    return cfg


def llava15_7b_mimo_finetune_config(
    layouts: Layouts = EIGHT_GPUS, hf_path: str | None = None, seq_length: int = 2048
) -> ConfigContainer:
    """The second stage of LLaVA-1.5: projector and language model are trained.

    Args:
        layouts, hf_path, seq_length: see `llava15_7b_mimo_align_config`.
    """
    return _llava(layouts, hf_path, seq_length, batch=128, lr=2e-5, samples=_TUNED)


def qwen25_vl_7b_mimo_finetune_config(
    layouts: Layouts = EIGHT_GPUS, hf_path: str | None = None, seq_length: int = 4096
) -> ConfigContainer:
    """Qwen2.5-VL 7B with all of it trained, the tower ten times slower than the rest (both rates are ours).

    Args:
        layouts, hf_path, seq_length: see `llava15_7b_mimo_align_config`; a mock image is 504 x 504 pixels, 324 tokens.
    """
    model = _provider("qwen25_vl_7b", layouts, hf_path, seq_length)
    slower, as_all = ModuleOptimizerConfig(lr=1e-6), ModuleOptimizerConfig(lr=1e-5)
    model.optimizers = {"images": slower, "images.projector": as_all}
    patches = MockImages(
        sequence_length=seq_length,
        text_tokens=151_643,
        image_token_id=model.encoders["images"].token_id,
        tokens_per_image=18 * 18,
        inputs={"pixel_values": (36 * 36, 3 * 2 * 14 * 14)},
        grid=(1, 36, 36),
    )
    return _run(model, patches, batch=128, lr=1e-5, samples=_TUNED)


def _llava(
    layouts: Layouts, hf_path: str | None, seq_length: int, *, batch: int, lr: float, samples: int
) -> ConfigContainer:
    model = _provider("llava15_7b", layouts, hf_path, seq_length)
    model.encoders["images"].frozen = True
    pictures = MockImages(
        sequence_length=seq_length,
        text_tokens=32_000,
        image_token_id=model.encoders["images"].token_id,
        tokens_per_image=576,
        inputs={"pixel_values": (1, 3, 336, 336)},
    )
    return _run(model, pictures, batch=batch, lr=lr, samples=samples)


def _provider(size: str, layouts: Layouts, hf_path: str | None, seq_length: int) -> MimoProvider:
    from megatron.bridge import AutoBridge

    placement = MimoParallelismConfig(
        llm_module_name="language_module",
        module_parallelisms={name: ModuleParallelismConfig(**each) for name, each in layouts.items()},
    )
    bridge = AutoBridge.from_hf_config(_hf_config(size)) if hf_path is None else AutoBridge.from_hf_pretrained(hf_path)
    precision: dict[str, Any] = {"bf16": True, "fp16": False, "params_dtype": torch.bfloat16}
    precision["pipeline_dtype"] = torch.bfloat16
    provider = MimoProvider.from_hf_pretrained(bridge, placement, seq_length=seq_length, **precision)
    provider.language.sequence_parallel = provider.llm_layout.tensor_parallel > 1
    return provider


def _hf_config(size: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = dict(SIZES[size].hf_config)
    return CONFIG_MAPPING[values.pop("model_type")](**values)


def _run(model: MimoProvider, dataset: MockImages, *, batch: int, lr: float, samples: int) -> ConfigContainer:
    """AdamW without weight decay, a cosine to nothing after 3% of warm-up, one pass: as LLaVA-1.5 was trained."""
    widest = max(each.data_parallel for each in model.placement.module_parallelisms.values())
    return ConfigContainer(
        model=model,
        dataset=dataset,
        train=TrainingConfig(
            train_iters=samples // batch,
            global_batch_size=batch,
            micro_batch_size=max(1, widest // model.llm_layout.data_parallel),
        ),
        optimizer=OptimizerConfig(
            lr=lr, min_lr=0.0, weight_decay=0.0, adam_beta2=0.999, clip_grad=1.0, use_distributed_optimizer=True
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        scheduler=SchedulerConfig(lr_decay_style="cosine", lr_warmup_fraction=0.03),
        tokenizer=TokenizerConfig(vocab_size=model.vocab_size),
    )
