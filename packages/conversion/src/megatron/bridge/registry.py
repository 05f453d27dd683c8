"""Registries of plugins: a strict front on stevedore.

Listing imports nothing, loading loads exactly one name, and nothing is ever resolved by order of installation: an
unknown name, a name offered twice, a plugin that fails to import and a value of the wrong kind are all errors that
name the distribution at fault.
"""

import importlib
import importlib.metadata
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any
from weakref import WeakSet

from stevedore.driver import DriverManager

from megatron.bridge.errors import BridgeError, did_you_mean

# Entry-point groups, and the distributions of this project that fill them (named when a lookup fails).
GROUPS: Mapping[str, str] = {
    "megatron.bridge.model_bridges": "megatron-bridge-models",
    "megatron.bridge.layer_specs": "megatron-bridge-models",
    "megatron.bridge.peft": "megatron-bridge-peft",
    "megatron.bridge.dataset_formats": "megatron-bridge-data",
    "megatron.bridge.datasets": "megatron-bridge-data",
    "megatron.bridge.prompt_templates": "megatron-bridge-data",
    "megatron.bridge.recipes": "megatron-bridge-recipes",
    "megatron.bridge.commands": "megatron-bridge-training",
}


class RegistryError(BridgeError, LookupError):
    """A plugin lookup failed."""


class UnknownPlugin(RegistryError):
    """Nothing installed offers the name."""


class ConflictingPlugins(RegistryError):
    """Two distributions offer the same name."""


class BrokenPlugin(RegistryError):
    """The distribution that offers the name fails to import, or offers a value of the wrong kind."""


@dataclass(frozen=True, order=True)
class Offer:
    """One entry point: `name` is offered by `distribution` as the object at `target` (`module:attribute`)."""

    name: str
    target: str
    distribution: str
    version: str

    @property
    def origin(self) -> str:
        """`distribution version`, for messages."""
        return f"{self.distribution} {self.version}"


@cache
def _offers_by_group() -> dict[str, tuple[Offer, ...]]:
    # importlib.metadata rather than stevedore's cache on disk: that one keeps listing removed plugins and forgets
    # which distribution an entry point came from.
    found: dict[str, set[Offer]] = {}
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        name, version = _identity(distribution)
        # A distribution found a second time, further down sys.path, is shadowed for imports too.
        if name and _normalized(name) not in seen:
            seen.add(_normalized(name))
            for group, point, target in _points(distribution):
                if group.startswith("megatron.bridge."):
                    found.setdefault(group, set()).add(Offer(point, target, name, version))
    return {group: tuple(sorted(offers)) for group, offers in found.items()}


def _identity(distribution: importlib.metadata.Distribution) -> tuple[str, str]:
    # Two fields of a file that may be 100 kB long: the e-mail parser behind `distribution.name` takes ten times longer.
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    headers = text.partition("\n\n")[0]  # a description may follow, and say anything
    fields = dict(re.findall(r"^(Name|Version):\s*(\S+)", headers, re.MULTILINE))
    return fields.get("Name", ""), fields.get("Version", "")


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _points(distribution: importlib.metadata.Distribution) -> Iterable[tuple[str, str, str]]:
    """(group, name, target) of each entry point; a line that is none has an empty target, which loading refuses."""
    try:
        return [(point.group, point.name, point.value) for point in distribution.entry_points]
    except Exception:  # importlib.metadata gives up on a whole file for one line without "="
        points, group = [], ""
        for line in map(str.strip, (distribution.read_text("entry_points.txt") or "").splitlines()):
            if line.startswith("["):
                group = line.strip("[] ")
            elif line and not line.startswith(("#", ";")):
                name, _, target = line.partition("=")
                points.append((group, name.strip(), target.strip()))
        return points


def refresh() -> None:
    """Forget what is installed and loaded, so that the next lookup reads it again (for tests and notebooks)."""
    importlib.invalidate_caches()
    _offers_by_group.cache_clear()
    for registry in _registries:
        registry._loaded.clear()


def _reason(offer: Offer, error: BaseException) -> str:
    if importlib.metadata.EntryPoint.pattern.match(offer.target) is None:
        return "the entry point's target is not of the form module:attribute"
    return f"{type(error).__name__}: {error}"


_registries: "WeakSet[Registry[Any]]" = WeakSet()


class _SoleDriver(DriverManager[object]):
    """stevedore's driver over one entry point that was found by us."""

    def __init__(self, point: importlib.metadata.EntryPoint) -> None:
        self._point = point
        super().__init__(point.group, point.name)

    def list_entry_points(self) -> list[importlib.metadata.EntryPoint]:
        return [self._point]


def installed_groups() -> tuple[str, ...]:
    """Every `megatron.bridge.*` entry-point group for which something is installed, sorted."""
    return tuple(sorted(_offers_by_group()))


class Registry[T]:
    """What is offered under one entry-point group.

    Args:
        group: entry-point group, e.g. `megatron.bridge.peft`.
        kind: a class that every value must be an instance or a subclass of, or a predicate on the value.
        what: the noun used in messages, e.g. `"PEFT method"`.
        absent: names that people look for and nobody here can offer -> why, and what to do instead.
    """

    def __init__(
        self,
        group: str,
        kind: type | Callable[[object], bool],
        what: str,
        absent: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.group = group
        self.what = what
        self._absent = absent
        self._kind = kind
        self._registered: dict[str, T] = {}
        self._loaded: dict[str, T] = {}
        _registries.add(self)

    def offers(self, name: str | None = None) -> tuple[Offer, ...]:
        """Installed offers, all or those of one name. Imports no plugin."""
        offers = _offers_by_group().get(self.group, ())
        return offers if name is None else tuple(offer for offer in offers if offer.name == name)

    def register(self, name: str, value: T, *, replace: bool = False) -> T:
        """Offer `value` as `name` in this process only; what an installed distribution offers under it is not used.

        Raises:
            ConflictingPlugins: the name is registered already, or installed, as something else and `replace` is false.
            BrokenPlugin: the value is of the wrong kind.
        """
        if not replace and (holder := self._other_holder(name, value)) is not None:
            raise ConflictingPlugins(
                f"{self.what} {name!r} is already {holder}; pass replace=True to take its place in this process"
            )
        self._check(value, name, "this process")
        self._registered[name] = value
        return value

    def _other_holder(self, name: str, value: T) -> str | None:
        if name in self._registered:
            registered = self._registered[name]
            return None if registered is value else f"registered in this process as {registered!r}"
        # A module that registers the very object its distribution offers says the same thing twice: no conflict.
        itself = f"{getattr(value, '__module__', None)}:{getattr(value, '__qualname__', None)}"
        others = [offer for offer in self.offers(name) if offer.target != itself]
        return f"offered by {others[0].origin} ({others[0].target})" if others else None

    def unregister(self, name: str) -> None:
        """Take back `register(name, ...)`."""
        if name not in self._registered:
            raise UnknownPlugin(
                f"no {self.what} {name!r} is registered in this process{did_you_mean(name, self._registered)}; "
                "only register() can be taken back, an installed plugin is uninstalled"
            )
        del self._registered[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({offer.name for offer in self.offers()} | self._registered.keys()))

    def __contains__(self, name: object) -> bool:
        return name in self._registered or any(offer.name == name for offer in self.offers())

    def __getitem__(self, name: str) -> T:
        if name in self._registered:
            return self._registered[name]
        if name not in self._loaded:
            self._loaded[name] = self._load(self._sole_offer(name))
        return self._loaded[name]

    def _sole_offer(self, name: str) -> Offer:
        offers = self.offers(name)
        if not offers:
            raise UnknownPlugin(self._unknown(name))
        if len(offers) > 1:
            origins = " and ".join(f"{offer.origin} ({offer.target})" for offer in offers)
            several = len({offer.distribution for offer in offers}) > 1
            remedy = "uninstall one of them" if several else f"tell the authors of {offers[0].distribution}"
            raise ConflictingPlugins(
                f"{self.what} {name!r} is offered by {origins}; {remedy}, none is preferred to the other"
            )
        return offers[0]

    def _unknown(self, name: str) -> str:
        if name in self._absent:
            return f"no {self.what} is called {name!r}: {self._absent[name]}"
        known = list(self)
        provider = GROUPS.get(self.group)
        absent = provider is not None and provider not in {offer.distribution for offer in self.offers()}
        hint = f"; the package {provider!r} provides some (uv pip install {provider})" if absent else ""
        listed = f" (known: {', '.join(known)})" if 0 < len(known) <= 20 else ""
        return (
            f"no {self.what} is called {name!r}{did_you_mean(name, known)}{listed}{hint}. "
            f"`megatron-bridge plugins --group {self.group}` lists what is installed"
        )

    def _load(self, offer: Offer) -> T:
        try:
            value: T = _SoleDriver(importlib.metadata.EntryPoint(offer.name, offer.target, self.group)).driver
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also sys.exit() and a test framework's own exits in the plugin's module
            raise BrokenPlugin(
                f"{self.what} {offer.name!r} of {offer.origin} cannot be loaded from {offer.target!r}: "
                f"{_reason(offer, error)}; repair or uninstall {offer.distribution}"
            ) from error
        self._check(value, offer.name, offer.origin)
        return value

    def _check(self, value: object, name: str, origin: str) -> None:
        kind = self._kind
        if isinstance(kind, type):
            if isinstance(value, kind) or (isinstance(value, type) and issubclass(value, kind)):
                return
            expected = f"a {kind.__name__} (class or instance)"
        else:
            if kind(value):
                return
            expected = getattr(kind, "__doc__", None) or f"accepted by {kind!r}"
        raise BrokenPlugin(f"{self.what} {name!r} of {origin} has the wrong kind: it must be {expected}, not {value!r}")
