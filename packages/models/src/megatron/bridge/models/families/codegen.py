"""CodeGen of Salesforce (arXiv:2203.13474)."""

from megatron.bridge.conversion.transforms import PermuteBlocks, Transform
from megatron.bridge.models.families.gptj import GPTJBridge
from megatron.bridge.models.fragments import HFNames

# The checkpoints keep the four shards they were trained on.
_SHARDS = 4


class CodeGenBridge(GPTJBridge):
    """`CodeGenForCausalLM`: GPT-J with q, k and v in one weight: in each of four parts all q, then v, then k."""

    names = HFNames(
        embedding="transformer.wte",
        layer="transformer.h.{l}",
        final_norm="transformer.ln_f",
        input_norm="ln_1",
        qkv=("attn.qkv_proj",),
        attention_output="attn.out_proj",
        fc1=("mlp.fc_in",),
        fc2="mlp.fc_out",
    )

    def fused_qkv(self) -> Transform:
        heads = self.hf_config.num_attention_heads
        local = heads // _SHARDS
        q, v, k = range(3)
        return PermuteBlocks(
            tuple((head // local * 3 + part) * local + head % local for head in range(heads) for part in (q, k, v))
        )

    def ignored(self) -> tuple[str, ...]:
        """Masks that old checkpoints stored."""
        return ("transformer.h.{l}.attn.causal_mask",)
