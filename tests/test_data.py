"""Records and their readers: records written by hand, every kind of bad input, real files.

Expected values are written by hand. Counts of the real data were taken with json.loads only.
"""

import json
import os
import random
import re
from pathlib import Path

import pytest

import fgrlhf.data
from fgrlhf.data.fields import UserError
from fgrlhf.data.files import read_object, write_atomic
from fgrlhf.data.readers import (
    read_annotations, read_demonstrations, read_edits, read_outputs, read_pairs, read_prompts)
from fgrlhf.data.records import (
    Annotation, Demonstration, Edit, Output, Pair, Passage, Prompt, Span, normalise_edit,
    normalise_whitespace, write_jsonl, write_outputs)
from fgrlhf.templates import render_prompt

EDIT = {"id": "e1", "prompt": "Who?", "original": "A cat sat.", "edited": "The cat sat.",
        "context": [{"title": "Cats", "text": "They sit."}],
        "spans": [{"start": 6, "end": 9, "type": "verb"}, {"start": 0, "end": 1, "type": "word"}]}
PAIR = {"id": "p1", "prompt": "Who?", "chosen": "Me.", "rejected": "You."}
OUTPUT = {"dataset": "koala", "instruction": "Say hi", "output": "hi", "generator": "m"}
JUDGED = {"instruction": "Say hi", "output_1": "hi", "output_2": "ho", "generator_1": "a",
          "generator_2": "b", "preference": 1, "annotator": "gpt", "price_per_example": 0.1}


@pytest.fixture
def lines(tmp_path):
    """lines(record, "raw line", b"raw bytes", ...) -> the path of a JSONL file."""
    def write(*records, name="data.jsonl"):
        raw = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode()
               for r in records]
        (tmp_path / name).write_bytes(b"\n".join(raw) + b"\n")
        return tmp_path / name
    return write


@pytest.fixture
def array(tmp_path):
    """array(record, ...) -> the path of a file with one JSON array."""
    def write(*records, name="data.json"):
        (tmp_path / name).write_text(json.dumps(records, indent=1), encoding="utf-8")
        return tmp_path / name
    return write


def refusal(reader, *arguments) -> str:
    """The one line with which a reader refuses."""
    with pytest.raises(UserError) as caught:
        reader(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


# ----- good input ---------------------------------------------------------------------------------

def test_read_edits_gives_every_field_and_sorts_the_spans(lines):
    [edit] = read_edits(lines(EDIT | {"input": "in", "annotator": "ann"}))
    assert edit == Edit("e1", "Who?", "A cat sat.", "The cat sat.", "in",
                        (Passage("Cats", "They sit."),),
                        (Span(0, 1, "word"), Span(6, 9, "verb")), "ann")
    assert len({edit, edit}) == 1                                      # hashable at every level


def test_read_edits_tells_unannotated_from_nothing_wrong(lines):
    plain = {key: EDIT[key] for key in ("prompt", "original", "edited")}
    first, second, third = read_edits(lines(
        plain | {"id": "1"}, plain | {"id": "2", "spans": []}, plain | {"id": "3", "spans": None}))
    assert (first.spans, second.spans, third.spans) == (None, (), None)


def test_read_edits_keeps_an_edit_that_changes_nothing_and_read_pairs_leaves_it_out(lines):
    path = lines(EDIT, EDIT | {"id": "e2", "edited": EDIT["original"]})
    assert [edit.id for edit in read_edits(path)] == ["e1", "e2"]
    assert read_pairs(path) == [Pair("e1", "Who?", chosen="The cat sat.", rejected="A cat sat.",
                                     context=(Passage("Cats", "They sit."),))]


def test_read_edits_survives_a_byte_order_mark_blank_lines_and_unicode_line_separators(lines):
    odd = "a\u2028b\u0085c"
    path = lines(b"\xef\xbb\xbf" + json.dumps(EDIT).encode() + b"\r", "", "  ",
                 json.dumps(EDIT | {"id": "e2", "edited": odd}, ensure_ascii=False))
    assert [edit.edited for edit in read_edits(path)] == ["The cat sat.", odd]


def test_read_pairs_reads_native_records(lines):
    assert read_pairs(lines(PAIR | {"input": "x", "annotator": "a"})) == [
        Pair("p1", "Who?", "Me.", "You.", "x", (), "a")]


def test_read_pairs_reads_alpaca_farm_and_skips_ties(array):
    def record(preference, first="one", **more):
        return {"instruction": "Count", "input": "", "output_1": first, "output_2": "two",
                "preference": preference, "kind": "extra"} | more
    pairs = read_pairs(array(record(1), record(2), record(0), record(None), record(1, first="two"),
                             record(1.4, input="up"), record(1.5), record(1.6, id="x")))
    assert pairs == [Pair("data.json: record 1", "Count", "one", "two"),
                     Pair("data.json: record 2", "Count", "two", "one"),
                     Pair("data.json: record 6", "Count", "one", "two", "up"),
                     Pair("x", "Count", "two", "one")]


def test_read_pairs_reads_trl_strings_and_conversations(lines):
    def talk(role, text):
        return [{"role": role, "content": text}]
    path = lines({"prompt": "p", "chosen": "c", "rejected": "r", "score_chosen": 9},
                 {"prompt": talk("user", "p"), "chosen": talk("assistant", "c"),
                  "rejected": talk("assistant", "r")})
    assert read_pairs(path) == [Pair("data.jsonl:1", "p", "c", "r"),
                                Pair("data.jsonl:2", "p", "c", "r")]


def test_read_prompts_takes_every_kind_of_record(lines):
    path = lines({"id": "a", "prompt": "P", "input": "I"}, EDIT, PAIR,
                 {"id": "d", "prompt": "P", "output": "O"}, OUTPUT, JUDGED,
                 {"instruction": "Do", "input": ""})
    assert read_prompts(path) == [
        Prompt("a", "P", "I"), Prompt("e1", "Who?", None, (Passage("Cats", "They sit."),)),
        Prompt("p1", "Who?"), Prompt("d", "P"), Prompt("data.jsonl:5", "Say hi", dataset="koala"),
        Prompt("data.jsonl:6", "Say hi"), Prompt("data.jsonl:7", "Do")]


def test_dataset_is_read_where_it_is_text_and_otherwise_ignored(lines, array):
    """Records of other people may hold anything there, as before the project knew the key."""
    good = [record | {"dataset": "koala"} for record in (
        EDIT, PAIR, {"id": "a", "prompt": "P"}, {"instruction": "Do", "input": ""},
        {"prompt": "P", "chosen": "c", "rejected": "r"})]
    assert [p.dataset for p in read_prompts(lines(*good))] == ["koala"] * 5
    assert [p.dataset for p in read_pairs(lines(*good[:2]))] == ["koala"] * 2
    talk = [{"role": "user", "content": "P"}]
    for other in (7, {"name": "koala"}, ["koala"], None, "\ud800"):
        foreign = [record | {"dataset": other} for record in (
            {"prompt": "P"}, {"id": "b", "prompt": talk}, {"instruction": "Do"}, JUDGED, EDIT)]
        assert [p.dataset for p in read_prompts(lines(*foreign))] == [None] * 5
    [output] = read_outputs(array(OUTPUT | {"dataset": 7}))
    assert output.dataset is None and output.other == (("dataset", "7"),)
    assert read_outputs(array(OUTPUT))[0].dataset == "koala"


def test_read_demonstrations_takes_the_better_response_of_every_kind(lines):
    path = lines({"id": "d", "prompt": "P", "output": "O"}, EDIT, PAIR, OUTPUT,
                 {"instruction": "Do", "input": "this", "output": "done"})
    assert read_demonstrations(path) == [
        Demonstration("d", "P", "O"),
        Demonstration("e1", "Who?", "The cat sat.", None, (Passage("Cats", "They sit."),)),
        Demonstration("p1", "Who?", "Me."), Demonstration("data.jsonl:4", "Say hi", "hi",
                                                        dataset="koala"),
        Demonstration("data.jsonl:5", "Do", "done", "this")]
    assert "data.jsonl:1: output: expected" in refusal(
        read_demonstrations, lines({"id": "a", "prompt": "P"}))


@pytest.mark.parametrize("preference, winner", [
    (1, 1), (2, 2), (1.0, 1), (1.49, 1), (1.51, 2), (1.5, None), (0, None), (None, None)])
def test_annotation_winner_is_first_below_and_second_above_one_and_a_half(
        array, preference, winner):
    [annotation] = read_annotations(array(JUDGED | {"preference": preference}))
    assert annotation == Annotation("Say hi", "hi", "ho", preference, "a", "b", "gpt")
    assert annotation.winner == winner


def test_write_outputs_gives_alpaca_eval_s_format_back(tmp_path, array):
    records = [OUTPUT | {"datasplit": "eval", "cost": {"usd": [0.1, None]}},
               {"instruction": "Dis « é »", "output": "", "generator": "m", "id": "7"}]
    outputs = read_outputs(array(*records))
    assert outputs[1] == Output("Dis « é »", "", "m", "7")
    write_outputs(tmp_path / "new" / "out.json", outputs)
    text = (tmp_path / "new" / "out.json").read_text(encoding="utf-8")
    assert json.loads(text) == records and "« é »" in text
    assert read_outputs(tmp_path / "new" / "out.json") == outputs and len(set(outputs)) == 2


def test_write_jsonl_omits_defaults_keeps_unicode_and_reads_back(tmp_path, lines):
    records = [Edit("e1", "q\n\u2028", "a é", "b", spans=()), Edit("e2", "q", "a", "b", "i",
               (Passage("", "t"),), (Span(0, 1, "x"),), "me")]
    write_jsonl(tmp_path / "out.jsonl", records)
    first, second = (tmp_path / "out.jsonl").read_bytes().decode("utf-8").strip().split("\n")
    assert first == ('{"id": "e1", "prompt": "q\\n\u2028", "original": "a é", "edited": "b", '
                     '"spans": []}')
    assert json.loads(second)["spans"] == [{"start": 0, "end": 1, "type": "x"}]
    assert read_edits(tmp_path / "out.jsonl") == records


# ----- bad input: file, line, field, expected, got ------------------------------------------------

@pytest.mark.parametrize("change, expected", [
    ({"edited": ""}, "edited: expected a string that is not blank, got ''"),
    ({"original": " \n"}, "original: expected a string that is not blank, got ' \\n'"),
    ({"prompt": 3}, "prompt: expected a string that is not blank, got 3"),
    ({"prompt": None}, "prompt: expected a string that is not blank, got None"),
    ({"id": 7.5}, "id: expected a string that is not blank, or an integer, got 7.5"),
    ({"input": ["x"]}, "input: expected a string, got ['x']"),
    ({"edited": "\ud800"}, "edited: expected a string that is not blank, got '\\ud800'"),
    ({"context": {"title": "t"}}, "context: expected a list, got {'title': 't'}"),
    ({"context": ["t"]}, "context[0]: expected an object, got 't'"),
    ({"context": [{"title": "t"}]}, "context[0].text: expected this field, got only ['title']"),
    ({"spans": [{"start": 0.0, "end": 1, "type": "x"}]}, "spans[0].start: expected an integer"),
    ({"spans": [{"start": 0, "end": 1, "type": ""}]}, "spans[0].type: expected a string that is"),
    ({"spans": [{"start": False, "end": 1, "type": "x"}]}, "spans[0].start: expected an integer"),
    ({"spans": [{"start": 0, "end": 11, "type": "x"}]},
     "spans[0]: expected 0 <= start < end <= 10, the length of original, got [0, 11]"),
    ({"spans": [{"start": 2, "end": 2, "type": "x"}]}, "spans[0]: expected 0 <= start < end <= 10"),
    ({"spans": [{"start": -1, "end": 2, "type": "x"}]}, "spans[0]: expected 0 <= start < end"),
    ({"spams": []}, "'spams': unknown field, expected one of id, prompt, original, edited, input"),
])
def test_read_edits_refuses_a_bad_field_naming_file_line_and_field(lines, change, expected):
    path = lines(EDIT, EDIT | {"id": "e2"} | change)
    assert f"{path}:2: {expected}" in refusal(read_edits, path)


def test_read_edits_refuses_a_missing_field(lines):
    path = lines(EDIT, {"id": "e2", "prompt": "p", "original": "o"})
    assert f"{path}:2: edited: expected this field" in refusal(read_edits, path)


def test_read_edits_refuses_a_second_record_with_the_same_id(lines):
    path = lines(EDIT, EDIT | {"id": "e2"}, EDIT)
    assert f"{path}:3: id: expected a new id, got 'e1' as in {path}:1" in refusal(read_edits, path)


@pytest.mark.parametrize("line, expected", [
    ('{"id": "e2", "prompt" "p"}', "got broken JSON at column 23"),
    ("{", "got broken JSON at column 2"),
    (b'{"id": "\xff"}', "expected UTF-8, got 0xff as byte 9 of the line"),
    ("[" * 100_000, "expected JSON, got a value that cannot be read"),
    ('{"id": NaN}', "NaN is not a JSON number"),
    ('{"id": ' + "9" * 5000 + "}", "expected JSON, got a value that cannot be read"),
    ("7", "record: expected an object, got 7"),
    ("null", "record: expected an object, got None"),
])
def test_read_edits_refuses_a_line_that_is_not_a_record(lines, line, expected):
    path = lines(EDIT, "", line)
    message = refusal(read_edits, path)
    assert message.startswith(f"{path}:3: ") and expected in message


def test_readers_refuse_a_broken_array_by_line_and_a_bad_element_by_number(tmp_path, array):
    path = tmp_path / "broken.json"
    path.write_text('[\n {"instruction": "a",\n  "output" "b"}\n]')
    message = refusal(read_outputs, path)
    assert f"{path}:3: record 1: expected a JSON value, got broken JSON at column 12" in message
    path.write_bytes(b'[\n "\xff"]')
    assert f"{path}:2: record 1: expected UTF-8, got 0xff as byte 3 of" in refusal(
        read_outputs, path)
    path = array(OUTPUT, {"instruction": "a", "output": 1, "generator": "m"})
    assert f"{path}: record 2: output: expected a string, got 1" in refusal(read_outputs, path)
    for preference in (3, 0.5, -1, 10**400):
        path = array(JUDGED, JUDGED | {"preference": preference})
        assert f"{path}: record 2: preference: expected 1 to 2, 0 or null, got " in (
            refusal(read_annotations, path))
    path = array({key: JUDGED[key] for key in JUDGED if key != "preference"})
    assert "record 1: preference: expected this field" in refusal(read_pairs, path)
    path = array(JUDGED | {"output_2": ""})
    assert "record 1: output_2: expected a string that is not blank" in refusal(read_pairs, path)


def test_read_pairs_refuses_a_record_that_is_not_a_pair(lines):
    path = lines(PAIR, {"id": "x", "prompt": "p"})
    assert f"{path}:2: expected a pair" in refusal(read_pairs, path)
    path = lines(PAIR | {"chosn": "x"})
    assert f"{path}:1: 'chosn': unknown field" in refusal(read_pairs, path)
    path = lines({"prompt": "p", "chosen": "c"})
    assert f"{path}:1: rejected: expected" in refusal(read_pairs, path)


READERS = [read_edits, read_pairs, read_prompts, read_demonstrations, read_outputs,
           read_annotations]


@pytest.mark.parametrize("reader", READERS)
def test_readers_refuse_a_missing_file_a_folder_and_a_file_without_records(reader, tmp_path):
    assert f"{tmp_path}: expected a file, got a folder" in refusal(reader, tmp_path)
    assert f"{tmp_path / 'no'}: expected a file, got nothing" in refusal(reader, tmp_path / "no")
    for content in ("", "\n \n", "[]"):
        (tmp_path / "empty").write_text(content)
        assert f"{tmp_path / 'empty'}: expected at least one usable record, got none in 0" in (
            refusal(reader, tmp_path / "empty"))


def test_read_pairs_refuses_a_file_of_ties(array):
    assert "got none in 1" in refusal(read_pairs, array(JUDGED | {"preference": 1.5}))


def test_readers_leave_bad_records_out_when_told_to_skip_and_say_so(lines, capsys):
    bad = [EDIT | {"id": f"bad{i}", "edited": ""} for i in range(4)]
    path = lines(EDIT, "{", *bad, EDIT, EDIT | {"id": "e2"})
    assert [edit.id for edit in read_edits(path, "skip")] == ["e1", "e2"]
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[0] == f"{path}: left out 6 bad records of 8:"
    assert [line.split(": ")[0] for line in err.splitlines()[1:]] == [
        f"  {path}:{n}" for n in range(2, 8)]
    assert "got none in 4" in refusal(read_edits, lines(*bad), "skip")
    with pytest.raises(ValueError, match='on_bad_record: expected "stop" or "skip"'):
        read_edits(path, "ignore")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff", b"[" * 100_000])
def test_read_object_refuses_anything_but_one_object(content, tmp_path):
    (tmp_path / "one.json").write_bytes(b'{"a": 1}')
    assert read_object(tmp_path / "one.json") == {"a": 1}
    (tmp_path / "one.json").write_bytes(content)
    assert f"{tmp_path / 'one.json'}: expected one JSON object, got" in refusal(
        read_object, tmp_path / "one.json")


@pytest.mark.parametrize("depth", range(880, 1000, 7))
def test_read_outputs_survives_any_depth_of_nesting(tmp_path, depth):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"instruction": "a", "output": "b", "generator": "c", "x": '
                    + "[" * depth + "]" * depth + "}")
    try:
        read_outputs(path)
    except UserError as error:
        assert str(error).startswith(f"{path}:1: ")


# ----- writing, completely or not at all ----------------------------------------------------------

def test_write_atomic_keeps_the_old_file_and_leaves_nothing_when_the_writer_fails(tmp_path):
    path = tmp_path / "model.pt"
    write_atomic(path, b"old")

    def half(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, half)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_write_atomic_follows_a_link_and_makes_missing_folders(tmp_path):
    write_atomic(tmp_path / "a" / "b" / "file", b"1")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b" / "file")
    write_atomic(tmp_path / "link", b"2")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a/b/file").read_bytes() == b"2"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_write_atomic_keeps_the_permissions_of_a_file_that_it_replaces(tmp_path):
    write_atomic(tmp_path / "file", b"1")
    (tmp_path / "file").chmod(0o600)
    write_atomic(tmp_path / "file", b"2")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_write_atomic_refuses_a_folder_a_device_and_a_file_used_as_a_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, "/dev/null"):
        assert f"{path}: expected a file or a free name" in refusal(write_atomic, path, b"")
    assert "cannot be written" in refusal(write_atomic, tmp_path / "file" / "x", b"")


# ----- texts --------------------------------------------------------------------------------------

def test_normalise_whitespace_moves_spans_with_their_characters():
    #       0123456789012345
    text = "  a cat\n\n sat .  "
    spans = [Span(2, 3, "a"), Span(0, 7, "lead"), Span(4, 13, "cat..sat"), Span(7, 8, "blank"),
             Span(8, 10, "dropped"), Span(8, 11, "s"), Span(0, 2, "outer"), Span(15, 17, "outer"),
             Span(14, 17, "dot")]
    result, moved = normalise_whitespace(text, spans)
    assert result == "a cat sat ."
    assert [(span.type, result[span.start:span.end]) for span in moved] == [
        ("a", "a"), ("lead", "a cat"), ("cat..sat", "cat sat"), ("blank", " "), ("s", "s"),
        ("dot", ".")]


def test_normalise_whitespace_agrees_with_split_and_keeps_every_character_when_random():
    random.seed(1)
    for _ in range(500):
        text = "".join(random.choices("ab \n\t\u00a0é", k=random.randint(0, 12)))
        spans = [Span(i, j, "") for i in range(len(text)) for j in range(i + 1, len(text) + 1)]
        for span in spans:
            result, moved = normalise_whitespace(text, [span])
            assert result == " ".join(text.split())
            inside = [result[new.start:new.end] for new in moved] or [""]
            assert inside[0].split() == text[span.start:span.end].split()
    assert normalise_whitespace("") == ("", ()) and normalise_whitespace(" \n") == ("", ())


def test_normalise_edit_keeps_none_and_empty_spans_apart():
    edit = Edit("e", "q", " a  b", "a\nb ", spans=(Span(1, 5, "x"),))
    assert normalise_edit(edit) == Edit("e", "q", "a b", "a b", spans=(Span(0, 3, "x"),))
    assert normalise_edit(Edit("e", "q", "a", "b")).spans is None
    assert normalise_edit(Edit("e", "q", "a", "b", spans=())).spans == ()


def test_render_prompt_gives_the_templates():
    plain = Prompt("1", "Add.")
    full = Prompt("2", "Add.", "1 2", (Passage("T", "x."), Passage("U", "y.")))
    assert render_prompt(plain, "alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:")
    assert render_prompt(full, "alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Add.\n\n### Input:\n1 2\n\n### Response:")
    assert render_prompt(full, "qa") == "T: x.\n\nU: y.\n\n### Question:\nAdd.\n\n### Response:"
    assert render_prompt(plain, "plain") == "Add. ->"
    assert render_prompt(full, "plain") == "Add.\n1 2 ->"
    for template in ("alpaca", "qa", "plain"):    # an empty input is no input
        assert render_prompt(Prompt("1", "Add.", ""), template) == render_prompt(plain, template)
        assert not render_prompt(full, template)[-1].isspace()
    assert "expected one of alpaca, qa, plain, chatml, " in refusal(render_prompt, plain, "chat")


# ----- the documentation --------------------------------------------------------------------------

def test_readme_example_lines_are_read_by_the_readers_it_names(lines):
    text = (Path(fgrlhf.data.__path__[0]) / "README.md").read_text()
    rows = re.findall(r"^\| (.*?) \|.*\| `(\{.*\})` \|$", text, re.M)
    rows = [row for row in rows if row[0] != "token scores"]        # read with their records
    reader = {"edit": read_edits, "pair": read_pairs, "prompt": read_prompts,
              "demonstration": read_demonstrations, "output": read_outputs}
    assert {name.split(",")[0] for name, _ in rows} == reader.keys()
    for name, line in rows:
        assert len(reader[name.split(",")[0]](lines(line))) == 1
        assert read_prompts(lines(line))[0].prompt == "Capital of France?"


# ----- real data ----------------------------------------------------------------------------------

def test_readers_read_qa_feedback_whole(data_dir, tmp_path):
    path = data_dir / "qa_feedback" / "edits.jsonl"
    edits = read_edits(path)
    assert len(edits) == len(set(edits)) == 400
    assert len(read_prompts(path)) == len(read_demonstrations(path)) == 400
    assert sum(edit.edited == edit.original for edit in edits) == 5 and len(read_pairs(path)) == 395
    assert sum(len(edit.spans) for edit in edits) == 1103
    assert edits[0].spans[0] == Span(152, 282, "Irrelevant")
    write_jsonl(tmp_path / "copy.jsonl", edits)
    assert read_edits(tmp_path / "copy.jsonl") == edits


def test_normalise_edit_normalises_173_of_the_real_corrections(data_dir):
    edits = read_edits(data_dir / "qa_feedback" / "edits.jsonl")
    clean = [normalise_edit(edit) for edit in edits]
    assert sum(new.edited != old.edited for new, old in zip(clean, edits)) == 173
    assert [new.spans for new in clean] == [old.spans for old in edits]    # the originals are clean


def test_readers_read_alpaca_eval_whole(data_dir, tmp_path):
    folder = data_dir / "alpaca_eval"
    for name, generator in (("davinci003.json", "text_davinci_003"),
                            ("ppo_human.json", "alpaca-farm-ppo-human")):
        path = folder / name
        outputs = read_outputs(path)
        assert len(outputs) == len(read_prompts(path)) == len(read_demonstrations(path)) == 100
        assert {output.generator for output in outputs} == {generator}
        write_outputs(tmp_path / "copy.json", outputs)
        assert json.loads((tmp_path / "copy.json").read_bytes()) == json.loads(path.read_bytes())
    winners = [a.winner for a in read_annotations(folder / "gpt4_annotations.json")]
    assert [winners.count(w) for w in (1, 2, None)] == [58, 41, 1]
    pairs = read_pairs(folder / "gpt4_annotations.json")
    assert len(pairs) == 99 and pairs[0].id == "gpt4_annotations.json: record 1"
