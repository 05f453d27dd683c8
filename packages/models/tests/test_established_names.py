"""Families written against the field's established class names: they load unchanged and are proven as ours are."""

import dataclasses
import json

import pytest
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Phi3Config, Qwen3Config, Qwen3MoeConfig

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.model_bridge import MODEL_BRIDGES
from megatron.bridge.errors import BridgeError
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    ColumnParallelMapping,
    ConcatenatedQKVMapping,
    GatedMLPMapping,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
)
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
from megatron.bridge.testing import RankFailed, run_ranks
from megatron.bridge.testing.families import compare, expect_same_keys, family_case, refuse_without_any_rule

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
ATTENTION = "decoder.layers.*.self_attention"
MLP = "decoder.layers.*.mlp"


# What follows is written as the field's documentation has it.


def common(hf_norm_of_mlp="model.layers.*.post_attention_layernorm.weight"):
    return [
        AutoMapping(megatron_param="embedding.word_embeddings.weight", hf_param="model.embed_tokens.weight"),
        AutoMapping(megatron_param="output_layer.weight", hf_param="lm_head.weight"),
        AutoMapping(megatron_param="decoder.final_layernorm.weight", hf_param="model.norm.weight"),
        AutoMapping(
            megatron_param=f"{ATTENTION}.linear_qkv.layer_norm_weight", hf_param="model.layers.*.input_layernorm.weight"
        ),
        # The same norm as other layer specs name it.
        AutoMapping("decoder.layers.*.input_layernorm.weight", "model.layers.*.input_layernorm.weight"),
        AutoMapping(megatron_param=f"{MLP}.linear_fc1.layer_norm_weight", hf_param=hf_norm_of_mlp),
        AutoMapping(
            megatron_param=f"{ATTENTION}.linear_proj.weight", hf_param="model.layers.*.self_attn.o_proj.weight"
        ),
    ]


def separate_qkv(kind="weight"):
    return QKVMapping(
        megatron_param=f"{ATTENTION}.linear_qkv.{kind}",
        q=f"model.layers.*.self_attn.q_proj.{kind}",
        k=f"model.layers.*.self_attn.k_proj.{kind}",
        v=f"model.layers.*.self_attn.v_proj.{kind}",
    )


class AcmeBridge(MegatronModelBridge):
    """Qwen3's layout, under the name of a model that nobody offers."""

    def provider_bridge(self, hf_pretrained: PreTrainedCausalLM) -> GPTModelProvider:
        config = hf_pretrained.config
        return GPTModelProvider(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_key_value_heads,
            kv_channels=config.head_dim,
            layernorm_epsilon=config.rms_norm_eps,
            rotary_base=config.rope_parameters["rope_theta"],
            vocab_size=config.vocab_size,
            make_vocab_size_divisible_by=self.make_vocab_size_divisible_by(config.vocab_size),
            share_embeddings_and_output_weights=config.tie_word_embeddings,
            seq_length=config.max_position_embeddings,
            params_dtype=self.dtype_from_hf(config),
            normalization="RMSNorm",
            activation_func=F.silu,
            gated_linear_unit=True,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            qk_layernorm=True,
        )

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(
            *common(),
            separate_qkv(),
            separate_qkv("bias"),  # of another variant
            AutoMapping(f"{ATTENTION}.q_layernorm.weight", "model.layers.*.self_attn.q_norm.weight"),
            AutoMapping(f"{ATTENTION}.k_layernorm.weight", "model.layers.*.self_attn.k_norm.weight"),
            GatedMLPMapping(
                megatron_param=f"{MLP}.linear_fc1.weight",
                gate="model.layers.*.mlp.gate_proj.weight",
                up="model.layers.*.mlp.up_proj.weight",
            ),
            AutoMapping(f"{MLP}.linear_fc2.weight", "model.layers.*.mlp.down_proj.weight"),
        )


class AcmeFusedBridge(MegatronModelBridge):
    """Phi-3's layout; the base class reads the sizes, and the kinds of mapping are stated."""

    def provider_bridge(self, hf_pretrained):
        provider = super().provider_bridge(hf_pretrained)
        provider.normalization = "RMSNorm"
        provider.activation_func = F.silu
        provider.gated_linear_unit = True
        provider.add_bias_linear = False
        provider.hidden_dropout = 0.0
        return provider

    def mapping_registry(self):
        return MegatronMappingRegistry(
            *common()[:-1],
            RowParallelMapping(f"{ATTENTION}.linear_proj.weight", "model.layers.*.self_attn.o_proj.weight"),
            ConcatenatedQKVMapping(
                megatron_param=f"{ATTENTION}.linear_qkv.weight", hf_param="model.layers.*.self_attn.qkv_proj.weight"
            ),
            ColumnParallelMapping(f"{MLP}.linear_fc1.weight", "model.layers.*.mlp.gate_up_proj.weight"),
            RowParallelMapping(f"{MLP}.linear_fc2.weight", "model.layers.*.mlp.down_proj.weight"),
        )


class AcmeMoeBridge(AcmeBridge):
    """Qwen3-MoE's layout: experts by their second wildcard."""

    def provider_bridge(self, hf_pretrained):
        provider = super().provider_bridge(hf_pretrained)
        config = hf_pretrained.config
        provider.num_moe_experts = config.num_experts
        provider.moe_router_topk = config.num_experts_per_tok
        provider.moe_ffn_hidden_size = config.moe_intermediate_size
        provider.moe_router_load_balancing_type = "none"
        provider.moe_token_dispatcher_type = "alltoall"
        provider.moe_router_pre_softmax = False
        return provider

    def mapping_registry(self):
        return MegatronMappingRegistry(
            *common(),
            separate_qkv(),
            ReplicatedMapping(f"{ATTENTION}.q_layernorm.weight", "model.layers.*.self_attn.q_norm.weight"),
            ReplicatedMapping(f"{ATTENTION}.k_layernorm.weight", "model.layers.*.self_attn.k_norm.weight"),
            AutoMapping("decoder.layers.*.pre_mlp_layernorm.weight", "model.layers.*.post_attention_layernorm.weight"),
            AutoMapping(f"{MLP}.router.weight", "model.layers.*.mlp.gate.weight"),
            GatedMLPMapping(
                megatron_param=f"{MLP}.experts.linear_fc1.weight*",
                gate="model.layers.*.mlp.experts.*.gate_proj.weight",
                up="model.layers.*.mlp.experts.*.up_proj.weight",
            ),
            AutoMapping(f"{MLP}.experts.linear_fc2.weight*", "model.layers.*.mlp.experts.*.down_proj.weight"),
            # The same experts as modules of their own.
            AutoMapping(
                f"{MLP}.experts.local_experts.*.linear_fc2.weight", "model.layers.*.mlp.experts.*.down_proj.weight"
            ),
        )


# The tests.

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
FAMILIES = {
    "AcmeForCausalLM": (AcmeBridge, Qwen3Config(**SIZES, head_dim=32)),
    "AcmeTiedForCausalLM": (AcmeBridge, Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True)),
    "AcmeFusedForCausalLM": (AcmeFusedBridge, Phi3Config(**SIZES)),
    "AcmeMoeForCausalLM": (AcmeMoeBridge, Qwen3MoeConfig(**SIZES, **MOE, head_dim=16)),
}
MIXTURES = {"AcmeMoeForCausalLM"}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    found = {}
    for architecture, (bridge, config) in FAMILIES.items():
        MegatronModelBridge.register_bridge(source=architecture, target=GPTModel)(bridge)
        found[architecture] = family_case(config, tmp_path_factory.mktemp(architecture), architecture)
        state_architecture(found[architecture].folder, architecture)
    yield found
    for architecture in FAMILIES:
        MODEL_BRIDGES.unregister(architecture)


def state_architecture(folder, architecture):
    """A model of a class that only the other side's code knows."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [architecture]}))


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2", "ep2", "etp2"])
def test_logits_and_round_trip(cases, layout):
    names = MIXTURES if layout.startswith("e") else FAMILIES
    compare([cases[name] for name in names], layout)


@pytest.mark.parametrize(("architecture", "rules"), [("AcmeTiedForCausalLM", 10), ("AcmeMoeForCausalLM", 12)])
def test_without_any_one_mapping_nothing_is_converted(cases, architecture, rules):
    run_ranks(1, expect_same_keys, cases[architecture])
    assert run_ranks(1, refuse_without_any_rule, cases[architecture]) == [rules]


def test_a_deleted_mapping_is_named(cases, monkeypatch):
    mapped = AcmeBridge.mapping_registry
    monkeypatch.setattr(AcmeBridge, "mapping_registry", lambda self: without(mapped(self), "linear_fc2"))
    with pytest.raises(RankFailed, match=r"mlp\.linear_fc2\.weight[\s\S]*model\.layers\.0\.mlp\.down_proj\.weight"):
        run_ranks(1, load, cases["AcmeForCausalLM"].folder)


def without(table, part):
    return dataclasses.replace(
        table, rules=tuple(rule for rule in table.rules if f"{part}.weight" not in rule.megatron)
    )


def load(folder, **layout):
    return len(AutoBridge.from_hf_pretrained(folder).to_megatron_model(**layout))


def test_a_wrong_division_is_refused_where_it_matters(cases, monkeypatch):
    wrong = ReplicatedMapping(f"{MLP}.linear_fc2.weight", "model.layers.*.mlp.down_proj.weight")
    table = AcmeBridge.mapping_registry

    def mapped(self):
        rest = without(table(self), "linear_fc2")
        return type(rest).of(rest.rules, wrong.rule(self.provider_bridge()), tied=rest.tied)

    monkeypatch.setattr(AcmeBridge, "mapping_registry", mapped)
    folder = cases["AcmeForCausalLM"].folder
    assert run_ranks(1, load, folder) == [1]
    with pytest.raises(RankFailed, match=r"shapes that disagree[\s\S]*mlp\.linear_fc2\.weight \[64, 48\]"):
        run_ranks(2, lambda: load(folder, tensor_model_parallel_size=2))


def test_a_changed_model_exports_its_own_configuration(cases, tmp_path):
    folder = cases["AcmeForCausalLM"].folder

    def export():
        bridge = AutoBridge.from_hf_pretrained(folder)
        model = bridge.to_megatron_model(load_weights=False, num_layers=2)
        bridge.save_hf_pretrained(model, tmp_path / "out")
        return True

    assert run_ranks(1, export) == [True]
    stated = json.loads((tmp_path / "out/config.json").read_text())
    assert stated == json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2}


def provider():
    return GPTModelProvider(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=131, gated_linear_unit=True)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (lambda: AutoMapping("decoder.layers.*.mixer.in_proj.weight", "m.*.w"), "'in_proj' is not known; .*Replicated"),
        (lambda: AutoMapping("vision.**", "visual.**"), "at most two wildcards"),
        (lambda: AutoMapping("a.*.b.*.c.*.router.weight", "d.*.*.*"), "at most two wildcards"),
        (lambda: AutoMapping("decoder.layers.*.mlp.router.weight", "m.w"), "must use the same indices"),
        (lambda: AutoMapping("output_layer.weight", "w", permute_dims=(2, 0, 1)), "permute_dims"),
    ],
)
def test_a_mapping_that_cannot_be_expressed_is_refused_by_name(mapping, message):
    with pytest.raises(BridgeError, match=message):
        mapping().rule(provider())


def test_a_matrix_stored_transposed_is_turned():
    rule = AutoMapping("decoder.layers.*.mlp.linear_fc2.weight", "h.*.c_proj.weight", permute_dims=(1, 0)).rule(
        provider()
    )
    assert rule.transform.hf_shapes((64, 96)) == [(96, 64)]


def test_a_list_of_mappings_is_refused():
    with pytest.raises(BridgeError, match=r"MegatronMappingRegistry\(\*mappings\)"):
        MegatronMappingRegistry([separate_qkv()])


def test_a_provider_attribute_that_does_not_exist_is_refused(cases):
    class Misspelt(AcmeFusedBridge):
        def provider_bridge(self, hf_pretrained):
            provider = super().provider_bridge(hf_pretrained)
            provider.qk_layernorms = True
            return provider

    with pytest.raises(
        BridgeError, match=r"Misspelt\.provider_bridge sets 'qk_layernorms'.*did you mean 'qk_layernorm'"
    ):
        Misspelt(FAMILIES["AcmeFusedForCausalLM"][1]).provider_bridge()
