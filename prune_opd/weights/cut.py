"""How one megatron parameter holds Hugging Face tensors, and how it is divided over ranks: shapes and views.

    for part, piece in zip(cut.parts(shard, …), cut.slices(wholes, …)):  piece.copy_(part)

over all shards makes the whole tensors, and `part.copy_(piece)` makes a shard. Nothing is copied here: each pair can be
copied, sent and summed by itself. Parts of KV groups are strided, and so are slices of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_opd.model_spec import VOCAB_MULTIPLE

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """A shard has an equal share of each tensor, one share after the other along `dim`. Shards are numbered by rank.

    dim: along which the tensors are cut. divided: False for one shard that every rank has (`count` is 1).
    groups: KV groups of the whole parameter. A shard is some of them; each has its own rows of every tensor, one after
    the other. 0: no groups.
    multiple: what a share is a multiple of. What the last shards have beyond the tensor is padding.
    """

    dim: int = 0
    divided: bool = True
    groups: int = 0
    multiple: int = 1

    def shape(self, wholes: Sequence[Shape], count: int) -> Shape:
        """Of one of `count` shards. wholes: the shapes of the whole tensors."""
        first = wholes[0]
        return (*first[: self.dim], sum(self._share(whole, count) for whole in wholes), *first[self.dim + 1 :])

    def spans(self, wholes: Sequence[Shape], index: int, count: int) -> list[tuple[int, int]]:
        """Of each whole tensor, the first and the end row (or column) that shard `index` of `count` has."""
        lengths = [(whole[self.dim], self._share(whole, count)) for whole in wholes]
        return [(min(index * share, length), min((index + 1) * share, length)) for length, share in lengths]

    def parts(self, shard: Tensor, wholes: Sequence[Shape], index: int, count: int) -> tuple[Tensor, ...]:
        """Views of a shard: what it has of each whole tensor, without the padding."""
        lengths = [end - begin for begin, end in self.spans(wholes, index, count)]
        filled = shard.narrow(self.dim, 0, sum(lengths))
        if not self.groups:
            return filled.split(lengths, self.dim)
        groups = self.groups // count
        return filled.unflatten(0, (groups, -1)).split([length // groups for length in lengths], dim=1)

    def slices(self, wholes: Sequence[Tensor], index: int, count: int) -> tuple[Tensor, ...]:
        """Views of the whole tensors: where those parts belong, in the same shapes."""
        spans = zip(wholes, self.spans([whole.shape for whole in wholes], index, count), strict=True)
        found = (whole.narrow(self.dim, begin, end - begin) for whole, (begin, end) in spans)
        return tuple(piece.unflatten(0, (self.groups // count, -1)) if self.groups else piece for piece in found)

    def _share(self, whole: Shape, count: int) -> int:
        return -(-whole[self.dim] // (self.multiple * count)) * self.multiple


WHOLE = Cut(divided=False)
ROWS, COLUMNS = Cut(dim=0), Cut(dim=1)
VOCABULARY = Cut(multiple=VOCAB_MULTIPLE)
