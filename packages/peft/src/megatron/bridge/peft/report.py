"""What a method did to a model: which modules it changed, and how much of the model trains now."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Binding:
    """One changed module.

    Attributes:
        name: its full name in the whole model, e.g. `decoder.layers.0.self_attention.linear_qkv`.
        chunk: virtual pipeline chunk.
        base, bound: class names before and after; the same when the module was changed in place.
        trainable: names in the chunk of the trainable parameters that the change brought, when it was made.
    """

    name: str
    chunk: int
    base: str
    bound: str
    trainable: tuple[str, ...]


@dataclass(frozen=True)
class BindingReport:
    """One application of a method, as this rank sees it.

    Attributes:
        trainable_parameters, total_parameters: elements this rank holds; a shared parameter counts once.
    """

    method: str
    bindings: tuple[Binding, ...]
    trainable_parameters: int
    total_parameters: int

    @classmethod
    def of(cls, method: str, bindings: "list[Binding]", chunks: "list[torch.nn.Module]") -> "BindingReport":
        """Count what `chunks` hold now."""
        parameters = {id(each): each for chunk in chunks for each in chunk.parameters()}.values()
        trainable = sum(each.numel() for each in parameters if each.requires_grad)
        return cls(method, tuple(bindings), trainable, sum(each.numel() for each in parameters))

    def __str__(self) -> str:
        share = self.trainable_parameters / self.total_parameters if self.total_parameters else 0.0
        count = len(self.bindings)
        lines = [
            f"{self.method}: {count} module{'s' * (count != 1)} changed; {self.trainable_parameters:,} of "
            f"{self.total_parameters:,} parameters on this rank train ({share:.2%})"
        ]
        several = len({binding.chunk for binding in self.bindings}) > 1
        for binding in self.bindings:
            chunk = f"chunk {binding.chunk}: " if several else ""
            became = "" if binding.base == binding.bound else f" -> {binding.bound}"
            lines.append(f"  {chunk}{binding.name or '(the model)'} ({binding.base}{became})")
        return "\n".join(lines)
