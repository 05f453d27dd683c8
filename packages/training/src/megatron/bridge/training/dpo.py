"""Direct preference optimization (Rafailov et al., arXiv:2305.18290): learning from pairs of answers.

The reference model is the one that training starts from: a copy of the weights as they are then, and beneath adapters
the model without them. Its log-probabilities of every answer are computed once, before the first step, so that no
second model is held.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.tally import Tally

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.state import RunState, TrainResult

REFERENCE = "reference.json"
# What is told of a step besides its loss, as means over pairs: an answer's reward is `beta` times by how much its
# log-probability is above the reference model's.
REWARDS = ("chosen_reward", "rejected_reward", "reward_margin", "reward_accuracy")
_PAIR = "pair"

# Pair -> log-probabilities of the chosen and the rejected answer.
type Reference = Mapping[int, tuple[float, float]]


def dpo(cfg: "ConfigContainer", *, beta: float = 0.1, callbacks: "Sequence[Callback]" = ()) -> "TrainResult":
    """Tune `cfg.model`, or the adapters of `cfg.peft`, to prefer the chosen answers of `cfg.dataset`.

    Losses are means over pairs. Logged with them: rewards, their margins, and the share of pairs in which the chosen
    answer has the higher one.

    Args:
        cfg: the run; `dataset` is a `PreferenceDatasetConfig`, and there are weights to start from.
        beta: how dearly going away from the reference model is paid for.
        callbacks: as for `finetune`.

    Raises:
        BridgeError: data of another kind, context parallelism, or what `finetune` refuses.
    """
    from megatron.bridge.training.finetune import check_start
    from megatron.bridge.training.setup import distributed, setup
    from megatron.bridge.training.train import train

    check_start(cfg)
    for problem in _problems(cfg, beta):
        raise BridgeError(problem)
    cfg.model.calculate_per_token_loss = True  # what is counted are pairs
    with distributed(cfg):
        run = setup(cfg, callbacks)
        run.tally = Tally(*REWARDS)
        return train(run, partial(preference_step, beta, _reference(run)))


def _problems(cfg: "ConfigContainer", beta: float) -> Iterator[str]:
    if not getattr(cfg.dataset, "paired", False):
        yield f"DPO needs pairs of answers; {type(cfg.dataset).__name__} has none: use PreferenceDatasetConfig"
    if beta <= 0:
        yield f"beta={beta:g} must be greater than 0"
    if getattr(cfg.model, "context_parallel_size", 1) > 1:
        yield "DPO adds up whole answers on one rank: set model.context_parallel_size=1"


def preference_step(
    beta: float, reference: Reference, state: "RunState", data_iterator: Iterator[dict[str, "Tensor"]], model: Any
) -> tuple["Tensor", Callable[["Tensor"], Any]]:
    """One pair through one model chunk; as `gpt_step.forward_step`.

    Args:
        beta, reference: see `dpo`.
        state: the run.
        data_iterator: samples of a `PreferenceDatasetConfig`, one at a time.
        model: the chunk.
    """
    output, batch = _forward(data_iterator, model)
    return output, partial(preference_loss, beta, reference, batch, state.tally)


def preference_loss(
    beta: float, reference: Reference, batch: Mapping[str, "Tensor"], tally: Tally, losses: "Tensor"
) -> tuple["Tensor", "Tensor", dict[str, "Tensor"]]:
    """`(loss, pairs, report)` of one sample from the losses of its tokens, [1, sequence]; rewards go to `tally`."""
    import torch

    from megatron.bridge.training.gpt_step import LOSS

    pair = int(batch[_PAIR])
    count = torch.tensor(int(pair >= 0), dtype=torch.int, device=losses.device)
    if pair < 0:  # what fills up the last batch of an evaluation
        total = losses.sum() * 0.0
    else:
        chosen, rejected = log_probabilities(batch, losses)
        chosen_before, rejected_before = reference[pair]
        better, worse = beta * (chosen - chosen_before), beta * (rejected - rejected_before)
        total = -torch.nn.functional.logsigmoid(better - worse)
        tally.add(dict(zip(REWARDS, (better, worse, better - worse, (better > worse).float()), strict=True)))
    return total, count, {LOSS: torch.stack([total.detach(), count.to(total.dtype)])}


def log_probabilities(batch: Mapping[str, "Tensor"], losses: "Tensor") -> "Tensor":
    """Of the chosen and the rejected answer of a sample, [2]: the sum over the tokens that are trained."""
    import torch

    counted = (losses.float() * batch["loss_mask"])[0]
    start, middle, stop = batch["cu_seqlens"][0, :3].tolist()
    return -torch.stack([counted[start:middle].sum(), counted[middle:stop].sum()])


def _forward(data_iterator: Iterator[dict[str, "Tensor"]], model: Any) -> tuple["Tensor", dict[str, "Tensor"]]:
    from megatron.bridge.platform import device
    from megatron.bridge.training.gpt_step import packed_documents

    batch = {name: value.to(device(), non_blocking=True) for name, value in next(data_iterator).items()}
    documents = packed_documents(batch["cu_seqlens"])
    inputs = batch["tokens"], batch["position_ids"], None
    return model(*inputs, labels=batch["labels"], packed_seq_params=documents), batch


def _reference(run: "RunState") -> Reference:
    """The reference model's log-probabilities: computed from a fresh run's weights, else those it wrote. Collective."""
    from megatron.bridge import platform
    from megatron.bridge.conversion.rank_agreement import on_every_rank

    if run.progress.iteration:
        return on_every_rank(lambda: _read(run.cfg), "the reference model's values")
    found = _computed(run)
    save = run.cfg.checkpoint.save
    if save is not None and platform.is_rank_zero():
        Path(save).mkdir(parents=True, exist_ok=True)
        (Path(save) / REFERENCE).write_text(json.dumps(found), "utf-8")
    return found


def _read(cfg: "ConfigContainer") -> Reference:
    load = Path(str(cfg.checkpoint.load))
    for folder in (load, load.parent):
        if (folder / REFERENCE).is_file():
            values = json.loads((folder / REFERENCE).read_text("utf-8"))
            return {int(pair): (chosen, rejected) for pair, (chosen, rejected) in values.items()}
    raise BridgeError(f"{load} has no {REFERENCE}: it is not of a DPO run, which writes it beside its checkpoints")


def _computed(run: "RunState") -> Reference:
    import torch

    from megatron.bridge.conversion.rank_agreement import gather
    from megatron.bridge.peft.adapted_layer import without_adapters
    from megatron.bridge.training.data import batches_per_chunk
    from megatron.bridge.training.step import forward_backward

    found: dict[int, tuple[float, float]] = {}
    batch = run.cfg.train.global_batch_size
    for chunk in run.model:
        chunk.eval()
    with torch.no_grad(), without_adapters(run.model):
        for dataset in _pairs(run.cfg):
            data = batches_per_chunk(run.cfg, dataset, len(run.model), batch)
            for _ in range(len(dataset) // batch):
                reports = forward_backward(run, _reference_step, data, run.num_microbatches(batch), training=False)
                found |= {
                    int(pair): (chosen, rejected) for pair, chosen, rejected in (r[_PAIR].tolist() for r in reports)
                }
    for chunk in run.model:
        chunk.train()
    return {pair: values for each in gather(found) for pair, values in each.items()}


def _reference_step(state: "RunState", data_iterator: Any, model: Any) -> Any:
    import torch

    output, batch = _forward(data_iterator, model)

    def told(losses: "Tensor") -> Any:
        values = torch.cat([batch[_PAIR].double(), log_probabilities(batch, losses).double()])
        return losses.sum(), torch.ones((), dtype=torch.int, device=losses.device), {_PAIR: values}

    return output, told


def _pairs(cfg: "ConfigContainer") -> "list[_FilledUp]":
    """The training and validation pairs, each once."""
    from megatron.bridge.data.provider import DatasetBuildContext
    from megatron.bridge.training.run_data import run_tokenizer

    evaluated = None if cfg.train.eval_interval else 0
    context = DatasetBuildContext(train_samples=None, valid_samples=evaluated, tokenizer=run_tokenizer(cfg))
    built = cfg.dataset.build_train_valid_test_datasets(context)
    return [_FilledUp(dataset, cfg.train.global_batch_size) for dataset in built if dataset is not None]


class _FilledUp:
    """A dataset made a multiple of the batch by drawing some samples again."""

    def __init__(self, dataset: Any, batch: int) -> None:
        self._dataset = dataset
        self._length = -(-len(dataset) // batch) * batch

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index % len(self._dataset)]
