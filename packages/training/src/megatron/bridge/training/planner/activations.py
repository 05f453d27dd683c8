"""What a forward pass keeps for the backward pass, in bytes, layer by layer.

Counted from the modules: each entry is a tensor that autograd saves, per token of the micro-batch. The two layer specs
keep different ones: `torch` (PyTorch's own norms and activations) and `transformer_engine` (fused kernels).
"""

from dataclasses import dataclass
from typing import Literal

from megatron.bridge.training.planner.precision import Bytes
from megatron.bridge.training.planner.shape import ModelShape

type Spec = Literal["torch", "transformer_engine"]


@dataclass(frozen=True)
class Kept:
    """Counts what layers of a model keep on a rank.

    Args:
        shape: the model at its layout.
        size: bytes per element.
        spec: whose modules.
    """

    shape: ModelShape
    size: Bytes
    spec: Spec = "transformer_engine"

    @property
    def e(self) -> int:
        """Bytes of an element."""
        return self.size.activation

    @property
    def _spread(self) -> int:
        """Over how many ranks sequence parallelism divides what is between the products."""
        return self.shape.tensor_model_parallel_size if self.shape.sequence_parallel else 1

    def norm(self, width: int) -> float:
        """A norm over `width` channels, per token: its input, what it divided by, and what is scaled."""
        if self.spec == "transformer_engine":
            return self.e * width + 4
        if self.shape.normalization == "LayerNorm":
            return self.e * width + 8
        return 4 * width + 4 + 4 * width

    def hidden(self) -> float:
        """The input of a product that tensor parallelism divides, per token of the whole sequence part."""
        return self.e * self.shape.hidden_size / self._spread

    def layer(self, *, experts: bool) -> float:
        """One layer, per token."""
        shape = self.shape
        norms = 2 + (2 if shape.post_norm else 0) - (0 if shape.pre_norm else 2) - int(shape.shared_pre_norm)
        between = norms * self.norm(shape.hidden_size) / self._spread
        mlp = self._experts() if experts else self.hidden() + self.mlp(shape.ffn_hidden_size or 0)
        return between + self.attention() + mlp

    def mlp(self, width: int) -> float:
        """An MLP of this width behind its input, per token."""
        own = width / self.shape.tensor_model_parallel_size
        if not self.shape.gated_linear_unit:
            return self.e * 2 * own
        return self.e * own * (3 if self.spec == "transformer_engine" else 5)

    def attention(self) -> float:
        """Attention with its input, per token."""
        return self.hidden() + (self._latent_attention() if self.shape.multi_latent_attention else self._attention())

    def _attention(self) -> float:
        shape, tensor = self.shape, self.shape.tensor_model_parallel_size
        query = shape.num_attention_heads * (shape.kv_channels or 0) / tensor
        pair = max(shape.num_query_groups or 0, tensor) * (shape.kv_channels or 0) / tensor
        # The fused product (values are a part of it), turned queries and keys, the sums of scores, and the output.
        kept = self.e * ((query + 2 * pair) + query + pair + query) + 4 * shape.num_attention_heads / tensor
        if shape.attention_output_gate:
            kept += 2 * self.e * query
        if shape.qk_layernorm:
            kept += self._qk_norm(query, pair)
        return kept

    def _qk_norm(self, query: float, pair: float) -> float:
        channels = self.shape.kv_channels or 1
        return self.norm(channels) / channels * (query + pair)

    def _latent_attention(self) -> float:
        shape, tensor = self.shape, self.shape.tensor_model_parallel_size
        heads = shape.num_attention_heads / tensor
        query = heads * (shape.qk_head_dim + shape.qk_pos_emb_head_dim)
        value = heads * shape.v_head_dim
        latents = (shape.q_lora_rank or 0) + shape.kv_lora_rank
        down = self.e * (latents + shape.qk_pos_emb_head_dim) + self.norm(latents) + self.e * latents
        return down + self.e * (3 * query + heads * shape.qk_head_dim + 2 * value) + 4 * heads

    def _experts(self) -> float:
        """A mixture of experts, per token: each copy of a token with its expert's MLP, and what all share."""
        shape = self.shape
        width = (shape.moe_ffn_hidden_size or 0) / shape.expert_tensor
        # Tokens of a rank go to ranks of other experts, and as many come: in balance a rank works on its own number.
        copies = shape.moe_router_topk * shape.expert_tensor / self._spread
        gated = (4 if self.spec == "transformer_engine" else 6) if shape.gated_linear_unit else 3
        kept = copies * self.e * (shape.hidden_size + gated * width)
        shared = shape.moe_shared_expert_intermediate_size
        if shared:
            kept += self.hidden() + self.mlp(shared)
        return kept + (self.e * shape.hidden_size + 8 * (shape.num_moe_experts or 0)) / self._spread

    def edge(self) -> float:
        """A layer's input alone, which full recomputation keeps; per token."""
        return self.e * self.shape.hidden_size / self._spread

    def output(self) -> float:
        """The final norm and the output layer's input, per token."""
        return self.norm(self.shape.hidden_size) / self._spread + self.hidden()

    def logits(self) -> float:
        """Logits with their loss, at the moment when most of it is there, per token.

        Three tensors of them: logits, the softmax in fp32 and a gradient; PyTorch's own operations copy one more.
        """
        vocabulary = self.shape.padded_vocab_size / self.shape.tensor_model_parallel_size
        return vocabulary * (12 if self.spec == "torch" else 2 * self.e + 4)
