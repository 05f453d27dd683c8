"""InternLM2 in plain PyTorch, after the paper (arXiv:2403.17297): what the plugin is compared with."""

import torch
import torch.nn.functional as F
from internlm2_bridge.config import InternLM2Config
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.groups = config.num_key_value_heads
        self.queries = config.num_attention_heads // self.groups
        self.channels = config.hidden_size // config.num_attention_heads
        rows = (self.queries + 2) * self.groups * self.channels
        self.wqkv = nn.Linear(config.hidden_size, rows, bias=config.bias)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        rows = self.wqkv(x).view(batch, length, self.groups, self.queries + 2, self.channels)
        query = rows[..., : self.queries, :].flatten(2, 3).transpose(1, 2)
        key, value = (rows[..., self.queries + which, :].transpose(1, 2) for which in (0, 1))
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, input_ids):
        x = self.tok_embeddings(input_ids)
        cos, sin = self.rotary(x, torch.arange(input_ids.shape[1])[None])
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class InternLM2ForCausalLM(PreTrainedModel):
    config_class = InternLM2Config

    def __init__(self, config):
        super().__init__(config)
        self.model = Model(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=self.output(self.model(input_ids)))


AutoModelForCausalLM.register(InternLM2Config, InternLM2ForCausalLM)
