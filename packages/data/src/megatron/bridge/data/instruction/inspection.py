"""What instruction data look like once they are tokens, and how that is shown. Torch-free."""

import itertools
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron.bridge.data.instruction.prepare import Counts, Sample
from megatron.bridge.data.packing import pack

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import Console
    from rich.text import Text

    from megatron.bridge.data.datasets.sft_plan import SFTPlan

_LISTED = 10
_BARS = 12
_WIDTH = 40


@dataclass(frozen=True)
class Findings:
    """What is in some files.

    Attributes:
        shown: the first samples.
        lengths: tokens of every conversation that could be encoded, before any was cut.
        kept: tokens of every sample.
        trained: tokens that are trained, in all.
        counts: what became of the rows.
        refusal: why training would refuse the data; None when it would not.
    """

    shown: Sequence[Sample]
    lengths: "NDArray[np.int64]"
    kept: "NDArray[np.int64]"
    trained: int
    counts: Counts
    refusal: str | None


def examine(plan: "SFTPlan", rows: int) -> Findings:
    """Read all rows; those that cannot be used are counted, however many there are."""
    lengths, kept, trained = array("q"), array("q"), 0
    shown: list[Sample] = []
    preparation = plan.preparation(skip_bad_rows=math.inf, watch=lengths.append)
    for sample in itertools.chain.from_iterable(preparation.samples(source.files) for source in plan.sources):
        if len(shown) < rows:
            shown.append(sample)
        kept.append(len(sample.encoded.ids))
        trained += int(sample.encoded.trained[1:].sum())
    counts = preparation.counts
    return Findings(
        shown, np.asarray(lengths, np.int64), np.asarray(kept, np.int64), trained, counts, _refusal(plan, counts)
    )


def _refusal(plan: "SFTPlan", counts: Counts) -> str | None:
    allowed = plan.config.skip_bad_rows
    if len(counts.bad) > allowed:
        return f"{len(counts.bad):,} rows cannot be used, and skip_bad_rows={allowed}; the first: {counts.bad[0]}"
    if not counts.samples:
        return f"no row can be trained: {counts.rows:,} were read, {counts.dropped:,} are too long"
    return None


def show(found: Findings, plan: "SFTPlan", console: "Console") -> None:
    """Print it: coloured on a terminal, plain text elsewhere."""
    for sample in found.shown:
        console.print(
            f"{sample.origin}: {len(sample.encoded.ids):,} tokens", style="bold", soft_wrap=True, markup=False
        )
        console.print(_coloured(sample, plan.tokenizer, console.is_terminal), soft_wrap=True)
        console.print()
    for line in itertools.chain(_summary(found, plan), _histogram(found.lengths)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _coloured(sample: Sample, tokenizer: Any, colours: bool) -> "Text":
    """The text of a sample, runs of trained tokens apart from the others."""
    from rich.text import Text

    text = Text()
    ids, trained = sample.encoded.ids.tolist(), sample.encoded.trained.tolist()
    for is_trained, run in itertools.groupby(zip(ids, trained, strict=True), lambda pair: pair[1]):
        piece = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        marked = f"«{piece}»" if is_trained and not colours else piece
        text.append(marked, style="bold green" if is_trained else "dim")
    return text


def _summary(found: Findings, plan: "SFTPlan") -> Iterator[str]:
    counts, length = found.counts, plan.config.sequence_length
    yield f"{counts.rows:,} rows, {counts.samples:,} conversations, {int(found.kept.sum()):,} tokens"
    if counts.samples:
        yield f"{found.trained:,} tokens are trained ({found.trained / found.kept.sum():.1%})"
    if len(found.lengths):
        low, middle, high, top = np.percentile(found.lengths, (0, 50, 95, 100)).astype(int)
        yield f"tokens of a conversation: least {low:,}, median {middle:,}, 95 of 100 at most {high:,}, most {top:,}"
    if length is not None:
        long = int((found.lengths > length + 1).sum())
        yield f"{long:,} are longer than sequence_length={length:,}{_fate(plan, counts) if long else ''}"
        if counts.samples:
            packs = pack(found.kept - 1, length)
            padded = (found.kept - 1).sum() / (len(found.kept) * length)
            yield f"packed: {len(packs):,} samples, {packs.efficiency:.1%} full; one by one: {padded:.1%} full"
    if counts.bad:
        yield f"{len(counts.bad):,} rows cannot be used:"
        yield from (f"  {bad}" for bad in counts.bad[:_LISTED])
        if len(counts.bad) > _LISTED:
            yield f"  ... and {len(counts.bad) - _LISTED:,} more"


def _fate(plan: "SFTPlan", counts: Counts) -> str:
    if plan.config.truncation == "refuse":
        return ": refused (--truncation right, turns or drop would do otherwise)"
    return f": {counts.truncated:,} are cut, {counts.dropped:,} dropped (--truncation {plan.config.truncation})"


def _histogram(lengths: "NDArray[np.int64]") -> Iterator[str]:
    if len(lengths) == 0:
        return
    counts, edges = np.histogram(lengths, bins=min(_BARS, len(np.unique(lengths))))
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "█" * math.ceil(_WIDTH * count / counts.max())
        yield f"{math.ceil(low):>8,} - {math.floor(high):<8,} {bar} {count:,}"
