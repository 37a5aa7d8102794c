"""Several sequences side by side in one row of a batch, and what they share computed once.

Shape suffixes:  B rows, L slots of a row.

A tree is a stem and branches that continue it: a prompt and its completions. A token reads its own
stem and its own branch up to itself, at the positions that it would have alone, so a packed batch
computes what its sequences would, with a few per cent of padding where sequences of different
length, each in a row of its own, have a third.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter, itemgetter
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

_PADDING, _STEM = -2, -1  # in place of a tree's or a branch's number
_LAYOUTS = 8  # numbers of rows tried


@dataclass
class Slots:
    """Tokens that a model has read, and the places that were computed for them."""

    used: int = 0
    total: int = 0

    def add(self, used: int, total: int) -> None:
        """Count a forward pass; what is not used is padding or a row that has ended."""
        self.used += used
        self.total += total


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A sequence and its continuations."""

    stem: tuple[int, ...]
    """Token ids, at least one."""
    branches: tuple[tuple[int, ...], ...] = ()
    """Token ids of each continuation, which may be empty."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Trees laid out in a batch. A slot is an index into the flattened B x L."""

    ids_BL: Int[Tensor, "B L"]
    position_BL: Int[Tensor, "B L"]
    """Place of each token in its own sequence."""
    mask_B1LL: Bool[Tensor, "B 1 L L"]
    """Whether the token of the second to last axis reads that of the last."""
    lengths_B: Int[Tensor, " B"]
    """Slots in use."""
    apart: bool
    """Whether each row holds one sequence, from its start on."""
    stems: tuple[Int[Tensor, "..."], ...]
    """Of each tree, the slots of its stem."""
    paths: tuple[Int[Tensor, "..."], ...]
    """Of each branch, tree by tree, the slot of its stem's last token and those of its own: what
    they say predicts the branch and one token more."""


def pack(trees: Sequence[Tree], capacity: int, pad: int, *, apart: bool = False) -> Packed:
    """Lay trees out in rows of one length, which is chosen so that few slots stay unused.

    Args:
        trees: what to lay out.
        capacity: most slots of a row; a longer tree makes all rows as long as itself.
        pad: token id of slots that nothing uses.
        apart: each branch behind a copy of its stem, in a row of its own, for models that cannot
            tell apart the sequences of one row.
    """
    pieces = sorted(_pieces(trees, apart=apart), key=attrgetter("length"), reverse=True)
    lengths = [piece.length for piece in pieces]
    places = range(len(pieces)) if apart else _places(lengths, capacity)
    rows, stems, paths = _filled(pieces, places)
    length = max(len(row.ids) for row in rows)
    tree_BL = _table([row.trees for row in rows], length, _PADDING)
    branch_BL = _table([row.branches for row in rows], length, _PADDING)
    position_BL = _table([row.positions for row in rows], length, 0)
    earlier_BLL = position_BL[:, None, :] <= position_BL[:, :, None]
    same_BLL = tree_BL[:, None, :] == tree_BL[:, :, None]
    own_BLL = branch_BL[:, None, :] == branch_BL[:, :, None]
    mask_BLL = earlier_BLL & same_BLL & (own_BLL | (branch_BL == _STEM)[:, None, :])
    return Packed(
        ids_BL=_table([row.ids for row in rows], length, pad),
        position_BL=position_BL,
        mask_B1LL=mask_BLL[:, None],
        lengths_B=torch.tensor([len(row.ids) for row in rows]),
        apart=apart,
        stems=_by_key(stems, length),
        paths=_by_key(paths, length),
    )


def _places(lengths: Sequence[int], capacity: int) -> Sequence[int]:
    """The row of each piece, longest first, in the layout with the fewest slots.

    Tried are as many rows as just fit, and some more.
    """
    room = max(capacity, lengths[0])
    counts = range(-(-sum(lengths) // room), len(lengths) + 1)
    layouts = (_balanced(lengths, count) for count in counts)
    fitting = ((slots, places) for length, slots, places in layouts if length <= room)
    # Of equals the first, which has the fewest rows.
    return min(islice(fitting, _LAYOUTS), key=itemgetter(0))[1]


def _balanced(lengths: Sequence[int], count: int) -> tuple[int, int, Sequence[int]]:
    """Pieces in so many rows: the longest row, the slots of all, and the row of each piece.

    Source: Karmarkar & Karp 1982, "The differencing method of set partitioning". Begins with a
    layout for each piece, and lays the two over each other whose rows differ most, the fullest row
    of one on the emptiest of the other, until one is left.
    """
    empty: list[tuple[int, tuple[int, ...]]] = [(0, ())] * (count - 1)
    layouts = [
        (-length, piece, [(length, (piece,)), *empty]) for piece, length in enumerate(lengths)
    ]
    heapq.heapify(layouts)
    while len(layouts) > 1:
        _, piece, ours = heapq.heappop(layouts)
        theirs = heapq.heappop(layouts)[2]
        both = [(a + b, x + y) for (a, x), (b, y) in zip(ours, reversed(theirs), strict=True)]
        both.sort(reverse=True)  # the fullest row first
        heapq.heappush(layouts, (both[-1][0] - both[0][0], piece, both))
    rows = layouts[0][2]
    places = [0] * len(lengths)
    for row, (_, pieces) in enumerate(rows):
        for piece in pieces:
            places[piece] = row
    return rows[0][0], rows[0][0] * count, places


class _Piece(NamedTuple):
    """A stem and some branches that stay together."""

    tree: int
    stem: tuple[int, ...]
    branches: dict[int, tuple[int, ...]]
    """By number, counted over all trees."""
    length: int


class _Row(NamedTuple):
    """A row that is being filled: of each slot, what `Packed` says of it."""

    ids: list[int]
    positions: list[int]
    trees: list[int]
    branches: list[int]


_Slots = dict[int, tuple[int, Sequence[int]]]
"""By the number of a tree or a branch, a row and slots of it."""


def _pieces(trees: Sequence[Tree], *, apart: bool) -> list[_Piece]:
    pieces: list[_Piece] = []
    number = 0
    for index, tree in enumerate(trees):
        numbered = dict(enumerate(tree.branches, start=number))
        number += len(numbered)
        shares = [{key: ids} for key, ids in numbered.items()] if apart else [numbered]
        for share in shares or [{}]:
            length = len(tree.stem) + sum(map(len, share.values()))
            pieces.append(_Piece(index, tree.stem, share, length))
    return pieces


def _filled(
    pieces: Sequence[_Piece], places: Sequence[int]
) -> tuple[Sequence[_Row], _Slots, _Slots]:
    """Rows of different length, the slots of each tree's stem, and the path of each branch."""
    rows = [_Row([], [], [], []) for _ in range(1 + max(places))]
    stems: _Slots = {}
    paths: _Slots = {}
    for piece, place in zip(pieces, places, strict=True):
        row = rows[place]
        for key, ids in ((_STEM, piece.stem), *piece.branches.items()):
            slots = range(len(row.ids), len(row.ids) + len(ids))
            position = 0 if key == _STEM else len(piece.stem)
            row.ids.extend(ids)
            row.positions.extend(range(position, position + len(ids)))
            row.trees.extend([piece.tree] * len(ids))
            row.branches.extend([key] * len(ids))
            if key == _STEM:
                stems[piece.tree] = place, slots
            else:
                paths[key] = place, [stems[piece.tree][1][-1], *slots]
    return rows, stems, paths


def _by_key(slots: _Slots, length: int) -> tuple[Int[Tensor, "..."], ...]:
    """One tensor for each, in the order of the keys: parts of one, which is quick to make."""
    chosen = [slots[key] for key in sorted(slots)]
    whole = [place * length + slot for place, own in chosen for slot in own]
    parts = [len(own) for _, own in chosen]
    return torch.tensor(whole, dtype=torch.long).split(parts) if chosen else ()


def _table(rows: Sequence[list[int]], length: int, fill: int) -> Int[Tensor, "B L"]:
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])


def pad_right(
    sequences: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Int[Tensor, "B L"], Int[Tensor, " B"]]:
    """Stack sequences of different length; returns the ids and the lengths."""
    longest = max(len(sequence) for sequence in sequences)
    ids = [list(sequence) + [pad] * (longest - len(sequence)) for sequence in sequences]
    lengths = [len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(lengths, device=device)
