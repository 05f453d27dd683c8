"""Which Hugging Face models can be taken apart: those whose images give the language model features, and no more."""

import pytest
import transformers

from megatron.bridge import AutoBridge
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.vision_half import VisionHalf


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration has positions that images decide"),
        ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration has features that are added between layers"),
        ("Gemma3Config", "Gemma3ForConditionalGeneration has attention that images decide"),
        ("LlamaConfig", "LlamaForCausalLM has no vision half"),
    ],
)
def test_what_cannot_stand_apart_is_refused_by_name(config, told):
    architecture = told.split()[0]
    made = getattr(transformers, config)(architectures=[architecture])
    with pytest.raises(BridgeError, match=told):
        VisionHalf.of(AutoBridge.from_hf_config(made))
