"""BitFit on a case: one step of gradient descent on the biases."""

from collections.abc import Mapping
from typing import Any

import torch

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.entries import base_name
from megatron.bridge.conversion.live_weights import canonical_weights
from megatron.bridge.peft.bitfit import BitFit
from megatron.bridge.testing.families import FamilyCase, FamilyMismatch


def train_biases(case: FamilyCase, fields: Mapping[str, Any]) -> None:
    """Train the biases for one step and compare what comes out. To be run in every rank of the layout.

    Raises:
        FamilyMismatch: a weight without a bias changed, or none did.
        BridgeError: the model has no biases.
    """
    bridge = AutoBridge.from_hf_pretrained(case.folder)
    provider = bridge.to_megatron_provider()
    for name, value in {**fields, "layer_spec": "torch"}.items():
        setattr(provider, name, value)
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False, pre_wrap_hook=BitFit())
    trained = [each for each in model.parameters() if each.requires_grad]
    for tokens, inputs in zip(case.tokens.split(1), case.inputs or [{}] * len(case.tokens), strict=True):
        positions = torch.arange(tokens.shape[1])[None]
        # The decoder of an encoder-decoder reads the same tokens as its encoder.
        given = (
            (tokens, tokens, None, None, None) if getattr(model, "xattn_needed", False) else (tokens, positions, None)
        )
        model(*given, **inputs).float().square().mean().backward()
    with torch.no_grad():
        for bias in trained:
            if bias.grad is not None:
                bias.sub_(bias.grad)
    biases = {name for name, each in canonical_weights([model]).items() if any(each is other for other in trained)}
    tasks = bridge.get_conversion_tasks(model)
    allowed = {base_name(hf) for item in tasks if item.megatron in biases for hf in item.hf}
    changed = {name for name, each in bridge.export_hf_weights(model) if not torch.equal(each, case.weights[name])}
    if not changed or not changed <= allowed:
        raise FamilyMismatch(f"{case.name}: BitFit changed {sorted(changed - allowed) or 'nothing'}")
