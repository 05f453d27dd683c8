"""`megatron-bridge plugins`: what is offered under every `megatron.bridge.*` entry-point group, and what is broken."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby

import click

from megatron.bridge.cli.offers import Listing, list_offers, load_offers


@click.command()
@click.option("--group", metavar="GROUP", help="Only this entry-point group, e.g. megatron.bridge.peft or peft.")
@click.option("--check", is_flag=True, help="Load every one; exit with 1 when one is broken or in conflict.")
@click.option("--timeout", default=60, show_default=True, type=click.IntRange(1), help="Seconds to load one (--check).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def plugins(ctx: click.Context, group: str | None, check: bool, timeout: int, as_json: bool) -> None:
    """List every installed plugin with its distribution and version."""
    listings = list_offers(group)
    if check:
        listings = load_offers(listings, timeout)
    if as_json:
        click.echo(json.dumps([listing.as_dict() for listing in listings], indent=2))
    else:
        for line in _lines(listings, checked=check):
            click.echo(line)
    if check and any(listing.state != "works" for listing in listings):
        ctx.exit(1)


def _lines(listings: list[Listing], checked: bool) -> Iterator[str]:
    names = max((len(listing.offer.name) for listing in listings), default=0)
    targets = max((len(listing.offer.target) for listing in listings), default=0)
    for group, members in groupby(listings, key=lambda listing: listing.group):
        yield click.style(group, bold=True)
        for listing in members:
            offer = listing.offer
            state = "" if listing.state == "listed" else f"  {_STYLES[listing.state]}"
            yield f"  {offer.name:<{names}}  {offer.target:<{targets}}  {offer.origin}{state}"
            if listing.reason:
                yield f"      {listing.reason}"
        yield ""
    yield _summary(listings, checked)


_STYLES = {
    "works": click.style("works", fg="green"),
    "broken": click.style("BROKEN", fg="red"),
    "conflict": click.style("CONFLICT", fg="red"),
}


def _summary(listings: Iterable[Listing], checked: bool) -> str:
    listings = list(listings)
    states = Counter(listing.state for listing in listings)
    parts = [f"{len(listings)} offers in {len({listing.group for listing in listings})} groups"]
    parts += [f"{states['works']} work", f"{states['broken']} broken"] if checked else []
    parts += [f"{states['conflict']} in conflict"] if states["conflict"] or checked else []
    return ", ".join(parts) + ("" if checked else " (--check loads each one)")
