"""How much an edit changed, in words: the measure behind --max-change (the paper's *minimal* edit).

    share = d / max(n, m)       d: the Levenshtein distance of fgrlhf.align, of n and m words

The distance is the same whichever of the cheapest alignments is taken. A word is a run of letters
and digits, one character of Chinese or Japanese, or one mark of punctuation; whitespace is none.
"""

import re
from typing import NamedTuple

from fgrlhf.align import Alignment, Span, align

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]|_")
KINDS = ("insertion", "deletion", "substitution")


class Run(NamedTuple):
    """A maximal stretch of changed words: original[i:i_end] became edited[j:j_end]."""

    i: int
    i_end: int
    j: int
    j_end: int

    @property
    def kind(self) -> str:
        """insertion: nothing on the original's side; deletion: nothing on the edit's."""
        if self.i == self.i_end:
            return "insertion"
        return "deletion" if self.j == self.j_end else "substitution"


class Change(NamedTuple):
    """An edit, measured."""

    original: list[Span]            # [n] characters of each word of the original, half-open
    edited: list[Span]              # [m] likewise of the edit
    alignment: Alignment            # of those words

    @property
    def distance(self) -> int:
        """Words inserted, deleted and substituted."""
        return self.alignment.distance

    @property
    def share(self) -> float:
        """distance / longer side, in [0, 1]; 0 where both sides are empty."""
        return self.distance / max(len(self.original), len(self.edited), 1)

    @property
    def runs(self) -> list[Run]:
        """The changed stretches, from left to right."""
        return runs(self.alignment)


def words(text: str) -> list[Span]:
    """The words of a text as half-open ranges of characters."""
    return [found.span() for found in WORD.finditer(text)]


def measure(original: str, edited: str) -> Change:
    """The change from `original` to `edited`, in words.

    Words are equal when their characters are (case counts); whitespace alone changes no word.
    """
    sides = words(original), words(edited)
    units = [[text[start:end] for start, end in spans]
             for text, spans in zip((original, edited), sides)]
    return Change(*sides, align(*units))


def runs(alignment: Alignment) -> list[Run]:
    """The changed stretches between the pairs of an alignment, from left to right."""
    ends = len(alignment.original_changed), len(alignment.edited_changed)
    found, i, j = [], 0, 0
    for next_i, next_j in [*alignment.pairs, ends]:
        if (i, j) != (next_i, next_j):
            found.append(Run(i, next_i, j, next_j))
        i, j = next_i + 1, next_j + 1
    return found


def excess(change: Change, max_change: float) -> str | None:
    """What is wrong with an edit that changes more than `max_change` allows; None within it."""
    if change.share <= max_change:
        return None
    return (f"{change.distance} of {max(len(change.original), len(change.edited))} words changed, "
            f"{change.share:.0%}; at most {max_change:.0%} may")
