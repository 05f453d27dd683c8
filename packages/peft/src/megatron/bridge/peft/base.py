"""`PEFT`: what every parameter-efficient method is: a frozen model, and a few modules changed by name.

A method is a small dataclass, so it is a section of a run's configuration at the same time; others are added under the
entry-point group `megatron.bridge.peft`. Torch-free until a method is applied.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, overload

from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.peft.binding import (
    Binder,
    counted_over_model_parallel_ranks,
    freeze,
    let_gradients_through,
    module_names,
)
from megatron.bridge.peft.module_names import ModuleNames
from megatron.bridge.peft.report import BindingReport
from megatron.bridge.peft.targets import layer_of, layers_of, matches, matches_any
from megatron.bridge.registry import Registry

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.transforms import Transform


@dataclass(kw_only=True)
class PEFT(ABC):
    """A method that trains few parameters of a frozen model.

    Subclass it as a dataclass and define `transform`. Apply it to a bare model, before DDP and the optimizer are built:

        method = BitFit()
        provider.provide_distributed_model(pre_wrap_hook=lambda chunks: method(chunks, training=True))

    Attributes:
        target_modules: which modules the method may change: last names (`linear_qkv`), shell patterns of full names
            (`*.layers.0.*.linear_qkv`; layers and experts count through the whole model) or, behind `re:`, regular
            expressions of them. Where the model comes from an `AutoBridge`, its Hugging Face names are known as well
            (`q_proj`, `model.layers.0.*`). Every one must match something.
        exclude_modules: which of these it leaves alone, in the same way.
        layers_to_transform: the layers whose modules it may change: `[0, 1, 2]` or `"0-2"`; None for all and for what
            is outside the layers.
    """

    target_modules: list[str] = field(default_factory=list)
    exclude_modules: list[str] = field(default_factory=list)
    layers_to_transform: list[int] | str | None = None

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
            BridgeError: the settings cannot be, nothing was changed anywhere, or some of `target_modules` matched
                nothing that was.
        """
        self.validate()
        chunks: list[torch.nn.Module] = list(model) if isinstance(model, Sequence) else [model]
        names: list[str] = []
        bound, bindings = [], []
        for index, chunk in enumerate(chunks):
            self._names = ModuleNames(chunk)
            names += map(self._names.full, module_names(chunk))
            binder = Binder(self.transform, chunk=index, rename=self._names.full)
            freeze(chunk)
            self.begins(chunk)
            bound.append(binder.bind(chunk))
            bindings += binder.bindings
        self._refuse_unbound([binding.name for binding in bindings], names, bound)
        for chunk in bound:
            chunk.train(training)
            if training:
                let_gradients_through(chunk)
            else:
                freeze(chunk)
        self.applied(bound)
        self._report = BindingReport.of(type(self).__name__, bindings, bound)
        return bound if isinstance(model, Sequence) else bound[0]

    @property
    def was_applied(self) -> bool:
        """Whether the method was applied to a model on this rank."""
        return getattr(self, "_report", None) is not None

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

    def settle(self) -> None:  # noqa: B027  a method whose settings have one name each has nothing to do
        """Give settings that have several names their one value."""

    def begins(self, chunk: "torch.nn.Module") -> None:  # noqa: B027  most methods have nothing to do
        """Called with each chunk, frozen, before its modules are shown to `transform`."""

    def applied(self, chunks: "list[torch.nn.Module]") -> None:  # noqa: B027  most methods have nothing to do
        """Called with the chunks when all that was to be changed has been."""

    def problems(self) -> "Iterator[str]":
        """What is wrong with the settings, each with its remedy; needs no model."""
        try:
            layers_of(self.layers_to_transform)
        except BridgeError as error:
            yield str(error)

    def validate(self) -> None:
        """Refuse settings that cannot be.

        Raises:
            BridgeError: lists every problem.
        """
        self.settle()
        if found := list(self.problems()):
            raise BridgeError(f"{type(self).__name__}: " + "; ".join(found))

    def optimizer_overrides(self, lr: float, min_lr: float) -> "Mapping[str, Mapping[str, float]]":
        """Settings of the optimizer for some parameters: pattern of their names -> Megatron-Core's overrides.

        Args:
            lr, min_lr: the run's highest and lowest learning rate.
        """
        return {}

    def is_target(self, name: str, prefix: str) -> bool:
        """Whether `target_modules` names this module; without any, every module is one."""
        full = f"{prefix}.{name}" if prefix else name
        layers = layers_of(self.layers_to_transform)
        if layers is not None and layer_of(full) not in layers:
            return False
        if matches_any(self.exclude_modules, [full]):
            return False
        return not self.target_modules or matches_any(self.target_modules, [full]) or bool(self.hf_targets(full))

    def hf_names(self, full: str) -> tuple[str, ...]:
        """The Hugging Face modules that a module of the model at hand holds; empty where nothing tells."""
        names: ModuleNames | None = getattr(self, "_names", None)
        return () if names is None else names.hf(full)

    def hf_rows(self, full: str) -> "Transform | None":
        """How the outputs of a module's Hugging Face modules lie in its own; None where nothing tells."""
        names: ModuleNames | None = getattr(self, "_names", None)
        return None if names is None else names.rows(full)

    def hf_targets(self, full: str) -> tuple[str, ...]:
        """Those of a module's Hugging Face modules that the settings name; all of them where they name it itself."""
        held = self.hf_names(full)
        if not self.target_modules or matches_any(self.target_modules, [full]):
            named = held
        else:
            named = tuple(each for each in held if matches_any(self.target_modules, [each]))
        return tuple(each for each in named if not matches_any(self.exclude_modules, [each]))

    def _meets(self, pattern: str, full: str) -> bool:
        return matches(pattern, full) or matches_any([pattern], self.hf_names(full))

    def _refuse_unbound(self, bound: list[str], names: list[str], chunks: "list[torch.nn.Module]") -> None:
        wanted, kept = self.target_modules, self.exclude_modules
        # A target may be left out again as a whole; it has met something then.
        met = bound + [name for name in names if any(self._meets(pattern, name) for pattern in kept)]
        here = [len(bound)] + [sum(self._meets(pattern, name) for name in met) for pattern in wanted]
        here += [sum(self._meets(pattern, name) for name in names) for pattern in kept]
        total, *counts = counted_over_model_parallel_ranks(here, chunks)
        unmatched = [pattern for pattern, count in zip(wanted, counts, strict=False) if not count]
        idle = [pattern for pattern, count in zip(kept, counts[len(wanted) :], strict=True) if not count]
        if total and not unmatched and not idle:
            return
        what = type(self).__name__
        if not wanted and not idle:
            raise BridgeError(f"{what} changed no module of the model. {self.requirement}")
        known = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()} - {""})
        from_hf = sorted({each.rpartition(".")[2] for name in names for each in self.hf_names(name)})
        hints = "".join(did_you_mean(pattern, [*known, *from_hf]) for pattern in unmatched or idle)
        fault = (
            f"{what} changed no module for target_modules={unmatched}"
            if unmatched or not total
            else f"{what}: exclude_modules={idle} matches nothing"
        )
        also = f", and by their Hugging Face names {', '.join(from_hf)}" if from_hf else ""
        raise BridgeError(f"{fault}{hints or '.'} The modules here: {', '.join(known)}{also}. {self.requirement}")

    @property
    def requirement(self) -> str:
        """What a module must be for this method to change it, for messages. Subclasses say it in their terms."""
        return "Set target_modules to modules that the method can change"


PEFT_METHODS: Registry[type[PEFT]] = Registry(
    "megatron.bridge.peft",
    PEFT,
    "PEFT method",
    absent={
        "qlora": (
            "bitsandbytes and torchao keep torch.nn.Linear in few bits, and no library does so with Megatron-Core's "
            "parallel layers, so that it could not be proven; use lora, with model.bf16=true for a smaller base, and "
            "read low-bit folders by `megatron-bridge convert import`, which decodes those that it knows"
        )
    },
)
