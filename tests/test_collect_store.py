"""The parts that all editors share: the measure of change, the tasks, and the files of records."""

import json
import os

import pytest

from fgrlhf.align import align
from fgrlhf.collect.change import Run, excess, measure, part_spans, parts, segments, words
from fgrlhf.collect.line_ends import keep_line_ends
from fgrlhf.collect.long import LARGE, align_long
from fgrlhf.collect.store import Skip, Store, outcome_of
from fgrlhf.collect.tasks import Task, read_tasks
from fgrlhf.data.fields import UserError
from fgrlhf.data.readers import read_edits
from fgrlhf.data.records import Provenance, Span

HOW = Provenance("human", "2026-11-21T12:00:00Z", 1, 2.5)
TASK = Task("r1", "Who sat?", "The cat sat.", "A dog sat.", spans=(Span(2, 5, "wrong"),))


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


# Change.

def test_words_are_runs_of_letters_and_digits_and_marks_are_parts_but_no_words():
    text = "It's 1945, a_b: 漢字kana"
    both = ["It", "'", "s", "1945", ",", "a", "_", "b", ":", "漢", "字", "kana"]
    assert parts(text) == [text[i:j] for i, j in part_spans(text)] == both
    assert words(text) == ["It", "s", "1945", "a", "b", "漢", "字", "kana"]


@pytest.mark.parametrize("text, expected", [
    ("Cafe\u0301 s\u0327i", ["Cafe\u0301", "s\u0327i"]),           # accents as characters
    ("हिन्दी में", ["हिन्दी", "में"]),                               # vowel signs inside a word
    ("ไม่ดี", ["ไ", "ม่", "ดี"]),                                  # Thai: marks stay with a letter
    ("ソニー・東京。", ["ソ", "ニ", "ー", "東", "京"]),                  # a middle dot is a mark
    ("ខ្មែរ។", ["ខ្", "មែ", "រ"]),
    ("한국어 문장.", ["한국어", "문장"]), ("مرحبا، يا", ["مرحبا", "يا"]), ("?! … 👍", [])])
def test_words_of_other_scripts(text, expected):
    assert words(text) == expected


def test_measure_counts_insertions_deletions_and_substitutions():
    change = measure("The old cat sat.", "The cat sat down there!")
    # words: old is deleted, down and there are inserted
    assert change.distance == 3 and change.share == 3 / 5
    # parts: old is deleted; "." becomes "down"; "there" and "!" are inserted
    assert change.parts.distance == 4
    assert change.runs == [Run(1, 2, 1, 1), Run(4, 5, 3, 6)]
    assert [run.kind for run in change.runs] == ["deletion", "substitution"]
    assert measure("a b", "a x b").runs[0].kind == "insertion"


@pytest.mark.parametrize("original, edited, share", [
    ("", "", 0.0), ("a b", "a  b\n", 0.0), ("a", "", 1.0), ("a b", "c d", 1.0),
    ("A b", "a b", 0.5), ("Yes.", "Yes!", 0.0), ("a-b, c.", "a b c", 0.0), ("?", "!", 0.0)])
def test_measure_share_is_the_distance_over_the_longer_side(original, edited, share):
    assert measure(original, edited).share == share


def test_excess_names_the_numbers_above_the_limit_and_nothing_within_it():
    change = measure("a b c d", "a b c x")
    assert excess(change, 0.25, free_words=0) is None
    assert excess(change, 0.2, free_words=0) == "1 of 4 words changed (25%), at most 20% allowed"
    assert excess(change, 0.2, free_words=1) is None


@pytest.mark.parametrize("original, edited", [
    ("Lyon", "Paris"), ("4", "5"), ("Lyon.", "Paris."), ("Yes, it is.", "No."), ("No", "Yes!"),
    ("Friedrich Schiller wrote Faust.", "Johann Wolfgang von Goethe wrote Faust."),
    ("北京", "东京")])
def test_excess_lets_a_short_answer_change(original, edited):
    assert excess(measure(original, edited), 0.5) is None


def test_excess_counts_the_words_of_a_short_answer_only_up_to_five():
    assert excess(measure("a b c d e", "v w x y z"), 0.5) is None
    assert excess(measure("a b c d e f", "u v w x y z"), 0.5) == (
        "6 of 6 words changed (100%), at most 50% allowed")


# Long texts.

def test_align_long_finds_few_changes_in_a_very_long_text():
    """40,000 different parts, of which 3 are substituted, 1 is deleted and 2 are inserted."""
    a = [str(i) for i in range(40_000)]
    b = a.copy()
    for i in (17, 20_000, 39_999):
        b[i] = "x"
    b[30_000:30_000] = ["y", "z"]
    del b[10_000]
    found = align_long(a, b)
    assert len(a) * len(b) > LARGE and found.distance == 6
    assert [i for i, changed in enumerate(found.original_changed) if changed] == [
        17, 10_000, 20_000, 39_999]
    assert all(a[i] == b[j] for i, j in found.pairs) and len(found.pairs) == 40_000 - 4


@pytest.mark.parametrize("a, b, distance", [
    (["a"] * 9_000, ["b"] * 8_000, 9_000), (["a"] * 9_000, ["a"] * 8_000, 1_000),
    (["a"] * 9_000, [], 9_000), ([str(i) for i in range(9_000)], ["x", "y"], 9_000),
    (["a"] * 4, ["a"] * 200_000, 199_996), (["a", "b", "c"], ["b"] * 200_000, 200_000)])
def test_align_long_takes_texts_that_have_little_in_common(a, b, distance):
    assert align_long(a, b).distance == distance


def test_align_long_takes_short_texts_that_align_refuses(monkeypatch):
    """Half of the 420 by 210 cells are on a cheapest path, more than the lowered bound allows."""
    monkeypatch.setattr("fgrlhf.align.MOST_VISITED", 2 ** 15)
    a, b = [f"a{i}" for i in range(420)], [f"b{i}" for i in range(210)]
    assert len(a) * len(b) <= LARGE
    with pytest.raises(UserError, match="too many cheapest alignments"):
        align(a, b)
    assert align_long(["x", *a], ["x", *b]).pairs == [(0, 0)]
    assert align_long(a, b).distance == 420


# Line ends.

@pytest.mark.parametrize("original, edited, expected", [
    ("One.\r\nTwo.\nThree.", "One.\nTwo.\nrows.", "One.\r\nTwo.\nrows."),
    ("One.\rTwo.", "One.\nrows.", "One.\rrows."),
    ("One.\r\nTwo.\nThree.", "One.\nThree.", "One.\r\nThree."),            # line 2 is deleted
    ("One.\r\nTwo.\r\n", "One.\nNew.\nTwo.\n", "One.\r\nNew.\r\nTwo.\r\n"),
    ("One.\nTwo.", "One.\r\nTwo.", "One.\nTwo."), ("One. Two.", "One.\r\nTwo.", "One.\nTwo."),
    ("a\r\n\r\nb\n\nc", "a\n\nb\n\nx", "a\r\n\r\nb\n\nx"),
    ("a\r\nb", "x\na\nb", "x\r\na\r\nb"), ("a\r\nb\nc", "", ""), ("", "a\nb", "a\nb"),
    ("a\u2028b\x0bc\x85d\r\n", "a\u2028b\x0bc\x85e\n", "a\u2028b\x0bc\x85e\r\n")])
def test_keep_line_ends_line_by_line(original, edited, expected):
    assert keep_line_ends(original, edited) == expected


@pytest.mark.parametrize("text", ["a\r\nb\nc\rd", "\r\r\n\n\r", "\n\r\n", "", "a\n\r\nb"])
def test_keep_line_ends_of_an_unchanged_text_changes_nothing(text):
    assert keep_line_ends(text, text) == text
    assert keep_line_ends(text, text.replace("\r\n", "\n").replace("\r", "\n")) == text


# Segments.

@pytest.mark.parametrize("original, edited, expected", [
    ("a b c", "a b c", [("keep", "a b c")]),
    ("a b c", "a x c", [("keep", "a "), ("delete", "b"), ("insert", "x"), ("keep", " c")]),
    ("a b c", "a c", [("keep", "a"), ("delete", " b"), ("keep", " c")]),
    ("a c", "a b c", [("keep", "a"), ("insert", " b"), ("keep", " c")]),
    ("b c", "c", [("delete", "b "), ("keep", "c")]),
    ("c", "b c", [("insert", "b "), ("keep", "c")]),
    ("a b", "a", [("keep", "a"), ("delete", " b")]),
    ("a", "a b\n", [("keep", "a"), ("insert", " b"), ("keep", "\n")]),
    ("a  b", "a b", [("keep", "a b")]),
    ("a b", "", [("delete", "a b")]),
    ("", "", []),
    ("Yes. It", "Yes, it", [("keep", "Yes"), ("delete", ". It"), ("insert", ", it")]),
])
def test_segments_read_as_the_edit_does(original, edited, expected):
    assert segments(measure(original, edited)) == expected


def test_segments_keep_every_character_of_real_edits(data_dir):
    for line in (data_dir / "qa_feedback" / "edits.jsonl").read_text().splitlines():
        record = json.loads(line)
        original, edited = record["original"], record["edited"]
        shown = segments(measure(original, edited))
        assert "".join(text for kind, text in shown if kind != "delete") == edited
        without = "".join(text for kind, text in shown if kind != "insert")
        assert "".join(without.split()) == "".join(original.split())
        assert all(text for _, text in shown)


# Tasks.

def test_read_tasks_takes_the_less_preferred_side_of_pairs_and_leaves_ties_out(tmp_path):
    judged = {"instruction": "Say", "output_1": "good", "output_2": "bad", "preference": 1}
    path = write(tmp_path / "p.jsonl", judged, judged | {"preference": 1.5})
    [task] = read_tasks(path)
    assert (task.prompt, task.chosen, task.rejected) == ("Say", "good", "bad")


def test_read_tasks_reads_edits_and_pairs_in_one_file_and_keeps_their_order(tmp_path):
    edit = {"id": "r1", "prompt": "p", "original": "a", "edited": "b"}
    pair = {"id": "r2", "prompt": "p", "chosen": "d", "rejected": "c"}
    tasks = read_tasks(write(tmp_path / "p.jsonl", edit, pair, edit | {"id": "r3"}))
    assert [(t.id, t.chosen, t.rejected) for t in tasks] == [
        ("r1", "b", "a"), ("r2", "d", "c"), ("r3", "b", "a")]
    assert read_tasks(tmp_path / "p.jsonl", limit=2) == tasks[:2]


def test_read_tasks_edits_the_original_of_an_edit_again_and_keeps_its_spans(tmp_path):
    path = write(tmp_path / "e.jsonl", {
        "id": "r1", "prompt": "Who sat?", "original": "A dog sat.", "edited": "The cat sat.",
        "spans": [{"start": 2, "end": 5, "type": "wrong"}]})
    assert read_tasks(path) == [TASK]


def test_read_tasks_names_the_fault_of_a_file_without_preferences(tmp_path):
    with pytest.raises(UserError, match="expected a pair"):
        read_tasks(write(tmp_path / "p.jsonl", {"id": "a", "prompt": "b"}))


# Store.

def test_store_add_writes_what_read_edits_reads_and_resumes(tmp_path):
    path, edit = tmp_path / "e.jsonl", TASK.edit("The cat sat.", "ann", HOW)
    with Store(path) as store:
        assert store.add(edit) and store.add(Skip("r2", "skipped", "unclear", "ann", HOW))
        assert read_edits(path) == [edit]                  # while the store is open
    with Store(path) as store:
        assert store.records == {"r1": edit, "r2": Skip("r2", "skipped", "unclear", "ann", HOW)}
        assert store.remaining([TASK, Task("r3", "", "", "")])[0].id == "r3"
        assert list(map(outcome_of, store.records.values())) == ["skipped", "edited"]


def test_store_add_counts_the_first_delivery_only(tmp_path):
    with Store(tmp_path / "e.jsonl") as store:
        assert store.add(TASK.edit("The cat sat.", None, HOW))
        assert not store.add(TASK.edit("Another.", None, HOW))
        assert not store.add(Skip("r1", "skipped", ""))
    assert [e.edited for e in read_edits(tmp_path / "e.jsonl")] == ["The cat sat."]


def test_store_add_refuses_what_the_readers_would_refuse(tmp_path):
    with Store(tmp_path / "e.jsonl") as store:
        with pytest.raises(UserError, match="edited: expected a string that is not blank"):
            store.add(TASK.edit(" ", None, HOW))
        assert store.records == {} and (tmp_path / "e.jsonl").read_bytes() == b""


def test_store_cuts_a_line_torn_at_any_byte(tmp_path):
    path = tmp_path / "e.jsonl"
    with Store(path) as store:
        store.add(TASK.edit("The cat sat.", "é漢", HOW))
    line = path.read_bytes()
    second = line.replace(b'"r1"', b'"r2"')
    for cut in range(len(second) - 1):
        path.write_bytes(line + second[:cut])
        with Store(path) as store:
            assert list(store.records) == ["r1"]
        assert path.read_bytes() == line
    path.write_bytes(line + second[:-1])               # without the newline: it counts
    with Store(path) as store:
        assert list(store.records) == ["r1", "r2"]
    assert path.read_bytes() == line + second


@pytest.mark.parametrize("content, message", [
    (b"# a readme", "expected one JSON object per line"), (b"[{}]\n", "expected one JSON object"),
    (b'{"id": "a"}\n', "prompt: expected this field"), (b'{"id": \n{}\n', "broken JSON")])
def test_store_refuses_a_file_of_something_else_and_leaves_it_alone(tmp_path, content, message):
    path = tmp_path / "e.jsonl"
    path.write_bytes(content)
    for _ in range(2):                             # the second time: the lock was freed
        with pytest.raises(UserError, match=message):
            Store(path)
    assert path.read_bytes() == content


def test_store_refuses_a_second_writer_until_the_first_has_closed(tmp_path):
    with Store(tmp_path / "e.jsonl"):
        with pytest.raises(UserError, match="expected no other writer"):
            Store(tmp_path / "e.jsonl")
    Store(tmp_path / "e.jsonl").close()


def test_store_continues_a_file_that_an_editor_saved_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "e.jsonl"
    with Store(path) as store:
        store.add(TASK.edit("The cat sat.", "ann", HOW))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    with Store(path) as store:
        assert store.add(Task("r2", "p", "c", "r").edit("x", None, HOW))
    assert [edit.id for edit in read_edits(path)] == ["r1", "r2"]


@pytest.mark.parametrize("names", [("e.alice", "e.bob"), ("edits-0.5", "edits-0.3"), ("e", "f")])
def test_store_shares_no_skipped_records_with_another_file(tmp_path, names):
    with Store(tmp_path / names[0]) as store, Store(tmp_path / names[1]) as other:
        store.add(TASK.skip("skipped", "unclear", "ann", HOW))
        other.add(TASK.edit("The cat sat.", "ann", HOW))
    with Store(tmp_path / names[1]) as other:
        assert list(map(outcome_of, other.records.values())) == ["edited"]


def test_store_add_leaves_no_half_line_when_the_disk_is_full(tmp_path, monkeypatch):
    path, write_fully = tmp_path / "e.jsonl", os.write
    with Store(path) as store:
        store.add(TASK.edit("The cat sat.", None, HOW))
        before = path.read_bytes()
        monkeypatch.setattr(os, "write", lambda file, data: write_fully(file, data[:20]))
        with pytest.raises(UserError, match="No space left"):
            store.add(Task("r2", "p", "c", "r").edit("x", None, HOW))
        monkeypatch.undo()
        assert path.read_bytes() == before
        assert store.add(Task("r2", "p", "c", "r").edit("x", None, HOW))
    assert [edit.id for edit in read_edits(path)] == ["r1", "r2"]


def test_store_withdraw_takes_one_record_back_and_lets_it_be_done_again(tmp_path):
    path = tmp_path / "e.jsonl"
    with Store(path) as store:
        for name in ("a", "b", "c"):
            store.add(Task(name, "p", "c", "r").edit(f"{name} edited", None, HOW))
        assert store.withdraw("a").edited == "a edited"
        assert store.withdraw("a") is None
        assert [edit.id for edit in read_edits(path)] == ["b", "c"]
        assert store.add(Task("a", "p", "c", "r").edit("again", None, HOW))
    assert {e.id: e.edited for e in read_edits(path)} == {
        "b": "b edited", "c": "c edited", "a": "again"}
