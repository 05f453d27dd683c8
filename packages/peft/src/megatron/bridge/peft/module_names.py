"""What the modules of a chunk are called in the whole model, and which Hugging Face modules each of them holds.

The second comes from the model's own weight table, through the bridge that the provider was made by; a model without
one has Megatron's names only.
"""

from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.adapters import table_of
from megatron.bridge.conversion.live_weights import CanonicalNames, unwrap

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
        self._knows_more = getattr(bare, "bridge", None) is not None

    def full(self, name: str) -> str:
        """The name in the whole model: layers and experts count through all ranks."""
        return self._names.canonical(name)

    def hf(self, full_name: str) -> tuple[str, ...]:
        """The Hugging Face modules that a module holds, e.g. q, k and v projections; empty where nothing tells."""
        return () if self._table is None else self._table.modules(f"{full_name}.weight")
