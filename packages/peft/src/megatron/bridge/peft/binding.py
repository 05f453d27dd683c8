"""Walks a frozen model, puts in place what a method returns, and records what that changed."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.live_weights import ADAPTERS, unwrap
from megatron.bridge.peft.report import Binding

if TYPE_CHECKING:
    import torch

    type Transform = Callable[[torch.nn.Module, str, str], torch.nn.Module]


def freeze(model: "torch.nn.Module") -> None:
    """Make no parameter of `model` trainable, and forget gradients that would be counted or clipped."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def let_gradients_through(chunk: "torch.nn.Module") -> None:
    """Have a frozen embedding's output ask for a gradient where layers are computed anew in the backward pass.

    Megatron-Core's recomputation gives no gradient to what is inside it when no input asks for one: adapters in the
    first layers would silently never learn.
    """
    config, embedding = getattr(chunk, "config", None), getattr(chunk, "embedding", None)
    if embedding is not None and getattr(config, "recompute_granularity", None) is not None:
        embedding.register_forward_hook(_ask_for_gradient)


def _ask_for_gradient(module: Any, inputs: Any, output: "torch.Tensor") -> "torch.Tensor":
    import torch

    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
    return output


def module_names(model: "torch.nn.Module") -> Iterator[str]:
    """Full names of all modules, the empty one of the model itself included."""
    return (name for name, _ in model.named_modules())


class Binder:
    """Applies one method to one chunk.

    Args:
        transform: of the method.
        chunk: index of the chunk.
        rename: a module's name in the chunk -> in the whole model, which is what the method is told.

    Attributes:
        bindings: modules that were changed so far, in the order they were met.
    """

    def __init__(self, transform: "Transform", chunk: int, rename: "Callable[[str], str]" = str) -> None:
        self.bindings: list[Binding] = []
        self._transform = transform
        self._chunk = chunk
        self._rename = rename
        # A module that hangs in two places stays one module.
        self._done: dict[int, tuple[torch.nn.Module, torch.nn.Module]] = {}

    def bind(self, module: "torch.nn.Module", name: str = "", prefix: str = "") -> "torch.nn.Module":
        """Transform `module` and all below it, children first, so that what a method adds is not visited itself."""
        if id(module) in self._done:
            return self._done[id(module)][1]
        full = f"{prefix}.{name}" if prefix else name
        for child_name, child in list(module._modules.items()):
            # Adapters that are there already are no part of the model.
            if child is not None and child_name != ADAPTERS:
                bound = self.bind(child, child_name, full)
                if bound is not child:
                    setattr(module, child_name, bound)
        before, kind = _trainable(module), type(module).__name__
        whole_name = self._rename(full)
        parent, _, own = whole_name.rpartition(".")
        bound = self._transform(module, own, parent)
        brought = _trainable(bound) - before
        if bound is not module or brought:
            trainable = tuple(f"{full}.{each}" if full else each for each in _in_order(bound, brought))
            self.bindings.append(Binding(whole_name, self._chunk, kind, type(bound).__name__, trainable))
        # Keeping the module keeps its id from being given to another.
        self._done[id(module)] = (module, bound)
        return bound


def _trainable(module: "torch.nn.Module") -> frozenset[str]:
    return frozenset(name for name, parameter in module.named_parameters() if parameter.requires_grad)


def _in_order(module: "torch.nn.Module", names: frozenset[str]) -> "Iterator[str]":
    return (name for name, _ in module.named_parameters() if name in names)


def counted_over_model_parallel_ranks(counts: list[int], chunks: "Sequence[Any]") -> list[int]:
    """Element-wise sum over the ranks that hold the model with this one. Collective.

    Args:
        counts: of this rank.
        chunks: of the model. Without process groups, theirs or Megatron's, it is this rank's alone.
    """
    import torch

    from megatron.bridge.platform import device

    summed = torch.tensor(counts, device=device())
    for group in _model_parallel_groups(chunks):
        torch.distributed.all_reduce(summed, group=group)
    return [int(count) for count in summed.tolist()]


def _model_parallel_groups(chunks: "Sequence[Any]") -> list[Any]:
    """Megatron's groups of the ranks that share a model, or those of a model that has a layout of its own."""
    from megatron.core import parallel_state

    if parallel_state.is_initialized():
        dense, expert = parallel_state.get_model_parallel_group(), parallel_state.get_expert_model_parallel_group(False)
    else:
        own = getattr(unwrap(chunks[0]), "pg_collection", None) if chunks else None
        dense, expert = getattr(own, "mp", None), getattr(own, "ep", None)
    return [group for group in (dense, expert) if group is not None and group.size() > 1]
