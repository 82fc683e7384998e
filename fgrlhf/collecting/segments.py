"""An edit as text to show: what was kept, deleted and inserted, in reading order."""

from typing import NamedTuple

from fgrlhf.align import Span
from fgrlhf.collecting.change import Change


class Segment(NamedTuple):
    kind: str                                     # keep, delete or insert
    text: str


def segments(original: str, edited: str, change: Change) -> list[Segment]:
    """`change`, measured between the two texts, as segments of them; none is empty.

    The kept and the inserted ones, joined, are exactly `edited`. Deleted or inserted words take the
    blanks before them along, or where there are none those behind; words put in the place of others
    take none. Blanks between kept words are shown as in `edited`.
    """
    found, shown = [], 0                          # shown: characters of `edited`
    for run in change.runs:
        blanks = run.kind != "substitution"
        old, end = _range(change.original, run.i, run.i_end, blanks)
        new, new_end = _range(change.edited, run.j, run.j_end, blanks)
        found += [Segment("keep", edited[shown:new]), Segment("delete", original[old:end]),
                  Segment("insert", edited[new:new_end])]
        shown = new_end
    found.append(Segment("keep", edited[shown:]))
    return [segment for segment in found if segment.text]


def _range(words: list[Span], first: int, end: int, blanks: bool) -> Span:
    """Characters of words[first:end]; of no word, the place behind the one before."""
    before = words[first - 1][1] if first else 0
    if first == end:
        return before, before
    start, stop = words[first][0], words[end - 1][1]
    if not blanks:
        return start, stop
    if start == before and end < len(words):
        stop = words[end][0]
    return before, stop
