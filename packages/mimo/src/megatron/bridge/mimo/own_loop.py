"""MIMO in a loop of one's own, around Megatron-Core's schedules and any torch optimizer."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.module_groups import LANGUAGE

if TYPE_CHECKING:
    from megatron.core.hyper_comm_grid import HyperCommGrid

    from megatron.bridge.mimo.model import BridgeMimoModel
    from megatron.bridge.mimo.provider import MimoProvider

    type ModulesAndGrids = Sequence[tuple[Any, HyperCommGrid]]


def get_vlm_mimo_model_colocated(
    model_config: "MimoProvider", seq_len: int
) -> "tuple[BridgeMimoModel, dict[str, HyperCommGrid], dict[str, list[str]]]":
    """A model whose modules stand on the same ranks, ready for `forward_backward_no_pipelining`. Collective.

    After the schedule every parameter has its gradient in `grad`, reduced and divided by the step's tokens, so that a
    plain torch optimizer over `model.parameters()` can step.

    Args:
        model_config: its provider.
        seq_len: longest sequence, in tokens.

    Returns:
        This rank's modules, each in Megatron-Core's DDP; the grid of every module, and whom it sends its output to, by
        the names in the placement.

    Raises:
        BridgeError: the placement is heterogeneous, or the model is refused.
    """
    if model_config.placement.mode == "heterogeneous":
        raise BridgeError(
            "get_vlm_mimo_model_colocated is for modules on the same ranks, and this placement is heterogeneous; train "
            "it by megatron.bridge.training.pretrain"
        )
    model_config.seq_length = seq_len
    (model,) = model_config.provide_distributed_model()
    runtime = model_config.engine.runtime

    def finish(*arguments: Any, **settings: Any) -> None:
        runtime.finish_gradients(*arguments, **settings)
        for parameter in model.parameters():
            parameter.grad = getattr(parameter, "main_grad", None)

    model.config.finalize_model_grads_func = finish
    names = {name: model_config.placement.llm_module_name if name == LANGUAGE else name for name in runtime.modules}
    grids = {names[name]: place.grid for name, place in runtime.modules.items()}
    topology = {names[name]: [names[other] for other in others] for name, others in runtime.topology.items()}
    return model, grids, topology


def module_to_grid_tuple(model: "BridgeMimoModel") -> "list[tuple[Any, HyperCommGrid]]":
    """The modules on this rank, each with its grid."""
    return [(part, model.module_groups[name].grid) for name, part in model.parts().items()]


@contextlib.contextmanager
def multimodule_no_sync(
    modules: "ModulesAndGrids", iteration: int | None = None, num_microbatches: int | None = None
) -> Iterator[None]:
    """Within the block no module begins to reduce its gradients.

    Args:
        modules: see `module_to_grid_tuple`.
        iteration, num_microbatches: of the loop; the block does not depend on them.
    """
    with contextlib.ExitStack() as stack:
        for module, _ in modules:
            stack.enter_context(module.no_sync())
        yield


def finalize_model_grads(
    modules: "ModulesAndGrids", iteration: int | None = None, num_microbatches: int | None = None
) -> None:
    """End a step: the gradients, which the schedule has reduced and the optimizer used, make room for the next ones.

    Args:
        modules: see `module_to_grid_tuple`.
        iteration, num_microbatches: of the loop; nothing depends on them.
    """
    for module, _ in modules:
        module.zero_grad_buffer()
