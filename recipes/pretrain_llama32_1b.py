"""Pretraining of Llama 3.2 1B: `uv run recipes/pretrain_llama32_1b.py [SECTION.FIELD=VALUE]...`, or under torchrun."""

from megatron.bridge.recipes.base.script import main
from megatron.bridge.recipes.llama import llama32_1b_pretrain_config

if __name__ == "__main__":
    main(llama32_1b_pretrain_config)
