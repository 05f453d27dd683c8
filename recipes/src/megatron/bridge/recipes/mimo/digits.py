"""A small vision-language model that reads handwritten digits: two questions about real images, trained in minutes.

The images are scikit-learn's digits (1,797 of 8 x 8 pixels, from E. Alpaydin and C. Kaynak, 1998). Every sixth is held
out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from megatron.bridge.data.provider import DatasetBuildContext, DatasetProvider
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo import MimoParallelismConfig, MimoProvider, ModuleParallelismConfig, collate
from megatron.bridge.mimo.towers import SiglipTower
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.config import (
    ConfigContainer,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
)

# Tokens: the digits, then these.
START, IMAGE, WHICH, NEXT = 10, 11, 12, 13
VOCABULARY = 16
FEATURES = 16
# Start, image, question | answer.
LENGTH = 1 + FEATURES + 1
HELD_OUT = 6
HELD_OUT_SAMPLES = 600


class DigitQuestions(Dataset[Any]):
    """Each image twice: `which digit is it?` and `which comes next?` (9 is followed by 0)."""

    collate = staticmethod(collate)

    def __init__(self, images: Any, digits: Any) -> None:
        self.images = torch.tensor(images, dtype=torch.float32)[:, None] / 8.0 - 1.0
        self.digits = [int(each) for each in digits]

    def __len__(self) -> int:
        return 2 * len(self.digits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, follows = divmod(index, 2)
        answer = (self.digits[number] + follows) % 10
        tokens = torch.tensor([START, *[IMAGE] * FEATURES, NEXT if follows else WHICH])
        last = torch.arange(LENGTH) == LENGTH - 1
        return {
            "tokens": tokens,
            "labels": last * answer,
            "loss_mask": last.float(),
            "position_ids": torch.arange(LENGTH),
            "modality_inputs": {"images": {"pixel_values": self.images[number : number + 1]}},
        }


@dataclass(kw_only=True)
class DigitsProvider(DatasetProvider):
    """The digits, every sixth of them for validation."""

    dataloader_type: Any = "cyclic"

    def build_train_valid_test_datasets(self, context: DatasetBuildContext) -> Any:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise BridgeError("the digits come with scikit-learn: uv pip install scikit-learn") from error
        images, digits = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8)
        held = torch.arange(len(digits)) % HELD_OUT == 0
        train, valid = ~held.numpy(), held.numpy()
        return DigitQuestions(images[train], digits[train]), DigitQuestions(images[valid], digits[valid]), None


def placement(mode: str) -> MimoParallelismConfig:
    """A placement of each mode on two ranks: shared layout, own layouts on the same ranks, own ranks."""
    layouts = {
        "homogeneous": ({"data_parallel": 2}, {"data_parallel": 2}),
        "colocated": ({"data_parallel": 2}, {"tensor_parallel": 2}),
        "heterogeneous": ({}, {"rank_offset": 1}),
    }
    if mode not in layouts:
        raise BridgeError(f"mode={mode!r} is none of {', '.join(layouts)}")
    encoder, language = (ModuleParallelismConfig(**each) for each in layouts[mode])
    return MimoParallelismConfig(
        llm_module_name="language_module",
        deployment_mode=mode,
        module_parallelisms={"images": encoder, "language_module": language},
    )


def digits_vlm_config(mode: str = "colocated") -> ConfigContainer:
    """A SigLIP tower of two layers before a Llama of two, 170,000 weights, for two ranks in the given mode."""
    tower = SiglipTower(
        token_id=IMAGE,
        hf_config={
            **{"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 48, "intermediate_size": 96},
            **{"num_hidden_layers": 2, "num_attention_heads": 4},
        },
    )
    language = GPTModelProvider(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=VOCABULARY,
        make_vocab_size_divisible_by=8,
        seq_length=LENGTH,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    layout = placement(mode)
    replicas = layout.module_parallelisms["language_module"].data_parallel
    return ConfigContainer(
        model=MimoProvider(language=language, encoders={"images": tower}, placement=layout),
        dataset=DigitsProvider(),
        train=TrainingConfig(
            train_iters=300,
            global_batch_size=200,
            # A pipeline over two modules wants micro-batches to fill it.
            micro_batch_size=50 if mode == "heterogeneous" else 200 // replicas,
            eval_interval=50,
            eval_iters=HELD_OUT_SAMPLES // 200,
        ),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=1e-4, weight_decay=0.01, clip_grad=1.0),
        scheduler=SchedulerConfig(lr_warmup_iters=20, lr_decay_iters=300),
        tokenizer=TokenizerConfig(vocab_size=VOCABULARY),
    )
