"""Measures how much an edit changed, in words. The limit --max-change is on this measure.

    share = d / max(n, m)       d: the Levenshtein distance (fgrlhf/align.py) of n and m words

The distance is the same for all cheapest alignments. A word is a run of letters and digits, a
single Chinese or Japanese character, or a single punctuation mark. Whitespace is not a word.
"""

import re
from typing import NamedTuple

from fgrlhf.align import Alignment, Span, align

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]|_")
KINDS = ("insertion", "deletion", "substitution")


class Run(NamedTuple):
    """A maximal run of changed words: original[i:i_end] became edited[j:j_end]."""

    i: int
    i_end: int
    j: int
    j_end: int

    @property
    def kind(self) -> str:
        """insertion if the original's side is empty, deletion if the edit's side is empty."""
        if self.i == self.i_end:
            return "insertion"
        return "deletion" if self.j == self.j_end else "substitution"


class Change(NamedTuple):
    """A measured edit."""

    original: list[Span]            # [n] the characters of each word of the original, half-open
    edited: list[Span]              # [m] the characters of each word of the edit
    alignment: Alignment            # of these words

    @property
    def distance(self) -> int:
        """The number of words that were inserted, deleted or substituted."""
        return self.alignment.distance

    @property
    def share(self) -> float:
        """distance / max(n, m), in [0, 1]; 0 if both texts are empty."""
        return self.distance / max(len(self.original), len(self.edited), 1)

    @property
    def runs(self) -> list[Run]:
        """The changed runs between the pairs of the alignment, from left to right."""
        found, i, j = [], 0, 0
        for next_i, next_j in [*self.alignment.pairs, (len(self.original), len(self.edited))]:
            if (i, j) != (next_i, next_j):
                found.append(Run(i, next_i, j, next_j))
            i, j = next_i + 1, next_j + 1
        return found


def word_spans(text: str) -> list[Span]:
    """Returns the words of a text as half-open ranges of characters."""
    return [found.span() for found in WORD.finditer(text)]


def words(text: str) -> list[str]:
    """Returns the words of a text."""
    return WORD.findall(text)


def measure(original: str, edited: str) -> Change:
    """Measures the change from `original` to `edited`.

    Two words are equal if their characters are equal (upper and lower case differ). A change of
    whitespace changes no word.
    """
    return Change(word_spans(original), word_spans(edited), align(words(original), words(edited)))


def excess(change: Change, max_change: float) -> str | None:
    """Describes an edit that changes a larger share than `max_change`; None if it does not."""
    if change.share <= max_change:
        return None
    return (f"{change.distance} of {max(len(change.original), len(change.edited))} words changed "
            f"({change.share:.0%}), at most {max_change:.0%} allowed")


# ----- an edit as text to show --------------------------------------------------------------------

class Segment(NamedTuple):
    kind: str                                     # keep, delete or insert
    text: str


def segments(original: str, edited: str, change: Change) -> list[Segment]:
    """Cuts the two texts of `change` into segments in reading order; no segment is empty.

    The kept and the inserted segments, joined, are exactly `edited`. Deleted or inserted words
    include the whitespace before them, or the whitespace behind them if there is none before.
    Substituted words include no whitespace. Whitespace between kept words is shown as in `edited`.
    """
    found, shown = [], 0                          # shown: characters of `edited`
    for run in change.runs:
        with_space = run.kind != "substitution"
        old, end = _characters(change.original, run.i, run.i_end, with_space)
        new, new_end = _characters(change.edited, run.j, run.j_end, with_space)
        found += [Segment("keep", edited[shown:new]), Segment("delete", original[old:end]),
                  Segment("insert", edited[new:new_end])]
        shown = new_end
    found.append(Segment("keep", edited[shown:]))
    return [segment for segment in found if segment.text]


def _characters(spans: list[Span], first: int, end: int, with_space: bool) -> Span:
    """Returns the characters of spans[first:end]; an empty range lies behind the word before."""
    before = spans[first - 1][1] if first else 0
    if first == end:
        return before, before
    start, stop = spans[first][0], spans[end - 1][1]
    if not with_space:
        return start, stop
    if start == before and end < len(spans):
        stop = spans[end][0]
    return before, stop
