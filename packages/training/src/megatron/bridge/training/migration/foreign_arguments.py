"""Megatron-LM's arguments about what is no part of pretraining here; each is refused by its name."""

from megatron.bridge.training.migration.rules import Rule, Table, refused

# How families of such arguments begin -> what they are about.
_FAMILIES = {
    "inference-": "generation: see megatron-bridge generate",
    "mamba-inference-": "generation: see megatron-bridge generate",
    "rl-": "reinforcement learning: train elsewhere and refit by AutoBridge.export_hf_weights",
    "grpo-": "reinforcement learning: train elsewhere and refit by AutoBridge.export_hf_weights",
    "langrl-": "reinforcement learning: train elsewhere and refit by AutoBridge.export_hf_weights",
    "dino-": "pretraining of vision models",
    "retriever-": "retrieval models",
    "fim-": "fill-in-the-middle data: a dataset of your own can make it (megatron.bridge.datasets)",
    "inprocess-": "restarts within the process: the launchers slurm and torchrun restart ranks",
    "fault-injector-": "faults on purpose",
    "kitchen-": "the Kitchen library",
    "use-kitchen": "the Kitchen library",
    "dsa-": "sparse attention of DeepSeek-V3.2",
    "mup-": "maximal update parametrisation",
    "use-mup": "maximal update parametrisation",
    "muon-": "the optimizer Muon; 'adam' (AdamW) is supported",
    "lion-": "the optimizer Lion; 'adam' (AdamW) is supported",
    "sgd-": "the optimizer SGD; 'adam' (AdamW) is supported",
    "cuda-graph": "CUDA graphs",
    "fsdp-": "FSDP; use --use-distributed-optimizer",
    "megatron-fsdp-": "FSDP; use --use-distributed-optimizer",
    "torch-fsdp2-": "FSDP; use --use-distributed-optimizer",
    "use-megatron-fsdp": "FSDP; use --use-distributed-optimizer",
    "use-torch-fsdp2": "FSDP; use --use-distributed-optimizer",
    "logits-": "logits on disk for distillation",
    "moe-paged-stash": "stashes of experts' activations",
    "moe-routing-trace-": "traces of routing",
    "moe-hybridep-": "the dispatcher HybridEP",
    "moe-ncclep-": "the dispatcher NCCL EP",
    "qk-clip": "clipping of queries and keys by the optimizer",
    "non-persistent-": "checkpoints that are not kept",
    "replication": "checkpoints that are not kept",
    "ict-": "retrieval models",
    "biencoder-": "retrieval models",
    "bert-": "BERT",
    "indexer-": "retrieval models",
    "img-": "pretraining of vision models",
    "vision-": "pretraining of vision models",
    "relative-attention-": "relative positions of T5",
    "ft-": "NVRx's fault tolerance",
    "tiktoken-": "tokenizers that are not Hugging Face's; name the same tokenizer's folder by --tokenizer",
    "tokenizer-": "tokenizers that are not Hugging Face's; name the same tokenizer's folder by --tokenizer",
    "save-": "tensors on disk for debugging",
    "ckpt-convert-": "conversion of checkpoints: see megatron-bridge convert",
}
_SINGLE = """
    activation-offload-fraction adlr-autoresume adlr-autoresume-interval allow-ambiguous-pad-tokens
    batch-invariant-mode block-data-path calc-ft-timeouts chat-template classes-fraction config-logger-dir
    cpu-offloading-num-layers cpu-offloading-retain-pinned-cpu-buffers create-all-gather-group
    data-parallel-sharding-strategy data-per-class-fraction dataloader-inter-document-masking
    ddp-param-name-patterns-for-fp32-local-accumulation ddp-reduce-scatter-with-fp32-accumulation
    decode-only-cuda-graphs decoder-num-layers decoder-seq-length decrease-batch-size-if-needed
    delay-offload-until-cuda-graph delta-offload-bytes-across-pp-ranks disable-bf16-reduced-precision-matmul
    disable-clone-scatter-output-in-embedding disable-dsa-indexer-rotate-activation
    disable-dsa-indexer-scoring-relu disable-msc disable-strict-fsdp-dtensor-load disable-symmetric-registration
    disable-tokenizer-sentencepiece-ignore-extra-whitespaces disable-tp-comm-split-ag disable-tp-comm-split-rs
    dump-param-to-param-group-map embedding-path enable-chunked-prefill enable-cuda-graph enable-ft-package
    enable-full-sharding-in-hsdp enable-msc encoder-num-layers ep-overlap-early-attn-memory-release
    eval-global-batch-size eval-micro-batch-size evidence-data-path exit-signal
    exit-signal-handler-for-dataloader exit-signal-handler-for-training expert-tensor-parallel-num-weight-shards
    external-cuda-graph fake-process-group fine-grained-activation-offloading
    fine-grained-offloading-max-inflight-offloads flash-attention-version flash-decode fp4-quantizer-factory
    fp8-output-proj fp8-quantizer-factory freeze-all-layers full-validation fused-residual-rmsnorm head-lr-mult
    hybrid-context-parallel init-model-with-meta-device iter-per-epoch iterations-to-skip
    keep-fp8-transpose-cache load-main-params-from-ckpt mask-factor mask-prob mask-type
    max-seqlen-per-dp-cp-rank max-tokens-to-oom min-offloaded-tensor-size mlp-chunks-for-prefill
    mlp-chunks-for-training moe-enable-routing-replay moe-expert-rank-capacity-factor
    moe-mlp-glu-interleave-size moe-pad-experts-for-cuda-graph-inference moe-permute-fusion-into-hybridep
    moe-router-force-biased moe-router-quantile-balancing-ema moe-shared-expert-glu-interleave-size
    moe-single-grouped-bias moe-single-grouped-weight moe-upcycling-granularity moe-use-upcycling
    mtp-detach-heads mtp-standalone mtp-use-repeated-layer multiple-validation-sets nccl-all-reduce-for-prefill
    no-clone-scatter-output-in-embedding no-data-sharding no-dsa-indexer-rotate-activation
    no-dsa-indexer-scoring-relu no-pin-cpu-grads no-pin-cpu-params no-strict-fsdp-dtensor-load
    no-tokenizer-sentencepiece-ignore-extra-whitespaces no-tp-comm-split-ag no-tp-comm-split-rs
    no-use-layer-wise-param-layout no-weight-decay-cond-type null-tokenizer-pad-id num-channels num-classes
    num-speculative-tokens object-storage-cache-path offload-modules optimizer-cpu-offload optimizer-cuda-graph
    optimizer-offload-fraction outer-dp-sharding-strategy output-bert-embeddings overlap-cpu-optimizer-d2h-h2d
    overlap-dispatch-backward-with-experts-wgrad overlap-p2p-communication-warmup-flush
    overlap-param-gather-with-optimizer-step override-ckpt-iteration patch-dim perform-rl-step
    phase-transition-iterations pipeline-model-parallel-comm-backend pytorch-profiler-collect-callstack
    pytorch-profiler-collect-chakra query-in-block-prob refit-method reuse-grad-buf-for-mxfp8-param-ag
    run-workload-inspector-server sample-rate short-seq-prob start-eval-at-iter step-batch-size-schedule
    suggested-communication-unit-size swin-backbone-type symmetric-ar-type te-precision-config-file
    tensor-parallel-num-weight-shards test-mode titles-data-path tp-comm-overlap-cfg
    use-fused-weighted-squared-relu use-grouped-gemm-for-dense-mlp use-grouped-gemm-for-shared-expert
    use-legacy-static-engine use-nccl-ub use-one-sent-docs use-ring-exchange-p2p
    use-same-sampling-seed-across-dp-ranks use-te-activation-func use-torch-optimizer-for-cpu-offload
    use-transformer-engine-op-fuser validation-set-names yaml-cfg
"""
FOREIGN: Table = refused(
    "it has no counterpart in pretraining here; leave it out, or stay with Megatron-LM", _SINGLE
) | refused("tune by megatron-bridge finetune, whose data are conversations", "sft sft-tokenizer-prompt-format")


def of_a_family(name: str) -> Rule | None:
    """The rule of an argument that is known by how it begins."""
    plain = name.removeprefix("no-")
    about = next((what for start, what in _FAMILIES.items() if plain.startswith(start)), None)
    return None if about is None else Rule(refused=f"it is about {about}")
