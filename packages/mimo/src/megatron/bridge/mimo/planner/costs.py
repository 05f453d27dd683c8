"""What an encoder takes on a rank, by the planner's cost model. Torch-free."""

from dataclasses import dataclass

from megatron.bridge.mimo.planner.encoder_shape import EncoderShape
from megatron.bridge.training.flops import config_flops_per_token
from megatron.bridge.training.planner.hardware import Cluster
from megatron.bridge.training.planner.layout import Layout
from megatron.bridge.training.planner.memory import stage_memory
from megatron.bridge.training.planner.precision import Bytes
from megatron.bridge.training.planner.step_time import NETWORK, PRODUCTS, step_time

# A forward pass, and one backward pass each for inputs and weights.
_PASSES = 3


@dataclass(frozen=True, kw_only=True)
class EncoderCost:
    """Of one rank.

    Attributes:
        memory: bytes at the fullest moment.
        pass_seconds: of a micro-batch, forwards and backwards.
        step_seconds: once in a step: gradients that nothing hides, and the update.
    """

    memory: float
    pass_seconds: float
    step_seconds: float


def encoder_cost(
    encoder: EncoderShape, cluster: Cluster, size: Bytes, *, replicas: int, samples: float, under_way: int
) -> EncoderCost:
    """What a replica takes, which is whole on each of its ranks: towers are not divided.

    Args:
        encoder: its sizes.
        cluster: whose device it has.
        size: bytes per parameter.
        replicas: that share a batch.
        samples: of a micro-batch, on one replica.
        under_way: micro-batches whose activations are held at once.
    """
    device, items = cluster.device, samples * encoder.items
    one = Layout(micro_batch=1)
    taken = step_time(encoder.tower, one, device, replicas=replicas, micro_batches=1, size=size)
    held = stage_memory(encoder.tower, one, 0, replicas=replicas, micro_batches=1, size=size, spec="torch")
    trained = encoder.projector_parameters + (0 if encoder.frozen else encoder.tower_parameters)
    shared = replicas if size.distributed else 1
    memory = float(size.weight * (encoder.tower_parameters + encoder.projector_parameters))
    memory += trained * (size.gradient + size.optimizer / shared)
    memory += items * held.activations * (1 / encoder.tower.num_layers if encoder.frozen else under_way)
    tower = taken.compute / (_PASSES if encoder.frozen else 1)
    projector = _PASSES * 2.0 * encoder.projector_parameters * encoder.features / (PRODUCTS * device.bf16_tflops * 1e12)
    once = items * (tower + projector)
    sent = trained * (size.gradient + size.gathered) * (replicas - 1) / replicas
    exposed = max(0.0, sent / (device.bandwidth(cluster.count) * NETWORK) - once)
    return EncoderCost(
        memory=memory, pass_seconds=once, step_seconds=exposed + (0.0 if encoder.frozen else taken.optimizer)
    )


def encoder_flops(encoder: EncoderShape, samples: float) -> float:
    """Model FLOPs of an encoder over so many samples."""
    tower = encoder.features * config_flops_per_token(encoder.tower, encoder.features, 0)
    projector = 2.0 * encoder.projector_parameters * encoder.features
    return samples * encoder.items * (tower * (1 if encoder.frozen else _PASSES) + _PASSES * projector)
