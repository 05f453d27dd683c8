"""Pretraining of Llama 3 8B: `uv run recipes/pretrain_llama3_8b.py [SECTION.FIELD=VALUE]...`, or under torchrun."""

from megatron.bridge.recipes.base.script import main
from megatron.bridge.recipes.llama import llama3_8b_pretrain_config

if __name__ == "__main__":
    main(llama3_8b_pretrain_config)
