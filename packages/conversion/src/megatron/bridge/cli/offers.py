"""What plugins are installed, and whether they can be used: listed, looked up without running them, or loaded."""

import ast
import importlib.metadata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron.bridge.cli.locate import bound_names, locate
from megatron.bridge.cli.probe import offer_step, probe
from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.registry import GROUPS, Offer, Registry, installed_groups

PREFIX = "megatron.bridge."
# A module that keeps a registry names it here, under its group's name, so that a check also sees a wrong kind.
REGISTRIES = "megatron.bridge.registries"


class UnknownGroup(BridgeError):
    """No installed distribution offers anything under the entry-point group."""


@dataclass(frozen=True)
class Listing:
    """One offer, and what is known about it.

    Attributes:
        state: `listed` (nothing more was tried), `works`, `broken` or `conflict`.
        reason: why it is broken, or with whom it conflicts.
    """

    group: str
    offer: Offer
    state: str = "listed"
    reason: str | None = None

    @property
    def key(self) -> str:
        """Unique among the listings of an installation."""
        return f"{self.group}/{self.offer.name}/{self.offer.distribution}/{self.offer.target}"

    def as_dict(self) -> dict[str, Any]:
        """Flat, for JSON."""
        return {"group": self.group, **asdict(self.offer), "state": self.state, "reason": self.reason}


def list_offers(group: str | None = None) -> list[Listing]:
    """Every offer of one group (full name, or what follows `megatron.bridge.`) or of all, conflicts marked.

    Imports nothing.

    Raises:
        UnknownGroup: nothing is offered under `group`.
    """
    listings = []
    for each in installed_groups() if group is None else (_full_name(group),):
        offers = _registry(each).offers()
        listings += [_listing(each, offer, offers) for offer in offers]
    return listings


def _listing(group: str, offer: Offer, offers: Iterable[Offer]) -> Listing:
    rivals = [rival for rival in offers if rival.name == offer.name and rival != offer]
    if not rivals:
        return Listing(group, offer)
    named = ", ".join(f"{rival.origin} ({rival.target})" for rival in rivals)
    return Listing(group, offer, "conflict", f"{offer.name!r} is also offered by {named}; uninstall one of them")


def _full_name(group: str) -> str:
    known = installed_groups()
    for name in (group, PREFIX + group):
        if name in known:
            return name
    provider = GROUPS.get(group) or GROUPS.get(PREFIX + group)
    hint = f"; the package {provider!r} provides some (uv pip install {provider})" if provider else ""
    near = did_you_mean(group, [*known, *(name.removeprefix(PREFIX) for name in known)])
    raise UnknownGroup(f"nothing installed is offered under the group {group!r}{near}{hint}")


def _registry(group: str) -> Registry[object]:
    return Registry(group, object, "plugin")


def registry_of(group: str) -> Registry[Any]:
    """The registry that some module declared for `group` (this imports it), else one that accepts any kind of value."""
    declared = Registry[Registry[Any]](REGISTRIES, Registry, "registry")
    return declared[group] if group in declared else _registry(group)


def load_offers(listings: Iterable[Listing], seconds: int) -> list[Listing]:
    """The same listings with every one loaded in a guarded process, `seconds` at most for each."""
    listings = list(listings)
    wanted = [listing for listing in listings if listing.state != "conflict"]
    outcomes = probe([[offer_step(each.key, each.group, each.offer.name) for each in wanted]], seconds=seconds)
    return [_judged(each, outcomes[each.key].reason) if each.key in outcomes else each for each in listings]


def inspect_offers(listings: Iterable[Listing]) -> list[Listing]:
    """The same listings, each looked up without running its code: the module exists and binds the name."""
    return [each if each.state == "conflict" else _judged(each, _missing(each.offer.target)) for each in listings]


def _judged(listing: Listing, reason: str | None) -> Listing:
    return replace(listing, state="broken" if reason else "works", reason=reason)


def _missing(target: str) -> str | None:
    match = importlib.metadata.EntryPoint.pattern.match(target)
    if match is None:
        return f"the entry point's target {target!r} is not of the form module:attribute"
    spec = locate(match["module"])
    if spec is None:
        return f"there is no module {match['module']!r}"
    if not match["attr"] or not spec.origin or not spec.origin.endswith(".py"):
        return None
    try:
        tree = ast.parse(Path(spec.origin).read_bytes(), spec.origin)
    except (OSError, SyntaxError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    name = match["attr"].partition(".")[0]
    if {name, "*", "__getattr__"} & bound_names(tree):
        return None
    return f"the module {match['module']!r} binds no {name!r}{did_you_mean(name, bound_names(tree))}"
