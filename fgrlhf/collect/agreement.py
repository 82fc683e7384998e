"""Describes the edits of one annotator, and measures the agreement of two annotators.

    python -m fgrlhf.collect --report edits.jsonl
    python -m fgrlhf.collect --report edits.jsonl others.jsonl

The share of change is counted in words, as --max-change counts it (change.py). Everything else is
counted in parts: words and punctuation marks. A part of the *original* is changed if the edit
substitutes or deletes it. The comparison of two annotators also counts pure insertions. As in
training, an insertion changes the part behind the gap, or the end of the text (which is like EOS).

    F1 = 2 both / (A + B)       kappa = (p - e) / (1 - e)

both, A, B: the numbers of parts changed by both, by A, by B. p: the share of parts with the same
label. e: that share by chance, given how often each annotator changes a part. Parts of all records
are pooled.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fgrlhf.align import gap_credit
from fgrlhf.collect.ambiguity import ambiguity
from fgrlhf.collect.change import KINDS, Change, measure, part_spans, parts
from fgrlhf.collect.long import LARGE, align_long
from fgrlhf.data.fields import UserError
from fgrlhf.data.readers import read_edits
from fgrlhf.data.records import Edit

END = ""                                          # the end of a text; no part is empty


class Table:
    """Counts two binary labels per part."""

    def __init__(self):
        self.both = self.first = self.second = self.parts = 0

    def add(self, first: Sequence[bool], second: Sequence[bool]) -> None:
        """Adds the labels of one record, [n] each."""
        if len(first) != len(second):
            raise ValueError(f"labels: expected {len(first)} from both annotators, "
                             f"got {len(second)} from the second")
        self.parts += len(first)
        self.first, self.second = self.first + sum(first), self.second + sum(second)
        self.both += sum(a and b for a, b in zip(first, second))

    @property
    def f1(self) -> float | None:
        """F1 in [0, 1]; None if no label is True."""
        total = self.first + self.second
        return 2 * self.both / total if total else None

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa, at most 1, and 0 by chance; None if chance always agrees."""
        if not self.parts:
            return None
        a, b = self.first / self.parts, self.second / self.parts
        same = 1 - a - b + 2 * self.both / self.parts
        return beyond_chance(same, a * b + (1 - a) * (1 - b))


def beyond_chance(same: float, chance: float) -> float | None:
    """Returns (same - chance) / (1 - chance), or None if chance always agrees."""
    return (same - chance) / (1 - chance) if chance < 1 else None


def cohen_kappa(first: Sequence, second: Sequence) -> float | None:
    """Cohen's kappa of two lists [n] of labels of any number of kinds, as Table.kappa for two.

    Returns None for n = 0, and if chance always agrees.
    """
    if not first:
        return None
    counts, others, n = Counter(first), Counter(second), len(first)
    same = sum(a == b for a, b in zip(first, second, strict=True)) / n
    return beyond_chance(same, sum(counts[label] * others[label] for label in counts) / n ** 2)


def changed_parts(edit: Edit) -> list[bool]:
    """[n + 1]: True for each part of the original that is credited with the edit; last, the end."""
    original, edited = [*parts(edit.original), END], [*parts(edit.edited), END]
    credited = set(gap_credit(align_long(original, edited)).original)
    return [i in credited for i in range(len(original))]


def in_spans(edit: Edit) -> list[bool]:
    """[n]: True for each part of the original that overlaps an error span of the edit."""
    return [any(max(s.start, start) < min(s.end, end) for s in edit.spans)
            for start, end in part_spans(edit.original)]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Returns (lower quartile, median, upper quartile), interpolated between the values."""
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
    return [*lines, f"  {'less than 40% changed':28}{small} of {len(changes)} edits"]


def _kind_lines(changes: list[Change]) -> list[str]:
    kinds, pure = Counter(), Counter()
    for change in changes:
        found = [run.kind for run in change.runs]
        kinds.update(found)
        pure.update(set(found) if len(set(found)) == 1 else ())
    lines = [f"  {'runs of changed parts':28}{kinds.total()}, {kinds.total() / len(changes):.1f} "
             "per edit"]
    return lines + [f"    {kind:26}{kinds[kind]} ({percent(kinds[kind] / kinds.total())}); "
                    f"the only kind in {pure[kind]} edits" for kind in KINDS]


def _ambiguity_lines(edits: list[Edit]) -> list[str]:
    several = ambiguous = labels = open_labels = 0
    both = [(parts(edit.original), parts(edit.edited)) for edit in edits]
    short = [(a, b) for a, b in both if len(a) * len(b) <= LARGE]
    for original, edited in short:
        found = ambiguity(original, edited)
        several += found.several
        ambiguous += any(found.original + found.edited)
        labels += len(found.original) + len(found.edited)
        open_labels += sum(found.original) + sum(found.edited)
    longer = len(both) - len(short)
    left_out = f" ({longer} longer edits left out)" if longer else ""
    return [f"  {'several cheapest alignments':28}{several} of {len(short)} edits; their labels "
            f"differ in {ambiguous} edits, for {percent(open_labels / max(labels, 1))} of all parts"
            + left_out]


def _span_lines(edits: list[Edit]) -> list[str]:
    table, with_spans = Table(), [edit for edit in edits if edit.spans is not None]
    if not with_spans:
        return []
    for edit in with_spans:
        table.add(measure(edit.original, edit.edited).parts.original_changed, in_spans(edit))
    precision = table.both / table.first if table.first else None
    recall = table.both / table.second if table.second else None
    return [f"  {'error spans':28}in {len(with_spans)} records, covering "
            f"{percent(table.second / table.parts)} of the parts; the edits change "
            f"{percent(table.first / table.parts)}",
            f"    {'changed parts in spans':26}precision {percent(precision)}, recall "
            f"{percent(recall)}, F1 {number(table.f1)}, kappa {number(table.kappa)}"]


def describe(path: str | Path, edits: list[Edit]) -> list[str]:
    """Returns the lines about one file of edits."""
    real = [edit for edit in edits if edit.original != edit.edited]
    lines = [f"{path}: {len(edits)} records, {len(real)} edited, {len(edits) - len(real)} left "
             "unchanged"]
    changes = [measure(edit.original, edit.edited) for edit in real]
    changes = [change for change in changes if change.parts.distance]
    if not changes:
        return [*lines, "  no word or mark is changed"]
    return [*lines, *_share_lines(changes), *_kind_lines(changes), *_ambiguity_lines(real),
            *_span_lines(edits)]


def compare(first: list[Edit], second: list[Edit]) -> list[str]:
    """Returns the lines about two annotators of the same responses, matched by id.

    Raises UserError if the files have no id in common, or if one id has two different originals.
    """
    others = {edit.id: edit for edit in second}
    pairs = [(edit, others[edit.id]) for edit in first if edit.id in others]
    for a, b in pairs:
        if a.original != b.original:
            raise UserError(f"--report: record {a.id!r}: expected the same original in both files, "
                            "got two different ones; compare edits of the same pairs")
    if not pairs:
        raise UserError("--report: expected records of the same id in both files, got none; "
                        "compare edits of the same pairs")
    table, between = Table(), []
    for a, b in pairs:
        table.add(changed_parts(a), changed_parts(b))
        between.append(measure(a.edited, b.edited))
    same = sum(change.parts.distance == 0 for change in between)
    any_edit = Table()
    any_edit.add([a.original != a.edited for a, _ in pairs],
                 [b.original != b.edited for _, b in pairs])
    return [f"both files: {len(pairs)} records in common; A is the first file, B the second",
            f"  {'changed parts':28}F1 {number(table.f1)}, kappa {number(table.kappa)} over "
            f"{table.parts} parts; A changes {percent(table.first / table.parts)}, B "
            f"{percent(table.second / table.parts)}",
            f"  {'edited at all':28}{any_edit.both} records by both, "
            f"{any_edit.first - any_edit.both} only by A, {any_edit.second - any_edit.both} only "
            f"by B; kappa {number(any_edit.kappa)}",
            f"  {'the same edit':28}{same} of {len(pairs)} records; the two edits differ in "
            f"{percent(statistics.fmean(c.share for c in between))} of their words"]


def report(paths: list[str]) -> str:
    """Returns the report on one or two files of edits."""
    if not 1 <= len(paths) <= 2:
        raise UserError(f"--report: expected one or two files of edits, got {len(paths)}; see "
                        "python -m fgrlhf.collect --help")
    files = [read_edits(path) for path in paths]
    lines = [line for path, edits in zip(paths, files) for line in describe(path, edits)]
    return "\n".join(lines + (compare(*files) if len(files) == 2 else []))
