"""How a MIMO model runs on this rank: schedule, gradients and totals, for every deployment mode.

One rule holds for gradients in all modes. Every module's gradients are sums over tokens (`calculate_per_token_loss`),
each module reduces its own over its own groups, and all are divided by the tokens of the whole step.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import MultiModuleProcessGroupCollection
from torch import Tensor

from megatron.bridge import platform
from megatron.bridge.mimo.module_groups import LANGUAGE
from megatron.bridge.mimo.peer_failure import Peers
from megatron.bridge.mimo.uneven_bridges import UnevenPipeline

if TYPE_CHECKING:
    from megatron.bridge.mimo.model import BridgeMimoModel
    from megatron.bridge.mimo.parallelism import MimoParallelismConfig

# Axes of what passes between pipeline stages: [sequence, batch, hidden].
_AXES = {"s": 0, "b": 1, "h": 2}


class MimoRuntime:
    """Runs one model. Made collectively, over the world.

    Args:
        model: this rank's modules, each wrapped in Megatron-Core's DDP where they are trained.
        placement: where they stand.
    """

    def __init__(self, model: "BridgeMimoModel", placement: "MimoParallelismConfig") -> None:
        self.model, self.placement = model, placement
        self._peers = Peers(placement)
        self.modules = model.module_groups
        config = model.config
        config.finalize_model_grads_func = self.finish_gradients
        if hasattr(model, "ddp_config") and model.ddp_config.overlap_grad_reduce:
            config.no_sync_func = model.no_sync
        self._pipeline = self._communicator() if placement.mode == "heterogeneous" else None

    @property
    def topology(self) -> dict[str, list[str]]:
        """Which modules each one sends its output to."""
        return {name: [] if name == LANGUAGE else [LANGUAGE] for name in self.modules}

    @property
    def counts(self) -> bool:
        """Whether this rank's losses and tokens count: it is the first of those that have the same ones."""
        own = self.modules[LANGUAGE].groups
        return own is not None and own.pp.rank() == own.pp.size() - 1 and own.tp.rank() == 0

    @cached_property
    def schedule(self) -> Callable[..., list[Any]]:
        """Megatron-Core's schedule for this placement; takes what is left of its arguments."""
        own = self.modules[LANGUAGE].groups
        if self._pipeline is not None:
            here = {name: each.groups for name, each in self.modules.items() if each.groups is not None}
            name = LANGUAGE if LANGUAGE in here else None
            groups = MultiModuleProcessGroupCollection(module_pgs=here, language_model_module_name=name)
            return partial(
                schedules.forward_backward_pipelining_without_interleaving,
                p2p_communicator=self._pipeline,
                pg_collection=groups,
            )
        assert own is not None
        if own.pp.size() == 1:
            return partial(schedules.forward_backward_no_pipelining, pg_collection=own)
        return partial(
            schedules.forward_backward_pipelining_without_interleaving,
            p2p_communicator=P2PCommunicator(own.pp, self.model.config),
            pg_collection=own,
        )

    def forward_backward(
        self,
        forward_step: Any,
        data: Iterator[Any],
        num_microbatches: int,
        *,
        seq_length: int,
        micro_batch_size: int,
        training: bool = True,
    ) -> list[Any]:
        """All micro-batches of a step through the modules; what the loss function reports, on the last stage alone."""
        return self.run_schedule(
            forward_step_func=forward_step,
            data_iterator=data,
            model=[self.model],
            num_microbatches=num_microbatches,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=not training,
        )

    def run_schedule(self, **arguments: Any) -> list[Any]:
        """Megatron-Core's schedule for this placement, with its own arguments.

        Raises:
            BridgeError: (on every rank that is left) a rank failed or is gone; names it and its module.
        """
        if isinstance(data := arguments.get("data_iterator"), list):
            arguments["data_iterator"] = data[0]
        try:
            reports = self.schedule(**arguments)
        except Exception as error:
            raise self._peers.failure(error) from error
        if self._pipeline is not None:
            self._pipeline.forget()
        return reports

    def finish_gradients(
        self, model: Sequence[Any], num_tokens: Tensor | None, pg_collection: Any = None, force_all_reduce: bool = False
    ) -> None:
        """Reduce every module's gradients over its own groups, and divide them by the step's tokens. Collective.

        Megatron-Core's schedules call it when the last micro-batch is through.
        """
        tokens = self.total(torch.zeros((), device=platform.device()) if num_tokens is None else num_tokens.float())
        for name, module in self.model.parts().items():
            groups = self.modules[name].here
            finalize_model_grads([module], pg_collection=groups, force_all_reduce=force_all_reduce)
            module.scale_gradients(1.0 / max(float(tokens), 1.0))  # type: ignore[operator]

    def total(self, values: Tensor) -> Tensor:
        """The sum over all replicas of what the last stages hold, on every rank. Collective."""
        summed = values.clone() if self.counts else torch.zeros_like(values)
        dist.all_reduce(summed)
        return summed

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within the block no module reduces its gradients, whatever overlaps."""
        with self.model.no_sync():
            yield

    def _communicator(self) -> UnevenPipeline:
        return UnevenPipeline(
            {name: each.grid for name, each in self.modules.items()},
            self.topology,
            self.model.config,
            dim_mapping=_AXES,
            module_output_ndim={name: 3 if name == LANGUAGE else 2 for name in self.modules},
        )
