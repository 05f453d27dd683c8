"""What a recipe is: a function that returns a `ConfigContainer`, and that can say what it does without torch."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from megatron.bridge.errors import did_you_mean
from megatron.bridge.recipes.base import changes, tasks
from megatron.bridge.recipes.base.description import Description
from megatron.bridge.recipes.base.hardware import on
from megatron.bridge.recipes.base.size import Size

if TYPE_CHECKING:
    from megatron.bridge.peft import PEFT
    from megatron.bridge.training.config import ConfigContainer


class Arguments(TypedDict, total=False):
    """What every recipe takes; None counts as not given.

    Keys:
        gpus: number and type of GPUs, e.g. `64xH100`: sets layout and batch.
        precision: name of a precision, as in `mixed_precision.precision`.
        seq_length: tokens per sequence.
        train_iters: optimizer steps.
        global_batch_size, micro_batch_size: sequences per step over all ranks, and per forward pass on one.
        lr, min_lr: learning rate after the warm-up, and at the end of its decay.
        tokenizer_model: Hugging Face folder or id of the tokenizer of `data_paths`.
        tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size, expert_model_parallel_size,
        sequence_parallel: the layout.
    """

    gpus: str | None
    precision: str | None
    seq_length: int | None
    train_iters: int | None
    global_batch_size: int | None
    micro_batch_size: int | None
    lr: float | None
    min_lr: float | None
    data_paths: list[str] | None
    tokenizer_model: str | None
    tensor_model_parallel_size: int | None
    pipeline_model_parallel_size: int | None
    context_parallel_size: int | None
    expert_model_parallel_size: int | None
    sequence_parallel: bool | None


class FinetuneArguments(Arguments, total=False):
    """What tuning takes besides.

    Keys:
        peft: name of a PEFT method or an object of one; None trains all weights.
        pretrained_checkpoint: what to start from: a Megatron checkpoint, or a Hugging Face folder.
        dataset_format, prompt_template, packing: of `SFTDatasetConfig`, for `data_paths`.
    """

    peft: "str | PEFT | None"
    pretrained_checkpoint: str | None
    dataset_format: str | None
    prompt_template: str | None
    packing: bool | None


_GIVEN = "given to the recipe"
# Argument of a recipe -> the section of its setting, which has the argument's name.
_HOMES = {
    "seq_length": "model",
    "train_iters": "train",
    "global_batch_size": "train",
    "micro_batch_size": "train",
    "lr": "optimizer",
    "min_lr": "optimizer",
    "data_paths": "dataset",
    "tokenizer_model": "tokenizer",
    "tensor_model_parallel_size": "model",
    "pipeline_model_parallel_size": "model",
    "context_parallel_size": "model",
    "expert_model_parallel_size": "model",
    "sequence_parallel": "model",
    "pretrained_checkpoint": "checkpoint",
    "dataset_format": "dataset",
    "prompt_template": "dataset",
    "packing": "dataset",
}


@dataclass(frozen=True)
class Recipe(ABC):
    """A task for a published model.

    Attributes:
        model: name of its size, e.g. `llama31_8b`.
        task: what follows it in the recipe's name, e.g. `pretrain_config`.
        size: the model.
    """

    model: str
    task: str
    size: Size

    @property
    def name(self) -> str:
        """Under which it is offered, e.g. `llama31_8b_pretrain_config`."""
        return f"{self.model}_{self.task}"

    @property
    def __name__(self) -> str:
        return self.name

    @property
    @abstractmethod
    def title(self) -> str:
        """One line for people."""

    @abstractmethod
    def describe(self, **given: Any) -> Description:
        """What the recipe builds with these arguments. Torch-free."""

    def _refuse_unknown(self, given: Mapping[str, Any], known: Collection[str]) -> None:
        for name in given.keys() - known:
            raise TypeError(f"{self.name}() has no argument {name!r}{did_you_mean(name, known)}")

    def _with(self, description: Description, given: Mapping[str, Any]) -> Description:
        """The description with what the caller gave."""
        if given.get("gpus") is not None:
            description = on(description, self.model, given["gpus"])
        if given.get("precision") is not None:
            description = changes.precision(description, given["precision"])
        if given.get("data_paths") is not None and description.task == "finetune":
            # Rows of conversations, until something else is said of them.
            description = description.but("ours: messages with roles", {"dataset.dataset_format": "chat"})
        wanted = {name: value for name, value in given.items() if name in _HOMES and value is not None}
        return description.but(_GIVEN, {f"{_HOMES[name]}.{name}": value for name, value in wanted.items()})


@dataclass(frozen=True)
class Pretrain(Recipe):
    """Training from random weights on text; on mock data until `data_paths` or `cfg.dataset` says otherwise."""

    @property
    def title(self) -> str:
        return f"{self.size.title}: pretraining"

    def describe(self, **given: Any) -> Description:
        self._refuse_unknown(given, Arguments.__annotations__)
        return self._with(tasks.pretraining(self.size), given)

    def __call__(self, **given: Unpack[Arguments]) -> "ConfigContainer":
        """The configuration; see `Arguments`."""
        from megatron.bridge.recipes.base.building import build

        return build(self.describe(**given))


@dataclass(frozen=True)
class Finetune(Recipe):
    """Tuning of given weights on conversations; mock data until `data_paths` or `cfg.dataset` says otherwise.

    Attributes:
        peft: method where the caller names none; None trains all weights.
    """

    peft: str | None = None

    @property
    def title(self) -> str:
        return f"{self.size.title}: " + ("tuning of all weights" if self.peft is None else f"tuning with {self.peft}")

    def describe(self, **given: Any) -> Description:
        self._refuse_unknown(given, FinetuneArguments.__annotations__)
        return self._with(self._tuned(given.get("peft") or self.peft), given)

    def _tuned(self, method: "str | PEFT | None") -> Description:
        if method is None:
            return tasks.finetuning(self.size)
        if isinstance(method, str):
            return tasks.adapting(self.size, method)
        own = tasks.adapting(self.size)
        return own.without(*(key for key in own.settings if key.startswith("peft."))).but(_GIVEN, {"peft": method})

    def __call__(self, **given: Unpack[FinetuneArguments]) -> "ConfigContainer":
        """The configuration; see `Arguments` and `FinetuneArguments`."""
        from megatron.bridge.recipes.base.building import build

        return build(self.describe(**given))
