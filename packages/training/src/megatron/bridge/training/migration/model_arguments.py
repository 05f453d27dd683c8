"""Megatron-LM's arguments about the model, its parallel layout and its precision."""

from megatron.bridge.training.migration.patterns import pattern, window
from megatron.bridge.training.migration.rules import Table, left_out, moved, refused, same, together

_SIZES = """
    num-layers hidden-size ffn-hidden-size num-attention-heads kv-channels max-position-embeddings
    make-vocab-size-divisible-by vocab-size init-method-std embedding-init-method-std attention-dropout hidden-dropout
    rotary-percent softmax-type normalization activation-func-clamp-value glu-linear-offset
    mtp-num-layers mtp-loss-scaling-factor
"""
_EXPERTS = """
    moe-ffn-hidden-size moe-shared-expert-intermediate-size moe-latent-size moe-router-topk moe-router-num-groups
    moe-router-group-topk moe-router-topk-scaling-factor moe-router-score-function moe-router-bias-update-rate
    moe-router-dtype moe-z-loss-coeff moe-input-jitter-eps moe-token-dispatcher-type moe-flex-dispatcher-backend
    moe-expert-capacity-factor moe-token-drop-policy moe-deepep-num-sms moe-flex-dispatcher-num-sms
"""
_EXPERT_FLAGS = """
    moe-grouped-gemm moe-shared-expert-overlap moe-shared-expert-gate moe-router-pre-softmax
    moe-router-enable-expert-bias moe-router-force-load-balancing moe-router-fusion moe-router-padding-for-fp8
    moe-router-padding-for-quantization moe-pad-expert-input-to-capacity moe-permute-fusion moe-layer-recompute
    moe-enable-deepep moe-apply-probs-on-input moe-per-layer-logging overlap-moe-expert-parallel-comm
"""
_FLAGS = """
    add-qkv-bias apply-residual-connection-post-layernorm apply-query-key-layer-scaling attention-softmax-in-fp32
    fp32-residual-connection qk-layernorm qk-l2-norm rotary-interleaved attention-output-gate fp16-lm-cross-entropy
    calculate-per-token-loss deterministic-mode use-cpu-initialization cross-entropy-loss-fusion
"""
_PARALLEL = """
    tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size expert-model-parallel-size
    expert-tensor-parallel-size
"""
_PARALLEL_FLAGS = """
    tp-comm-overlap tp-comm-overlap-rs-dgrad defer-embedding-wgrad-compute distribute-saved-activations
    account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split high-priority-a2a-comm-stream
"""
_LOW_BITS = """
    fp8-recipe fp8-margin fp8-interval fp8-amax-history-len fp8-amax-compute-algo num-layers-at-start-in-bf16
    num-layers-at-end-in-bf16 fp4-recipe
"""

MODEL: Table = {
    **same("model", _SIZES),
    **same("model", _FLAGS, "none"),
    **same("model", _EXPERTS),
    **same("model", _EXPERT_FLAGS, "none"),
    **same("model", _PARALLEL),
    **same("model", _PARALLEL_FLAGS, "none"),
    **same("model", "recompute-granularity recompute-method recompute-num-layers tp-comm-bootstrap-backend"),
    **same("model", "wgrad-deferral-limit cross-entropy-fusion-impl attention-backend"),
    **same("model", "recompute-modules", "many", list),
    **same("model", "mrope-section hierarchical-context-parallel-sizes", "many"),
    **same("model", _LOW_BITS),
    **same("model", "first-last-layers-bf16", "none"),
    **same("model", "moe-layer-freq window-attn-skip-freq no-rope-freq", read=pattern),
    **same("model", "window-size", read=window),
    **moved(
        {
            "norm-epsilon": "model.layernorm_epsilon",
            "num-experts": "model.num_moe_experts",
            "decoder-first-pipeline-num-layers": "model.num_layers_in_first_pipeline_stage",
            "decoder-last-pipeline-num-layers": "model.num_layers_in_last_pipeline_stage",
            "microbatch-group-size-per-virtual-pipeline-stage": "model.microbatch_group_size_per_vp_stage",
            "num-virtual-stages-per-pipeline-rank": "model.virtual_pipeline_model_parallel_size",
            "fp8-format": "model.fp8",
            "fp4-format": "model.fp4",
        }
    ),
    **moved(
        {
            "apply-layernorm-1p": "model.layernorm_zero_centered_gamma",
            "delay-wgrad-compute": ("model.delay_wgrad_compute", "ddp.delay_wgrad_compute"),
            "fp8-param-gather": ("model.fp8_param", "ddp.fp8_param_gather"),
            "fp4-param-gather": ("model.fp4_param", "ddp.fp4_param_gather"),
        },
        "none",
    ),
    **moved(
        {
            "disable-bias-linear": "model.add_bias_linear",
            "untie-embeddings-and-output-weights": "model.share_embeddings_and_output_weights",
            "no-initialization": "model.perform_initialization",
            "no-fp8-wgrad": "model.fp8_wgrad",
            "disable-fp8-wgrad": "model.fp8_wgrad",
            "no-tp-comm-bulk-dgrad": "model.tp_comm_bulk_dgrad",
            "disable-tp-comm-bulk-dgrad": "model.tp_comm_bulk_dgrad",
            "no-tp-comm-bulk-wgrad": "model.tp_comm_bulk_wgrad",
            "disable-tp-comm-bulk-wgrad": "model.tp_comm_bulk_wgrad",
            "no-tp-comm-overlap-ag": "model.tp_comm_overlap_ag",
            "disable-tp-comm-overlap-ag": "model.tp_comm_overlap_ag",
            "no-tp-comm-overlap-rs": "model.tp_comm_overlap_rs",
            "disable-tp-comm-overlap-rs": "model.tp_comm_overlap_rs",
        },
        "none",
        value=False,
    ),
    **together("position-embedding-type rotary-base rope-scaling-factor rotary-seq-len-interpolation-factor", "one"),
    **together("use-rotary-position-embeddings no-position-embedding use-rope-scaling", "none"),
    **together("swiglu squared-relu quick-geglu group-query-attention sequence-parallel bf16 fp16", "none"),
    **together("num-query-groups num-layers-per-virtual-pipeline-stage transformer-impl", "one"),
    **together("recompute-activations", "none"),
    **together("moe-router-load-balancing-type moe-aux-loss-coeff cp-comm-type", "many"),
    **left_out(
        "kernels are chosen by the layer spec; fusions are fields of the model, e.g. model.bias_activation_fusion",
        """
        no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion no-masked-softmax-fusion no-rope-fusion
        no-gradient-accumulation-fusion no-persist-layer-norm use-flash-attn onnx-safe
        """,
    ),
    **left_out("models are Megatron-Core's in any case", "use-mcore-models"),
    **refused(
        "pipeline stages of an interleaved schedule always overlap their messages here; drop it",
        "no-overlap-p2p-communication",
    ),
    **refused(
        "begin from the model's Hugging Face configuration instead: a recipe of it (megatron-bridge recipes ls), or "
        "AutoBridge.from_hf_config",
        """
        multi-latent-attention q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim
        rotary-scaling-factor mscale mscale-all-dim rope-type cache-mla-latents mla-down-proj-fusion
        yarn-original-max-position-embeddings yarn-beta-fast yarn-beta-slow yarn-correction-range-round-to-int
        no-yarn-correction-range-round-to-int
        hybrid-layer-pattern hybrid-override-pattern is-hybrid-model mtp-hybrid-override-pattern
        mamba-state-dim mamba-head-dim mamba-num-groups mamba-num-heads mamba-training-ssm-states-dtype
        disable-mamba-mem-eff-path
        linear-attention-freq linear-conv-kernel-dim linear-key-head-dim linear-value-head-dim linear-num-key-heads
        linear-num-value-heads experimental-attention-variant
        heterogeneous-layers-config-path heterogeneous-layers-config-encoded-json
        """,
    ),
    **refused(
        "set the field in Python, on the provider: model.init_method, model.activation_func, a layer spec of your own",
        "init-method-xavier-uniform openai-gelu spec pipeline-model-parallel-layout",
    ),
}
