"""The settings of a loaded optimizer, which are those of the present run, and the parts that it has there.

Megatron-Core keeps learning rates, weight decay, betas and the like in a checkpoint, group of parameters by group, and
refuses groups that differ. They are the present configuration's business; a checkpoint gives the step. With expert
parallelism the experts have an optimizer of their own, which the tensors of a checkpoint do not show.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def by_part(loaded: Mapping[Any, Any], saved: Mapping[Any, Any], parts: Sequence[Any]) -> list[dict[str, Any]]:
    """The state for each part of an optimizer to load, with the part's own settings.

    Args:
        loaded: what was loaded for the sharded state dict of `parts`.
        saved: the values in it that are not sharded, arranged in parts as when they were saved.
        parts: Megatron-Core optimizers.
    """
    before = _numbered(saved) or [saved]
    held = _numbered(loaded) if len(parts) > 1 else [{key: loaded[key] for key in loaded if not isinstance(key, int)}]
    return [_present(part, state, before) for part, state in zip(parts, held, strict=True)]


def _numbered(state: Mapping[Any, Any]) -> list[Any]:
    """The parts of a state that has several."""
    return [state[key] for key in sorted(key for key in state if isinstance(key, int))]


def _present(part: Any, loaded: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state with the groups of `part`; what all parts have in common comes from the first one that was saved."""
    steps = [group["step"] for each in before for group in _inner(each)["param_groups"] if "step" in group]
    step = {"step": max(steps)} if steps else {}
    live = [{key: group[key] for key in group if key != "params"} for group in part.optimizer.param_groups]
    if "param_state" in loaded:  # a distributed optimizer, which numbers its parameters itself
        return {**before[0], **loaded, "optimizer": {"param_groups": [group | step for group in live]}}
    numbers = [{"params": group["params"]} for group in _inner(loaded)["param_groups"]]
    groups = [{**group, **step, **number} for group, number in zip(live, numbers, strict=True)]
    inner = {"param_groups": groups, "state": {**_inner(before[0]).get("state", {}), **_inner(loaded)["state"]}}
    return {**before[0], **loaded, **({"optimizer": inner} if "optimizer" in loaded else inner)}


def _inner(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of torch's optimizer, which those with master weights wrap."""
    inner: Mapping[str, Any] = state.get("optimizer", state)
    return inner
