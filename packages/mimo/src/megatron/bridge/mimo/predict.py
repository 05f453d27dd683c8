"""Forward passes for their own sake: logits, and how many of the trained tokens a model would say."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.context_chunks import in_order, packed_in_order
from megatron.bridge.mimo.documents import BOUNDS, bounds_in_one_row
from megatron.bridge.mimo.module_groups import LANGUAGE
from megatron.bridge.mimo.slices import own_batch
from megatron.bridge.mimo.step import moved
from megatron.bridge.training.callbacks import Callback

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.mimo.model import BridgeMimoModel
    from megatron.bridge.mimo.runtime import MimoRuntime
    from megatron.bridge.training.state import RunState


def logits(runtime: "MimoRuntime", batches: "Sequence[Mapping[str, Any]]") -> "list[Tensor]":
    """Logits of micro-batches at any placement. Collective over the world.

    Args:
        runtime: of the model, which is left in the mode (training or not) that it is in.
        batches: as this rank loads them (see `slices.loading_place`).

    Returns:
        Of each micro-batch [samples of this replica, sequence, vocabulary], on ranks of the language model's last
        stage; nothing on the others.
    """
    import torch
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron.bridge.conversion.live_weights import unwrap

    def step(data_iterator: Iterator[Any], model: "BridgeMimoModel") -> tuple[Any, Callable[..., Any]]:
        own = moved(own_batch(model, next(data_iterator)))
        own.pop("labels", None)
        language = runtime.modules[LANGUAGE]
        # Asked for on the language model's last stage alone.
        return model(**own)[0], lambda output, **_: _whole(output, own.get(BOUNDS), length, language.here.cp)

    samples, length = batches[0]["tokens"].shape
    with torch.no_grad():
        found = runtime.run_schedule(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=[runtime.model],
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=samples,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not found:
        return []
    language: Any = unwrap(runtime.model.language_model)
    tensor = runtime.modules[LANGUAGE].here.tp
    whole = [gather_from_tensor_model_parallel_region(each, group=tensor) for each in found]
    # Packed samples come as one row.
    return [each[..., : language.unpadded_vocab_size].unflatten(1, (-1, length)).flatten(0, 1) for each in whole]


def _whole(part: "Tensor", bounds: "Tensor | None", length: int, group: Any) -> "Tensor":
    """Logits of whole sequences, from what each context-parallel rank has of them [rows, tokens / CP, ...]."""
    import torch

    if group.size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(group.size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    if bounds is None:
        return in_order(parts, 1)
    rows = packed_in_order(bounds_in_one_row(bounds, length)[0].tolist(), group.size())
    return torch.cat(parts, 1).index_select(1, rows.to(part.device))


class TokenAccuracy(Callback):
    """After each evaluation: the share of trained tokens of the validation split that the model would say itself.

    Args:
        samples: how many, from the beginning of the split; those of whole micro-batches are counted.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self.values: dict[int, float] = {}

    def on_evaluate_end(self, run: "RunState", loss: float) -> None:
        import torch

        from megatron.bridge import platform
        from megatron.bridge.training.data import batches_per_chunk

        runtime: MimoRuntime = run.cfg.model.engine.runtime
        samples = run.cfg.train.micro_batch_size * run.engine.replicas(run.cfg, platform.world_size())
        (data,) = batches_per_chunk(run.cfg, run.valid_dataset, 1, samples)
        assert data is not None
        batches = [next(data) for _ in range(self._samples // samples)]
        runtime.model.eval()
        counts = torch.zeros(2, device=platform.device())
        for batch, found in zip(batches, logits(runtime, batches), strict=False):
            own = own_batch(runtime.model, batch)
            counted = own["loss_mask"].to(counts.device) > 0
            right = found.argmax(-1) == own["labels"].to(counts.device)
            counts += torch.stack([(right & counted).sum(), counted.sum()])
        runtime.model.train()
        right_ones, trained = runtime.total(counts).tolist()
        self.values[run.progress.iteration] = right_ones / max(trained, 1.0)
        if platform.is_rank_zero() and run.cfg.logger.progress:
            print(f"step {run.progress.iteration}: {self.values[run.progress.iteration]:.1%} of the answers are right")
