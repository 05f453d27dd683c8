"""What the modules of a chunk are called in the whole model, and which Hugging Face modules each of them holds.

The second comes from the model's own weight table, through the bridge that the provider was made by; a model without
one has Megatron's names only.
"""

from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.adapters import table_of
from megatron.bridge.conversion.live_weights import CanonicalNames, unwrap
from megatron.bridge.conversion.transforms import Transform

if TYPE_CHECKING:
    import torch


class ModuleNames:
    """The names of one chunk's modules.

    Args:
        chunk: wrapped or not.
    """

    def __init__(self, chunk: "torch.nn.Module") -> None:
        bare: Any = unwrap(chunk)
        self._names = CanonicalNames(bare)
        self._table = table_of(bare)

    def full(self, name: str) -> str:
        """The name in the whole model: layers and experts count through all ranks."""
        return self._names.canonical(name)

    def hf(self, full_name: str) -> tuple[str, ...]:
        """The Hugging Face modules that a module holds, e.g. q, k and v projections; empty where nothing tells."""
        return () if self._table is None else self._table.modules(f"{full_name}.weight")

    def rows(self, full_name: str) -> Transform | None:
        """How the outputs of a module's Hugging Face modules lie in its own; None where nothing tells."""
        rule = None if self._table is None else self._table.rule(f"{full_name}.weight")
        return None if rule is None else rule.transform.on_rows
