"""From files to encoded conversations: one pass, in bounded memory, with every row that cannot be used named."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.bridge.data.instruction.encoding import Encoded, encode
from megatron.bridge.data.instruction.formats import DatasetFormat
from megatron.bridge.data.instruction.messages import BadRow, Conversation, check
from megatron.bridge.data.instruction.rendering import Renderer
from megatron.bridge.data.instruction.rows import SourceRow, read_rows
from megatron.bridge.data.instruction.truncation import DROP, fit
from megatron.bridge.errors import BridgeError

_BATCH = 256


@dataclass
class Counts:
    """What became of the rows.

    Attributes:
        rows: read.
        samples: conversations that are kept.
        dropped: conversations left out because they are too long (`truncation="drop"`).
        truncated: conversations that were cut.
        bad: what was wrong with each row that was skipped, `file:row: why`.
    """

    rows: int = 0
    samples: int = 0
    dropped: int = 0
    truncated: int = 0
    bad: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """An encoded conversation; samples of one `piece` (one row, or one tree) belong to one split."""

    encoded: Encoded
    piece: int
    origin: str


@dataclass(frozen=True)
class _Read:
    conversation: Conversation
    piece: int
    origin: str


class Preparation:
    """Reads, renders, encodes and fits conversations.

    Args:
        form: what rows mean.
        renderer: how conversations are written.
        tokenizer: a transformers tokenizer.
        longest: most tokens of a sample; None for no limit.
        truncation: see `truncation.fit`.
        skip_bad_rows: how many rows may be unusable.
        watch: is told the tokens of each conversation before it is made to fit.
    """

    def __init__(
        self,
        form: DatasetFormat,
        renderer: Renderer,
        tokenizer: Any,
        *,
        longest: int | None,
        truncation: str,
        skip_bad_rows: float = 0,
        watch: Callable[[int], object] = lambda tokens: None,
    ) -> None:
        self._form, self._renderer, self._tokenizer = form, renderer, tokenizer
        self._longest, self._truncation, self._tolerated = longest, truncation, skip_bad_rows
        self._watch = watch
        self.counts = Counts()

    def samples(self, files: Sequence[Path]) -> Iterator[Sample]:
        """Every sample, in the order of the rows.

        Raises:
            BridgeError: a row cannot be used and none may be skipped any more.
        """
        for batch in itertools.batched(self._conversations(files), _BATCH):
            yield from self._encoded(batch)

    def _conversations(self, files: Sequence[Path]) -> Iterator[_Read]:
        for piece, rows in enumerate(self._pieces(read_rows(files))):
            try:
                for conversation in self._form.conversations([row.checked() for row in rows]):
                    check(conversation)
                    yield _Read(conversation, piece, rows[0].origin)
            except BadRow as error:
                self._tolerate(rows[0].origin, error)

    def _pieces(self, rows: Iterator[SourceRow]) -> Iterator[list[SourceRow]]:
        """Rows that belong together; a key that comes again later is refused."""
        ended: set[str] = set()
        for key, group in itertools.groupby(self._counted(rows), self._key):
            members = list(group)
            if key is None:
                yield from ([row] for row in members)
                continue
            if key in ended:
                raise BridgeError(
                    f"{members[0].origin} belongs to {key!r}, whose rows ended before; sort the rows by it"
                )
            ended.add(key)
            yield members

    def _counted(self, rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
        for row in rows:
            self.counts.rows += 1
            yield row

    def _key(self, row: SourceRow) -> str | None:
        try:
            return self._form.group(row.row) if row.problem is None else None
        except BadRow:  # said again, and counted, when the row is read by itself
            return None

    def _encoded(self, batch: Sequence[_Read]) -> Iterator[Sample]:
        rendered, texts = [], []
        for read in batch:
            try:
                texts.append(self._renderer(read.conversation))
                rendered.append(read)
            except BadRow as error:
                self._tolerate(read.origin, error)
        for read, encoded in zip(rendered, encode(self._tokenizer, texts), strict=True):
            try:
                sample = self._fitted(read, encoded)
            except BadRow as error:
                self._tolerate(read.origin, error)
            else:
                if sample is not None:
                    self.counts.samples += 1
                    yield sample

    def _fitted(self, read: _Read, encoded: Encoded | BadRow) -> Sample | None:
        if isinstance(encoded, BadRow):
            raise encoded
        length = len(encoded.ids)
        self._watch(length)
        longest = length if self._longest is None else self._longest
        kept = fit(read.conversation, encoded, longest, self._truncation, self._again)
        self.counts.truncated += kept is not None and length > longest
        self.counts.dropped += kept is None
        assert kept is not None or self._truncation == DROP
        return None if kept is None else Sample(kept, read.piece, read.origin)

    def _again(self, conversation: Conversation) -> Encoded:
        (encoded,) = encode(self._tokenizer, [self._renderer(conversation)])
        if isinstance(encoded, BadRow):
            raise encoded
        return encoded

    def _tolerate(self, origin: str, error: BadRow) -> None:
        self.counts.bad.append(f"{origin}: {error}")
        if len(self.counts.bad) > self._tolerated:
            skipped = len(self.counts.bad) - 1
            more = f"\n{skipped} were skipped before it:\n" + "\n".join(self.counts.bad[:-1][:20]) if skipped else ""
            raise BridgeError(f"{self.counts.bad[-1]} (dataset.skip_bad_rows={self._tolerated}){more}") from error
