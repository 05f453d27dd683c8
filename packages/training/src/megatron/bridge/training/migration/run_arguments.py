"""Megatron-LM's arguments about training: data, optimizer, schedule, checkpoints, reports, ranks."""

from megatron.bridge.training.migration.rules import Table, left_out, moved, refused, same, together


def _minutes(word: str) -> float:
    """In seconds."""
    return 60.0 * float(word)


def _torch_dtype(word: str) -> str:
    """By torch's name."""
    return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "uint8"}.get(word, word)


_OPTIMIZER = """
    lr min-lr decoupled-lr decoupled-min-lr weight-decay clip-grad adam-beta1 adam-beta2 adam-eps loss-scale
    initial-loss-scale min-loss-scale loss-scale-window hysteresis
"""
_SCHEDULER = """
    lr-decay-style lr-decay-iters lr-decay-samples lr-wsd-decay-iters lr-wsd-decay-samples lr-wsd-decay-style
    lr-warmup-fraction lr-warmup-iters lr-warmup-samples lr-warmup-init start-weight-decay end-weight-decay
    weight-decay-incr-style
"""
_BOTH = ("ddp", "optimizer")

RUN: Table = {
    # data
    **moved({"data-path": "dataset.data_paths", "train-data-path": "dataset.train_data_paths"}, "many", read=list),
    **moved(
        {"valid-data-path": "dataset.valid_data_paths", "test-data-path": "dataset.test_data_paths"}, "many", read=list
    ),
    **same("dataset", "split", read=str),
    **moved({"data-cache-path": "dataset.path_to_cache"}, read=str),
    **moved({"mock-data": "dataset.mock"}, "none"),
    **same("dataset", "reset-position-ids reset-attention-mask eod-mask-loss", "none"),
    **same("dataset", "num-workers dataloader-type"),
    **moved(dict.fromkeys(("seq-length", "encoder-seq-length"), ("model.seq_length", "dataset.sequence_length"))),
    **together("tokenizer-type tokenizer-model null-tokenizer-eod-id vocab-file merge-file", "one"),
    **same("tokenizer", "trust-remote-code", "none"),
    # steps
    **same("train", "train-iters train-samples micro-batch-size global-batch-size eval-iters eval-interval"),
    **same("train", "exit-interval exit-duration-in-mins"),
    **same("train", "rampup-batch-size", "many"),
    **same("train", "exit-signal-handler skip-train", "none"),
    # optimizer
    **same("optimizer", _OPTIMIZER),
    **same("optimizer", "optimizer", read=str),
    **same("optimizer", "use-precision-aware-optimizer apply-wd-to-qk-layernorm log-num-zeros-in-grad", "none"),
    **same("optimizer", "main-grads-dtype main-params-dtype exp-avg-dtype exp-avg-sq-dtype", read=_torch_dtype),
    **same("scheduler", _SCHEDULER),
    **moved(
        {
            "use-distributed-optimizer": tuple(f"{section}.use_distributed_optimizer" for section in _BOTH),
            "overlap-param-gather": tuple(f"{section}.overlap_param_gather" for section in _BOTH),
            "overlap-grad-reduce": "ddp.overlap_grad_reduce",
            "check-for-large-grads": "ddp.check_for_large_grads",
            "ddp-average-in-collective": "ddp.average_in_collective",
            "ddp-pad-buckets-for-high-nccl-busbw": "ddp.pad_buckets_for_high_nccl_busbw",
        },
        "none",
    ),
    **moved({"ddp-bucket-size": "ddp.bucket_size", "ddp-num-buckets": "ddp.num_buckets"}),
    **same("ddp", "num-distributed-optimizer-instances"),
    **together("accumulate-allreduce-grads-in-fp32 grad-reduce-in-bf16", "none"),
    # checkpoints
    **together("load save pretrained-checkpoint", "one"),
    **together("finetune", "none"),
    **same("checkpoint", "save-interval ckpt-step"),
    **moved({"persistent-save-interval": "checkpoint.save_interval"}),
    **same("checkpoint", "async-save", "none"),
    **moved({"no-load-optim": "checkpoint.load_optim", "no-load-rng": "checkpoint.load_rng"}, "none", value=False),
    **together("ckpt-format", "one"),
    # reports
    **same("logger", "log-interval"),
    **same("logger", "tensorboard-dir wandb-project wandb-entity wandb-exp-name wandb-save-dir", read=str),
    **moved({"profile": "profiling.use_nsys_profiler"}, "none"),
    **same("profiling", "use-pytorch-profiler record-memory-history record-shapes", "none"),
    **moved({"pytorch-profiler-collect-shapes": "profiling.record_shapes"}, "none"),
    **same("profiling", "profile-step-start profile-step-end"),
    **same("profiling", "profile-ranks", "many"),
    # ranks and random numbers
    **moved({"seed": ("rng.seed", "dataset.random_seed")}),
    **same("rng", "te-rng-tracker data-parallel-random-init", "none"),
    **same("dist", "distributed-backend"),
    **moved({"distributed-timeout-minutes": "dist.timeout_seconds"}, read=_minutes),
    **left_out(
        "every checkpoint is Megatron-Core's torch_dist, written and read by all ranks, verified, and resumed exactly",
        """
        use-dist-ckpt dist-ckpt-format auto-detect-ckpt-format dist-ckpt-strictness ckpt-assume-constant-structure
        ckpt-fully-parallel-save no-ckpt-fully-parallel-save ckpt-fully-parallel-load dist-ckpt-workers
        ckpt-fully-parallel-save-process-group ckpt-fully-parallel-load-process-group
        ckpt-fully-parallel-load-exchange-algo use-persistent-ckpt-worker async-strategy async-ckpt-use-cpu-shm
        async-ckpt-cpu-priority async-ckpt-io-priority dist-ckpt-optim-fully-reshardable
        distrib-optim-fully-reshardable-mem-efficient verify-integrity exit-on-missing-checkpoint no-save-optim
        no-save-rng no-ckpt-load-validate-sharding-integrity disable-ckpt-load-validate-sharding-integrity
        dist-ckpt-save-pre-mcore-014 no-stream-ckpt-dequant disable-stream-ckpt-dequant
        """,
    ),
    **left_out(
        "on a resume the schedule is that of the configuration",
        """
        override-opt-param-scheduler override-opt_param-scheduler use-checkpoint-opt-param-scheduler
        use-checkpoint-opt_param-scheduler
        """,
    ),
    **left_out(
        "time, throughput, memory, norms and the loss scale are in metrics.jsonl and at every logger",
        """
        log-throughput log-timers-to-tensorboard log-memory-to-tensorboard log-validation-ppl-to-tensorboard
        log-world-size-to-tensorboard no-log-loss-scale-to-tensorboard
        disable-log-loss-scale-to-tensorboard log-params-norm log-progress log-device-memory-used log-memory-interval
        log-energy timing-log-level timing-log-option no-barrier-with-level-1-timing tensorboard-queue-size
        tensorboard-log-interval logging-level memory-snapshot-path no-one-logger one-logger-project
        one-logger-run-name one-logger-async app-tag-run-name app-tag-run-version log-straggler
        disable-straggler-on-startup straggler-ctrlr-port straggler-minmax-count log-max-attention-logit
        """,
    ),
    **left_out(
        "a step with a NaN is handled by fault_tolerance.on_fault (stop, skip or rerun)",
        """
        no-check-for-nan-in-loss-and-grad rerun-mode check-for-spiky-loss
        error-injection-rate error-injection-type result-rejected-tracker-filename
        """,
    ),
    **left_out(
        "it changes speed or memory on some systems, and no result",
        """
        manual-gc manual-gc-interval no-manual-gc-eval disable-manual-gc-eval empty-unused-memory-level
        no-align-param-gather no-align-grad-reduce disable-align-grad-reduce no-gradient-reduce-div-fusion
        train-sync-interval disable-jit-fuser no-mmap-bin-files num-dataset-builder-threads
        no-create-attention-mask-in-dataloader dataloader-fast-cache-load dataloader-defer-npy-index-mmap
        mid-level-dataset-surplus nccl-communicator-config-path use-sharp sharp-enabled-group nvtx-ranges
        high-priority-stream-groups disable-gloo-process-groups use-tp-pp-dp-mapping lazy-mpu-init local-rank
        check-weight-hash-across-dp-replicas-interval gpu-sniff-test-interval flight-recorder-dump-path
        flight-recorder-trace-buffer-size flight-recorder-include-stack-trace no-flight-recorder-dump-on-timeout
        disable-flight-recorder-dump-on-timeout no-flight-recorder-include-only-active
        disable-flight-recorder-include-only-active no-flight-recorder-extra-dump-on-exec
        disable-flight-recorder-extra-dump-on-exec distributed-timeout-seconds-after-init enable-experimental
        """,
    ),
    **refused(
        "model and layout are those of the configuration, never of a checkpoint; leave it out and give them",
        """
        use-checkpoint-args use-mp-args-from-checkpoint-args
        no-use-tokenizer-model-from-checkpoint-args disable-use-tokenizer-model-from-checkpoint-args
        """,
    ),
    **refused(
        "put the prefixes where it stands: --data-path $(cat FILE)",
        "data-args-path per-split-data-args-path per-dataset-sequences-path",
    ),
    **refused(
        "it is no longer an argument of Megatron-LM either; use --micro-batch-size, --lr-warmup-fraction, "
        "--tensor-model-parallel-size, --recompute-activations",
        "batch-size warmup model-parallel-size checkpoint-activations",
    ),
    **refused(
        "the model's vocabulary is padded by model.make_vocab_size_divisible_by and tensor parallelism; give "
        "--vocab-size without padding",
        "padded-vocab-size no-pad-vocab-size disable-pad-vocab-size vocab-extra-ids",
    ),
}
