"""What a minimal edit changed: section 3.1's Levenshtein alignment, with its tie-break defined.

    y- original (i of n tokens), y+ edited (j of m)     ->     U1-, U1+ changed,  U0 unchanged pairs

A path leads from (0, 0) to (n, m) by four moves

    match       (i, j) -> (i+1, j+1)    only where y-[i] == y+[j]; costs 0
    substitute  (i, j) -> (i+1, j+1)    only where y-[i] != y+[j]; costs 1
    delete      (i, j) -> (i+1, j)      costs 1
    insert      (i, j) -> (i, j+1)      costs 1

and a run is a maximal stretch of moves none of which is a match. Almost every real pair has several
cheapest paths, and they disagree on what changed, so the paper's "Levenshtein" becomes a definition:

    1. the least cost,
    2. among those the fewest runs,
    3. among those the right-most: write each path as the string of its moves from left to right and
       take the first in dictionary order, match < substitute < delete < insert. An edit begins as
       late as it can: "a b b c" -> "a b c" deletes the second b.

What a match joins is an unchanged pair, all else has changed. The order of moves inside a run changes
no label of that run, but it decides which of two equally good continuations is taken.

Speed: Myers' bit-vectors find all moves that lie on cheapest paths, a row of the table in a dozen
operations on whole integers; steps 2 and 3 then visit only cells on such paths.

`align_words`, not in the paper, is steps 1-3 on words, where human error spans begin and end.
`gap_credit` gives a pure insertion or deletion, which leaves nothing to blame on one side, a token.
"""

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

MATCH, SUBSTITUTE, DELETE, INSERT = range(4)                # in the order of preference
STEP = ((1, 1), (1, 1), (1, 0), (0, 1))                  # what each adds to (i, j)
NEVER = 1 << 62                                             # a cost above that of any path
FIRST = 1 << 32                                             # step 1 outweighs any count of step 2

Span = tuple[int, int]


class Alignment(NamedTuple):
    original_changed: list[bool]        # [n] U1-
    edited_changed: list[bool]          # [m] U1+
    pairs: list[tuple[int, int]]        # U0: unchanged (i, j), both increasing
    distance: int                       # edits: of tokens in `align`, of words in `align_words`


class Credit(NamedTuple):
    original: list[int]                 # U1-: positions in the original, increasing
    edited: list[int]                   # U1+: positions in the edited
    pairs: list[tuple[int, int]]        # U0 without the tokens credited above


class _Moves(NamedTuple):
    """The moves a path may use: bit j of entry i, 0..n, is the move from row i that ENTERS column j."""
    match: list[int]                    # these three lead to row i + 1
    substitute: list[int]
    delete: list[int]
    insert: list[int]                   # within row i


class _Word(NamedTuple):
    key: str | None                     # None: the end of the text
    start: int
    end: int


def align(original_ids: Sequence[Hashable], edited_ids: Sequence[Hashable]) -> Alignment:
    """The alignment defined above, of token ids or of anything hashable; either side may be empty.

    `distance` is the Levenshtein distance in tokens; pairs have equal ids; a token is changed if and
    only if it is in no pair. Raises ValueError for a tensor, whose elements do not compare as ids.
    """
    for name, ids in (("original_ids", original_ids), ("edited_ids", edited_ids)):
        if not isinstance(ids, Sequence):
            raise ValueError(f"{name}: expected a list of ids, got {type(ids).__name__}; "
                             "pass ids.tolist()")
    # All paths over these moves cost the same, so only the runs are left to count.
    path = _best_path(_cheapest_moves(original_ids, edited_ids), len(edited_ids),
                      edit_cost=0, run_cost=1)
    pairs = _matches(path)
    return Alignment(_changed((i for i, _ in pairs), len(original_ids)),
                     _changed((j for _, j in pairs), len(edited_ids)),
                     pairs, distance=len(path) - len(pairs))


def align_words(original_text: str, edited_text: str, original_spans: Sequence[Span],
                edited_spans: Sequence[Span]) -> Alignment:
    """Align words instead of tokens and project the result to tokens ("pieces"), given by spans.

    original_spans [n], edited_spans [m]: half-open character ranges (`Tokenizer.spans`).

    A word is a stretch without whitespace; two words are equal when they are so in lower case without
    the characters at either end that are neither letter nor digit ("The" == "the,"; a word of nothing
    else stands for itself). A path costs 1 for each deleted and each inserted word and 2 for each run,
    so that a lone common word ("the", "of") does not split a rewritten passage; there is no
    substitution. Steps 1-3 above then apply as they stand.

    A piece belongs to the words it overlaps, or if it overlaps none (blanks, EOS) to the next word;
    those after the last word are unchanged. It is changed if one of its words is. Pieces of two
    matched words are unchanged even where case or punctuation differ; those whose lower-case texts
    `align` matches are paired, the others are in no pair.
    """
    original_words, edited_words = _words(original_text), _words(edited_text)
    path = _best_path(_word_moves([word.key for word in original_words],
                                  [word.key for word in edited_words]),
                      len(edited_words), edit_cost=FIRST, run_cost=2 * FIRST + 1)
    matches = _matches(path)
    original_changed, original_pieces = _project(original_spans, original_words, {i for i, _ in matches})
    edited_changed, edited_pieces = _project(edited_spans, edited_words, {j for _, j in matches})
    pairs = []
    for i, j in matches:
        here, there = original_pieces[i], edited_pieces[j]
        equal = align([_surface(original_text, original_spans[p]) for p in here],
                      [_surface(edited_text, edited_spans[q]) for q in there]).pairs
        pairs += [(here[p], there[q]) for p, q in equal
                  if not original_changed[here[p]] and not edited_changed[there[q]]]
    return Alignment(original_changed, edited_changed, pairs, distance=len(path) - len(matches))


def gap_credit(alignment: Alignment, at_gaps: bool = True) -> Credit:
    """Which tokens answer for the edit: U1-, U1+, and the pairs U0 that remain.

    Changed tokens always do. Where text was only inserted, nothing in the original changed; with
    `at_gaps` its first token after the last pair before the insertion is credited, as what the policy
    wrote instead of the inserted text, and the edited one likewise where text was only deleted. At the
    very end, with no token left, nobody is. A pair with a credited token is no longer in U0.
    """
    n, m = len(alignment.original_changed), len(alignment.edited_changed)
    original = {i for i in range(n) if alignment.original_changed[i]}
    edited = {j for j in range(m) if alignment.edited_changed[j]}
    gaps_original, gaps_edited = set(), set()
    i, j = 0, 0                                             # just after the last pair
    for next_i, next_j in [*alignment.pairs, (n, m)] if at_gaps else []:
        deleted = any(alignment.original_changed[i:next_i])
        inserted = any(alignment.edited_changed[j:next_j])
        if inserted and not deleted and i < n:
            gaps_original.add(i)
        if deleted and not inserted and j < m:
            gaps_edited.add(j)
        i, j = next_i + 1, next_j + 1
    original |= gaps_original
    edited |= gaps_edited
    pairs = [(i, j) for i, j in alignment.pairs if i not in original and j not in edited]
    return Credit(sorted(original), sorted(edited), pairs)


def _cheapest_moves(a: Sequence[Hashable], b: Sequence[Hashable]) -> _Moves:
    """The moves that end a cheapest path from (0, 0) to the cell they enter.

    With D[i, j] the distance of a[:i] and b[:j], neighbours differ by at most 1, so a row of D is a few
    bit-vectors (Myers 1999, Hyyro 2003). In bit j-1, for the columns j = 1..m:
        up      D[i, j] = D[i, j-1] + 1         down     D[i, j] = D[i, j-1] - 1
        more    D[i, j] = D[i-1, j] + 1         less     D[i, j] = D[i-1, j] - 1
        level   D[i, j] = D[i-1, j-1], else D[i, j] = D[i-1, j-1] + 1
    """
    everywhere = (1 << len(b)) - 1
    places: dict[Hashable, int] = {}                        # where each token stands in b
    for j, token in enumerate(b):
        places[token] = places.get(token, 0) | 1 << j
    up, down = everywhere, 0                                # D[0, j] = j
    moves = _Moves([], [], [], [up << 1])
    for token in a:
        equal = places.get(token, 0)
        level = (((equal & up) + up) ^ up) | equal | down   # the sum carries along stretches of `up`
        level &= everywhere
        more = down | (everywhere & ~(level | up))
        more, less = more << 1 | 1, (level & up) << 1       # from here bit j: D[i, 0] = i
        up = (less | ~(level | more)) & everywhere
        down = more & level
        moves.match.append(equal << 1)
        moves.substitute.append((everywhere ^ level) << 1)
        moves.delete.append(more)
        moves.insert.append(up << 1)
    return _close(moves, len(b))


def _word_moves(a: Sequence[Hashable], b: Sequence[Hashable]) -> _Moves:
    """Every match, deletion and insertion; no substitution."""
    columns = (2 << len(b)) - 1
    match = [sum(2 << j for j, word in enumerate(b) if word == token) for token in a]
    moves = _Moves(match, [0] * len(a), [columns] * len(a), [columns - 1] * (len(a) + 1))
    return _close(moves, len(b))


def _close(moves: _Moves, m: int) -> _Moves:
    """Let the two ends match, from (n, m) to (n + 1, m + 1), so that every path ends outside a run."""
    moves.match.append(2 << m)
    moves.substitute.append(0)
    moves.delete.append(0)
    return moves


def _best_path(moves: _Moves, m: int, edit_cost: int, run_cost: int) -> list[int]:
    """The path by `moves` of least edit_cost * edits + run_cost * runs, right-most, as its moves.

    From the end back to (0, 0), for each cell that can reach the end: the best continuation outside a
    run and the best inside one, each as 4 * cost + its first move, so that the smaller number is the
    cheaper continuation and, among equally cheap ones, the preferred.
    """
    n = len(moves.match) - 1
    edit, opening = 4 * edit_cost, 4 * run_cost
    outside: list[dict[int, int]] = [{} for _ in range(n + 1)] + [{m + 1: 0}]
    inside: list[dict[int, int]] = [{} for _ in range(n + 2)]
    reaching = 2 << m                                       # the row's cells that reach the end, as bits
    for i in reversed(range(n + 1)):
        outside_below, inside_below = outside[i + 1], inside[i + 1]
        match, substitute = (reaching & moves.match[i]) >> 1, (reaching & moves.substitute[i]) >> 1
        delete, insert = reaching & moves.delete[i], 0
        reaching, todo = 0, match | substitute | delete
        while todo:
            j = todo.bit_length() - 1                       # from right to left
            bit = 1 << j
            by_match = by_edit = NEVER
            if match & bit:
                by_match = (outside_below[j + 1] & ~3) + MATCH
            if substitute & bit:
                by_edit = (inside_below[j + 1] & ~3) + edit + SUBSTITUTE
            if delete & bit:
                by_edit = min(by_edit, (inside_below[j] & ~3) + edit + DELETE)
            if insert & bit:
                by_edit = min(by_edit, (inside[i][j + 1] & ~3) + edit + INSERT)
            outside[i][j] = min(by_match, by_edit + opening)
            inside[i][j] = min(by_match, by_edit)
            enters = (bit & moves.insert[i]) >> 1           # an insertion leads from j - 1 to here
            insert |= enters
            reaching |= bit
            todo = (todo ^ bit) | enters
    path, i, j, in_run = [], 0, 0, False
    while i <= n:
        move = (inside if in_run else outside)[i][j] & 3
        path.append(move)
        i, j, in_run = i + STEP[move][0], j + STEP[move][1], move != MATCH
    return path[:-1]                                        # without the match of the two ends


def _matches(path: list[int]) -> list[tuple[int, int]]:
    """The (i, j) that the path's matches start from."""
    pairs, i, j = [], 0, 0
    for move in path:
        if move == MATCH:
            pairs.append((i, j))
        i, j = i + STEP[move][0], j + STEP[move][1]
    return pairs


def _changed(paired: Iterable[int], length: int) -> list[bool]:
    """[length] True at the positions not in `paired`."""
    changed = [True] * length
    for i in paired:
        changed[i] = False
    return changed


def _words(text: str) -> list[_Word]:
    """The words of a text, and its end as one more that every text shares."""
    words = []
    for found in re.finditer(r"\S+", text):
        lower = found[0].lower()
        key = re.sub(r"^[\W_]+|[\W_]+$", "", lower) or lower
        words.append(_Word(key, *found.span()))
    return words + [_Word(None, len(text), len(text) + 1)]


def _project(spans: Sequence[Span], words: list[_Word], kept: set[int]) -> tuple[list[bool], list[list[int]]]:
    """Words to pieces: for each piece whether it changed, for each word the pieces that begin in it.

    kept: positions of the unchanged words.
    """
    changed, pieces = [], [[] for _ in words]
    k = 0
    for p, (start, end) in enumerate(spans):
        while words[k].end <= start:
            k += 1
        pieces[k].append(p)
        last = k
        while last + 1 < len(words) and words[last + 1].start < end:
            last += 1
        changed.append(any(word not in kept for word in range(k, last + 1)))
    return changed, pieces


def _surface(text: str, span: Span) -> str:
    """A piece as it is compared inside matched words: without case and, if anything else, blanks."""
    piece = text[span[0]:span[1]].lower()
    return piece.strip() or piece
