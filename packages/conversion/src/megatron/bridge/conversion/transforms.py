"""Pure, invertible functions between Hugging Face tensors and one Megatron tensor.

A transform knows no model, process group or file. It reads its inputs through `Readable`, asking only for the rows and
columns that the wanted region of the result needs, so the same code serves a tensor in memory and a slice on disk.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import torch

type Shape = tuple[int, ...]
# One (start, stop) per axis of the Megatron tensor.
type Region = tuple[tuple[int, int], ...]


class Readable(Protocol):
    """A tensor that can be read in part."""

    @property
    def shape(self) -> Shape: ...

    def read(self, region: Region) -> "torch.Tensor": ...


@dataclass(frozen=True)
class InMemory:
    """A `Readable` over a tensor at hand."""

    tensor: "torch.Tensor"

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)

    def read(self, region: Region) -> "torch.Tensor":
        return self.tensor[tuple(slice(start, stop) for start, stop in region)]


def whole(shape: Shape) -> Region:
    """The region that covers a tensor of `shape`."""
    return tuple((0, size) for size in shape)


def _on_axis(region: Region, axis: int, start: int, stop: int) -> Region:
    return (*region[:axis], (start, stop), *region[axis + 1 :])


class Transform(ABC):
    """Joins a fixed number of Hugging Face tensors to one Megatron tensor.

    `inverse(forward(x)) == x` bit for bit, and `forward(x, region) == forward(x, whole)[region]` for every region.
    """

    @abstractmethod
    def megatron_shape(self, hf: Sequence[Shape], megatron: Shape) -> Shape:
        """The shape the inputs give; `megatron` is the model's, for transforms that follow it (padding)."""

    @abstractmethod
    def hf_shapes(self, megatron: Shape) -> list[Shape]:
        """Shapes of the Hugging Face tensors that a Megatron tensor of this shape holds."""

    @abstractmethod
    def forward(self, hf: Sequence[Readable], region: Region) -> "torch.Tensor":
        """The given region of the Megatron tensor."""

    @abstractmethod
    def inverse(self, megatron: "torch.Tensor") -> "list[torch.Tensor]":
        """The Hugging Face tensors of a whole Megatron tensor (views where possible)."""

    def regions(self, megatron: Shape) -> list[Region] | None:
        """The region of a Megatron tensor of this shape that each Hugging Face tensor is, as it stands there.

        None for a transform that rearranges; its tensors come of `inverse` only.
        """
        return None

    @property
    def on_rows(self) -> "Transform":
        """The same function on tensors whose leading axis holds the outputs on both sides: biases, LoRA's B."""
        return self


@dataclass(frozen=True)
class Identity(Transform):
    """The same tensor on both sides."""

    def megatron_shape(self, hf: Sequence[Shape], megatron: Shape) -> Shape:
        return hf[0]

    def hf_shapes(self, megatron: Shape) -> list[Shape]:
        return [megatron]

    def forward(self, hf: Sequence[Readable], region: Region) -> "torch.Tensor":
        return hf[0].read(region)

    def inverse(self, megatron: "torch.Tensor") -> "list[torch.Tensor]":
        return [megatron]

    def regions(self, megatron: Shape) -> list[Region] | None:
        return [whole(megatron)]


@dataclass(frozen=True)
class Concatenate(Transform):
    """`count` equal tensors laid one after another along `axis` (gate and up projections)."""

    count: int
    axis: int = 0

    def megatron_shape(self, hf: Sequence[Shape], megatron: Shape) -> Shape:
        total = sum(shape[self.axis] for shape in hf)
        return (*hf[0][: self.axis], total, *hf[0][self.axis + 1 :])

    def hf_shapes(self, megatron: Shape) -> list[Shape]:
        part = (*megatron[: self.axis], megatron[self.axis] // self.count, *megatron[self.axis + 1 :])
        return [part] * self.count

    def forward(self, hf: Sequence[Readable], region: Region) -> "torch.Tensor":
        import torch

        start, stop = region[self.axis]
        pieces, first = [], 0
        for tensor in hf:
            size = tensor.shape[self.axis]
            low, high = max(start, first), min(stop, first + size)
            if low < high:
                pieces.append(tensor.read(_on_axis(region, self.axis, low - first, high - first)))
            first += size
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.axis)

    def inverse(self, megatron: "torch.Tensor") -> "list[torch.Tensor]":
        return list(megatron.chunk(self.count, self.axis))

    def regions(self, megatron: Shape) -> list[Region] | None:
        size = megatron[self.axis] // self.count
        starts = range(0, size * self.count, size) if size else [0] * self.count
        return [_on_axis(whole(megatron), self.axis, start, start + size) for start in starts]


@dataclass(frozen=True)
class InterleaveGroups(Transform):
    """Tensors cut into groups of rows and laid group by group: Megatron's fused QKV.

    For query group g the result holds `rows[0]` rows of the first tensor, then `rows[1]` of the second, and so on:
    `[q_0 ... q_k, k, v]` per group. Works on weights `[rows, hidden]` and on biases `[rows]`.

    Args:
        rows: rows per group that each tensor contributes.
    """

    rows: tuple[int, ...]

    @property
    def group_rows(self) -> int:
        """Rows of one group of the result."""
        return sum(self.rows)

    def megatron_shape(self, hf: Sequence[Shape], megatron: Shape) -> Shape:
        return (sum(shape[0] for shape in hf), *hf[0][1:])

    def hf_shapes(self, megatron: Shape) -> list[Shape]:
        groups = megatron[0] // self.group_rows
        return [(groups * rows, *megatron[1:]) for rows in self.rows]

    def forward(self, hf: Sequence[Readable], region: Region) -> "torch.Tensor":
        import torch

        start, stop = region[0]
        # A rank's rows need not begin at a group (fewer groups than ranks): read the groups that cover them, then trim.
        first, last = start // self.group_rows, -(-stop // self.group_rows)
        pieces = [
            tensor.read(_on_axis(region, 0, first * rows, last * rows)).unflatten(0, (last - first, rows))
            for tensor, rows in zip(hf, self.rows, strict=True)
        ]
        rows = torch.cat(pieces, 1).flatten(0, 1)
        return rows[start - first * self.group_rows : stop - first * self.group_rows]

    def inverse(self, megatron: "torch.Tensor") -> "list[torch.Tensor]":
        groups = megatron.unflatten(0, (-1, self.group_rows))
        return [part.flatten(0, 1) for part in groups.split(self.rows, 1)]


@dataclass(frozen=True)
class PadRows(Transform):
    """The Hugging Face tensor's `rows` rows, followed by rows of zeros up to what the Megatron model holds.

    Megatron pads the vocabulary so that tensor-parallel ranks hold equal parts. Padding is never exported.
    """

    rows: int

    def megatron_shape(self, hf: Sequence[Shape], megatron: Shape) -> Shape:
        return (max(hf[0][0], megatron[0]), *hf[0][1:])

    def hf_shapes(self, megatron: Shape) -> list[Shape]:
        return [(self.rows, *megatron[1:])]

    def forward(self, hf: Sequence[Readable], region: Region) -> "torch.Tensor":
        import torch

        start, stop = region[0]
        held = max(0, min(stop, self.rows) - start)
        # An empty read still gives the dtype and the other axes.
        first = min(start, self.rows)
        rows = hf[0].read(_on_axis(region, 0, first, first + held))
        if held == stop - start:
            return rows
        return torch.cat([rows, rows.new_zeros(stop - start - held, *rows.shape[1:])])

    def inverse(self, megatron: "torch.Tensor") -> "list[torch.Tensor]":
        return [megatron[: self.rows]]

    def regions(self, megatron: Shape) -> list[Region] | None:
        return [_on_axis(whole(megatron), 0, 0, self.rows)]


@dataclass(frozen=True)
class _Rows:
    """Rows `first` to `first + shape[0]` of a tensor, as a `Readable` of their own."""

    tensor: Readable
    first: int
    shape: Shape

    def read(self, region: Region) -> "torch.Tensor":
        start, stop = region[0]
        return self.tensor.read(_on_axis(region, 0, self.first + start, self.first + stop))


@dataclass(frozen=True)
class Repeated(Transform):
    """One tensor that `count` Hugging Face weights hold, each the same; `inner` joins the first to the Megatron tensor.

    Reading proves that they are the same, region by region.
    """

    count: int
    inner: Transform = Identity()

    def megatron_shape(self, hf: Sequence[Shape], megatron: Shape) -> Shape:
        return self.inner.megatron_shape(hf[:1], megatron)

    def hf_shapes(self, megatron: Shape) -> list[Shape]:
        return self.inner.hf_shapes(megatron) * self.count

    def forward(self, hf: Sequence[Readable], region: Region) -> "torch.Tensor":
        first = self.inner.forward(hf[:1], region)
        for other in hf[1:]:
            if not self.inner.forward([other], region).equal(first):
                names = " and ".join(getattr(tensor, "name", "a weight") for tensor in (hf[0], other))
                raise BridgeError(f"{names} differ, but Megatron-Core has one weight for both; one would be lost")
        return first

    def inverse(self, megatron: "torch.Tensor") -> "list[torch.Tensor]":
        return self.inner.inverse(megatron) * self.count


@dataclass(frozen=True)
class Stacked(Transform):
    """One Hugging Face tensor that holds, one after another along axis 0, those which `inner` takes.

    A fused `[q; k; v]` projection is `Stacked(InterleaveGroups(...))`.
    """

    inner: Transform

    def megatron_shape(self, hf: Sequence[Shape], megatron: Shape) -> Shape:
        # Stacking keeps the rows; how they divide follows from the model's own shape, which `hf_shapes` checks.
        return hf[0]

    def hf_shapes(self, megatron: Shape) -> list[Shape]:
        parts = self.inner.hf_shapes(megatron)
        return [(sum(part[0] for part in parts), *parts[0][1:])]

    def forward(self, hf: Sequence[Readable], region: Region) -> "torch.Tensor":
        parts, first = [], 0
        for shape in self.inner.hf_shapes(hf[0].shape):
            parts.append(_Rows(hf[0], first, shape))
            first += shape[0]
        return self.inner.forward(parts, region)

    def inverse(self, megatron: "torch.Tensor") -> "list[torch.Tensor]":
        import torch

        return [torch.cat(self.inner.inverse(megatron))]


@dataclass(frozen=True)
class _Flipped:
    """A matrix read as its transpose."""

    matrix: Readable

    @property
    def shape(self) -> Shape:
        rows, columns = self.matrix.shape
        return columns, rows

    def read(self, region: Region) -> "torch.Tensor":
        rows, columns = region
        return self.matrix.read((columns, rows)).t()


@dataclass(frozen=True)
class Transposed(Transform):
    """Matrices stored `[in, out]` on the Hugging Face side (GPT-2's Conv1D); `inner` sees them as `[out, in]`."""

    inner: Transform = Identity()

    def megatron_shape(self, hf: Sequence[Shape], megatron: Shape) -> Shape:
        return self.inner.megatron_shape([shape[::-1] for shape in hf], megatron)

    def hf_shapes(self, megatron: Shape) -> list[Shape]:
        return [shape[::-1] for shape in self.inner.hf_shapes(megatron)]

    def forward(self, hf: Sequence[Readable], region: Region) -> "torch.Tensor":
        return self.inner.forward([_Flipped(matrix) for matrix in hf], region)

    def inverse(self, megatron: "torch.Tensor") -> "list[torch.Tensor]":
        return [part.t() for part in self.inner.inverse(megatron)]

    @property
    def on_rows(self) -> Transform:
        return self.inner.on_rows


class _Reordered(Transform):
    """The same rows on both sides, in another order."""

    def megatron_shape(self, hf: Sequence[Shape], megatron: Shape) -> Shape:
        return hf[0]

    def hf_shapes(self, megatron: Shape) -> list[Shape]:
        return [megatron]


def _cuts(start: int, stop: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """Of rows `start` to `stop`, the part in each block of `rows`: the block, and from where to where in it."""
    for block in range(start // rows, -(-stop // rows)):
        yield block, max(start - block * rows, 0), min(stop - block * rows, rows)


@dataclass(frozen=True)
class PermuteBlocks(_Reordered):
    """Equal blocks of rows in another order: block i of the Megatron tensor is the other side's block `order[i]`.

    Args:
        order: a permutation of 0 to n - 1, for n blocks.
    """

    order: tuple[int, ...]

    def forward(self, hf: Sequence[Readable], region: Region) -> "torch.Tensor":
        import torch

        rows = hf[0].shape[0] // len(self.order)
        pieces = []
        for block, low, high in _cuts(*region[0], rows):
            first = self.order[block] * rows
            pieces.append(hf[0].read(_on_axis(region, 0, first + low, first + high)))
        return torch.cat(pieces)

    def inverse(self, megatron: "torch.Tensor") -> "list[torch.Tensor]":
        import torch

        blocks = megatron.chunk(len(self.order))
        return [torch.cat([blocks[self.order.index(place)] for place in range(len(blocks))])]


@dataclass(frozen=True)
class Alternating(_Reordered):
    """`count` blocks of rows that take turns on the Hugging Face side: row i of block b is its row i * count + b."""

    count: int

    def forward(self, hf: Sequence[Readable], region: Region) -> "torch.Tensor":
        import torch

        pieces = []
        for block, low, high in _cuts(*region[0], hf[0].shape[0] // self.count):
            # Files are read in runs: the other blocks' rows come with this one's.
            run = hf[0].read(_on_axis(region, 0, low * self.count, high * self.count))
            pieces.append(run[block :: self.count])
        return torch.cat(pieces)

    def inverse(self, megatron: "torch.Tensor") -> "list[torch.Tensor]":
        return [megatron.unflatten(0, (self.count, -1)).transpose(0, 1).flatten(0, 1)]


@dataclass(frozen=True)
class PermuteRows(_Reordered):
    """Rows in another order within groups of equal size: row i of a group is the other side's row `order[i]`.

    Args:
        order: a permutation of 0 to n - 1, for groups of n rows.
    """

    order: tuple[int, ...]

    def forward(self, hf: Sequence[Readable], region: Region) -> "torch.Tensor":
        start, stop = region[0]
        size = len(self.order)
        first, last = start // size * size, -(-stop // size) * size
        rows = self._ordered(hf[0].read(_on_axis(region, 0, first, last)), self.order)
        return rows[start - first : stop - first]

    def inverse(self, megatron: "torch.Tensor") -> "list[torch.Tensor]":
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return [self._ordered(megatron, back)]

    @staticmethod
    def _ordered(rows: "torch.Tensor", order: Sequence[int]) -> "torch.Tensor":
        return rows.unflatten(0, (-1, len(order)))[:, list(order)].flatten(0, 1)


type Run = tuple[int, int, int]


@dataclass(frozen=True)
class GatherRows(Transform):
    """Runs of rows of the Hugging Face tensors, one after another: the fused projections that follow no simpler rule.

    Args:
        runs: (which tensor, its first row, rows) in the order of the Megatron tensor; every row of every tensor occurs
            exactly once.
    """

    runs: tuple[Run, ...]

    @cached_property
    def _rows(self) -> list[int]:
        """Rows of each Hugging Face tensor."""
        counts = [0] * (max(source for source, _, _ in self.runs) + 1)
        for source, _, rows in self.runs:
            counts[source] += rows
        return counts

    def megatron_shape(self, hf: Sequence[Shape], megatron: Shape) -> Shape:
        return (sum(shape[0] for shape in hf), *hf[0][1:])

    def hf_shapes(self, megatron: Shape) -> list[Shape]:
        return [(rows, *megatron[1:]) for rows in self._rows]

    def forward(self, hf: Sequence[Readable], region: Region) -> "torch.Tensor":
        import torch

        start, stop = region[0]
        pieces, place = [], 0
        for source, first, rows in self.runs:
            low, high = max(start - place, 0), min(stop - place, rows)
            if low < high:
                pieces.append(hf[source].read(_on_axis(region, 0, first + low, first + high)))
            place += rows
        return torch.cat(pieces)

    def inverse(self, megatron: "torch.Tensor") -> "list[torch.Tensor]":
        import torch

        runs = megatron.split([rows for _, _, rows in self.runs])
        placed = sorted(zip(self.runs, runs, strict=True), key=lambda each: each[0])
        return [
            torch.cat([piece for (source, _, _), piece in placed if source == wanted])
            for wanted in range(len(self._rows))
        ]
