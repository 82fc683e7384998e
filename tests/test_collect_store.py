"""The parts that all editors share: the measure of change, the tasks, and the files of records."""

import json
import os

import pytest

from fgrlhf.collect.change import Run, excess, measure, segments, word_spans, words
from fgrlhf.collect.store import Skip, Store
from fgrlhf.collect.tasks import Task, read_tasks
from fgrlhf.data.fields import UserError
from fgrlhf.data.readers import read_edits
from fgrlhf.data.records import Edit, Provenance, Span

HOW = Provenance("human", "2026-11-21T12:00:00Z", 1, 2.5)
TASK = Task("r1", "Who sat?", "The cat sat.", "A dog sat.", spans=(Span(2, 5, "wrong"),))


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


# Change.

def test_words_are_runs_of_letters_and_digits_single_marks_and_single_han_characters():
    text = "It's 1945, a_b: 漢字kana"
    expected = ["It", "'", "s", "1945", ",", "a", "_", "b", ":", "漢", "字", "kana"]
    assert words(text) == [text[i:j] for i, j in word_spans(text)] == expected


def test_measure_counts_insertions_deletions_and_substitutions():
    change = measure("The old cat sat.", "The cat sat down there!")
    # old is deleted; "." becomes "down"; "there" and "!" are inserted
    assert change.distance == 4 and change.share == 4 / 6
    assert change.runs == [Run(1, 2, 1, 1), Run(4, 5, 3, 6)]
    assert [run.kind for run in change.runs] == ["deletion", "substitution"]
    assert measure("a b", "a x b").runs[0].kind == "insertion"


@pytest.mark.parametrize("original, edited, share", [
    ("", "", 0.0), ("a b", "a  b\n", 0.0), ("a", "", 1.0), ("a b", "c d", 1.0),
    ("A b", "a b", 0.5)])
def test_measure_share_is_the_distance_over_the_longer_side(original, edited, share):
    assert measure(original, edited).share == share


def test_excess_names_the_numbers_above_the_limit_and_nothing_within_it():
    change = measure("a b c d", "a b c x")
    assert excess(change, 0.25) is None
    assert excess(change, 0.2) == "1 of 4 words changed (25%), at most 20% allowed"


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
    assert segments(original, edited, measure(original, edited)) == expected


def test_segments_keep_every_character_of_real_edits(data_dir):
    for line in (data_dir / "qa_feedback" / "edits.jsonl").read_text().splitlines():
        record = json.loads(line)
        original, edited = record["original"], record["edited"]
        change = measure(original, edited)
        parts = segments(original, edited, change)
        assert "".join(text for kind, text in parts if kind != "delete") == edited
        without = "".join(text for kind, text in parts if kind != "insert")
        assert "".join(without.split()) == "".join(original.split())
        assert all(text for _, text in parts)


# Tasks.

def test_read_tasks_takes_the_less_preferred_side_of_pairs_and_leaves_ties_out(tmp_path):
    judged = {"instruction": "Say", "output_1": "good", "output_2": "bad", "preference": 1}
    path = write(tmp_path / "p.jsonl", judged, judged | {"preference": 1.5})
    assert read_tasks(path) == [Task("p.jsonl:1", "Say", "good", "bad")]


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
        assert store.counts() == {"edited": 1, "skipped": 1}


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
