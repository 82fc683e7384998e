"""Aligns a minimal edit with its original, token by token (paper, section 2.1): U0 and U1.

    y- original (i of n tokens), y+ edited (j of m)     ->     changed tokens and unchanged pairs

The alignment is a path from (0, 0) to (n, m) by four moves:

    match       (i, j) -> (i+1, j+1)    only when y-[i] == y+[j]; costs 0
    substitute  (i, j) -> (i+1, j+1)    only when y-[i] != y+[j]; costs 1
    delete      (i, j) -> (i+1, j)      costs 1
    insert      (i, j) -> (i, j+1)      costs 1

A run is a maximal stretch of moves without a match. Nearly every real pair has several cheapest
paths, and they disagree on what changed. The alignment is therefore defined by three steps:

    1. the least cost,
    2. among those paths the fewest runs,
    3. among those the right-most path: write each path as the string of its moves from left to
       right and take the first in dictionary order, match < substitute < delete < insert. An edit
       then begins as late as it can: "abbc" -> "abc" deletes the second b.

A match is an unchanged pair; everything else has changed.

Speed: Myers' bit-vectors give the moves of all cheapest paths. Each row of the table takes a dozen
operations on whole integers. Steps 2 and 3 then visit only cells on such paths.

`gap_credit` makes U1-, U1+ and U0 of them: it also credits a token where an edit only inserted or
only deleted. fgrlhf/align_words.py applies the same steps to words, which the paper does not do.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from fgrlhf.data.fields import UserError

SUBSTITUTE, DELETE, INSERT = 1, 2, 3                        # in the order of preference; match is 0
STEP = ((1, 1), (1, 1), (1, 0), (0, 1))                     # what each move adds to (i, j)
NEVER = 1 << 62                                             # above the cost of any path
MOST_CELLS = 1 << 28                                        # 16,384 tokens against 16,384
MOST_VISITED = 1 << 22                                      # of these, visited one by one

Pair = tuple[int, int]


class Alignment(NamedTuple):
    original_changed: list[bool]        # [n] the edit took the token out
    edited_changed: list[bool]          # [m] the edit put the token in
    pairs: list[Pair]                   # unchanged (i, j), both increasing
    distance: int                       # edits: of tokens in `align`, of words in `align_words`


class Credit(NamedTuple):
    original: list[int]                 # U1-: positions in the original, increasing
    edited: list[int]                   # U1+: positions in the edited, increasing
    pairs: list[Pair]                   # U0 without any token credited above


class Moves(NamedTuple):
    """The moves of a path: bit j of entry i is the move from row i that ENTERS column j."""
    match: list[int]                    # [n] from row i to row i + 1, like the next two
    substitute: list[int]
    delete: list[int]
    insert: list[int]                   # [n + 1] within row i


def align(original_ids: Sequence[Hashable], edited_ids: Sequence[Hashable]) -> Alignment:
    """Aligns two sequences of token ids, or of anything hashable. Either side may be empty.

    A token is changed if and only if it is in no pair. The two ids of a pair are equal. `distance`
    is the Levenshtein distance. Raises ValueError for a tensor, because its elements do not compare
    as ids, and UserError when the sides are too long or too different to align in bounded memory.
    """
    for name, ids in (("original_ids", original_ids), ("edited_ids", edited_ids)):
        if not isinstance(ids, Sequence):
            raise ValueError(f"{name}: expected a list of ids, got {type(ids).__name__}; "
                             "pass ids.tolist()")
    n, m = len(original_ids), len(edited_ids)
    if n * m > MOST_CELLS:
        raise UserError(f"expected two texts of at most {math.isqrt(MOST_CELLS)} tokens each to "
                        f"align, got {n} and {m}; split or shorten them")
    moves = cheapest_moves(original_ids, edited_ids)        # step 1
    pairs, edits = _best_path(moves, m)                     # steps 2 and 3
    paired, edited_paired = {i for i, _ in pairs}, {j for _, j in pairs}
    return Alignment([i not in paired for i in range(n)],
                     [j not in edited_paired for j in range(m)], pairs, edits)


def gap_credit(alignment: Alignment, at_gaps: bool = True) -> Credit:
    """Finds the tokens that are credited with the edit, U1- and U1+, and the pairs U0 that remain.

    Changed tokens are always credited. Where the edit only inserted, the original has no changed
    token. With `at_gaps`, the original's token right behind the gap is then credited: the policy
    wrote it instead of the inserted text. (If the policy stopped too early, that token is EOS, so
    the ids should end with EOS.) Where the edit only deleted, the edited token behind the gap is
    credited. A gap at the very end, with no token behind it, credits nothing.
    """
    n, m = len(alignment.original_changed), len(alignment.edited_changed)
    original = {i for i in range(n) if alignment.original_changed[i]}
    edited = {j for j in range(m) if alignment.edited_changed[j]}
    i, j = 0, 0                                             # just after a pair
    for next_i, next_j in [*alignment.pairs, (n, m)] if at_gaps else []:
        deleted = any(alignment.original_changed[i:next_i])
        inserted = any(alignment.edited_changed[j:next_j])
        if inserted and not deleted and i < n:
            original.add(i)
        if deleted and not inserted and j < m:
            edited.add(j)
        i, j = next_i + 1, next_j + 1
    pairs = [(i, j) for i, j in alignment.pairs if i not in original and j not in edited]
    return Credit(sorted(original), sorted(edited), pairs)


def cheapest_moves(a: Sequence[Hashable], b: Sequence[Hashable]) -> Moves:
    """Finds the moves that end a cheapest path from (0, 0) to the cell they enter.

    Let D[i, j] be the distance of a[:i] and b[:j]. In its plain form

        D[i, j] = min(D[i-1, j-1] + (a[i-1] != b[j-1]), D[i-1, j] + 1, D[i, j-1] + 1)

    and a move is cheapest when D grows by the cost of the move. Neighbours in D differ by at most
    1, so a row of D is a few bit-vectors (Myers 1999, Hyyro 2003). Bit j-1, for the columns
    j = 1..m, means:
        up      D[i, j] = D[i, j-1] + 1         down    D[i, j] = D[i, j-1] - 1
        more    D[i, j] = D[i-1, j] + 1         less    D[i, j] = D[i-1, j] - 1
        level   D[i, j] = D[i-1, j-1], else D[i, j] = D[i-1, j-1] + 1
    """
    every = (1 << len(b)) - 1
    places: dict[Hashable, int] = {}                        # where each token stands in b
    for j, token in enumerate(b):
        places[token] = places.get(token, 0) | 1 << j
    up, down = every, 0                                     # D[0, j] = j
    moves = Moves([], [], [], [up << 1])
    for token in a:
        equal = places.get(token, 0)
        # Level spreads rightwards along `up`, as the carry of a sum does along ones.
        level = ((((equal & up) + up) ^ up) | equal | down) & every
        more = (down | every & ~(level | up)) << 1 | 1      # from here bit j; D[i, 0] = i
        less = (level & up) << 1
        up = (less | ~(level | more)) & every
        down = more & level
        moves.match.append(equal << 1)
        moves.substitute.append((every ^ level) << 1)
        moves.delete.append(more)
        moves.insert.append(up << 1)
    return moves


def _best_path(moves: Moves, m: int) -> tuple[list[Pair], int]:
    """Finds the right-most path of the fewest runs among the paths of `moves`.

    Returns (its matches, its number of edits). The rows are filled from the end back to (0, 0). For
    each cell that can reach the end a row holds the best continuation outside a run and the best
    inside a run, as 4 * runs + first move (& ~3 takes the move away). The smaller number is then
    the better continuation, and of equally good ones the preferred. A match of the two ends, from
    (n, m) to (n + 1, m + 1), closes every path. Only the first moves of the rows below are kept.
    """
    n, visited, run = len(moves.match), 0, 4
    matches = [*moves.match, 2 << m]
    substitutes, deletes = [*moves.substitute, 0], [*moves.delete, 0]
    first_moves: list[bytearray] = []                       # 4 * outside a run + inside a run
    outside_below, inside_below = {m + 1: 0}, {}
    reaching = 2 << m                                       # columns of row i + 1, as bits
    for i in reversed(range(n + 1)):
        outside_here, inside_here = {}, {}
        chosen = bytearray(m + 1)
        match, substitute = (reaching & matches[i]) >> 1, (reaching & substitutes[i]) >> 1
        delete, insert = reaching & deletes[i], 0           # these four: columns such moves LEAVE
        reaching, todo = 0, match | substitute | delete
        while todo:
            j = todo.bit_length() - 1                       # from right to left
            bit = 1 << j
            by_match = outside_below[j + 1] & ~3 if match & bit else NEVER
            by_edit = (inside_below[j + 1] & ~3) + SUBSTITUTE if substitute & bit else NEVER
            if delete & bit:
                by_edit = min(by_edit, (inside_below[j] & ~3) + DELETE)
            if insert & bit:
                by_edit = min(by_edit, (inside_here[j + 1] & ~3) + INSERT)
            outside_here[j] = outside = by_match if by_match < by_edit + run else by_edit + run
            inside_here[j] = inside = by_match if by_match < by_edit else by_edit
            chosen[j] = (outside & 3) << 2 | inside & 3
            inserted = (bit & moves.insert[i]) >> 1
            insert |= inserted
            reaching |= bit
            todo = (todo ^ bit) | inserted
        outside_below, inside_below = outside_here, inside_here
        first_moves.append(chosen)
        visited += len(outside_here)
        if visited > MOST_VISITED:
            raise UserError(f"expected two texts that resemble each other, got {n} and {m} tokens "
                            "with too many cheapest alignments; split or shorten them")
    return _follow(first_moves[::-1])


def _follow(first_moves: list[bytearray]) -> tuple[list[Pair], int]:
    """Walks from (0, 0) by the first moves of each row; returns matches and number of edits."""
    pairs, edits, i, j, in_run = [], 0, 0, 0, False
    while i < len(first_moves):
        move = first_moves[i][j] & 3 if in_run else first_moves[i][j] >> 2
        in_run = move > 0
        edits += in_run
        if not in_run:
            pairs.append((i, j))
        i, j = i + STEP[move][0], j + STEP[move][1]
    return pairs[:-1], edits                                # without the match of the two ends
