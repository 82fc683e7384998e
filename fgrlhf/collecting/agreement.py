"""What the edits of one annotator look like, and how far two of them agree.

    python -m fgrlhf.collect --report A.jsonl [B.jsonl]

Counted in words (fgrlhf/collecting/change.py). "Changed" are the words of the *original* that an
edit substitutes or deletes. Between two annotators a pure insertion counts, too: as in training it
is charged to the word behind the gap, or to the end of the text, which stands for EOS.

    F1 = 2 both / (A + B)       kappa = (p - e) / (1 - e)

p: the share of words with the same label; e: what it would be by chance, given how often each
annotator changes a word. Both are pooled over words.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fgrlhf.align import align, gap_credit
from fgrlhf.collecting.ambiguity import ambiguity
from fgrlhf.collecting.change import KINDS, Change, measure, words
from fgrlhf.config import UserError
from fgrlhf.edits import Edit
from fgrlhf.readers import read_edits

END = None                                        # what the end of a text is compared as


class Table:
    """Two binary labels a word, counted."""

    def __init__(self):
        self.both = self.first = self.second = self.words = 0

    def add(self, first: Sequence[bool], second: Sequence[bool]) -> None:
        """The labels of one record, [n] each."""
        if len(first) != len(second):
            raise ValueError(f"labels: expected {len(first)} of both, got {len(second)}")
        self.words += len(first)
        self.first, self.second = self.first + sum(first), self.second + sum(second)
        self.both += sum(a and b for a, b in zip(first, second))

    @property
    def f1(self) -> float | None:
        """In [0, 1]; None where neither ever says True."""
        total = self.first + self.second
        return 2 * self.both / total if total else None

    @property
    def kappa(self) -> float | None:
        """Cohen's, up to 1, 0 by chance; None where chance alone would agree always."""
        if not self.words:
            return None
        a, b = self.first / self.words, self.second / self.words
        same = 1 - a - b + 2 * self.both / self.words
        chance = a * b + (1 - a) * (1 - b)
        return (same - chance) / (1 - chance) if chance < 1 else None


def texts(text: str) -> list[str]:
    """The words of a text."""
    return [text[start:end] for start, end in words(text)]


def changed_words(edit: Edit) -> list[bool]:
    """[n + 1] the words of the original that answer for the edit, then the end of the text."""
    original, edited = [*texts(edit.original), END], [*texts(edit.edited), END]
    credited = set(gap_credit(align(original, edited)).original)
    return [i in credited for i in range(len(original))]


def in_spans(edit: Edit) -> list[bool]:
    """[n] whether each word of the original overlaps one of the edit's error spans."""
    return [any(max(s.start, start) < min(s.end, end) for s in edit.spans)
            for start, end in words(edit.original)]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; interpolated between the values."""
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def _share_lines(changes: list[Change]) -> list[str]:
    lines = []
    for name, values, form in (("share of words changed", [c.share for c in changes], percent),
                               ("words changed", [c.distance for c in changes], "{:.1f}".format)):
        low, median, high = quartiles(values)
        lines.append(f"  {name:28}mean {form(statistics.fmean(values))}, median {form(median)}, "
                     f"quartiles {form(low)} and {form(high)}")
    small = sum(c.share < 0.4 for c in changes)
    return [*lines, f"  {'under 40% changed':28}{small} of {len(changes)} edits"]


def _kind_lines(changes: list[Change]) -> list[str]:
    kinds, pure = Counter(), Counter()
    for change in changes:
        found = [run.kind for run in change.runs]
        kinds.update(found)
        pure.update(set(found) if len(set(found)) == 1 else ())
    lines = [f"  {'changed stretches':28}{kinds.total()}, {kinds.total() / len(changes):.1f} an "
             "edit"]
    return lines + [f"    {kind:26}{kinds[kind]} ({percent(kinds[kind] / kinds.total())}); "
                    f"{pure[kind]} edits have no other kind" for kind in KINDS]


def _ambiguity_lines(edits: list[Edit]) -> list[str]:
    several = ambiguous = labels = open_labels = 0
    for edit in edits:
        found = ambiguity(texts(edit.original), texts(edit.edited))
        several += found.several
        ambiguous += any(found.original + found.edited)
        labels += len(found.original) + len(found.edited)
        open_labels += sum(found.original) + sum(found.edited)
    return [f"  {'several cheapest alignments':28}{several} of {len(edits)} edits; with other "
            f"labels {ambiguous}, {percent(open_labels / labels)} of all labels"]


def _span_lines(edits: list[Edit]) -> list[str]:
    table, looked_at = Table(), [edit for edit in edits if edit.spans is not None]
    if not looked_at:
        return []
    for edit in looked_at:
        table.add(measure(edit.original, edit.edited).alignment.original_changed, in_spans(edit))
    precision = table.both / table.first if table.first else None
    recall = table.both / table.second if table.second else None
    return [f"  {'error spans':28}{len(looked_at)} records have them, over "
            f"{percent(table.second / table.words)} of the words; the edits change "
            f"{percent(table.first / table.words)}",
            f"    {'changed words in them':26}precision {percent(precision)}, recall "
            f"{percent(recall)}, F1 {number(table.f1)}, kappa {number(table.kappa)}"]


def describe(path: str | Path, edits: list[Edit]) -> list[str]:
    """The lines about one file of edits."""
    real = [edit for edit in edits if edit.original != edit.edited]
    lines = [f"{path}: {len(edits)} records, {len(real)} edited, {len(edits) - len(real)} left as "
             "they were"]
    changes = [measure(edit.original, edit.edited) for edit in real]
    changes = [change for change in changes if change.distance]
    if not changes:
        return [*lines, "  no word is changed"]
    return [*lines, *_share_lines(changes), *_kind_lines(changes), *_ambiguity_lines(real),
            *_span_lines(edits)]


def compare(first: list[Edit], second: list[Edit]) -> list[str]:
    """The lines about two annotators of the same responses, matched by id.

    Raises UserError where no record is common, or one id stands for two different originals.
    """
    others = {edit.id: edit for edit in second}
    pairs = [(edit, others[edit.id]) for edit in first if edit.id in others]
    for a, b in pairs:
        if a.original != b.original:
            raise UserError(f"--report: record {a.id!r}: expected the same original in both files, "
                            "got two; compare edits of the same pairs")
    if not pairs:
        raise UserError("--report: expected records of the same id in both files, got none; "
                        "compare edits of the same pairs")
    table, apart = Table(), []
    for a, b in pairs:
        table.add(changed_words(a), changed_words(b))
        apart.append(measure(a.edited, b.edited))
    same = sum(change.distance == 0 for change in apart)
    need = Table()
    need.add([a.original != a.edited for a, _ in pairs], [b.original != b.edited for _, b in pairs])
    return [f"both: {len(pairs)} records in common",
            f"  {'changed words':28}F1 {number(table.f1)}, kappa {number(table.kappa)} over "
            f"{table.words} words; A changes {percent(table.first / table.words)}, B "
            f"{percent(table.second / table.words)}",
            f"  {'needs an edit at all':28}{need.both} records by both, {need.first - need.both} "
            f"by A alone, {need.second - need.both} by B alone; kappa {number(need.kappa)}",
            f"  {'the same edit':28}{same} of {len(pairs)} records; the two texts differ in "
            f"{percent(statistics.fmean(c.share for c in apart))} of their words"]


def report(paths: list[str]) -> str:
    """The agreement report of one or two files of edits."""
    if not 1 <= len(paths) <= 2:
        raise UserError(f"--report: expected one file of edits or two, got {len(paths)}")
    files = [read_edits(path) for path in paths]
    lines = [line for path, edits in zip(paths, files) for line in describe(path, edits)]
    return "\n".join(lines + (compare(*files) if len(files) == 2 else []))
