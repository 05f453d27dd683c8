"""The base of every method, on plain torch modules: what is visited, replaced, reported and refused."""

import copy
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch

from megatron.bridge.errors import BridgeError
from megatron.bridge.peft import PEFT, PEFT_METHODS, BitFit


class Scaled(torch.nn.Module):
    """A frozen linear layer whose outputs are scaled by trainable factors."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.scale = torch.nn.Parameter(torch.ones(base.out_features))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.base(value) * self.scale


@dataclass(kw_only=True)
class Scaling(PEFT):
    """Replaces the linear layers that are targets."""

    seen: list[str] = field(default_factory=list)

    def transform(self, module: torch.nn.Module, name: str, prefix: str) -> torch.nn.Module:
        self.seen.append(f"{prefix}.{name}" if prefix else name)
        return Scaled(module) if isinstance(module, torch.nn.Linear) and self.is_target(name, prefix) else module


def _network() -> torch.nn.Module:
    shared = torch.nn.Linear(4, 4)
    network = torch.nn.Module()
    network.body = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(shared), torch.nn.ReLU())
    network.again = shared
    return network


def test_every_module_is_seen_once_children_first_and_replacements_are_not() -> None:
    method = Scaling()
    network = method(_network())
    assert method.seen == ["body.0", "body.1.0", "body.1", "body.2", "body", ""]
    assert isinstance(network.body[0], Scaled)
    assert network.again is network.body[1][0]


def test_only_what_the_method_added_trains() -> None:
    network = Scaling(target_modules=["body.0"])(_network())
    assert [name for name, each in network.named_parameters() if each.requires_grad] == ["body.0.scale"]
    assert network.training


def test_for_inference_nothing_trains() -> None:
    method = Scaling()
    network = method(_network(), training=False)
    assert not any(each.requires_grad for each in network.parameters())
    assert not network.training
    assert method.report.trainable_parameters == 0
    assert [binding.trainable for binding in method.report.bindings] == [("body.0.scale",), ("body.1.0.scale",)]


def test_the_report_counts_and_names() -> None:
    method = Scaling()
    method([_network(), _network()])
    report = method.report
    assert (report.trainable_parameters, report.total_parameters) == (2 * 8, 2 * (2 * 20 + 8))
    assert [(each.chunk, each.name, each.base, each.bound) for each in report.bindings] == [
        (chunk, name, "Linear", "Scaled") for chunk in (0, 1) for name in ("body.0", "body.1.0")
    ]
    assert str(report).splitlines()[:2] == [
        "Scaling: 4 modules changed; 16 of 96 parameters on this rank train (16.67%)",
        "  chunk 0: body.0 (Linear -> Scaled)",
    ]


def test_a_list_comes_back_as_a_list_and_a_root_may_be_replaced() -> None:
    linear = torch.nn.Linear(4, 4)
    (replaced,) = Scaling()([linear])
    assert isinstance(replaced, Scaled)
    assert replaced.base is linear


def test_unchanged_outputs_of_a_model_whose_modules_were_wrapped() -> None:
    network = _network()
    value = torch.randn(3, 4)
    expected = network.body(value)
    assert torch.equal(Scaling()(network).body(value), expected)


def test_a_report_before_use_is_refused() -> None:
    with pytest.raises(BridgeError, match="Scaling has not been applied"):
        _ = Scaling().report


def test_a_method_that_changes_nothing_is_refused_by_name() -> None:
    with pytest.raises(BridgeError, match=r"Scaling changed no module of the model"):
        Scaling()(torch.nn.Sequential(torch.nn.ReLU()))
    with pytest.raises(BridgeError, match=r"target_modules=\['bodi'\]; did you mean 'body'\? The modules here: body\."):
        Scaling(target_modules=["bodi"])(_network())


def test_every_target_must_match_something_that_changed() -> None:
    with pytest.raises(BridgeError, match=r"target_modules=\['body.2'\]"):
        Scaling(target_modules=["body.0", "body.2"])(_network())


def test_a_method_is_a_value() -> None:
    method = BitFit(target_modules=["linear_qkv"])
    method_copy = copy.deepcopy(method)
    assert method == method_copy
    assert repr(method).startswith("BitFit(target_modules=['linear_qkv']")


def test_bitfit_is_offered_and_the_registry_wants_methods() -> None:
    assert PEFT_METHODS["bitfit"] is BitFit
    assert "bitfit" in PEFT_METHODS
    with pytest.raises(BridgeError, match="PEFT"):
        PEFT_METHODS.register("wrong", dict)


def test_importing_the_package_and_listing_its_methods_imports_no_torch() -> None:
    code = (
        "import sys, megatron.bridge.peft as peft; assert 'bitfit' in list(peft.PEFT_METHODS); peft.BitFit();"
        "assert not {'torch', 'megatron.core'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
