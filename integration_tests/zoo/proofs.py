"""What the zoo proves of one architecture, each layout in ranks of its own."""

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron.bridge import AutoBridge
from megatron.bridge.errors import BridgeError
from megatron.bridge.models.capabilities import Capability
from megatron.bridge.testing import run_ranks
from megatron.bridge.testing.families import FamilyCase, FamilyMismatch, compare
from megatron.bridge.testing.layouts import layout_fields, layouts_for, ranks_of
from zoo.exhibits import Exhibit

LAYER_SPEC = "torch"
# Training a mixture of experts over tensor-parallel ranks takes sequence parallelism, and with it a gradient exchange
# that is not part of this.
PEFT_LAYOUTS = {False: ("single", "tp2"), True: ("single", "ep2")}
LONGEST_REASON = 160  # characters


def prove(exhibits: Sequence[Exhibit], told: Callable[[str], None]) -> Capability:
    """Try every layout and method; what fails is recorded with its reason.

    Args:
        exhibits: of one architecture.
        told: called with a line about each thing that was tried.
    """
    with tempfile.TemporaryDirectory() as root:
        cases = [exhibit.case(Path(root)) for exhibit in exhibits]
        providers = [AutoBridge.from_hf_pretrained(case.folder).to_megatron_provider() for case in cases]
        experts = all(bool(getattr(provider, "num_moe_experts", None)) for provider in providers)
        layouts, unproven = _layouts(cases, layouts_for(experts=experts), told)
        peft = {"BitFit": _bitfit(cases, PEFT_LAYOUTS[experts])}
        told(f"BitFit: {peft['BitFit']}")
    return Capability(
        cases=tuple(exhibit.name for exhibit in exhibits),
        layouts=layouts,
        unproven=unproven,
        peft=peft,
        mtp=any(getattr(provider, "mtp_num_layers", None) for provider in providers),
        layer_spec=LAYER_SPEC,
        date=datetime.now(UTC).date().isoformat(),
        versions={package: version(package) for package in ("torch", "megatron-core", "transformers")},
    )


def is_current(capability: Capability, exhibits: Sequence[Exhibit]) -> bool:
    """Whether a record was made of these very cases at all layouts that there are."""
    tried = {*capability.layouts, *capability.unproven}
    return capability.cases == tuple(exhibit.name for exhibit in exhibits) and any(
        tried == {*layouts_for(experts=experts)} for experts in (False, True)
    )


def _layouts(
    cases: Sequence[FamilyCase], names: Sequence[str], told: Callable[[str], None]
) -> tuple[dict[str, float], dict[str, str]]:
    """(layout -> largest difference, layout -> why not)"""
    proven: dict[str, float] = {}
    unproven: dict[str, str] = {}
    for name in names:
        try:
            difference = max(compare(cases, name, LAYER_SPEC).values())
        except (BridgeError, FamilyMismatch) as error:
            unproven[name] = _reason(error)
            told(f"{name}: not proven: {unproven[name]}")
        else:
            proven[name] = float(f"{difference:.1e}")
            told(f"{name}: {difference:.1e}")
    return proven, unproven


def _reason(error: Exception) -> str:
    """An error in one line, without the paths and rank numbers that differ from run to run."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"\[rank [\d, ]+\] ", "", " ".join(lines[:2]) if len(lines) < 6 else lines[-1])
    text = re.sub(r"/\S*/", "", text)
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


def _bitfit(cases: Sequence[FamilyCase], layouts: Sequence[str]) -> str:
    """What BitFit does to the first case that has biases."""
    for case in cases:
        try:
            for name in layouts:
                fields = layout_fields(name)
                run_ranks(ranks_of(fields), train_biases, case, fields, timeout=120)
        except (BridgeError, FamilyMismatch) as error:
            if "must have some" not in str(error):
                return f"not proven: {_reason(error)}"
        else:
            return f"one step at {' and '.join(layouts)} changes the biases and nothing else"
    return "nothing to train"


def train_biases(case: FamilyCase, fields: Mapping[str, Any]) -> None:
    """One step of gradient descent on the biases. To be run in every rank of the layout.

    Raises:
        FamilyMismatch: a weight without a bias changed, or none did.
    """
    import torch

    from megatron.bridge.conversion.live_weights import canonical_weights
    from megatron.bridge.peft.bitfit import BitFit

    bridge = AutoBridge.from_hf_pretrained(case.folder)
    provider = bridge.to_megatron_provider()
    for name, value in {**fields, "layer_spec": LAYER_SPEC}.items():
        setattr(provider, name, value)
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False, pre_wrap_hook=BitFit())
    trained = [each for each in model.parameters() if each.requires_grad]
    positions = torch.arange(case.tokens.shape[1]).expand_as(case.tokens)
    model(case.tokens, positions, None, labels=case.tokens.roll(-1, 1)).mean().backward()
    with torch.no_grad():
        for bias in trained:
            if bias.grad is not None:
                bias.sub_(bias.grad)
    biases = {name for name, each in canonical_weights([model]).items() if any(each is other for other in trained)}
    allowed = {hf for item in bridge.get_conversion_tasks(model) if item.megatron in biases for hf in item.hf}
    changed = {name for name, each in bridge.export_hf_weights(model) if not torch.equal(each, case.weights[name])}
    if not changed or not changed <= allowed:
        raise FamilyMismatch(f"{case.name}: BitFit changed {sorted(changed - allowed) or 'nothing'}")
