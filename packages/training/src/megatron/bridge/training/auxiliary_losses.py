"""Losses beside the main one: those of experts' routers (MoE) and of prediction layers (MTP).

The forward passes record them in Megatron-Core's trackers, per layer, on the stage that has the layer. They are set
to zero as a step begins and read where the step is reported, so that steps which are not cost no communication.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.bridge.training.state import RunState

# `model.moe_router_load_balancing_type` -> the name under which its loss is recorded.
_ROUTER_LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


def start_recording() -> None:
    """Drop what earlier runs of this process recorded: other layers, process groups that are gone."""
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    destroy_moe_metrics_tracker()
    MTPLossLoggingHelper.tracker.clear()


def forget_last_step() -> None:
    """Set what the last step recorded to zero."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    get_moe_metrics_tracker().clear()
    MTPLossLoggingHelper.clean_metrics_in_tracker()


def auxiliary_losses(run: "RunState", num_microbatches: int) -> dict[str, float]:
    """The losses that the last step recorded, without their coefficients; the same on every rank. Collective.

    Router losses (`load_balancing_loss`, `seq_load_balancing_loss`, `global_load_balancing_loss`, `z_loss`) are means
    over the layers with experts, micro-batches and data-parallel ranks; `mtp_1_loss`, ... of each prediction layer are
    means over micro-batches, data- and context-parallel ranks. Read them once per step.
    """
    names = list(router_losses(run.cfg.model))
    if not names and not getattr(run.cfg.model, "mtp_num_layers", None):
        return {}
    return run.engine.over_stages(
        lambda groups: _router_values(run, names, num_microbatches, groups) | _prediction_values(num_microbatches)
    )


def router_losses(model: Any) -> Iterator[str]:
    """Names of the losses that the routers of `model` (a provider) record."""
    if not getattr(model, "num_moe_experts", None):
        return
    kinds, weights = model.moe_router_load_balancing_type, model.moe_aux_loss_coeff
    kinds = [kinds] if isinstance(kinds, str) else kinds
    weights = weights if isinstance(weights, Sequence) else [weights] * len(kinds)
    yield from (
        _ROUTER_LOSSES[kind] for kind, weight in zip(kinds, weights, strict=True) if kind in _ROUTER_LOSSES and weight
    )
    if model.moe_z_loss_coeff is not None:
        yield "z_loss"


def _router_values(run: "RunState", names: list[str], num_microbatches: int, groups: Any) -> dict[str, float]:
    """Means over all stages; nothing where this stage has no experts, for there the reduction is not complete."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    if not names:
        return {}
    tracker, model = get_moe_metrics_tracker(), run.cfg.model
    found: dict[str, Any] = {}
    tracker.report(
        1 / num_microbatches,
        run.progress.iteration,
        force_initialize=True,
        track_names=names,
        num_layers=model.num_layers,
        moe_layer_freq=model.moe_layer_freq,
        mtp_num_layers=getattr(model, "mtp_num_layers", None),
        total_loss_dict=found,
        pg_collection=groups,
    )
    # An entry that the routers of this stage made knows their groups.
    own = {name for name, entry in tracker.metrics.items() if entry.reduce_group or entry.avg_group}
    return {name: float(value) for name, value in found.items() if name in own}


def _prediction_values(num_microbatches: int) -> dict[str, float]:
    """The losses of the prediction layers, where this stage computes them."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    found: dict[str, Any] = {}
    MTPLossLoggingHelper.track_mtp_metrics(1 / num_microbatches, 0, None, total_loss_dict=found)
    return {name.replace(" ", "_"): float(value) for name, value in found.items()}
