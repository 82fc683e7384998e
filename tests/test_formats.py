"""Formats that other people publish: data sets, conversations, files that are not JSON lines.

The records are made up, in the published shapes. Expected values are written by hand.
"""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fgrlhf.data import files, values
from fgrlhf.data.defacto import read_evidence_edits
from fgrlhf.data.qa_feedback import read_qa_feedback_pairs
from fgrlhf.data.readers import (
    read_demonstrations, read_edits, read_outputs, read_pairs, read_preferences, read_prompts)
from fgrlhf.data.records import Demonstration, Edit, Pair, Passage, Prompt, Span, write_jsonl
from fgrlhf.data.table import convert
from tests.test_data import EDIT, JUDGED, PAIR, array, lines, refusal       # noqa: F401

ROOT = Path(__file__).parents[1]
QA = {"question": "What colour is the river?",
      "passages": [["River", "River\n\nThe river is blue.", "It is long."], ["Lake", "A lake."]],
      "gold": "It is blue.", "prediction 1": "It is red. It is long.",
      "prediction 2": "It is blue.", "prediction 3": "It is red. It is long.",
      "prediction 4": "Blue.",
      "feedback": {"errors": [
          {"error type": "Irrelevant", "explanation": "", "start": 11, "end": 22},
          {"error type": "Wrong-Grounding", "explanation": "1, 0", "start": 6, "end": 9}],
          "missing-info": [], "corrected-prediction": "It is blue. It is long."},
      "preference": [2, 1, 0, 1, 2, 2]}
DEFACTO = {"article": "Ten men left.", "abstract": "Men left.", "candidate": "Nine men left.",
           "doc_id": 17, "has_error": True, "intrinsic_error": True, "extrinsic_error": False,
           "feedback": {"summary": "Ten men left.", "evidence": "Ten men left.",
                        "explanation": "", "instruction": ["Replace", "Nine", "Ten"]}}
COACH = {"Raw Instruction": "Add.", "Raw Input": "1 2", "Raw Response": "4",
         "Revised Instruction": "Add.", "Revised Input": "1 2", "Revised Response": "3",
         "Distance": 1}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


# ----- published data sets ------------------------------------------------------------------------

def test_qa_feedback_as_published_gives_edits_with_sorted_spans_and_passages(array, capsys):
    blank = QA | {"feedback": QA["feedback"] | {"corrected-prediction": " "}}
    path = array(QA, blank)
    context = (Passage("River", "The river is blue. It is long."), Passage("Lake", "A lake."))
    assert read_edits(path) == read_preferences(path) == [
        Edit("data.json: record 1", "What colour is the river?", "It is red. It is long.",
             "It is blue. It is long.", None, context,
             (Span(6, 9, "Wrong-Grounding"), Span(11, 22, "Irrelevant")))]
    assert capsys.readouterr().err.splitlines()[0] == (
        f"{path}: left out 1 of 2 records: the correction is blank (1)")
    assert [prompt.id for prompt in read_prompts(path)] == ["data.json: record 1",
                                                            "data.json: record 2"]
    assert [d.output for d in read_demonstrations(path)] == ["It is blue. It is long."]


def test_qa_feedback_questions_without_feedback_are_prompts(array):
    path = array({"question": "Who?", "passages": [["T", "a", "b"]], "text": "x", "answer": "y"})
    assert read_prompts(path) == [Prompt("data.json: record 1", "Who?", None,
                                         (Passage("T", "a b"),))]
    assert "got none in 1, the question has no feedback (1)" in refusal(read_edits, path)


def test_qa_feedback_preferences_give_the_better_of_each_two_and_skip_ties_and_equals(array):
    # order 12 13 14 23 24 34; predictions 1 and 3 are equal, so 13 holds no preference
    pairs = read_qa_feedback_pairs(array(QA))
    assert [(pair.id, pair.chosen, pair.rejected) for pair in pairs] == [
        ("data.json: record 1-12", "It is blue.", "It is red. It is long."),
        ("data.json: record 1-23", "It is blue.", "It is red. It is long."),
        ("data.json: record 1-24", "Blue.", "It is blue."),
        ("data.json: record 1-34", "Blue.", "It is red. It is long.")]
    assert pairs[0].prompt == "What colour is the river?" and len(pairs[0].context) == 2


@pytest.mark.parametrize("preference", [[1, 2], [1, 1, 1, 1, 1, 3], []])
def test_qa_feedback_preferences_are_six_of_0_1_2(array, preference):
    path = array(QA, QA | {"preference": preference})
    assert f"{path}: record 2: preference: expected six of 0, 1 and 2, got" in refusal(
        read_qa_feedback_pairs, path)


@pytest.mark.parametrize("change, expected", [
    ({"prediction 1": " "}, "prediction 1: expected a string that is not blank, got ' '"),
    ({"feedback": []}, "feedback: expected an object, got []"),
    ({"feedback": {"errors": []}}, "feedback.corrected-prediction: expected this field"),
    ({"feedback": {"errors": [{"error type": "x", "start": 5, "end": 99}],
                   "corrected-prediction": "a"}},
     "feedback.errors[0]: expected 0 <= start < end <= 22, the length of original, got [5, 99]"),
    ({"passages": ["t"]}, "passages[0]: expected a list, got 't'"),
    ({"passages": [[]]}, "passages[0]: expected a title and sentences, got []")])
def test_qa_feedback_refuses_a_bad_field(array, change, expected):
    path = array(QA, QA | change)
    assert f"{path}: record 2: {expected}" in refusal(read_edits, path)


def test_defacto_as_published_gives_the_edit_where_there_is_an_error(lines, capsys):
    right = DEFACTO | {"doc_id": 18, "has_error": False,
                       "feedback": {"summary": "Not used.", "evidence": ""}}
    undone = DEFACTO | {"doc_id": 19, "feedback": {"summary": ""}}
    path = lines(DEFACTO, right, undone)
    assert read_edits(path) == [
        Edit("17", "Ten men left.", "Nine men left.", "Ten men left."),
        Edit("18", "Ten men left.", "Nine men left.", "Nine men left.")]
    assert "left out 1 of 3 records: the error is not corrected (1)" in capsys.readouterr().err
    assert read_pairs(path) == [Pair("17", "Ten men left.", "Ten men left.", "Nine men left.")]
    assert "left out 2 of 3 records" in capsys.readouterr().err
    assert [prompt.id for prompt in read_prompts(path)] == ["17", "18", "19"]
    assert len(read_edits(lines(right | {"feedback": None}))) == 1
    assert "feedback: expected an object, got None" in refusal(
        read_edits, lines(DEFACTO | {"feedback": None}))
    path = lines(DEFACTO | {"has_error": "yes"})
    assert f"{path}:1: has_error: expected true or false, got 'yes'" in refusal(read_edits, path)


def test_defacto_with_the_evidence_as_prompt_keeps_only_what_was_changed(lines, capsys):
    evidence = DEFACTO | {"doc_id": 18, "feedback": DEFACTO["feedback"] | {"evidence": "Ten left."}}
    blank = DEFACTO | {"doc_id": 19, "feedback": DEFACTO["feedback"] | {"evidence": " "}}
    path = lines(evidence, blank, DEFACTO | {"doc_id": 20, "has_error": False},
                 DEFACTO | {"doc_id": 21, "feedback": {"summary": ""}})
    assert read_evidence_edits(path) == [
        Edit("18", "Ten left.", "Nine men left.", "Ten men left."),
        Edit("19", "Ten men left.", "Nine men left.", "Ten men left.")]
    said = capsys.readouterr().err
    assert "the edit changes nothing (1)" in said and "the error is not corrected (1)" in said


def test_coachlm_as_published_gives_edits_of_one_prompt(array, capsys):
    other = COACH | {"Revised Instruction": "Subtract.", "Revised Response": "-1"}
    odd = COACH | {"Raw Instruction": "", "Revised Instruction": " ", "Raw Input": "Name it.",
                   "Revised Input": "Name it."}
    path = array(COACH, other, odd, COACH | {"Revised Response": ""})
    assert read_edits(path) == [Edit("data.json: record 1", "Add.", "4", "3", "1 2"),
                                Edit("data.json: record 3", "Name it.", "4", "3")]
    assert capsys.readouterr().err == (
        f"{path}: left out 2 of 4 records: the expert revised the prompt too (1); "
        "the revised response is blank (1)\n")
    assert read_demonstrations(path)[1] == Demonstration(
        "data.json: record 2", "Subtract.", "-1", "1 2")
    assert len(read_prompts(path)) == 4


# ----- conversations ------------------------------------------------------------------------------

TURNS = ("User: Name a river.\n\nAssistant: The Rhine.\n\nUser: Another?")
TALK = [user("Name a river."), assistant("The Rhine."), user("Another?")]


@pytest.mark.parametrize("record, prompt", [
    ({"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]}, "p"),
    ({"prompt": [system("Be brief."), user("p")], "chosen": [assistant("c")],
      "rejected": [assistant("r")]}, "Be brief.\n\np"),
    ({"prompt": [system(""), user("p")], "chosen": "c", "rejected": "r"}, "p"),
    ({"prompt": TALK, "chosen": [assistant("c")], "rejected": [assistant("r")]}, TURNS),
    ({"prompt": [system("Be brief."), *TALK], "chosen": "c", "rejected": "r"},
     "Be brief.\n\n" + TURNS),
    ({"chosen": [*TALK, assistant("c")], "rejected": [*TALK, assistant("r")]}, TURNS),
    ({"prompt": [user("p")], "chosen": [user("p"), assistant("c")],
      "rejected": [user("p"), assistant("r")]}, "p"),
    ({"prompt": " p\n", "prompt_id": "x", "messages": [user("p"), assistant("c")],
      "chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")],
      "score_chosen": 9}, "p"),
    ({"prompt": "Another?", "chosen": [*TALK, assistant("c")],
      "rejected": [*TALK, assistant("r")]}, TURNS),
    ({"chosen": "\n\nHuman: Name a river.\n\nAssistant: The Rhine.\n\nHuman: Another?\n\n"
      "Assistant: c", "rejected": "\n\nHuman: Name a river.\n\nAssistant: The Rhine.\n\nHuman: "
      "Another?\n\nAssistant: r"}, TURNS),
    ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "p"}]}],
      "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "c"}]}],
      "rejected": [assistant("r")]}, "p"),
])
def test_read_pairs_reads_conversations(lines, record, prompt):
    path = lines(record)
    expected = Pair("data.jsonl:1", prompt, "c", "r")
    assert read_pairs(path) == read_preferences(path) == [expected]
    assert read_prompts(path) == [Prompt("data.jsonl:1", prompt)]
    assert read_demonstrations(path) == [Demonstration("data.jsonl:1", prompt, "c")]


@pytest.mark.parametrize("record, prompt, output", [
    ({"messages": TALK}, TURNS, None), ({"prompt": TALK}, TURNS, None),
    ({"messages": [*TALK, assistant("o")]}, TURNS, "o"),
    ({"prompt": TALK, "completion": [assistant("o")]}, TURNS, "o"),
    ({"prompt": "p", "completion": "o"}, "p", "o"),
    ({"prompt": "p", "completion": "o", "label": True}, "p", "o"),
    ({"prompt": "p", "id": 3, "messages": [user("p"), assistant("o")]}, "p", "o"),
])
def test_read_demonstrations_and_prompts_read_conversations(lines, record, prompt, output):
    path = lines(record)
    id = str(record.get("id", "data.jsonl:1"))
    assert read_prompts(path) == [Prompt(id, prompt)]
    if output is None:
        assert f"{path}:1: output: expected" in refusal(read_demonstrations, path)
    else:
        assert read_demonstrations(path) == [Demonstration(id, prompt, output)]


def test_a_completion_whose_label_is_false_is_not_imitated(lines, capsys):
    path = lines({"prompt": "p", "completion": "bad", "label": False},
                 {"prompt": [user("q")], "completion": [assistant("good")], "label": True})
    assert read_demonstrations(path) == [Demonstration("data.jsonl:2", "q", "good")]
    assert "left out 1 of 2 records: the completion's label is false (1)" in capsys.readouterr().err
    assert len(read_prompts(path)) == 2


def test_a_label_is_true_or_false_and_0_is_false(lines):
    """Tables have 0 and 1. A string, "False" in a converted CSV, is refused."""
    path = lines({"prompt": "p", "completion": "bad", "label": 0},
                 {"prompt": "q", "completion": "good", "label": 1},
                 {"prompt": "r", "completion": "good", "label": None})
    assert [found.prompt for found in read_demonstrations(path)] == ["q", "r"]
    path = lines({"prompt": "p", "completion": "bad", "label": "False"})
    assert (f"{path}:1: label: expected true or false, got 'False'"
            in refusal(read_demonstrations, path))


ROLES = "expected the roles user and assistant by turns, at most one system before them, and "


@pytest.mark.parametrize("change, expected", [
    ({"prompt": [assistant("p")]}, f"prompt: {ROLES}user last, got ['assistant']"),
    ({"prompt": [user("p"), user("q")]}, f"prompt: {ROLES}user last, got ['user', 'user']"),
    ({"prompt": [user("p"), system("s")]}, f"prompt: {ROLES}user last, got ['user', 'system']"),
    ({"prompt": [system("s")]}, f"prompt: {ROLES}user last, got ['system']"),
    ({"chosen": [user("c")]}, f"chosen: {ROLES}assistant last, got ['user']"),
    ({"chosen": [user("p"), {"role": "tool", "content": "c"}]},
     f"chosen: {ROLES}assistant last, got ['user', 'tool']"),
    ({"chosen": [user("q"), assistant("c")]},
     "prompt: expected the prompt of chosen, 'q', got 'p'"),
    ({"chosen": []}, "chosen: expected a string, or a list of messages {role, content}, got []"),
    ({"chosen": ["c"]}, "chosen[0]: expected a message {role, content}, got 'c'"),
    ({"chosen": [{"from": "gpt", "value": "c"}]}, "chosen[0]: expected a message {role, content}"),
    ({"chosen": [assistant(None)]}, "chosen[0].content: expected a string, or a list of parts"),
    ({"chosen": [assistant([{"type": "image", "url": "u"}])]},
     "chosen[0].content[0]: expected a part {type: text, text}, got {"),
    ({"chosen": [assistant(" ")]}, "chosen: expected a string that is not blank, got ' '"),
    ({"prompt": "p", "chosen": [user("q"), assistant("c")], "rejected": [user("q"),
                                                                         assistant("r")]},
     "chosen: expected a conversation that begins with the prompt, 'p', got 'q'"),
    ({"chosen": "Human: hello"}, f"chosen: {ROLES}assistant last, got ['user']"),
])
def test_conversations_that_are_not_prompt_and_response_are_refused(lines, change, expected):
    record = {"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]}
    if "Human" in change.get("chosen", ""):
        del record["prompt"]
    path = lines(PAIR, record | change)
    assert f"{path}:2: {expected}" in refusal(read_pairs, path)


# ----- one file with several kinds, ids -----------------------------------------------------------

def test_read_preferences_keeps_edits_with_their_spans_beside_pairs(lines):
    path = lines(PAIR, EDIT, JUDGED | {"preference": 2})
    pair, edit, judged = read_preferences(path)
    assert pair == Pair("p1", "Who?", "Me.", "You.") and judged.chosen == "ho"
    assert edit.edited == "The cat sat." and edit.spans == (Span(0, 1, "word"), Span(6, 9, "verb"))
    spaced = EDIT | {"original": " A  cat sat.", "spans": [{"start": 4, "end": 7, "type": "x"}]}
    [edit] = read_preferences(lines(spaced), normalise=True)
    assert (edit.original, edit.spans) == ("A cat sat.", (Span(2, 5, "x"),))


def test_integer_ids_are_taken_as_text(lines):
    path = lines(EDIT | {"id": 7}, PAIR | {"id": -1}, {"id": 10**30, "prompt": "p"})
    assert [prompt.id for prompt in read_prompts(path)] == ["7", "-1", "1" + "0" * 30]
    path = lines(PAIR | {"id": 7}, PAIR | {"id": "7"})
    assert f"{path}:2: id: expected a new id, got '7' as in {path}:1" in refusal(read_pairs, path)
    for id in (True, 7.0, " ", [7]):
        assert "id: expected a string that is not blank, or an integer, got" in refusal(
            read_pairs, lines(PAIR | {"id": id}))


def test_prompts_need_no_id_and_pairs_as_prompts_no_preference(lines):
    unjudged = {key: JUDGED[key] for key in JUDGED if key != "preference"}
    path = lines({"prompt": "Name it."}, {"id": None, "prompt": "Who?"}, unjudged)
    assert read_prompts(path) == [
        Prompt("data.jsonl:1", "Name it."), Prompt("data.jsonl:2", "Who?"),
        Prompt("data.jsonl:3", "Say hi")]
    for reader in (read_pairs, read_demonstrations):
        assert f"{path}:1: preference: expected this field" in refusal(reader, lines(unjudged))


def test_judged_outputs_give_the_better_one_as_a_demonstration(lines, capsys):
    path = lines(JUDGED, JUDGED | {"preference": 2}, JUDGED | {"preference": None})
    assert [d.output for d in read_demonstrations(path)] == ["hi", "ho"]
    assert "left out 1 of 3 records: the preference is null (1)" in capsys.readouterr().err


def test_a_record_without_a_known_field_is_refused_with_the_fields_it_has(lines):
    path = lines({"question": "q", "chosen": "c", "rejected": "r"})
    assert refusal(read_pairs, path) == (f"{path}:1: prompt: expected this field, got only "
                                         "['chosen', 'question', 'rejected']; rename or add the "
                                         "field")


def test_a_field_that_is_missing_is_called_missing_with_the_fields_of_the_file(lines):
    path = lines({"id": "a", "prompt": "p"})
    assert refusal(read_outputs, path) == (f"{path}:1: instruction: expected this field, got only "
                                           "['id', 'prompt']; add the field")
    for record, name in (({"id": "a", "prompt": "p"}, "Prompt"),
                         ({"instruction": "p"}, "Instruction")):
        path = lines(record)
        assert refusal(read_demonstrations, path) == (
            f"{path}:1: output: expected this field, got the fields of {name}; add the field, or "
            "choose a file of demonstrations, edits or pairs")
    path = lines({"instruction": "p", "output": " "})
    assert f"{path}:1: output: expected a string that is not blank, got ' '" in refusal(
        read_demonstrations, path)


def test_outputs_without_a_generator_are_named_after_their_file(array):
    path = array({"instruction": "q", "input": "", "output": "x"}, name="mine.json")
    [output] = read_outputs(path)
    assert output.generator == "mine" and output.other == (("input", '""'),)


# ----- files --------------------------------------------------------------------------------------

def test_a_byte_order_mark_gzip_and_a_pipe_give_the_same_records(lines, tmp_path):
    expected = read_pairs(lines(PAIR, PAIR | {"id": "p2"}))
    plain = (tmp_path / "data.jsonl").read_bytes()
    for data in (b"\xef\xbb\xbf" + plain, gzip.compress(plain), gzip.compress(plain[:70])
                 + gzip.compress(plain[70:]), gzip.compress(b"\xef\xbb\xbf" + plain)):
        (tmp_path / "other").write_bytes(data)
        assert read_pairs(tmp_path / "other") == expected
    os.mkfifo(tmp_path / "pipe")                               # can be read only once
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[plain])
    writer.start()
    assert read_preferences(tmp_path / "pipe") == expected
    writer.join()


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:12],
                                    lambda data: data[:20] + b"\0\xff" + data[22:],
                                    lambda data: data + b"more"])
def test_a_damaged_gzip_file_is_refused_in_one_line(tmp_path, damage):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(damage(gzip.compress(json.dumps(PAIR).encode() * 9)))
    assert f"{path}: expected a whole gzip file, got a damaged one" in refusal(read_pairs, path)


def test_one_object_on_several_lines_is_one_record(tmp_path):
    path = tmp_path / "one.json"
    path.write_text("\ufeff\n" + json.dumps(PAIR, indent=2))
    assert read_pairs(path) == [Pair("p1", "Who?", "Me.", "You.")]


@pytest.mark.parametrize("bad, why", [
    ('{"prompt": "p", "chosen": NaN, "rejected": "b"}', "NaN is not a JSON number"),
    ('{"prompt": "p", "chosen": "b", "rejected": 1e999}', "'1e999' is too large for a number"),
    ('{"prompt": "p", "chosen": "b" "rejected": "b"}', "broken JSON at column "),
    ('{"prompt": "p", "chosen": "b", "chosen": "a"}', "the field 'chosen' is given twice"),
    ('"p', "expected \"]\" at the end of the array"), ("", "broken JSON at column "),
    ("7", "record: expected an object, got 7")])
def test_one_bad_record_of_an_array_is_left_out_alone(tmp_path, capsys, bad, why):
    good = json.dumps({"prompt": "p, ]", "chosen": "a]},", "rejected": '"[{'})
    path = tmp_path / "data.json"
    path.write_text(f"[{good},\n {bad},\n {good}\n]")
    cut = bad == '"p'                                          # the string swallows the last record
    expected = Pair("data.json: record 1", "p, ]", "a]},", '"[{')
    if cut:
        path.write_text(f"[{good},\n {bad}")
    pairs = read_pairs(path, "skip")
    assert pairs[0] == expected
    assert [pair.id[-1] for pair in pairs] == (["1"] if cut else ["1", "3"])
    report = capsys.readouterr().err
    assert "left out 1 bad records of " in report and "record 2: " in report
    assert (why in report) or cut
    assert "record 2: " in refusal(read_pairs, path)


def test_an_array_is_refused_by_line_column_and_record(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[\n {"prompt": "p"},\n\n  {"prompt" "p"}, 7]')
    assert f"{path}:4: record 2: expected a JSON value, got broken JSON at column 13" in refusal(
        read_prompts, path)
    path.write_bytes(b'[{"prompt": "p"},\n "\xff"]')
    assert f"{path}:2: record 2: expected UTF-8, got 0xff as byte 3 of" in refusal(
        read_prompts, path)
    path.write_text('[{"prompt": "p"}] [{"prompt": "q"}]')
    assert "expected nothing behind the array, got more" in refusal(read_prompts, path)
    path.write_text('[{"prompt": "p"},\n {"prompt": "q" ]')
    assert f"{path}:2: record 2: expected a JSON value, got broken JSON at column 17" in refusal(
        read_prompts, path)
    path.write_text('[{"prompt": "p"}')
    assert 'expected "]" at the end of the array, got the end of the file' in refusal(
        read_prompts, path)


def test_an_array_that_was_cut_off_anywhere_says_so(tmp_path):
    path, record = tmp_path / "data.json", {"prompt": "é\n\u2028", "output": "x\"", "n": [
        -1.5e-3, True, None, {"a": {}}]}
    for indent in (None, 1):
        for ascii in (False, True):
            data = json.dumps([record] * 2, indent=indent, ensure_ascii=ascii).encode()
            for length in range(1, len(data)):
                path.write_bytes(data[:length])
                assert ('expected "]" at the end of the array, got the end of the file; fetch the '
                        "file again, it was cut off") in refusal(read_prompts, path)


def test_a_field_that_is_given_twice_is_refused_at_any_depth(lines):
    path = lines(PAIR, '{"id": "x", "prompt": "p", "context": [{"title": "a", "text": "b", '
                 '"title": "c"}]}')
    assert f"{path}:2: expected JSON, got a value that cannot be read (the field 'title' is given "
    assert "the field 'title' is given twice" in refusal(read_prompts, path)


@pytest.mark.parametrize("data, name, kind", [
    (b"PAR1\x15\x04PAR1", "x.parquet", "a Parquet file; convert it: python -c 'import pandas"),
    (b"PAR1\x15\x04PAR1", "x.json", "a Parquet file; convert it: python -c 'import pandas"),
    (b"ARROW1\0\0", "x.arrow", "an Arrow file"), (b"BZh91", "x", "a file compressed by bzip2"),
    (b"\x28\xb5\x2f\xfd", "x", "a file compressed by zstd"),
    (b"PK\x03\x04", "x.zip", "a zip archive"),
    (b"version https://git-lfs.github.com/spec/v1\n", "x", "a Git LFS pointer"),
    (b"<!DOCTYPE html>", "x.json", "a web page"), (b"\xff\xfe{\0", "x", "UTF-16"),
    (b"instruction;output\na;b\n", "x", "CSV with semicolons; convert it: python -c 'import sys"),
    (b'\xef\xbb\xbf"id","prompt"\n1,p\n', "x", "CSV; convert it"),
    (b"sep=;\nprompt;output\n", "x", "CSV with semicolons; convert it"),
    (b"prompt\nhello\n", "x.csv", "CSV; convert it"), (b"q\ta\n", "x.tsv.gz", "TSV; convert it")])
def test_files_of_other_formats_are_named_with_the_conversion(tmp_path, data, name, kind):
    path = tmp_path / name
    for content in (data, gzip.compress(data)):
        path.write_bytes(content)
        message = refusal(read_prompts, path)
        assert message.startswith(f"{path}: expected JSON lines or one JSON array, got {kind}")


@pytest.mark.parametrize("name, delimiter", [("a b.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ";"),
                                             ("a.jsonl", ",")])
def test_the_conversion_of_a_table_can_be_run(tmp_path, name, delimiter):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows(
        [["prompt", "chosen", "rejected"], ['p\n"x"', "c,;\t", "r é"]])
    data = file.getvalue().encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    command = refusal(read_pairs, path).split("convert it: ")[1].replace(
        "python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=os.environ | {
        "PYTHONPATH": str(ROOT)})
    [made] = set(tmp_path.glob("*.jsonl")) - {path}
    stem = name.split(".")[0] + ".converted" * (name == "a.jsonl")
    assert made.name == f"{stem}.jsonl"
    assert read_pairs(made) == [Pair(f"{made.name}:1", 'p\n"x"', "c,;\t", "r é")]


@pytest.mark.parametrize("data, record", [
    ("prompt,output,\r\np,caf\u00e9,\r\n".encode("cp1252"), {"prompt": "p", "output": "caf\u00e9"}),
    (b"sep=;\r\nprompt;output\r\np;a,b\r\n;\r\n", {"prompt": "p", "output": "a,b"}),
    (b"prompt,output,input\np,o\n", {"prompt": "p", "output": "o"}),
    (b"prompt,output\np," + b"o" * 200_000 + b"\n", {"prompt": "p", "output": "o" * 200_000})])
def test_tables_as_spreadsheets_write_them(tmp_path, data, record, capsys):
    (tmp_path / "a.csv").write_bytes(data)
    convert(tmp_path / "a.csv", tmp_path / "a.jsonl")
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8")) == record
    assert ("read as Windows-1252" in capsys.readouterr().err) == (b"\xe9" in data)


@pytest.mark.parametrize("data, said", [
    (b"prompt,output\np,a,b\n", "a.csv:2: expected 2 cells as in the first row, got 3"),
    (b"prompt,prompt\np,a\n", "expected one column per field"),
    (b",\n", "expected a first row with the names of the fields"), (None, "expected a free name")])
def test_a_table_that_would_lose_something_is_refused(tmp_path, data, said):
    path = tmp_path / "a.csv"
    path.write_bytes(data or b"prompt\np\n")
    assert said in refusal(lambda path: convert(path, tmp_path / "b.jsonl" if data else path), path)
    assert [*tmp_path.iterdir()] == [path]


PASSAGE = {"title": "River", "text": "It is blue."}


@pytest.mark.parametrize("record", [
    {"instruction": "q", "output": "o"}, {"instruction": "q", "output": "o", "generator": "g"},
    {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1}])
def test_passages_of_records_in_alpaca_evals_fields_are_kept(tmp_path, record):
    path = tmp_path / "x.jsonl"
    for context, kept in (([PASSAGE], Passage(**PASSAGE)),
                          ("It is blue.", Passage("Context", "It is blue."))):
        path.write_text(json.dumps(record | {"context": context}) + "\n")
        read = [read_prompts, read_demonstrations] + [read_pairs] * ("preference" in record)
        assert all(reader(path)[0].context == (kept,) for reader in read)
    path.write_text(json.dumps(record | {"context": ["It is blue."]}) + "\n")
    assert "x.jsonl:1: context[0]: expected an object" in refusal(read_prompts, path)


# ----- large files --------------------------------------------------------------------------------

def test_a_record_that_is_too_large_is_left_out_and_reading_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(values, "RECORD_LIMIT", 1000)
    long, good = json.dumps({"prompt": "x" * 5000}), json.dumps({"prompt": "p"})
    path = tmp_path / "data"
    for content, first, last in ((f"{good}\n{long}\n{good}\n", "data:1", "data:3"),
                                 (f"[{good}, {long},\n{good}]", "record 1", "record 3")):
        path.write_text(content)
        assert [prompt.id[-len(first):] for prompt in read_prompts(path, "skip")] == [first, last]
        assert "MiB, got a larger one; shorten or delete the record" in capsys.readouterr().err
        refusal(read_prompts, path)


def test_a_file_of_mostly_bad_records_is_refused_before_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "REFUSAL_LIMIT", 3)
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "p"}\n' + "7\n" * 100)
    message = refusal(read_prompts, path, "skip")
    assert f"{path}: expected mostly usable records, got 4 that are refused in the first 5" in (
        message) and f"the first refusal is {path}:2: record: expected an object" in message
    path.write_text('{"prompt": "p"}\n7\n' * 100)              # half of them: each is listed
    assert len(read_prompts(path, "skip")) == 100


def test_an_object_with_many_fields_or_lines_takes_no_longer_than_its_size_says(tmp_path):
    path, started = tmp_path / "data.jsonl", time.perf_counter()
    fields = ", ".join(f'"{i}": 0' for i in [*range(300_000), 299_999])
    path.write_text(f'{{"prompt": "p"}}\n{{{fields}}}\n')
    assert "the field '299999' is given twice" in refusal(read_prompts, path)
    path.write_text('{\n' + "7\n" * 300_000)
    assert f"{path}:1: expected one JSON object per line" in refusal(read_prompts, path)
    assert time.perf_counter() - started < 10


def test_an_array_or_element_over_its_limit_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "data.json"
    path.write_text("[" * 50)
    monkeypatch.setattr(values, "TOKEN_LIMIT", 20)
    assert "expected at most 20 strings, commas and brackets, got more" in refusal(
        read_prompts, path)
    path.write_text('[\n' + '{"prompt": "p"},\n' * 50)
    monkeypatch.setattr(values, "ARRAY_LIMIT", 40)
    assert "expected an array of at most" in refusal(read_prompts, path)


# ----- real data ----------------------------------------------------------------------------------

def test_readers_read_defacto_whole(data_dir, capsys):
    for name, records, changed in (("train", 1000, 696), ("val", 486, 337)):
        path = data_dir / "defacto" / f"{name}.jsonl"
        edits = read_edits(path)
        assert len(edits) == len(read_prompts(path)) == len(read_demonstrations(path)) == records
        assert capsys.readouterr().err == ""
        assert len(read_pairs(path)) == len(read_preferences(path)) == changed
        assert f"the edit changes nothing ({records - changed})" in capsys.readouterr().err
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    wrong = [r for r in raw if r["has_error"] and r["feedback"]["summary"] != r["candidate"]]
    assert [(e.id, e.prompt, e.original, e.edited) for e in read_preferences(path)] == [
        (str(r["doc_id"]), r["article"], r["candidate"], r["feedback"]["summary"]) for r in wrong]


def test_readers_read_coachlm_whole(data_dir, capsys):
    path = data_dir / "coachlm" / "expert_revisions.json"
    assert len(read_edits(path)) == 1629
    assert capsys.readouterr().err == (
        f"{path}: left out 672 of 2301 records: the expert revised the prompt too (671); "
        "the revised response is blank (1)\n")
    assert len(read_prompts(path)) == 2301 and len(read_demonstrations(path)) == 2300


def test_readers_read_qa_feedback_as_published_like_our_copy(data_dir, tmp_path):
    """Puts the 400 records back into the published shape, with a blank correction before them."""
    raw, other = ([json.loads(line) for line in (data_dir / "qa_feedback" / name).open("rb")]
                  for name in ("edits.jsonl", "candidates.jsonl"))
    published = [{
        "question": r["prompt"], "prediction 1": r["original"], "preference": r["preferences"],
        "passages": [[p["title"], f"{p['title']}\n\n{p['text']}"] for p in r["context"]],
        "feedback": {"errors": [{"error type": s["type"], **s} for s in r["spans"][::-1]],
                     "corrected-prediction": r["edited"]},
        **{f"prediction {n}": text for n, text in c["candidates"].items()}}
        for r, c in zip(raw, other, strict=True)]
    blank = published[0] | {"feedback": {"errors": [], "corrected-prediction": ""}}
    path = tmp_path / "dev_feedback.json"
    path.write_text(json.dumps([blank, *published], indent=2))
    ours = read_edits(data_dir / "qa_feedback" / "edits.jsonl")
    assert [(e.prompt, e.original, e.edited, e.context, e.spans) for e in read_edits(path)] == [
        (e.prompt, e.original, e.edited, e.context, e.spans) for e in ours]
    path.write_text(json.dumps(published))
    pairs = read_qa_feedback_pairs(path)
    assert len(pairs) == len({pair.id for pair in pairs}) == 2110
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs
