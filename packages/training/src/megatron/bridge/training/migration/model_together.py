"""What several of Megatron-LM's arguments mean together for the model."""

from collections.abc import Callable

from megatron.bridge.training.migration.rules import number
from megatron.bridge.training.migration.translating import Translating


def _activation(t: Translating) -> None:
    given = [name for name in ("swiglu", "squared-relu", "quick-geglu") if t.has(name)]
    if len(given) > 1:
        t.problems.append(f"--{' and --'.join(given)} are both given; an MLP has one activation")
        return
    function = {
        "swiglu": "torch.nn.functional.silu",
        "squared-relu": "megatron.core.activations.squared_relu",
        "quick-geglu": "megatron.core.fusions.fused_bias_geglu.quick_gelu",
    }
    for name in given:
        t.values["model.activation_func"] = function[name]
    if t.has("swiglu", "quick-geglu"):
        t.values["model.gated_linear_unit"] = True
    hidden = t.number("hidden-size")
    if t.has("swiglu") and not t.has("ffn-hidden-size") and isinstance(hidden, int):
        # As Megatron-LM rounds it; without a gate it is four times the hidden size, which is the field's own default.
        t.values["model.ffn_hidden_size"] = int((4 * hidden * 2 / 3) / 64) * 64


def _query_groups(t: Translating) -> None:
    if t.has("group-query-attention") and t.has("num-query-groups"):
        t.values["model.num_query_groups"] = t.number("num-query-groups")
    elif t.has("num-query-groups"):
        t.problems.append(
            "--num-query-groups means nothing to Megatron-LM without --group-query-attention; give both or neither"
        )


def _positions(t: Translating) -> None:
    kind = "rope" if t.has("use-rotary-position-embeddings") else t.word("position-embedding-type", "learned_absolute")
    if kind not in ("rope", "learned_absolute", "none", "mrope"):
        t.problems.append(
            f"--position-embedding-type {kind} is not supported here; rope, learned_absolute and none are"
        )
        return
    if t.has("no-position-embedding") and kind != "rope":
        t.problems.append("--no-position-embedding: write --position-embedding-type none")
    t.values["model.position_embedding_type"] = kind
    base, factor = float(t.number("rotary-base", 10000)), t.number("rotary-seq-len-interpolation-factor")
    if t.has("rotary-base"):
        t.values["model.rotary_base"] = base
    if factor is not None:
        scaling = {"rope_type": "linear", "factor": float(factor)}
        t.values["model.rope_parameters"] = {"rope_theta": base, **scaling}
    if t.has("use-rope-scaling"):
        scaling = {"rope_type": "llama3", "factor": float(t.number("rope-scaling-factor", 8.0))}
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        t.values["model.rope_parameters"] = {"rope_theta": base, **scaling}
        if factor is not None:
            t.problems.append("--use-rope-scaling and --rotary-seq-len-interpolation-factor are both given; keep one")


def _precision(t: Translating) -> None:
    if t.has("bf16") and t.has("fp16"):
        t.problems.append("--bf16 and --fp16 are both given; keep one")
    for flag, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if t.has(flag):
            t.values |= {f"model.{flag}": True, "model.params_dtype": dtype, "model.pipeline_dtype": dtype}
    in_fp32 = t.has("accumulate-allreduce-grads-in-fp32") or t.has("bf16")
    if t.has("bf16") and t.has("grad-reduce-in-bf16"):
        in_fp32 = False
    if in_fp32:
        t.values["ddp.grad_reduce_in_fp32"] = True


def _layout(t: Translating) -> None:
    if t.has("sequence-parallel"):
        if t.number("tensor-model-parallel-size", 1) == 1:
            t.notes.append("--sequence-parallel: left out, as by Megatron-LM, without tensor parallelism")
        else:
            t.values["model.sequence_parallel"] = True
    if t.has("num-layers-per-virtual-pipeline-stage"):
        stages = t.number("pipeline-model-parallel-size", 1) * t.number("num-layers-per-virtual-pipeline-stage")
        layers = t.number("num-layers", 0)
        layers += t.has("account-for-embedding-in-pipeline-split") + t.has("account-for-loss-in-pipeline-split")
        if stages == 0 or layers % stages:
            t.problems.append(
                f"--num-layers-per-virtual-pipeline-stage: {layers} layers are not divided by {stages}, stages x layers"
            )
        elif layers > stages:
            t.values["model.virtual_pipeline_model_parallel_size"] = layers // stages
    if t.has("cp-comm-type"):
        kinds = list(t.words["cp-comm-type"])
        t.values["model.cp_comm_type"] = kinds[0] if len(kinds) == 1 else kinds


def _experts(t: Translating) -> None:
    for name in ("moe-router-load-balancing-type", "moe-aux-loss-coeff"):
        if t.has(name):
            values = [number(word) for word in t.words[name]]
            t.values[f"model.{name.replace('-', '_')}"] = values[0] if len(values) == 1 else values


def _layer_spec(t: Translating) -> None:
    kind = t.word("transformer-impl", "transformer_engine")
    if kind == "local":
        t.values["model.layer_spec"] = "local"
    elif kind != "transformer_engine":
        t.problems.append(f"--transformer-impl {kind} is not for training; use transformer_engine or local")
    if t.has("apply-query-key-layer-scaling"):
        t.values["model.attention_softmax_in_fp32"] = True  # as Megatron-LM sees to
    if t.has("recompute-activations"):
        t.values["model.recompute_granularity"] = "selective"


MODEL_TOGETHER: tuple[Callable[[Translating], None], ...] = (
    _activation,
    _query_groups,
    _positions,
    _precision,
    _layout,
    _experts,
    _layer_spec,
)
