"""The agreement report: numbers by hand, and ambiguity against a list of all alignments."""

import random

import pytest

from fgrlhf.align import align
from fgrlhf.collect.agreement import (
    Table, changed_parts, compare, describe, in_spans, quartiles, report)
from fgrlhf.collect.ambiguity import ambiguity
from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Edit, Span, write_jsonl


def edit(original: str, edited: str, id: str = "a", spans=None) -> Edit:
    return Edit(id, "p", original, edited, spans=spans)


# Ambiguity.

def every_path(a, b):
    """Yields every path of moves from (0, 0) to (n, m) as (cost, kept i, kept j)."""
    if not a and not b:
        yield 0, (), ()
        return
    i, j = len(a) - 1, len(b) - 1
    if a and b:
        for cost, left, right in every_path(a[:-1], b[:-1]):
            yield ((cost, left + (i,), right + (j,)) if a[-1] == b[-1] else
                   (cost + 1, left, right))
    for cost, left, right in every_path(a[:-1], b) if a else ():
        yield cost + 1, left, right
    for cost, left, right in every_path(a, b[:-1]) if b else ():
        yield cost + 1, left, right


def slow_ambiguity(a, b):
    paths = list(every_path(a, b))
    cheapest = [p for p in paths if p[0] == min(p[0] for p in paths)]
    return tuple([len({k in path[side] for path in cheapest}) > 1 for k in range(len(ids))]
                 for side, ids in ((1, a), (2, b))) + (len(cheapest) > 1,)


def test_ambiguity_finds_the_labels_on_which_cheapest_paths_disagree():
    rng = random.Random(0)
    for _ in range(300):
        a, b = ("".join(rng.choices("abc", k=rng.randrange(6))) for _ in range(2))
        assert tuple(ambiguity(a, b)) == slow_ambiguity(a, b), (a, b)


@pytest.mark.parametrize("a, b, original, edited, several", [
    ("abbc", "abc", [False, True, True, False], [False] * 3, True),      # either b can be deleted
    ("abc", "axc", [False] * 3, [False] * 3, False),
    ("", "", [], [], False), ("", "ab", [], [False] * 2, False),
    ("ab", "ba", [True, True], [True, True], True)])
def test_ambiguity_by_hand(a, b, original, edited, several):
    assert tuple(ambiguity(a, b)) == (original, edited, several)


def test_ambiguity_allows_every_label_that_align_gives():
    """A label that is not ambiguous is the label that `align` gives."""
    rng = random.Random(1)
    for _ in range(200):
        a, b = ("".join(rng.choices("ab", k=rng.randrange(6))) for _ in range(2))
        chosen, found = align(a, b), ambiguity(a, b)
        costs = min(p[0] for p in every_path(a, b))
        sure = [p for p in every_path(a, b) if p[0] == costs][0]
        for k, unsure in enumerate(found.original):
            assert unsure or chosen.original_changed[k] == (k not in sure[1])


# Two annotators.

def test_table_f1_and_kappa_by_hand():
    """A textbook example of 50 items, with p = 0.7, e = 0.5 and kappa = 0.4."""
    table = Table()
    table.add([True] * 20 + [True] * 5 + [False] * 10 + [False] * 15,
              [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15)
    assert table.kappa == pytest.approx(0.4)
    assert table.f1 == pytest.approx(2 * 20 / (25 + 30))


@pytest.mark.parametrize("first, second, f1, kappa", [
    ([True, False], [True, False], 1, 1), ([True, False], [False, True], 0, -1),
    ([False, False], [False, False], None, None), ([True, True], [True, True], 1, None),
    ([], [], None, None)])
def test_table_at_its_limits(first, second, f1, kappa):
    table = Table()
    table.add(first, second)
    assert (table.f1, table.kappa) == (f1, kappa)


@pytest.mark.parametrize("original, edited, changed", [
    ("a b c", "a x c", [0, 1, 0, 0]), ("a b c", "a c", [0, 1, 0, 0]),
    ("a b c", "a x b c", [0, 1, 0, 0]),                    # inserted before b
    ("a b c", "a b c x", [0, 0, 0, 1]),                    # the text ended too early
    ("a b c", "a b c", [0, 0, 0, 0])])
def test_changed_parts_credit_the_part_behind_an_insertion(original, edited, changed):
    assert changed_parts(edit(original, edited)) == [bool(c) for c in changed]


def test_in_spans_takes_every_word_that_overlaps():
    record = edit("one two three", "x", spans=(Span(2, 5, "t"), Span(12, 13, "t")))
    assert in_spans(record) == [True, True, True]
    assert in_spans(edit("one two three", "x", spans=(Span(3, 4, "t"),))) == [False] * 3


def test_compare_by_hand():
    """Record 1 has 4 + 1 words: A changes b, B changes b and c. Record 2 has 2 + 1 words: A changes
    nothing, B changes the end. Record 3 is only in B.

    Of 8 words both change 1, A 1 and B 3: F1 = 2/4, p = 6/8, e = 1/8 * 3/8 + 7/8 * 5/8 = 38/64,
    kappa = (48 - 38) / (64 - 38).
    """
    first = [edit("a b c d", "a x c d", "1"), edit("e f", "e f", "2")]
    second = [edit("a b c d", "a x y d", "1"), edit("e f", "e f g", "2"), edit("h", "i", "3")]
    lines = "\n".join(compare(first, second))
    assert "both files: 2 records in common" in lines
    assert "F1 0.500, kappa 0.385 over 8 parts; A changes 12.5%, B 37.5%" in lines
    assert "1 records by both, 0 only by A, 1 only by B; kappa 0.000" in lines
    # the edits differ in c of 4 words and in g of 3: (1/4 + 1/3) / 2
    assert "0 of 2 records; the two edits differ in 29.2% of their words" in lines


def test_compare_refuses_what_cannot_be_compared():
    with pytest.raises(UserError, match="expected records of the same id"):
        compare([edit("a", "b", "1")], [edit("a", "b", "2")])
    with pytest.raises(UserError, match="record '1': expected the same original"):
        compare([edit("a", "b", "1")], [edit("c", "b", "1")])


# One annotator.

def test_describe_by_hand():
    """Record 1: 1 of 4 words is substituted. Record 2: 2 of 4 words are deleted, in two runs.
    Record 3: 1 word is inserted before 4. Record 4: no change.

    The span of record 1 covers two words, one of them changed. Record 4 has one word and no span.
    """
    edits = [edit("a b c d", "a x c d", "1", spans=(Span(2, 5, "t"),)),
             edit("a b c d", "b d", "2"), edit("a b c d", "x a b c d", "3"),
             edit("e", "e", "4", spans=())]
    lines = "\n".join(describe("F", edits))
    assert "F: 4 records, 3 edited, 1 left unchanged" in lines
    # shares .25, .5 and 1/5
    assert "mean 31.7%, median 25.0%, quartiles 22.5% and 37.5%" in lines
    assert "mean 1.3, median 1.0, quartiles 1.0 and 1.5" in lines
    assert "2 of 3 edits" in lines
    assert "runs of changed parts       4, 1.3 per edit" in lines
    assert "insertion                 1 (25.0%); the only kind in 1 edits" in lines
    assert "deletion                  2 (50.0%); the only kind in 1 edits" in lines
    assert "substitution              1 (25.0%); the only kind in 1 edits" in lines
    assert "0 of 3 edits; their labels differ in 0 edits, for 0.0% of all parts" in lines
    # of 5 words 2 are in spans, 1 is changed, 1 is both: precision 1, recall 1/2; p 4/5, e 14/25
    assert "in 2 records, covering 40.0% of the parts; the edits change 20.0%" in lines
    assert "precision 100.0%, recall 50.0%, F1 0.667, kappa 0.545" in lines


def test_describe_counts_ambiguous_labels():
    """One a of "a a" is deleted: both labels of the original are ambiguous, the edit's is not."""
    assert "1 of 1 edits; their labels differ in 1 edits, for 66.7% of all parts" in "\n".join(
        describe("F", [edit("a a", "a")]))


def test_describe_of_edits_that_change_no_word():
    assert describe("F", [edit("a b", "a  b"), edit("c", "c", "2")])[1:] == [
        "  no word or mark is changed"]


def test_describe_counts_a_changed_mark_as_a_run_but_not_as_a_changed_word():
    lines = "\n".join(describe("F", [edit("a b, c.", "a b; c.")]))
    assert "share of words changed      mean 0.0%" in lines
    assert "runs of changed parts       1, 1.0 per edit" in lines


def test_describe_leaves_very_long_edits_out_of_the_count_of_alignments():
    """The alignments of 10,000 words are not counted; everything else is."""
    long = " ".join(map(str, range(10_000)))
    lines = "\n".join(describe("F", [edit("a a", "a"), edit(long, long + " x", "2")]))
    assert "1 of 1 edits; their labels differ in 1 edits" in lines
    assert "(1 longer edits left out)" in lines
    assert "runs of changed parts       2, 1.0 per edit" in lines


@pytest.mark.parametrize("values, expected", [
    ([3.0], (3, 3, 3)), ([1.0, 2.0], (1.25, 1.5, 1.75)), ([4.0, 1.0, 3.0, 2.0, 5.0], (2, 3, 4))])
def test_quartiles_interpolate(values, expected):
    assert quartiles(values) == expected


def test_report_reads_one_file_or_two(tmp_path):
    for name in "AB":
        write_jsonl(tmp_path / name, [edit("a b", f"a {name}")])
    one, two = str(tmp_path / "A"), str(tmp_path / "B")
    assert len(report([one, two]).splitlines()) > 2 * len(report([one]).splitlines())
    for paths in ([], [one] * 3):
        with pytest.raises(UserError, match="expected one or two files of edits"):
            report(paths)


def test_report_on_real_corrections_agrees_with_their_error_spans(data_dir):
    """The 400 human corrections of QA-Feedback; 395 of them change something."""
    lines = report([str(data_dir / "qa_feedback/edits.jsonl")])
    assert "400 records, 395 edited, 5 left unchanged" in lines
    assert "mean 63.9%, median 66.2%" in lines
    assert "precision 87.6%, recall 89.1%, F1 0.883" in lines
