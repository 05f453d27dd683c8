"""`docs/parity.md`, written from what was measured."""

from collections.abc import Iterator, Mapping

from parity.curves import STEPS, Difference
from parity.kinds import KINDS, LAYOUTS, OFTEN
from parity.layouts import DENSE, EXPERTS, ONE
from parity.models import MODELS

PLAIN = "transformers"
# By model, by layout.
type Results = Mapping[str, Mapping[str, Difference | str]]
type Steps = Mapping[str, Mapping[str, Difference]]

_HEAD = f"""\
# Training parity

Made by `just parity`, which trains tiny random models for {STEPS} steps in float32; not written by hand. Each figure is
the largest difference from one rank with the same weights and samples: of the losses / of the gradient norms (both
relative) / of any weight after the last step. In the first line one rank is compared with transformers' model in a
plain loop with `torch.optim.AdamW`. Every run of the tests measures those marked * again and allows 1e-5.

`sp2` is TP2 with sequence parallelism; the other names are those of [the record](capabilities.md), `cp2` is
`context_parallel_size=2`, `dp2` two replicas. Mixtures of experts train under tensor parallelism with sequence
parallelism only (Megatron-Core's rule), a balancing loss is a micro-batch's own, and multi-latent attention is not
divided along sequences, hence the empty cells. DeepSeek-V3-MTP has a prediction layer, and its routers' biases move
after each step; transformers has neither.
"""
_KINDS = """
## Models of every kind

One step of the models that the family tests make, with an update that is nearly the gradient itself: losses / gradient
norms / weights are those of one rank, and so are the gradients. Encoder-decoder models (T5) and heads of other outputs
than tokens have no forward step here, and training them is refused until they are given one; images take one, too.
"""


def page(results: Results, steps: Steps, versions: str) -> str:
    """The page's text: a line for every layout and a column for every model; then a line for every kind of model."""
    return "\n".join((*_lines(results), _KINDS, *_lines_of_kinds(steps), f"\nMeasured with {versions}.")) + "\n"


def _lines_of_kinds(steps: Steps) -> Iterator[str]:
    layouts = [layout for layout in LAYOUTS if layout != ONE]
    yield f"| model of the tests | with | {' | '.join(layouts)} |"
    yield "|---" * (len(layouts) + 2) + "|"
    for name, found in steps.items():
        mark = " *" if name in OFTEN else ""
        yield f"| {name} | {KINDS[name]} | {' | '.join(_cell(found[layout]) + mark for layout in layouts)} |"


def _lines(results: Results) -> Iterator[str]:
    yield _HEAD
    names = [name for name in MODELS if name in results]
    yield f"| layout | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for layout in (PLAIN, *[name for name in {**DENSE, **EXPERTS} if name != ONE]):
        cells = (_cell(results[name].get(layout)) + _mark(name, layout) for name in names)
        yield f"| {layout} | {' | '.join(cells)} |"
    refused = {(n, layout): why for n in names for layout, why in results[n].items() if isinstance(why, str)}
    if refused:
        yield "\nRefused:\n"
        yield from (f"- {name}, {layout}: {' '.join(why.split())}" for (name, layout), why in refused.items())


def _mark(name: str, layout: str) -> str:
    model = MODELS[name]
    often = model.plain and model.often if layout == PLAIN else layout in model.often
    return " *" if often else ""


def _cell(found: Difference | str | None) -> str:
    if found is None:
        return ""
    return "refused" if isinstance(found, str) else f"{found.loss:.0e} / {found.norm:.0e} / {found.weight:.0e}"
