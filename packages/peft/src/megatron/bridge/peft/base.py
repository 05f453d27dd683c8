"""`PEFT`: what every parameter-efficient method is: a frozen model, and a few modules changed by name.

A method is a small dataclass, so it is a section of a run's configuration at the same time; others are added under the
entry-point group `megatron.bridge.peft`. Torch-free until a method is applied.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, overload

from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.peft.binding import Binder, counted_over_model_parallel_ranks, freeze, module_names
from megatron.bridge.peft.report import BindingReport
from megatron.bridge.peft.targets import matches
from megatron.bridge.registry import Registry

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class PEFT(ABC):
    """A method that trains few parameters of a frozen model.

    Subclass it as a dataclass and define `transform`. Apply it to a bare model, before DDP and the optimizer are built:

        method = BitFit()
        provider.provide_distributed_model(pre_wrap_hook=lambda chunks: method(chunks, training=True))

    Attributes:
        target_modules: which modules the method may change: last names (`linear_qkv`) or shell patterns of full names
            (`*.layers.0.*.linear_qkv`; layers count from 0 on each pipeline rank). Every one must match something.
    """

    target_modules: list[str] = field(default_factory=list)

    @abstractmethod
    def transform(self, module: "torch.nn.Module", name: str, prefix: str) -> "torch.nn.Module":
        """Change `module`, or return another in its place, or return it as it is.

        Called once for every module of the frozen model, children before their parents. What is trainable afterwards
        is what this method made trainable: parameters switched on, or those of the new module.

        Args:
            module: frozen.
            name: its name in its parent; empty for the model itself.
            prefix: its parent's full name; empty at the top.

        Raises:
            BridgeError: the module is a target that this method cannot serve.
        """

    @overload
    def __call__(self, model: "list[torch.nn.Module]", training: bool = True) -> "list[torch.nn.Module]": ...
    @overload
    def __call__(self, model: "torch.nn.Module", training: bool = True) -> "torch.nn.Module": ...
    def __call__(
        self, model: "torch.nn.Module | list[torch.nn.Module]", training: bool = True
    ) -> "torch.nn.Module | list[torch.nn.Module]":
        """Freeze `model`, let `transform` see every module, and prove that it changed what was asked for.

        Collective over the ranks that share the model where Megatron's process groups exist: a pipeline rank may hold
        no target as long as another one does.

        Args:
            model: a model or its virtual pipeline chunks, changed in place.
            training: False also freezes what the method added, for inference and export.

        Returns:
            The model or the chunks; the same objects unless the method replaced one as a whole.

        Raises:
            BridgeError: nothing was changed anywhere, or some of `target_modules` matched nothing that was.
        """
        chunks: list[torch.nn.Module] = list(model) if isinstance(model, Sequence) else [model]
        names = [name for chunk in chunks for name in module_names(chunk)]
        bound, bindings = [], []
        for index, chunk in enumerate(chunks):
            binder = Binder(self.transform, chunk=index)
            freeze(chunk)
            bound.append(binder.bind(chunk))
            bindings += binder.bindings
        self._refuse_unbound([binding.name for binding in bindings], names)
        for chunk in bound:
            chunk.train(training)
            if not training:
                freeze(chunk)
        self._report = BindingReport.of(type(self).__name__, bindings, bound)
        return bound if isinstance(model, Sequence) else bound[0]

    @property
    def report(self) -> BindingReport:
        """What the latest application changed on this rank.

        Raises:
            BridgeError: the method has not been applied.
        """
        report: BindingReport | None = getattr(self, "_report", None)
        if report is None:
            raise BridgeError(f"{type(self).__name__} has not been applied to a model; call it with the model first")
        return report

    def is_target(self, name: str, prefix: str) -> bool:
        """Whether `target_modules` names this module; without any, every module is one."""
        full = f"{prefix}.{name}" if prefix else name
        return not self.target_modules or any(matches(pattern, full) for pattern in self.target_modules)

    def _refuse_unbound(self, bound: list[str], names: list[str]) -> None:
        wanted = self.target_modules
        here = [len(bound)] + [sum(matches(pattern, name) for name in bound) for pattern in wanted]
        total, *by_target = counted_over_model_parallel_ranks(here)
        unmatched = [pattern for pattern, count in zip(wanted, by_target, strict=True) if not count]
        if total and not unmatched:
            return
        what = type(self).__name__
        if not wanted:
            raise BridgeError(f"{what} changed no module of the model. {self.requirement}")
        known = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()} - {""})
        hints = "".join(did_you_mean(pattern, known) for pattern in unmatched)
        raise BridgeError(
            f"{what} changed no module for target_modules={unmatched}{hints or '.'} "
            f"The modules here: {', '.join(known)}. {self.requirement}"
        )

    @property
    def requirement(self) -> str:
        """What a module must be for this method to change it, for messages. Subclasses say it in their terms."""
        return "Set target_modules to modules that the method can change"


PEFT_METHODS: Registry[type[PEFT]] = Registry("megatron.bridge.peft", PEFT, "PEFT method")
