"""The ways of training that are claimed: parallel layouts, and what data parallelism and the optimizer add to them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.bridge.testing.layouts import ALL_LAYOUTS, CONTEXT_LAYOUTS, EP, SP, TP, ranks_of

DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAPPED = DISTRIBUTED | {"overlap_grad_reduce": True, "overlap_param_gather": True}


@dataclass(frozen=True)
class Layout:
    """Attributes: fields: of the provider. settings: of the sections ddp, optimizer and train. ranks: in all."""

    fields: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 1

    @property
    def ranks(self) -> int:
        """How many processes it takes."""
        return self.replicas * ranks_of(self.fields)


def plain_layouts(names: tuple[str, ...]) -> dict[str, Layout]:
    """Those of the test kit, with nothing added."""
    return {name: Layout({**ALL_LAYOUTS, **CONTEXT_LAYOUTS}[name]) for name in names}


ONE = "single"
SEQUENCE = {TP: 2, SP: True}
# Name -> layout, for every model.
DENSE: dict[str, Layout] = {
    **plain_layouts((ONE, "tp2", "sp2", "pp2", "vpp2", "tp2pp2", "cp2", "tp2cp2sp")),
    "single, distributed optimizer": Layout(settings=DISTRIBUTED),
    "single, per-token loss": Layout({"calculate_per_token_loss": True}),
    "dp2": Layout(replicas=2),
    "dp2, overlapped": Layout(settings={"overlap_grad_reduce": True}, replicas=2),
    "dp2, distributed optimizer": Layout(settings=DISTRIBUTED, replicas=2),
    "dp2, distributed optimizer, overlapped": Layout(settings=OVERLAPPED, replicas=2),
    "dp2, per-token loss": Layout({"calculate_per_token_loss": True}, {"micro_batch_size": 2}, replicas=2),
    "cp2, per-token loss": Layout({**CONTEXT_LAYOUTS["cp2"], "calculate_per_token_loss": True}),
    "cp2, distributed optimizer": Layout(CONTEXT_LAYOUTS["cp2"], DISTRIBUTED),
    "tp2dp2": Layout(ALL_LAYOUTS["tp2"], replicas=2),
    "sp2dp2, distributed optimizer": Layout(SEQUENCE, DISTRIBUTED, replicas=2),
}
# And for mixtures of experts besides. With tensor parallelism these train with sequence parallelism only.
EXPERTS: dict[str, Layout] = {
    **{name: each for name, each in DENSE.items() if TP not in each.fields or SP in each.fields},
    **plain_layouts(("ep2", "pp2ep2", "tp2ep2sp")),
    "ep2, distributed optimizer": Layout({EP: 2}, DISTRIBUTED),
    "ep2, per-token loss": Layout({EP: 2, "calculate_per_token_loss": True}),
    "sp2ep2, experts divided": Layout({**SEQUENCE, EP: 2}),
    "dp2ep2, distributed optimizer": Layout({EP: 2}, DISTRIBUTED, replicas=2),
}
# The balance between experts is a micro-batch's, so another micro-batch is another loss.
BALANCED = {name: each for name, each in EXPERTS.items() if "micro_batch_size" not in each.settings}
FEW = {name: EXPERTS[name] for name in (ONE, "ep2", "tp2ep2sp")}
# Multi-latent attention is not divided along sequences.
LATENT = {
    name: EXPERTS[name]
    for name in (
        ONE,
        "sp2",
        "pp2",
        "vpp2",
        "ep2",
        "tp2ep2sp",
        "pp2ep2",
        "sp2ep2, experts divided",
        "dp2ep2, distributed optimizer",
    )
}
LATENT_FEW = {name: LATENT[name] for name in (ONE, "sp2", "pp2", "ep2")}
# What every run of the tests trains; `just parity` trains all.
DENSE_OFTEN = (
    ONE,
    "tp2",
    "pp2",
    "vpp2",
    "tp2pp2",
    "tp2cp2sp",
    "cp2, distributed optimizer",
    "dp2, per-token loss",
    "dp2, distributed optimizer, overlapped",
)
EXPERTS_OFTEN = (ONE, "pp2ep2", "tp2ep2sp", "ep2, distributed optimizer")
FEW_OFTEN = (ONE, "ep2")
