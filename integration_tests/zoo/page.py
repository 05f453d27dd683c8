"""`docs/capabilities.md`, written from the record."""

from collections.abc import Iterator

from megatron.bridge.models.capabilities import Capability, Record

_HEAD = """\
# What is proven

Made by `just zoo` from tiny random models of each architecture's own configuration class; not written by hand. At
every layout named: transformers' logits (float32; the largest difference, relative to the largest logit), and every
weight, bit for bit, after the way through Megatron and back. `megatron-bridge models NAME` shows one architecture, with
the cases that were tried and each layout's figure.

| layout | parallelism |
|---|---|"""


def page(record: Record) -> str:
    """The page's text."""
    return "\n".join(_lines(record)) + "\n"


def _lines(record: Record) -> Iterator[str]:
    yield _HEAD
    for name, fields in record.layouts.items():
        told = ", ".join(f"`{field}={value}`" for field, value in fields.items())
        yield f"| {name} | {told or 'one rank'} |"
    capabilities = record.architectures
    yield f"\n{len(capabilities)} architectures:\n"
    yield "| architecture | logits within | layouts | FP8 source | BitFit | MTP |"
    yield "|---|---|---|---|---|---|"
    for name, each in sorted(capabilities.items(), key=lambda item: item[0].casefold()):
        more = (_fp8(each), _bitfit(each), "yes" if each.mtp else "")
        yield f"| `{name}` | {each.difference:.0e} | {' '.join(each.layouts)} | {' | '.join(more)} |"
    unproven = {
        (name, layout): reason for name, each in capabilities.items() for layout, reason in each.unproven.items()
    }
    if unproven:
        yield "\nTried, and refused or not equal:\n"
        yield "| architecture | layout | why |"
        yield "|---|---|---|"
        for (name, layout), reason in unproven.items():
            yield f"| `{name}` | {layout} | {reason.replace('|', '/')} |"
    yield "\nProven with:\n"
    dates = sorted({(each.date, *each.versions.items()) for each in capabilities.values()})
    for date, *versions in dates:
        yield f"- {', '.join(f'{package} {held}' for package, held in versions)} ({date})"


def _bitfit(capability: Capability) -> str:
    outcome = capability.peft.get("BitFit", "")
    if outcome.startswith("one step"):
        return "yes"
    return "no biases" if outcome == "nothing to train" else "no"


def _fp8(capability: Capability) -> str:
    outcome = capability.low_bit.get("FP8", "")
    return "yes" if outcome.startswith("read") else "no" if outcome.startswith("not proven") else ""
