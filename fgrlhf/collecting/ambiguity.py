"""How far an edit leaves open what it changed: all cheapest alignments at once.

A cheapest path goes from (0, 0) to (n, m) by the moves of fgrlhf.align. A word that one cheapest
path keeps (match) and another changes (substitute, delete, insert) has an ambiguous label; align's
tie-break decides it. Walking backwards from (n, m) over the moves that end cheapest prefixes visits
exactly the cells and moves that lie on cheapest paths; a row is one integer, a column one bit.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from fgrlhf.align import cheapest_moves


class Ambiguity(NamedTuple):
    original: list[bool]            # [n] True where cheapest alignments disagree on the label
    edited: list[bool]              # [m] likewise
    several: bool                   # more than one cheapest path, of other labels or not


def ambiguity(original_ids: Sequence[Hashable], edited_ids: Sequence[Hashable]) -> Ambiguity:
    """Which labels of an edit depend on the tie-break; O(n) operations on m-bit integers.

    The order of a deletion and an insertion beside it changes no label, yet makes another path.
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
                     edges > cells - 1)             # a single path is a chain of its cells


def _along(row: int, inserts: int) -> int:
    """The columns from which `row` can be reached by insertions, and `row` itself."""
    new = row
    while new:
        new = (new & inserts) >> 1 & ~row
        row |= new
    return row
