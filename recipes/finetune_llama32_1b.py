"""Tuning of Llama 3.2 1B: `uv run recipes/finetune_llama32_1b.py checkpoint.pretrained_checkpoint=FOLDER ...`."""

from megatron.bridge.recipes.base.script import main
from megatron.bridge.recipes.llama import llama32_1b_finetune_config

if __name__ == "__main__":
    main(llama32_1b_finetune_config)
