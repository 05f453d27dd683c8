"""InternLM2's configuration, which transformers reads by this class once the module is imported."""

from transformers import AutoConfig, LlamaConfig


class InternLM2Config(LlamaConfig):
    """Llama's fields, and `bias`: whether attention's projections have biases."""

    model_type = "internlm2"

    bias: bool = False


AutoConfig.register(InternLM2Config.model_type, InternLM2Config)
