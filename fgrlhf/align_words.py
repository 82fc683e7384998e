"""Aligns a minimal edit with its original word by word, and projects the result to tokens.

The paper aligns tokens (align.py), which is the default. With `train_rm.py --unit word` the unit is
the word, where human error spans begin and end.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from fgrlhf.align import Alignment, Pair, align
from fgrlhf.data.fields import UserError

MOST_WORD_PAIRS = 1 << 20                                   # equal on both sides: 5 seconds
# Letters of scripts without blanks between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
UNSPACED = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
            "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff")
MARKS = "".join(c for c in map(chr, range(0xe00, 0x1800)) if unicodedata.category(c)[0] == "M")
WORD = re.compile(f"[{UNSPACED}][{MARKS}]*|[^\\s{UNSPACED}]+")

Span = tuple[int, int]                  # half-open, in characters


class _Word(NamedTuple):
    key: str | None                     # None: the end of the text
    start: int
    end: int


def align_words(original_text: str, edited_text: str, original_spans: Sequence[Span],
                edited_spans: Sequence[Span]) -> Alignment:
    """Aligns words instead of tokens, then projects the result to tokens ("pieces").

    original_spans [n], edited_spans [m]: the half-open ranges of characters of the pieces
    (`Tokenizer.spans`).

    A word is a stretch without whitespace, and a single character of a script that writes no
    blanks (Chinese, Japanese, Thai, ...). Two words match when they are equal in lower case,
    without the punctuation at either end ("The" and "the,"; a word of punctuation only is compared
    whole). The cost is 1 for each deleted and each inserted word, and 2 for each run, so that a
    single common word ("the") does not split a rewritten passage. There is no substitution. Steps
    1 to 3 of align.py then apply.

    A piece belongs to the words that it overlaps. A piece that overlaps no word (a blank, EOS)
    belongs to the next word; what follows the last word never changes. A piece is changed if one of
    its words is. The pieces of matched words are unchanged even if case or punctuation differ. They
    are paired where `align` matches their texts in lower case; the other pieces are in no pair.
    Raises ValueError when a span exceeds its text, and UserError when the texts are too long.
    """
    words, edited_words = _words(original_text), _words(edited_text)
    matches, edits = _best_words([word.key for word in words], [word.key for word in edited_words])
    changed, pieces = _project(original_spans, words, {i for i, _ in matches})
    edited_changed, edited_pieces = _project(edited_spans, edited_words, {j for _, j in matches})
    pairs = []
    for i, j in matches:
        here, there = pieces[i], edited_pieces[j]
        surfaces = [_surface(original_text, original_spans[p]) for p in here]
        edited_surfaces = [_surface(edited_text, edited_spans[q]) for q in there]
        alike = (zip(here, there) if surfaces == edited_surfaces else
                 ((here[p], there[q]) for p, q in align(surfaces, edited_surfaces).pairs))
        pairs += [(p, q) for p, q in alike if not changed[p] and not edited_changed[q]]
    return Alignment(changed, edited_changed, pairs, edits)


def _best_words(a: list[str | None], b: list[str | None]) -> tuple[list[Pair], int]:
    """Finds the right-most path of least edits + 2 runs, and of these the fewest runs, over words.

    Returns (its matches, its number of edits). Both lists end with the word of the end, which
    always matches. Without substitution edits = n + m - 2 matches, so the least edits + 2 runs is
    the greatest matches - runs. A block of L matches in a row follows a run and adds L - 1, the
    number of its pairs of neighbours. Only pairs of neighbouring words that are equal on both sides
    are therefore visited. With E above every number of runs, the pair at (i, j) is worth

        V[i, j] = E + V[i+1, j+1]                               when the next words match, too
        V[i, j] = E - 1 + max V[i', j'], i' >= i+2, j' >= j+2   its block ends, a run follows

    A word that every text begins with opens the first block: a text that begins with a match has no
    run there. Of several best places (i', j') for the next block the right-most path takes j' = j+2
    with the least i', else the greatest i' with the least j'.
    """
    a, b = ["", *a], ["", *b]                               # no word is empty
    n, m = len(a), len(b)
    E, columns = n + m, {}
    for j in range(m - 1):
        columns.setdefault((b[j], b[j + 1]), []).append(j)
    if sum(len(columns.get(pair, ())) for pair in zip(a, a[1:])) > MOST_WORD_PAIRS:
        raise UserError(f"expected two texts that do not repeat themselves, got {n - 2} and "
                        f"{m - 2} words with too many equal pairs; split or shorten them")
    starts, next_start = _Starts(m), {}                     # by the last match of a block
    starts.add(0, n - 1, m - 1)                             # the end
    below, two_below = {}, {}                               # V of rows i+1 and i+2 by column
    for i in reversed(range(n - 1)):
        for j, value in two_below.items():
            starts.add(value, i + 2, j)
        here = {}
        for j in columns.get((a[i], a[i + 1]), ()):
            if j + 1 in below or i + 2 == n:
                here[j] = E + below.get(j + 1, 0)
            else:
                value, *next_start[i + 1, j + 1] = starts.best(j + 2)
                here[j] = E - 1 + value
        below, two_below = here, below
    for j, value in two_below.items():
        starts.add(value, 1, j)
    _, *next_start[0, 0] = starts.best(1)
    pairs, i, j = [], 0, 0
    while i < n - 1:
        i, j = (i + 1, j + 1) if a[i + 1] == b[j + 1] else next_start[i, j]
        pairs.append((i - 1, j - 1))
    return pairs, n + m - 2 - 2 * len(pairs)


class _Starts:
    """The places (i, j) where the next block can begin; rows are added from the last to the first.

    A Fenwick tree over the columns gives the best place at or right of a column in log m steps.
    """

    def __init__(self, columns: int):
        self.columns, self.of_column = columns, {}
        self.tree = [(-1, 0, 0)] * (columns + 1)

    def add(self, value: int, i: int, j: int) -> None:
        if value >= self.of_column.get(j, (-1,))[0]:        # the least i of equal ones
            self.of_column[j] = value, i, j
        k = self.columns - j
        while k <= self.columns:
            self.tree[k] = max(self.tree[k], (value, i, -j))
            k += k & -k

    def best(self, j: int) -> tuple[int, int, int]:
        """Returns (value, i', j') of the best place with j' >= j."""
        k, found = self.columns - j, self.tree[0]
        while k:
            found = max(found, self.tree[k])
            k -= k & -k
        same_column = self.of_column.get(j, (-1,))
        return same_column if same_column[0] == found[0] else (found[0], found[1], -found[2])


def _words(text: str) -> list[_Word]:
    """Splits a text into words, and appends its end as a word that every text has."""
    words = [_Word(_key(found[0].lower()), *found.span()) for found in WORD.finditer(text)]
    return [*words, _Word(None, len(text), len(text) + 1)]


def _key(word: str) -> str:
    """Returns the word without the punctuation at its ends, or all of it if nothing else is in it.

    A combining mark, such as a vowel sign of Hindi, is no punctuation.
    """
    if word.isalnum():
        return word
    kept = [k for k, c in enumerate(word) if c.isalnum() or unicodedata.category(c)[0] == "M"]
    return word[kept[0]:kept[-1] + 1] if kept else word


def _project(spans: Sequence[Span], words: list[_Word],
             kept: set[int]) -> tuple[list[bool], list[list[int]]]:
    """Returns, for each piece, whether it changed, and for each word the pieces that begin in it.

    kept: the positions in `words` of the words that did not change.
    """
    length = words[-1].start
    if beyond := [span for span in spans if span[1] > length]:
        raise ValueError(f"spans: expected ranges within the text's {length} characters, got "
                         f"{beyond[0]}; pass the spans of this very text")
    changed, pieces = [], [[] for _ in words]
    first = 0
    for p, (start, end) in enumerate(spans):
        while words[first].end <= start:
            first += 1
        last = first
        while last + 1 < len(words) and words[last + 1].start < end:
            last += 1
        pieces[first].append(p)
        changed.append(first not in kept or
                       first < last and any(k not in kept for k in range(first, last + 1)))
    return changed, pieces


def _surface(text: str, span: Span) -> str:
    """The text of a piece inside matched words: lower case, stripped unless it is all blank."""
    piece = text[slice(*span)].lower()
    return piece.strip() or piece
