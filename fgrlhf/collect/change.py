"""Measures how much an edit changed, in words. The limit --max-change is on this measure.

    share = d / max(n, m)       d: the Levenshtein distance (fgrlhf/align.py) of n and m words

The distance is the same for all cheapest alignments. A word is a run of letters and digits, or a
single character of a script without blanks between words (Chinese, Japanese, Thai; the scripts are
those of fgrlhf/align_words.py). Accents and vowel signs belong to their letter. Punctuation marks
and whitespace are no words: a changed mark is shown and kept, but does not count towards the limit.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fgrlhf.align import Alignment
from fgrlhf.align_words import MARKS, UNSPACED, Span
from fgrlhf.collect.long import align_long

FREE_WORDS = 5                                    # so many words may always change
SIGNS = "\u200c\u200d" + "".join(                 # joiners, accents and vowel signs
    c for c in map(chr, range(0x300, 0x1e000)) if unicodedata.category(c)[0] == "M")
LETTER = rf"[^\W_{UNSPACED}]"
WORD = re.compile(rf"(?!\W)[{UNSPACED}][{MARKS}]*|{LETTER}+(?:[{SIGNS}]+{LETTER}*)*")
PART = re.compile(rf"{WORD.pattern}|[^\w\s]|_")   # a word or a mark
KINDS = ("insertion", "deletion", "substitution")


class Run(NamedTuple):
    """A maximal run of changed parts: original[i:i_end] became edited[j:j_end]."""

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


@dataclass(frozen=True)
class Change:
    """A measured edit. Two words are equal if their characters are equal, case included."""

    original: str
    edited: str

    @cached_property
    def words(self) -> Alignment:
        """Aligns the words of the two texts, without marks."""
        return align_long(words(self.original), words(self.edited))

    @cached_property
    def parts(self) -> Alignment:
        """Aligns the parts of the two texts: words and marks."""
        return align_long(parts(self.original), parts(self.edited))

    @property
    def distance(self) -> int:
        """The number of words that were inserted, deleted or substituted."""
        return self.words.distance

    @property
    def length(self) -> int:
        """max(n, m): the number of words of the longer text."""
        return max(len(self.words.original_changed), len(self.words.edited_changed))

    @property
    def share(self) -> float:
        """distance / length, in [0, 1]; 0 if both texts have no word."""
        return self.distance / max(self.length, 1)

    @property
    def runs(self) -> list[Run]:
        """The changed runs between the pairs of `parts`, from left to right."""
        found, i, j = [], 0, 0
        end = len(self.parts.original_changed), len(self.parts.edited_changed)
        for next_i, next_j in [*self.parts.pairs, end]:
            if (i, j) != (next_i, next_j):
                found.append(Run(i, next_i, j, next_j))
            i, j = next_i + 1, next_j + 1
        return found


def words(text: str) -> list[str]:
    """Returns the words of a text."""
    return WORD.findall(text)


def parts(text: str) -> list[str]:
    """Returns the words and the marks of a text."""
    return PART.findall(text)


def part_spans(text: str) -> list[Span]:
    """Returns the words and the marks of a text as half-open ranges of characters."""
    return [found.span() for found in PART.finditer(text)]


def measure(original: str, edited: str) -> Change:
    """Measures the change from `original` to `edited`. A change of whitespace changes no part."""
    return Change(original, edited)


def excess(change: Change, max_change: float, free_words: int = FREE_WORDS) -> str | None:
    """Describes an edit above the limit; None for an edit within the limit.

    An edit may change the share `max_change` of the words, and in any case `free_words` words: the
    one word of a short answer is 100% of it.
    """
    if change.share <= max_change or change.distance <= free_words:
        return None
    return (f"{change.distance} of {change.length} words changed ({change.share:.0%}), at most "
            f"{max_change:.0%} allowed")


# ----- an edit as text to show --------------------------------------------------------------------

class Segment(NamedTuple):
    kind: str                                     # keep, delete or insert
    text: str


def segments(change: Change) -> list[Segment]:
    """Cuts the two texts of `change` into segments in reading order; no segment is empty.

    The kept and the inserted segments, joined, are exactly `edited`. Deleted or inserted parts
    include the whitespace before them, or the whitespace behind them if there is none before.
    Substituted parts include no whitespace. Whitespace between kept parts is shown as in `edited`.
    """
    found, shown = [], 0                          # shown: characters of `edited`
    spans, edited_spans = part_spans(change.original), part_spans(change.edited)
    for run in change.runs:
        with_space = run.kind != "substitution"
        old, end = _characters(spans, run.i, run.i_end, with_space)
        new, new_end = _characters(edited_spans, run.j, run.j_end, with_space)
        found += [Segment("keep", change.edited[shown:new]),
                  Segment("delete", change.original[old:end]),
                  Segment("insert", change.edited[new:new_end])]
        shown = new_end
    found.append(Segment("keep", change.edited[shown:]))
    return [segment for segment in found if segment.text]


def marked(text: str, changed: Sequence[bool]) -> list[tuple[bool, str]]:
    """Cuts a text where marked characters begin or end: [(is marked, characters), ...].

    changed: one flag per part of the text. Whitespace between two changed parts is marked too. The
    pieces, joined, are exactly `text`.
    """
    pieces, shown, end, inside = [], 0, 0, False  # shown: characters in `pieces`
    for (start, stop), flag in zip(part_spans(text), changed, strict=True):
        if flag != inside:                        # a mark begins at its part, ends behind its part
            cut = start if flag else end
            pieces.append((inside, text[shown:cut]))
            shown, inside = cut, flag
        end = stop
    cut = end if inside else len(text)
    pieces += [(inside, text[shown:cut]), (False, text[cut:])]
    return [piece for piece in pieces if piece[1]]


def _characters(spans: list[Span], first: int, end: int, with_space: bool) -> Span:
    """Returns the characters of spans[first:end]; an empty range lies behind the part before."""
    before = spans[first - 1][1] if first else 0
    if first == end:
        return before, before
    start, stop = spans[first][0], spans[end - 1][1]
    if not with_space:
        return start, stop
    if start == before and end < len(spans):
        stop = spans[end][0]
    return before, stop
