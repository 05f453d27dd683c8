"""What is wrong with how model, batch and sequences are divided over ranks."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron.bridge.training.engine import engine_of
from megatron.bridge.training.problems.lengths import has_length

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def parallel_problems(cfg: "ConfigContainer", world_size: int) -> Iterator[str]:
    """What is wrong with how model and batch are divided over ranks; only sizes of `model` and `train` are asked."""
    yield from layout_problems(cfg, world_size)
    yield from model_layout_problems(cfg.model)


def model_layout_problems(model: Any) -> Iterator[str]:
    """What the parallel sizes of a model ask of its other sizes."""
    yield from _sequence_parts(model)
    if getattr(model, "num_moe_experts", None) and model.tensor_model_parallel_size > 1 and not model.sequence_parallel:
        yield (
            f"model.num_moe_experts={model.num_moe_experts} with model.tensor_model_parallel_size="
            f"{model.tensor_model_parallel_size} trains with model.sequence_parallel=true only; set it"
        )


def layout_problems(cfg: "ConfigContainer", world_size: int) -> Iterator[str]:
    """A batch that the ranks cannot share out, and whatever else the run's engine finds."""
    train, engine = cfg.train, engine_of(cfg)
    if misfits := list(engine.layout_problems(cfg, world_size)):
        yield from misfits
        return
    data_parallel = engine.replicas(cfg, world_size)
    step = train.micro_batch_size * data_parallel
    if not has_length(cfg):
        return
    for _, size in train.batch_sizes.stages if step > 0 and train.rampup_batch_size else ():
        if size % step:
            yield (
                f"train.rampup_batch_size={train.rampup_batch_size} comes to {size} sequences, not a multiple of "
                f"train.micro_batch_size={train.micro_batch_size} x {data_parallel} data-parallel ranks = {step}"
            )
            return
    if step > 0 and train.global_batch_size % step:
        fitting = max(train.global_batch_size // step, 1) * step
        yield (
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{train.micro_batch_size} x {data_parallel} data-parallel ranks = {step}; {fitting} would do"
        )
        return
    for _, size in train.batch_sizes.stages:
        yield from _interleaving(cfg, size // step if step > 0 else 0)


def _interleaving(cfg: "ConfigContainer", num_microbatches: int) -> Iterator[str]:
    pipeline = cfg.model.pipeline_model_parallel_size
    if getattr(cfg.model, "virtual_pipeline_model_parallel_size", None) and num_microbatches % pipeline:
        yield (
            f"an interleaved pipeline needs the micro-batches per step to be a multiple of "
            f"pipeline_model_parallel_size={pipeline}, and there are {num_microbatches}; change "
            "train.global_batch_size or train.micro_batch_size"
        )


def _sequence_parts(model: Any) -> Iterator[str]:
    """Context-parallel ranks hold two chunks of every sequence each; under SP, tensor-parallel ranks divide those."""
    context = getattr(model, "context_parallel_size", 1)
    tensor = model.tensor_model_parallel_size if model.sequence_parallel else 1
    chunks = chunks_of_sequence(model)
    if chunks > 0 and tensor > 0 and (model.seq_length % chunks or model.seq_length // max(context, 1) % tensor):
        named = [f"2 x model.context_parallel_size={context}"] if context > 1 else []
        named += [f"model.tensor_model_parallel_size={tensor} (sequence_parallel)"] if tensor > 1 else []
        parts = chunks * tensor
        fitting = max(model.seq_length // parts, 1) * parts
        yield f"model.seq_length={model.seq_length} is not divided by {' and '.join(named)}; {fitting} would do"


def model_parallel_size(model: Any) -> int:
    """Ranks that hold one replica of the model: TP x PP x CP."""
    return int(
        model.tensor_model_parallel_size
        * model.pipeline_model_parallel_size
        * getattr(model, "context_parallel_size", 1)
    )


def chunks_of_sequence(model: Any) -> int:
    """Into how many chunks context-parallel ranks cut a sequence: two for each rank, 1 without them."""
    context = int(getattr(model, "context_parallel_size", 1))
    return 2 * context if context > 1 else 1
