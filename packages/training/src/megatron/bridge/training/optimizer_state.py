"""Where torch's AdamW and Megatron-Core's optimizers disagree about state, without Transformer Engine and apex.

torch keeps a `step` tensor per parameter. Megatron-Core's distributed optimizer expects one shared step, fails on a
state that has not been stepped yet, and after a load gives the same tensor to all parameters, which then count each
other's steps. With Transformer Engine's or apex's Adam there is no `step` tensor, and nothing here changes anything.
"""

from typing import Any

from megatron.bridge.training.optimizer_parts import by_part


def prepare_optimizer_state(optimizer: Any) -> None:
    """Give parameters that were never stepped the state that they would have: zero moments at step 0."""
    import torch

    for inner in torch_adams(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def load_optimizer_state(optimizer: Any, state: dict[Any, Any], saved: dict[Any, Any]) -> None:
    """`optimizer.load_state_dict(state)` at any layout, with the present settings and a `step` for each parameter.

    Args:
        state: what was loaded for `optimizer.sharded_state_dict`.
        saved: the values in it that are not sharded, arranged as when they were saved.
    """
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    states = by_part(state, saved, parts)
    if not torch_adams(optimizer):
        optimizer.load_state_dict(states[0] if len(parts) == 1 else dict(enumerate(states)))
        return
    for part, held in zip(parts, states, strict=True):
        if isinstance(part, DistributedOptimizer):
            _load_distributed(part, held)
        else:
            _restore_step_zero(held)
            part.load_state_dict(held)
    for inner in torch_adams(optimizer):
        for held in inner.state.values():
            held["step"] = torch.as_tensor(held.get("step", 0.0), dtype=torch.float32).clone()


def _load_distributed(optimizer: Any, state: dict[str, Any]) -> None:
    """Common part first, then the tensors: in one go Megatron-Core looks for a `step` among the tensors."""
    common = {name: value for name, value in state.items() if not name.startswith("param_state")}
    optimizer.load_state_dict(common)
    inner = optimizer.optimizer
    steps = {parameter: held.pop("step") for parameter, held in inner.state.items()}
    optimizer.load_parameter_state_from_fully_reshardable(state["param_state"])
    for parameter, step in steps.items():
        inner.state[parameter]["step"] = step


def _restore_step_zero(state: dict[str, Any]) -> None:
    """Megatron-Core leaves a shared step of 0 out when it saves; torch's AdamW does not load without one."""
    import torch

    state.get("optimizer", state)["state"].setdefault("common_step", torch.tensor(0.0))


def torch_adams(optimizer: Any) -> list[Any]:
    """torch's Adam and AdamW in one of Megatron-Core's optimizers."""
    import torch

    inner = [getattr(part, "optimizer", None) for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [adam for adam in inner if type(adam) in (torch.optim.Adam, torch.optim.AdamW)]
