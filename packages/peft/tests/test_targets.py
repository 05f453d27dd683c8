"""How target patterns, layer ranges and Hugging Face names choose modules."""

import pytest

from megatron.bridge.errors import BridgeError
from megatron.bridge.peft.targets import layer_of, layers_of, matches


def test_patterns() -> None:
    name = "decoder.layers.3.self_attention.linear_qkv"
    for pattern in (
        "linear_qkv",
        name,
        "*.layers.3.*",
        "*.layers.[2-3].*qkv",
        r"re:.*layers\.(1|3)\..*",
        "*linear_qkv",
    ):
        assert matches(pattern, name), pattern
    for pattern in ("linear_q", "*.layers.1.*", r"re:layers\.3", "qkv"):
        assert not matches(pattern, name), pattern


def test_a_broken_expression_is_named() -> None:
    with pytest.raises(BridgeError, match=r"'re:\(' is no regular expression"):
        matches("re:(", "linear_qkv")


def test_layers() -> None:
    assert layers_of(None) is None
    assert layers_of([1, 4]) == {1, 4}
    assert layers_of("0-2, 7") == {0, 1, 2, 7}
    assert layer_of("decoder.layers.12.mlp") == 12
    assert layer_of("output_layer") is None
    with pytest.raises(BridgeError, match="layers_to_transform='first'"):
        layers_of("first")
