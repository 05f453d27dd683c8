"""Splits and blends: what is written is what is meant, against Megatron-Core's own arithmetic."""

import pytest

from megatron.bridge.data.splits import Blend, document_range, parse_blend, parse_split
from megatron.bridge.errors import BridgeError


@pytest.mark.parametrize("split", ["99,1,0", "969,30,1", "1,1,1", "0.5,0.25", "1", "7,0,3", "1,2,3"])
@pytest.mark.parametrize("documents", [1, 2, 3, 10, 679, 100_001])
def test_documents_are_divided_as_megatron_core_divides_them(split: str, documents: int) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    shares = parse_split(split)
    assert shares == pytest.approx(parse_and_normalize_split(split), abs=1e-15)
    for index, bounds in enumerate(convert_split_vector_to_split_matrix(list(shares))):
        if bounds is None:
            assert shares[index] == 0
        else:
            expected = tuple(round(bound * float(documents)) for bound in bounds)
            assert document_range(shares, index, documents) == expected


@pytest.mark.parametrize(
    ("split", "complaint"),
    [
        ("0,0,0", "sums to 0"),
        ("99;1;0", "not a list of numbers"),
        ("", "not a list of numbers"),
        ("1,2,3,4", "4 shares"),
        ("2,-1,0", "negative"),
        ("inf,1,0", "infinite"),
    ],
)
def test_a_split_that_means_nothing_is_refused(split: str, complaint: str) -> None:
    with pytest.raises(BridgeError, match=complaint) as refusal:
        parse_split(split)
    assert "99,1,0" in str(refusal.value)


def test_blends() -> None:
    assert parse_blend(["a"], "f") == Blend(("a",))
    assert parse_blend(["a", "b"], "f") == Blend(("a", "b"))
    assert parse_blend(["0.7", "a", "0.3", "b"], "f") == Blend(("a", "b"), (0.7, 0.3))
    assert parse_blend(["1.0", "a"], "f") == Blend(("a",)), "one weighted prefix is no blend"


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([], "is empty"),
        (["0.7", "a", "b"], "mixes weights and prefixes"),
        (["a", "0.7", "b", "0.3"], "mixes weights and prefixes"),
        (["0.7", "0.3"], "mixes weights and prefixes"),
        (["0", "a", "1", "b"], "weight 0 of 'a' must be positive"),
        (["nan", "a", "1", "b"], "weight nan of 'a' must be positive"),
        ("data/corpus", "must be a list"),
    ],
)
def test_a_blend_that_means_nothing_is_refused(entries: list[str], complaint: str) -> None:
    with pytest.raises(BridgeError, match=complaint) as refusal:
        parse_blend(entries, "dataset.data_paths")
    assert "dataset.data_paths" in str(refusal.value)
