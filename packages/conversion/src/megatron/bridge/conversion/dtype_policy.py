"""Which dtype each Hugging Face weight of an export gets."""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from megatron.bridge.errors import BridgeError, did_you_mean

if TYPE_CHECKING:
    import torch

    # One dtype for all; a dtype per pattern of names (`*` stands for any text, the first that fits counts); or a
    # function of a weight's name and the dtype it is held in.
    type DtypePolicy = torch.dtype | Mapping[str, torch.dtype] | Callable[[str, torch.dtype], torch.dtype] | None


def export_dtype(policy: "DtypePolicy", name: str, held: "torch.dtype", keeps: bool) -> "torch.dtype":
    """The dtype of one weight.

    Args:
        policy: None keeps every weight's own.
        name: on the Hugging Face side.
        held: in the model.
        keeps: whether the table has it stay as it is (`WeightRule.keeps_dtype`, routing biases that need float32).
            Only a function overrules that: it is asked about every weight.
    """
    import torch

    if callable(policy):
        return policy(name, held)
    if policy is None or keeps or not held.is_floating_point:
        return held
    if isinstance(policy, torch.dtype):
        return policy
    return next((dtype for pattern, dtype in policy.items() if fnmatchcase(name, pattern)), held)


def refuse_unmet_patterns(policy: "DtypePolicy", names: Iterable[str], what: str) -> None:
    """Refuse a pattern that no weight's name fits: it was meant for some.

    Raises:
        BridgeError: naming the patterns, and near names.
    """
    if not isinstance(policy, Mapping):
        return
    known = list(names)
    for pattern in policy:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise BridgeError(f"{what}: no weight is named like {pattern!r}{did_you_mean(pattern, known)}")
