"""The capability record is complete and in form, and a sample of it holds today."""

import hashlib
from pathlib import Path

import pytest
from zoo.exhibits import Exhibit, chosen, exhibits
from zoo.page import page
from zoo.proofs import is_current, prove

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.capabilities import shipped_record
from megatron.bridge.registry import Registry
from megatron.bridge.testing.families import compare
from megatron.bridge.testing.layouts import ALL_LAYOUTS, EVERYWHERE

PAGE = Path(__file__).parents[1] / "docs/capabilities.md"
RENEW = "run `just zoo --missing` and commit what it writes"
SAMPLE = 3


@pytest.fixture(scope="module")
def everything() -> dict[str, list[Exhibit]]:
    return exhibits()


def offered() -> set[str]:
    """Architectures of our own distribution; those of plugins are proven by theirs."""
    offers = Registry[object]("megatron.bridge.model_bridges", object, "model bridge").offers()
    return {offer.name for offer in offers if offer.distribution == "megatron-bridge-models"}


def test_every_offered_architecture_is_in_the_record() -> None:
    held = shipped_record().architectures
    assert sorted(offered() - held.keys()) == [], RENEW


def test_the_record_is_of_the_cases_and_layouts_that_there_are(everything) -> None:
    held = shipped_record().architectures
    assert held.keys() == everything.keys(), RENEW
    assert [name for name, each in held.items() if not is_current(each, everything[name], quick=True)] == [], RENEW
    assert shipped_record().layouts == ALL_LAYOUTS, RENEW


def test_the_page_is_written_from_the_record() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(shipped_record()), RENEW


def test_every_architecture_is_proven_at_the_layouts_that_are_promised() -> None:
    for name, each in shipped_record().architectures.items():
        tried = {*each.layouts, *each.unproven}
        wanted = {*EVERYWHERE, *(("ep2",) if "ep2" in tried else ())}
        assert wanted <= each.layouts.keys(), name
        assert each.difference < 1e-4, name


def test_a_sample_of_the_record_holds(everything, tmp_path: Path) -> None:
    # The same architectures every time until new ones come: a failure is one of the change at hand.
    by_chance = sorted(everything, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    for name in by_chance[:SAMPLE]:
        exhibit = everything[name][0]
        layout = list(shipped_record().architectures[name].layouts)[1]
        found = compare([exhibit.case(tmp_path)], layout)
        assert found[exhibit.name] < 1e-5


def test_what_does_not_hold_is_recorded_with_its_reason(everything, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.bridge.models.families.granite import GraniteBridge

    monkeypatch.setattr(GraniteBridge, "differences", lambda self: {})
    monkeypatch.setattr("zoo.proofs.EVERYWHERE", ("single", "tp2"))
    lines: list[str] = []
    name = "GraniteForCausalLM"
    found = prove({name: everything[name]}, lines.append, quick=True)[name]
    assert found.layouts == {}
    assert found.unproven.keys() == {"single", "tp2"}
    assert "granite: logits differ from transformers' by" in found.unproven["single"]
    assert lines[0].startswith("single: 1 cases, logits within nan")


def test_names_choose_by_how_they_start(everything) -> None:
    assert chosen(("qwen2moe",), everything) == ["Qwen2MoeForCausalLM"]
    assert chosen((), everything) == list(everything)
    with pytest.raises(BridgeError, match="the zoo has no 'Lama'"):
        chosen(("Lama",), everything)


def test_two_cases_of_one_name_are_told_apart_by_their_area(tmp_path: Path) -> None:
    text = "from transformers import LlamaConfig\nCONFIGS = {'llama': LlamaConfig()}\n"
    for name in ("test_a_families.py", "test_b_families.py"):
        (tmp_path / name).write_text(text)
    assert [each.name for each in exhibits(tmp_path)["LlamaForCausalLM"]] == ["llama", "llama-b"]
