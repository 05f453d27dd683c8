"""Where torch's AdamW and Megatron-Core's optimizers disagree about state, without Transformer Engine and apex.

torch keeps a `step` tensor per parameter. Megatron-Core's distributed optimizer expects one shared step, fails on a
state that has not been stepped yet, and after a load gives the same tensor to all parameters, which then count each
other's steps. With Transformer Engine's or apex's Adam there is no `step` tensor, and nothing here changes anything.
"""

from typing import Any


def prepare_optimizer_state(optimizer: Any) -> None:
    """Give parameters that were never stepped the state that they would have: zero moments at step 0."""
    import torch

    for inner in _torch_adams(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def load_optimizer_state(optimizer: Any, state: Any) -> None:
    """`optimizer.load_state_dict(state)`, with a `step` of its own for each parameter afterwards."""
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    if len(parts) == 1 and isinstance(parts[0], DistributedOptimizer) and _torch_adams(optimizer):
        _load_distributed(parts[0], state)
    else:
        if _torch_adams(optimizer):
            _restore_step_zero([state] if len(parts) == 1 else list(state.values()))
        optimizer.load_state_dict(state)
    for inner in _torch_adams(optimizer):
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


def _restore_step_zero(states: list[Any]) -> None:
    """Megatron-Core leaves a shared step of 0 out when it saves; torch's AdamW does not load without one."""
    import torch

    for state in states:
        state.get("optimizer", state)["state"].setdefault("common_step", torch.tensor(0.0))


def _torch_adams(optimizer: Any) -> list[Any]:
    import torch

    inner = [getattr(part, "optimizer", None) for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [adam for adam in inner if type(adam) in (torch.optim.Adam, torch.optim.AdamW)]
