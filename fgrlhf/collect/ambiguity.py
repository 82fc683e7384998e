"""Finds the labels of an edit that depend on the tie-break between cheapest alignments.

A cheapest path goes from (0, 0) to (n, m) by the moves of fgrlhf/align.py. A word has an ambiguous
label if one cheapest path keeps it (match) and another changes it (substitute, delete, insert).

The moves of `cheapest_moves` end cheapest paths from (0, 0). Followed backwards from (n, m), they
visit exactly the cells and moves of all cheapest paths. A row of cells is one integer, with one bit
per column.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from fgrlhf.align import cheapest_moves


class Ambiguity(NamedTuple):
    original: list[bool]            # [n] True if cheapest alignments disagree on the word's label
    edited: list[bool]              # [m] the same for the words of the edit
    several: bool                   # there are several cheapest paths, with equal labels or not


def ambiguity(original_ids: Sequence[Hashable], edited_ids: Sequence[Hashable]) -> Ambiguity:
    """Finds the ambiguous labels, in O(n) operations on integers of m bits.

    A deletion and an insertion next to each other can swap their order. That gives another path,
    but the same labels.
    """
    moves, m = cheapest_moves(original_ids, edited_ids), len(edited_ids)
    original = []
    kept = changed = edges = cells = 0              # kept, changed: bit j + 1 is edited word j
    row = _along(1 << m, moves.insert[-1])          # columns on a cheapest path, in row n
    for i in reversed(range(len(original_ids) + 1)):
        inserts = row & moves.insert[i]
        cells, edges = cells + row.bit_count(), edges + inserts.bit_count()
        changed |= inserts
        if i == 0:
            break
        match, substitute = row & moves.match[i - 1], row & moves.substitute[i - 1]
        delete = row & moves.delete[i - 1]
        original.append(bool(match) and bool(substitute | delete))
        kept, changed = kept | match, changed | substitute
        edges += match.bit_count() + substitute.bit_count() + delete.bit_count()
        row = _along(match >> 1 | substitute >> 1 | delete, moves.insert[i - 1])
    both = kept & changed
    return Ambiguity(original[::-1], [bool(both >> j + 1 & 1) for j in range(m)],
                     edges > cells - 1)             # a single path has one edge less than cells


def _along(row: int, inserts: int) -> int:
    """Returns the columns of `row`, and those from which insertions lead to `row`."""
    new = row
    while new:
        new = (new & inserts) >> 1 & ~row
        row |= new
    return row
