"""`megatron-bridge models`: the architectures that are offered, and what has been proven of each."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click

from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.models.capabilities import Capability, Record, shipped_record
from megatron.bridge.registry import Offer, Registry


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def models(name: str | None, as_json: bool) -> None:
    """List the architectures that convert, with what is proven of each; all of one with NAME."""
    record, offers = shipped_record(), _offers()
    if name is not None:
        name = _resolved(name, offers)
        offers = {name: offers[name]}
    if as_json:
        click.echo(json.dumps({each: _as_dict(record, each, offers[each]) for each in offers}, indent=2))
        return
    for line in _lines(record, offers) if name is None else _details(record, name, offers[name]):
        click.echo(line)


def _offers() -> dict[str, Offer]:
    # The registry's own module is not imported: it needs torch's company.
    offers: Registry[object] = Registry("megatron.bridge.model_bridges", object, "model bridge")
    return {offer.name: offer for offer in offers.offers()}


def _resolved(name: str, offers: dict[str, Offer]) -> str:
    """The one architecture that is meant; case does not matter, and `Llama` is enough for `LlamaForCausalLM`."""
    folded = name.casefold()
    for match in (lambda each: each == folded, lambda each: each.startswith((f"{folded}for", f"{folded}lmhead"))):
        found = [each for each in offers if match(each.casefold())]
        if len(found) == 1:
            return found[0]
    near = did_you_mean(name, [*offers, *(each.partition("For")[0] for each in offers)])
    raise BridgeError(f"no architecture is called {name!r}{near or '; `megatron-bridge models` lists them'}")


def _as_dict(record: Record, name: str, offer: Offer) -> dict[str, Any]:
    capability = record.architectures.get(name)
    return {"offered_by": offer.origin, "proven": None if capability is None else asdict(capability)}


def _lines(record: Record, offers: dict[str, Offer]) -> Iterator[str]:
    width = max(map(len, offers), default=0)
    for name, offer in offers.items():
        capability = record.architectures.get(name)
        yield f"{name:<{width}}  {_summary(capability, offer)}"
    proven = sum(name in record.architectures for name in offers)
    yield ""
    yield f"{len(offers)} architectures, {proven} in the capability record (megatron-bridge models NAME shows one)"


def _summary(capability: Capability | None, offer: Offer) -> str:
    if capability is None:
        return f"not in the record; offered by {offer.origin}"
    return f"{capability.difference:.0e}  {' '.join(capability.layouts)}"


def _details(record: Record, name: str, offer: Offer) -> Iterator[str]:
    yield click.style(name, bold=True) + f"  {offer.target}  {offer.origin}"
    capability = record.architectures.get(name)
    if capability is None:
        yield "  not in the capability record: its own tests are its proof, `megatron-bridge verify` another"
        return
    yield f"  tried: {', '.join(capability.cases)}; float32, layer spec {capability.layer_spec}, {capability.date}"
    yield f"  with: {', '.join(f'{package} {version}' for package, version in capability.versions.items())}"
    yield "  layout      logits within  weights"
    for layout, difference in capability.layouts.items():
        yield f"  {layout:<11} {difference:<14.1e} bit for bit"
    for layout, reason in capability.unproven.items():
        yield f"  {layout:<11} not proven: {reason}"
    for what, outcome in {**capability.low_bit, **capability.peft}.items():
        yield f"  {what}: {outcome}"
    yield f"  multi-token prediction: {'proven' if capability.mtp else 'not tried'}"
